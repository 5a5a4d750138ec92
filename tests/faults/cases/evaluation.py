"""Rows 13 and 14: the evaluator is slow, or crashes."""

from __future__ import annotations

from tests.faults.inject import Fault
from tests.faults.lab import EVALUATED, INTERVAL, TIMEOUT, Lab
from tests.faults.registry import case


@case(13, "evaluator slower than the timeout", "2.5 x 4 ranks", code=0, factor=2.5, ranks=4)
@case(13, "evaluator slower than the timeout", "10 x", code=0, factor=10, ranks=2, timeout=2)
def slow(lab: Lab, code: int, factor: float, ranks: int, timeout: int = TIMEOUT) -> None:
    """Nobody fails: ranks wait for each other by heartbeat, not in a collective."""
    words = (*EVALUATED, f"peers={ranks}", f"comm.timeout={timeout}")
    end = lab.run([Fault("sleep", "eval", rank=0, at=0, seconds=factor * timeout)], *words, ranks=ranks)
    lab.expect_end(end, code, timed=False)
    lab.expect(lab.hashes() == lab.reference(*words), "other weights than the undisturbed run")


@case(14, "evaluator crashes", "rank 1", code=13, bound=3, rank=1, phase="eval")
@case(14, "evaluator crashes", "rank 0 loading", code=13, bound=3, rank=0, phase="models")
def crashed(lab: Lab, code: int, rank: int, phase: str) -> None:
    """All ranks print the same; the checkpoint of that epoch is there, and the restart evaluates it."""
    end = lab.run([Fault("raise", phase, rank=rank, at=0)], *EVALUATED)
    evaluated = f"step_{INTERVAL:08d}"
    lab.expect_end(end, code, names=f"rank {rank}", says=["the cat sat on the cable", evaluated], survivors=[0, 1])
    lab.expect((end.folder / "checkpoints" / evaluated / "manifest.json").exists(), "the state was not saved")
    lab.expect_resumed(*EVALUATED)
    lab.expect((end.folder / "eval" / f"validation_{evaluated}.json").exists(), "the evaluation is still missing")
