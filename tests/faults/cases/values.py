"""Rows 15 to 18: other data on one rank, values that are not finite, a loss out of proportion."""

from __future__ import annotations

import json

from tests.faults.inject import Fault
from tests.faults.lab import INTERVAL, Lab
from tests.faults.registry import case

AT = INTERVAL + 2


@case(15, "another batch on one rank", "permuted 4 ranks", code=13, bound=3, kind="permute", ranks=4)
@case(15, "another batch on one rank", "permuted", code=13, bound=3, kind="permute", ranks=2)
@case(15, "another batch on one rank", "labels", code=13, bound=3, kind="labels", ranks=2)
@case(15, "another batch on one rank", "one pixel", code=13, bound=3, kind="one pixel", ranks=2)
def other_batch(lab: Lab, code: int, kind: str, ranks: int) -> None:
    """Stopped before the optimizer step, with all checksums; two ranks cannot tell which of them is wrong."""
    rank = ranks - 1
    end = lab.run([Fault(kind, "batch", rank=rank, at=AT)], f"peers={ranks}", ranks=ranks)
    names = f"rank {rank} differs in the batch" if ranks > 2 else "ranks differ in the batch"
    sums = [f"rank {r}: 0x" for r in range(ranks)]
    lab.expect_end(end, code, names=names, says=[*sums, f"step {AT}"], survivors=range(ranks))
    lab.expect_lost(end)


@case(16, "other shape or type from one peer", "rows of AEs", code=13, bound=3, kind="fewer", phase="attack", ranks=4)
@case(16, "other shape or type from one peer", "type of AEs", code=13, bound=3, kind="double", phase="attack", ranks=2)
@case(16, "other shape or type from one peer", "classes", code=13, bound=3, kind="wider", phase="forward", ranks=2)
def other_form(lab: Lab, code: int, kind: str, phase: str, ranks: int) -> None:
    """Found in the header; gloo would take it in silence, or abort."""
    rank = ranks - 1
    end = lab.run([Fault(kind, phase, rank=rank, at=AT, times=None)], f"peers={ranks}", ranks=ranks)
    names = f"rank {rank} differs in the shape or type" if ranks > 2 else "ranks differ in the shape or type"
    forms = [f"rank {r}: (" for r in range(ranks)]
    lab.expect_end(end, code, names=names, says=[*forms, f"step {AT}"], survivors=range(ranks))
    lab.expect_lost(end)


@case(17, "NaN or infinity in one peer", "weight", code=15, bound=3, kind="nan weight", ci=True)
@case(17, "NaN or infinity in one peer", "AEs", code=15, bound=3, kind="nan", torchrun=True)
@case(17, "NaN or infinity in one peer", "logits", code=15, bound=3, kind="inf", phase="forward")
@case(17, "NaN or infinity in one peer", "loss", code=15, bound=3, kind="nan", phase="loss")
def not_finite(lab: Lab, code: int, kind: str, phase: str = "attack", torchrun: bool = False) -> None:
    """Peer 1 is named, no peer is updated: the others are bit-equal to before the step."""
    end = lab.run([Fault(kind, phase, at=AT), Fault("watch", rank=None)], torchrun=torchrun)
    lab.expect_end(end, code, names="peer 1 produced", says=[f"step {AT}"], survivors=[0, 1])
    kept = {}
    for file in lab.folder.glob("mark_1.kept.*"):
        kept.update(json.loads(file.read_text()))
    lab.expect(kept.get("0") is True, f"peers bit-equal to before the step: {kept}")
    lab.expect(kind == "nan weight" or kept.get("1") is True, f"peers bit-equal to before the step: {kept}")
    lab.expect_lost(end)


@case(17, "NaN or infinity in one peer", "left out", code=0)
def borne(lab: Lab, code: int) -> None:
    """As a setting the step is left out; the run completes."""
    end = lab.run([Fault("inf", "forward", at=AT)], "step.on_nonfinite=skip")
    lab.expect_end(end, code, timed=False)
    lab.expect(f"step {AT} left out" in end.text and "peer 1" in end.text, "the step that was left out is not told")


@case(18, "loss spike (x 100)", code=0)
def spiked(lab: Lab, code: int) -> None:
    """The run goes on, with a warning that names peer and step."""
    end = lab.run([Fault("x100", "loss", at=AT)], "log.every=1")
    lab.expect_end(end, code, timed=False)
    warnings = [line for line in end.text.splitlines() if "warning" in line and "loss" in line]
    lab.expect(len(warnings) == 1 and "peer 1" in warnings[0] and str(AT + 1) in warnings[0], f"warnings: {warnings}")
