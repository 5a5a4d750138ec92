"""A SLURM cluster for the session, the hashes of the undisturbed run, and two hosts with a cable."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from mat_dist.runs.folder import RunFolder
from tests.cluster.hosts import TwoHosts
from tests.cluster.runs import ROOT, start_reference
from tests.cluster.slurm import LAB, LACKS, Slurm
from tests.small_runs import Finished


def _needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture(scope="session")
def lab() -> Iterator[Path]:
    """A folder with a running SLURM of two nodes. Skips where there cannot be one."""
    _needs_root()
    if not entry_points(group="torchrun.handlers", name="mat_dist_local"):
        pytest.skip("mat_dist is not installed (pip install -e .): launch/slurm.sbatch needs its rendezvous")
    # Not below pytest's folder, which only its owner may enter: munge checks the whole path.
    folder = Path(tempfile.mkdtemp(prefix="slurm_lab."))
    up = ["bash", str(LAB), "up", str(folder), str(os.getpid())]
    done = subprocess.run(up, cwd=ROOT, capture_output=True, text=True, timeout=300)
    try:
        if done.returncode == LACKS:
            pytest.skip(done.stderr.strip().splitlines()[-1])
        assert done.returncode == 0, done.stderr
        yield folder
    finally:
        subprocess.run(["bash", str(LAB), "down", str(folder)], cwd=ROOT, check=True, timeout=120)
        assert str(folder) not in Path("/etc/hosts").read_text()
        shutil.rmtree(folder)


@pytest.fixture
def slurm(lab: Path, tmp_path: Path) -> Iterator[Slurm]:
    """The cluster, for jobs that write below tmp_path; those left at the end are cancelled."""
    cluster = Slurm(lab, tmp_path)
    yield cluster
    cluster.cancel_all()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Hashes of all peers' states after the run in one process that nobody disturbed."""
    root = tmp_path_factory.mktemp("reference")
    process = start_reference(root)
    try:
        assert process.wait(timeout=300) == 0, (root / "reference.log").read_text()
    finally:
        if process.poll() is None:
            process.kill()
    yield Finished(0, RunFolder(root / "reference")).hashes()


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    """Two network namespaces. Skips where they cannot be made."""
    _needs_root()
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (iproute2, util-linux)")
    try:
        hosts = TwoHosts(tmp_path).__enter__()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        yield hosts
    finally:
        hosts.__exit__()
