"""Processes: what they do with the memory that they free."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_serves_the_next_arrays_unless_somebody_set_the_allocator_up(
        environment: dict[str, str], kept: bool) -> None:
    code = """if True:
        import resource, numpy
        from mat_dist.distributed.processes import keep_freed_memory
        keep_freed_memory()
        def work():
            arrays = [numpy.ones(500_000) for _ in range(4)]  # 4 MB each
        work()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            work()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    clean = {name: text for name, text in os.environ.items()
             if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    found = subprocess.run([sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True,
                           check=True)
    assert (int(found.stdout) < 1000) == kept  # of 20 * 4 * 977 pages
