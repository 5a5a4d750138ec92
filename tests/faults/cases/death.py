"""Rows 1 to 9 and 43: a rank dies, leaves, fails, runs out of memory, hangs, is slow, or cannot close its groups."""

from __future__ import annotations

import json

from tests.faults.inject import Fault
from tests.faults.lab import INTERVAL, TIMEOUT, Lab
from tests.faults.registry import case

AT = INTERVAL + 2  # the step of the fault: after the first checkpoint, within an epoch
SILENT = 14


@case(1, "kill -9 of a rank", "rank 0", code=SILENT, bound=5, rank=0, ranks=4)
@case(1, "kill -9 of a rank", "rank 1", code=SILENT, bound=5, rank=1, ranks=4)
@case(1, "kill -9 of a rank", "rank 2", code=SILENT, bound=5, rank=2, ranks=4)
@case(1, "kill -9 of a rank", "rank 3", code=SILENT, bound=5, rank=3, ranks=4)
@case(1, "kill -9 of a rank", "2 ranks", code=SILENT, bound=5, rank=1, ranks=2, ci=True)
def killed(lab: Lab, code: int, rank: int, ranks: int) -> None:
    """Survivors name the rank; the restart goes on from the newest checkpoint, here on one rank."""
    peers = f"peers={ranks}"
    end = lab.run([Fault("kill", rank=rank, at=AT)], peers, ranks=ranks, torchrun=True)
    lab.expect_end(end, code, names=f"rank {rank} (peer {rank})", survivors=set(range(ranks)) - {rank})
    lab.expect_lost(end)
    lab.expect_resumed(peers)


@case(1, "kill -9 of a rank", "--max-restarts", code=0)
def restarted(lab: Lab, code: int) -> None:
    """torchrun's own restart continues by itself and completes the run."""
    end = lab.run([Fault("kill", rank=1, at=AT, attempt=0)], torchrun=True, restarts=1)
    lab.expect_end(end, code, timed=False)
    lab.expect(f"continuing after step {INTERVAL}" in end.text, "the restart did not continue from the checkpoint")
    codes = [one["code"] for one in json.loads((end.folder / "exit.json").read_text())["attempts"]]
    lab.expect(codes == [SILENT, 0], f"codes of the attempts: {codes}")
    lab.expect(lab.hashes() == lab.reference(), "other weights than the undisturbed run")


@case(2, "Python exception in a step", "attack", code=13, bound=3, phase="attack", torchrun=True)
@case(2, "Python exception in a step", "forward", code=13, bound=3, phase="forward", rank=0, ci=True)
@case(2, "Python exception in a step", "backward", code=13, bound=3, phase="backward")
@case(2, "Python exception in a step", "loss", code=13, bound=3, phase="loss")
@case(2, "Python exception in a step", "batch", code=13, bound=3, phase="batch")
@case(2, "Python exception in a step", "update", code=13, bound=3, phase="update")
def raised(lab: Lab, code: int, phase: str, rank: int = 1, torchrun: bool = False) -> None:
    """All ranks print peer, step, phase and the original text, word for word the same."""
    end = lab.run([Fault("raise", phase, rank=rank, at=AT)], torchrun=torchrun)
    said = ["the cat sat on the cable", f"step {AT}", f"peer {rank}"]
    lab.expect_end(end, code, names=f"rank {rank}", says=said, survivors=[0, 1])
    lab.expect_lost(end)


@case(3, "out of memory", "attack once", code=0, phase="craft")
def short_of_memory_once(lab: Lab, code: int, phase: str) -> None:
    """The batch is split once and the run goes on; the weights agree with those of the undisturbed run."""
    end = lab.run([Fault("oom", phase, at=AT)])
    lab.expect_end(end, code, timed=False)
    if end.code == 0:
        lab.expect(lab.hashes() == lab.reference(), "other weights than the undisturbed run")


@case(3, "out of memory", "attack always", code=13, bound=3, phase="craft")
@case(3, "out of memory", "forward always", code=13, bound=3, phase="forward")
@case(3, "out of memory", "backward always", code=13, bound=3, phase="loss")
def short_of_memory(lab: Lab, code: int, phase: str) -> None:
    """As an exception, with advice."""
    end = lab.run([Fault("oom", phase, times=None)])
    lab.expect_end(end, code, names="rank 1", says=["memory", "train.batch_size", "peer 1"], survivors=[0, 1])


@case(4, "a rank leaves in the middle", "sys.exit(0)", code=SILENT, bound=5, kind="exit", torchrun=True)
@case(4, "a rank leaves in the middle", "os._exit(0)", code=SILENT, bound=5, kind="hard exit", torchrun=True)
@case(4, "a rank leaves in the middle", "sys.exit(0) rank 0", code=SILENT, bound=5, kind="exit", rank=0)
@case(4, "a rank leaves in the middle", "os._exit(0) rank 0", code=SILENT, bound=5, kind="hard exit", rank=0)
@case(4, "a rank leaves in the middle", "sys.exit(0) while saving", code=SILENT, bound=5, kind="exit", phase="save",
      at=1)
