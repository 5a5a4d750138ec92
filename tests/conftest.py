"""Settings of every test run: one CPU thread, time limits and markers by folder, no clock in property tests."""

from __future__ import annotations

import os

# Before the first import of torch, and for the processes that tests start: with several ranks on few cores, more
# threads than cores make a collective ten times slower, and sums over threads differ in the last bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("mat_dist", deadline=None)
settings.load_profile("mat_dist")

# folder: markers of its tests, seconds a test may take (a test's own timeout marker wins)
FOLDERS = {
    "e2e": (("e2e", "slow"), 300),
    "commands": (("slow",), 300),
    "faults": (("slow",), 300),
    "cluster": (("cluster", "slow", "alone"), 600),
}


def _cuda_is_missing() -> bool:
    import torch

    return not torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = next((parent.name for parent in item.path.parents if parent.name in FOLDERS), "")
        markers, seconds = FOLDERS.get(folder, ((), None))
        for name in markers:
            item.add_marker(name)
        if seconds is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(seconds))
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and _cuda_is_missing():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
