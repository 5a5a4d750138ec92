"""The small run of the cluster tests: 30 steps of four peers on 200 digits, each step as slow as the test needs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 30
TIMEOUT = 10  # comm.timeout, seconds
PATIENCE = 180  # seconds that something may take on a busy machine before a test gives up
SETTINGS = (
    "--plugin", str(Path(__file__).with_name("slow_net.py")), "model=slow_net", "model.width=0.25", "run.device=cpu",
    "log.console=plain", "log.every=1", "attack.steps=2", "data.train_size=200", "data.val_size=40",
    "data.test_size=40", "train.batch_size=32", "train.epochs=100", f"train.max_steps={STEPS}",
    "checkpoint.every_steps=5", "eval.every=0", "eval.test_steps=0", "eval.chunk=20",
    f"comm.timeout={TIMEOUT}")


def environment(pause: float = 0.0, **variables: str) -> dict[str, str]:
    """The variables of a launch: this Python first on PATH, no other launcher's variables; `pause` slows the steps."""
    other = ("SLURM_", "SBATCH_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(other)}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix,
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PAUSE": str(pause), **variables}


def start_reference(root: Path) -> subprocess.Popen[bytes]:
    """The same run in one process, undisturbed, without pauses."""
    with (root / "reference.log").open("wb") as log:
        command = [sys.executable, "-m", "mat_dist.train", *SETTINGS, f"run.root={root}", "run.name=reference"]
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def wait_until(true: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Poll until `true()`; fails, naming `what`, when it takes too long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.2)


def steps_done(folder: Path) -> int:
    """Steps in metrics.jsonl, those done twice counted twice."""
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def failed_at(log: Path) -> float:
    """When the first error of a rank's log was written, seconds since 1970."""
    line = next(line for line in log.read_text().splitlines() if " ERROR " in line)
    return datetime.strptime(line.split()[0], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp()
