"""What a machine with one GPU can show of several ranks: NCCL beside CUDA graphs, and ranks that share the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mat_dist.tools.check.machine import free_port
from tests.e2e.nccl_rank import CLAIMS, DESTROY, PATIENCE
from tests.e2e.test_train_torchrun import run_to_end, torchrun
from tests.faults.inject import Fault
from tests.small_runs import SMALL, Finished

pytestmark = [pytest.mark.gpu, pytest.mark.alone]
DEVICE, BACKEND = "cuda", "nccl"
# Along an l2 gradient, in fp64: sums in another order stay rounding, which the sign of a gradient would amplify.
TINY = (f"run.device={DEVICE}", "train.max_steps=2", "attack.norm=l2", "attack.eps=0.5", "attack.steps=2",
        "step.precision=fp64", "loss=mat", "optim.ema_decay=null", "checkpoint.every_steps=null")
ONE_PROCESS = [sys.executable]
LAUNCHES = {  # launcher, what differs from TINY
    "two peers": (ONE_PROCESS, ("peers=2",)),
    "two peers on two ranks": (torchrun(2), ("peers=2", "comm.backend=gloo")),
    "one peer": (ONE_PROCESS, ("peers=1", "loss=at")),
    "one peer with two replicas": (torchrun(2), ("peers=1", "loss=at", "comm.backend=gloo")),
    "deterministic": (ONE_PROCESS, ("peers=2", "run.deterministic=true", "step.precision=fp32")),
    "deterministic again": (ONE_PROCESS, ("peers=2", "run.deterministic=true", "step.precision=fp32"))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """All launches side by side, since most of their time is the import of torch."""
    root = tmp_path_factory.mktemp("gpu")
    with ThreadPoolExecutor(len(LAUNCHES)) as pool:
        found = {name: pool.submit(run_to_end, launcher, root, name.replace(" ", "-"), *TINY, *overrides)
                 for name, (launcher, overrides) in LAUNCHES.items()}
        return {name: one.result() for name, one in found.items()}


def distance(one: Finished, other: Finished) -> float:
    """Largest difference between the weights and buffers of two runs."""
    assert (one.code, other.code) == (0, 0) and one.steps()[-1] == other.steps()[-1] == 2
    return max((here[key].double() - there[key].double()).abs().max().item()
               for a, b in zip(one.peers(), other.peers(), strict=True)
               for here, there in [(a["model"], b["model"])] for key in here)


@pytest.mark.parametrize(("ranks", "process"), [("two peers on two ranks", "two peers"),
                                                ("one peer with two replicas", "one peer")])
def test_ranks_that_share_a_gpu_over_gloo_train_what_one_process_does(ranks: str, process: str,
                                                                      runs: dict[str, Finished]) -> None:
    assert distance(runs[ranks], runs[process]) < 1e-9


def test_deterministic_runs_on_a_gpu_have_equal_bits(runs: dict[str, Finished]) -> None:
    one, other = runs["deterministic"], runs["deterministic again"]
    assert distance(one, other) == 0 and one.hashes() == other.hashes()


def over_nccl() -> dict[str, str]:
    """The surroundings of each of two ranks that share the GPU."""
    version = torch.cuda.nccl.version()[:2]
    if version < (2, 30):
        pytest.skip(f"NCCL {version[0]}.{version[1]} refuses two ranks on one GPU, 2.30 is the first that does not")
    return {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()), "NCCL_MULTI_RANK_GPU_ENABLE": "1", "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo"}


def test_ranks_that_share_a_gpu_over_nccl_train_what_one_process_does(runs: dict[str, Finished],
                                                                      tmp_path: Path) -> None:
    variables = over_nccl()
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(run_to_end, ONE_PROCESS, tmp_path, "nccl", *TINY, "peers=2", f"comm.backend={BACKEND}",
                             **variables, RANK=str(rank)) for rank in range(2)]
        ended = [one.result() for one in ranks]
    assert [one.code for one in ended] == [0, 0]
    assert distance(ended[0], runs["two peers"]) < 1e-9


@pytest.mark.parametrize(("kind", "code", "says"), [("raise", 13, "the cat sat on the cable"),
                                                    ("stop", 14, "rank 1 (peer 1) stopped answering")])
def test_ranks_over_nccl_end_soon_after_an_error_with_its_line(kind: str, code: int, says: str, tmp_path: Path) -> None:
    variables, mark = over_nccl(), tmp_path / "mark"
    faults = json.dumps([Fault(kind, at=1, mark=str(mark)).dump()])
    words = [*SMALL, *TINY, "peers=2", "train.max_steps=3", f"comm.backend={BACKEND}", "comm.timeout=5",
             f"run.root={tmp_path}", "run.name=nccl"]
    ranks = [subprocess.Popen([sys.executable, "-m", "tests.faults.victim", faults, *words], text=True,
                              cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                              env={**os.environ, **variables, "RANK": str(rank)}) for rank in range(2)]
    told = [rank.communicate(timeout=120)[1] for rank in ranks]
    seconds = time.monotonic() - json.loads(mark.read_text())["time"]
    assert ranks[0].returncode == code and says in told[0]
    assert json.loads((tmp_path / "nccl" / "exit.json").read_text())["code"] == code
    assert seconds < (5 if kind == "raise" else 20)


@pytest.fixture(scope="module")
def nccl_rank() -> tuple[dict[str, str], str]:
    """How each claim about the one rank of an NCCL group ended, "" is well; and what the process said."""
    done = subprocess.run([sys.executable, "-m", "tests.e2e.nccl_rank"], cwd=Path(__file__).parents[2],
                          capture_output=True, text=True, timeout=2 * PATIENCE)
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")), done.stderr


@pytest.mark.parametrize("claim", [*CLAIMS, DESTROY])
def test_one_rank_over_nccl(claim: str, nccl_rank: tuple[dict[str, str], str]) -> None:
    ended, said = nccl_rank
    assert ended.get(claim, f"its process ended before: {said}") == ""