def left(lab: Lab, code: int, kind: str, rank: int = 1, torchrun: bool = False, phase: str = "attack",
         at: int = AT) -> None:
    """The others name the one that left, though its own exit code was 0."""
    end = lab.run([Fault(kind, phase, rank=rank, at=at)], torchrun=torchrun)
    lab.expect_end(end, code, names=f"rank {rank} (peer {rank})", survivors=[1 - rank])
    lab.expect_lost(end)
    lab.expect_resumed()


@case(5, "native crash", "SIGSEGV", code=SILENT, bound=5, kind="segv", torchrun=True)
@case(5, "native crash", "SIGABRT", code=SILENT, bound=5, kind="abort", torchrun=True)
def crashed(lab: Lab, code: int, kind: str, torchrun: bool) -> None:
    """As kill -9; the launcher's report names the signal."""
    end = lab.run([Fault(kind, rank=1, at=AT)], torchrun=torchrun)
    lab.expect_end(end, code, names="rank 1 (peer 1)", survivors=[0])
    lab.expect({"segv": "SIGSEGV", "abort": "SIGABRT"}[kind] in end.text, "the signal is not named")
    lab.expect_lost(end)


@case(6, "SIGSTOP of a rank", "4 ranks", code=SILENT, bound=TIMEOUT + 10, rank=2, ranks=4, torchrun=True)
@case(6, "SIGSTOP of a rank", "rank 0", code=SILENT, bound=TIMEOUT + 10, rank=0, ranks=2, ci=True)
def stopped(lab: Lab, code: int, rank: int, ranks: int, torchrun: bool = False) -> None:
    """Named with the place where it was last seen; the survivors end the stopped process."""
    peers = f"peers={ranks}"
    end = lab.run([Fault("stop", rank=rank, at=AT)], peers, ranks=ranks, torchrun=torchrun)
    lab.expect_end(end, code, names=f"rank {rank} (peer {rank})", says=["step 7, AEs", "last seen at "],
                   survivors=set(range(ranks)) - {rank})
    lab.expect("last seen at start" not in end.text, "the exchanges of steps 1 to 6 are forgotten")
    lab.expect_lost(end)
    lab.expect_resumed(peers)


@case(7, "straggler within the timeout", code=0)
def straggled(lab: Lab, code: int) -> None:
    """No failure; the share of waiting is recorded, and one warning names the slow rank."""
    end = lab.run([Fault("sleep", times=None, seconds=0.15)], "log.every=1")
    lab.expect_end(end, code, timed=False)
    steps = [json.loads(line) for line in (end.folder / "metrics.jsonl").read_text().splitlines()]
    shares = [one["wait_share"] for one in steps if one.get("wait_share")]
    lab.expect(bool(shares) and shares[-1][0] > shares[-1][1], f"wait_share in metrics.jsonl: {shares[-1:]}")
    warnings = [line for line in end.text.splitlines() if "warning" in line and "slow" in line]
    lab.expect(len(warnings) == 1 and "rank 1" in warnings[0], f"warnings: {warnings}")
    lab.expect(lab.hashes() == lab.reference("log.every=1"), "other weights than the undisturbed run")


@case(8, "straggler beyond the timeout", code=SILENT, bound=TIMEOUT + 10)
def too_slow(lab: Lab, code: int) -> None:
    """Named, stopped, with the hint to raise comm.timeout."""
    end = lab.run([Fault("sleep", at=AT, seconds=120)])
    lab.expect_end(end, code, names="rank 1 (peer 1)", says=["comm.timeout"], survivors=[0])
    lab.expect_lost(end)


@case(9, "a thread holds the interpreter's lock", code=SILENT, bound=TIMEOUT + 10)
def held(lab: Lab, code: int) -> None:
    """No heartbeat comes out: as SIGSTOP."""
    end = lab.run([Fault("gil", at=AT, seconds=120)])
    lab.expect_end(end, code, names="rank 1 (peer 1)", survivors=[0])
    lab.expect_lost(end)


@case(43, "process groups that cannot be closed", "after an error", code=13, bound=5, at=AT, ci=True)
@case(43, "process groups that cannot be closed", "at the end of a run", code=0, bound=10, at=None)
@case(43, "process groups that cannot be closed", "an error at the end", code=0, bound=10, at=None, text="NCCL error")
def stuck(lab: Lab, code: int, at: int | None, text: str = "") -> None:
    """Neither the line on the screen nor the end of the ranks waits for them, and a finished run has not failed."""
    failure = [] if at is None else [Fault("raise", at=at)]
    end = lab.run([Fault("stuck groups", rank=None, text=text), *failure])
    lab.expect_end(end, code, names="the cat sat on the cable" if code else "", survivors=[0, 1] if code else None)
    lab.expect(set(end.codes.values()) == {code}, f"codes of the ranks: {end.codes}")
    lab.expect("NCCL error" not in end.text, "a group that could not be closed is told as an error")
    lab.expect(code > 0 or "next: python -m mat_dist.evaluate" in end.text, "the end of the run is not told")
