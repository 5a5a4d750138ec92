"""A step whose work is recorded once, as CUDA graphs, and launched whole from then on.

What lies between two exchanges is one graph: a few thousand small kernels, which the GPU then runs without waiting for
the host. A graph repeats the same operations on the same memory. So images, labels and keys are copied into fixed
tensors before, what an exchange brings is copied into fixed tensors between graphs, and whatever follows the step in
another way (learning rate, averaged weights) stays outside.

Nothing is executed while a step is recorded, and nothing travels: each rank records by itself, and one that cannot goes
on eagerly beside the others. A recorded step is compared with an eager one of another number before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mat_dist.attacks.memory import release
from mat_dist.core import step as steps
from mat_dist.core.cohort import Cohort
from mat_dist.core.guard import Guard
from mat_dist.core.step import Batch, Computed
from mat_dist.models.modes import copy_all, saved_buffers
from mat_dist.training.recorder import CudaRecorder, Recorder
from mat_dist.training.tape import Tape, raise_kept, trainable

MOST = 8  # kinds of step that are recorded: each holds the memory of its results
EAGER_EVERY = 1024  # steps 1, 2, 4 ... 1024, 2048, 3072 ... run eagerly, where attacked copies are compared
NOISE = 2.0  # a recorded step may differ from an eager one by so many times what eager ones differ by
LOUD = 0.1  # but not by more than twice this (relative L2 distance of a gradient): such a model follows something else


class CapturedSteps:
    """Takes the place of `step.compute`: the first step of a kind runs eagerly, the second one is also recorded and
    compared, and from the third on the recorded one runs.

    Steps are of one kind if they do the same operations: shapes, log steps, which peers warm up, which threats hooks
    choose.

    Args:
        tell: gets one line where steps cannot be captured.
    """

    def __init__(self, recorder: Recorder, tell: Callable[[str], None]) -> None:
        self._recorder, self._tell = recorder, tell
        self._number = 0
        self._first: dict[Any, int] = {}  # kind -> the step at which it was met
        self._tapes: dict[Any, Tape | None] = {}  # None: it runs eagerly
        self._form: Any = None  # what all of them hold for

    def __call__(self, cohort: Cohort, guard: Guard, batch: Batch, log: bool) -> Computed:
        self._number += 1
        kind = guard.run("choice of threats", _kind, cohort, batch, log)
        form = cohort.warming_up, [peer.attack_of_training.copies for peer in cohort.peers]
        if form != self._form:  # a warm-up has ended, or a copy was found to be wrong: what was recorded never returns
            self._form, self._first, self._tapes = form, {}, {}
            release(None)
        if kind not in self._first:
            self._first[kind] = batch.step
        elif kind not in self._tapes and len(self._tapes) < MOST and cohort.moved:
            return self._compared(kind, cohort, guard, batch)
        tape, eager = self._tapes.get(kind), self._number & (self._number - 1) == 0 or self._number % EAGER_EVERY == 0
        if tape is None or eager or self._first[kind] == batch.step:
            for peer in cohort.peers if tape else ():
                peer.attack_of_training.check_soon()
            return steps.compute(cohort, guard, batch, log)
        return tape.play(cohort, guard, batch)

    def _compared(self, kind: Any, cohort: Cohort, guard: Guard, batch: Batch) -> Computed:
        """An eager step, and beside it a recorded one of this kind, if possible."""
        log: bool = kind[0]
        before = [saved_buffers(peer.model) for peer in cohort.peers]
        try:
            # Of another step: what was recorded and should have followed the step shows in the comparison.
            tape = Tape.record(cohort, replace(batch, step=self._first[kind]), log, self._recorder)
            if not self._recorder.room():
                raise MemoryError("the graphs leave no memory for eager steps, which come now and then; lower "
                                  "train.batch_size")
        except Exception as error:  # drivers, models and hooks raise anything
            self._refuse(kind, f"{type(error).__name__}: {error}".splitlines()[0])
            tape = None
            release(error)
        answers: list[Tensor] = []

        def kept(*given: Any) -> Tensor:
            answers.append(Guard.exchange(*given))
            return answers[-1]

        guard.meet = kept
        found = steps.compute(cohort, guard, batch, log)
        cohort.mesh.await_device()  # as before the vote: whatever reads from the device waits without a limit
        # Numbers that are not finite compare with nothing: fp16 overflows now and then, and a later step is as good.
        if tape and guard.failure is None and guard.run("device", lambda: found.told[1:].all().item()):
            after, gradients = [saved_buffers(peer.model) for peer in cohort.peers], [p.grad for p in trainable(cohort)]
            try:
                if why := _difference(tape, cohort, batch, log, answers, before):
                    self._refuse(kind, why)
                else:
                    self._tapes[kind] = tape
            finally:
                for restore in after:
                    restore()
                cohort.restorers = before
                for p, gradient in zip(trainable(cohort), gradients, strict=True):
                    p.grad = gradient
        if self._tapes.get(kind) is None:  # a pool that only graphs of the past have used refuses new ones
            tape = None
            release(None)
        return found

    def _refuse(self, kind: Any, why: str) -> None:
        self._tapes[kind] = None
        self._tell(f"steps run eagerly, since they cannot be captured: {why}")


def captured_steps(cohort: Cohort, tell: Callable[[str], None],
                   recorder: Recorder | None = None) -> steps.Compute:
    """What computes the steps of a cohort, as `step.engine` says. `tell` gets one line where that is impossible.

    Args:
        recorder: instead of CUDA's.
    """
    engine, on_gpu = cohort.step.engine, recorder is not None or cohort.mesh.device.type == "cuda"
    if engine == "eager" or (not on_gpu and engine in ("auto", "compile")):
        return steps.compute
    moving = [f"method {hook.name}" for peer in cohort.peers for hook in peer.hooks if not hook.repeats]
    for bad, why in ((not on_gpu, "there is no GPU"), (cohort.mesh.placement.replicas > 1, "peers have replicas"),
                     (bool(moving), f"{', '.join(dict.fromkeys(moving))} follows the step")):
        if bad:
            if engine != "auto" or on_gpu:
                tell(f"steps run eagerly, since they cannot be captured: {why}")
            return steps.compute
    return CapturedSteps(recorder or CudaRecorder(), tell)


def _kind(cohort: Cohort, batch: Batch, log: bool) -> tuple[Any, ...]:
    chosen = tuple(sum(hook.choose(batch.step) for hook in peer.hooks) for peer in cohort.peers)
    shapes = tuple((tensor.shape, tensor.dtype) for tensor in (batch.x_BCHW, batch.y_B))
    return log, shapes, chosen


def _difference(tape: Tape, cohort: Cohort, batch: Batch, log: bool, answers: Sequence[Tensor],
                before: Sequence[Callable[[], None]]) -> str:
    """How a recorded step differs from an eager one, whose results the cohort has, with the same `answers` of the other
    ranks; empty if it does not, or no more than another eager one.

    Args:
        before: give the buffers their values of before the step.
    """
    def results(work: Callable[[Guard], Computed]) -> list[Tensor]:
        guard = Guard(cohort.mesh, f"comparison of step {batch.step}", batch.step)
        waiting = list(answers)
        guard.meet = lambda *given: given[2] if cohort.mesh.alone else waiting.pop(0)
        for restore in before:
            restore()
        work(guard)
        raise_kept(guard)
        return _results(cohort)

    waiting, drawn = list(answers), _offsets()
    try:
        wanted = _results(cohort)
        played = results(lambda guard: tape.play(cohort, guard, batch, lambda _: waiting.pop(0)))
        if _offsets() != drawn:
            return "the model draws random numbers"
        found = _distance(played, wanted)
        if not _updates_alike(tape, cohort, batch.step):
            return "the optimizer's step differs from an eager one"
        for peer in cohort.peers:
            peer.forget()
        noise = 0.0 if found == 0 else _distance(
            results(lambda guard: steps.compute(cohort, guard, batch, log)), wanted)
    except Exception as error:  # as in recording
        release(error)
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if found <= NOISE * min(noise, LOUD):
        return ""
    return f"gradients differ by {found:.1e} from those of an eager step, and eager ones by {noise:.1e} from each other"


def _results(cohort: Cohort) -> list[Tensor]:
    """Copies of the gradients and buffers of the local peers."""
    buffers = [b for peer in cohort.peers for b in peer.model.buffers()]
    gradients = [p.grad for p in trainable(cohort) if p.grad is not None]
    return [t.detach().to(torch.float64, copy=True) for t in (*gradients, *buffers)]


def _updates_alike(tape: Tape, cohort: Cohort, step: int) -> bool:
    """Whether the recorded optimizer steps do the same as eager ones, bit by bit; all is as before afterwards."""
    kept = [t for peer in cohort.peers for state in peer.optimizer.state.values() for t in state.values()
            if isinstance(t, Tensor)]
    places = [p.detach() for p in trainable(cohort)] + kept
    before, found = [place.clone() for place in places], []
    assert tape.found is not None
    for work in ([peer.descend for peer in cohort.peers], tape.found.descend):
        try:
            for peer, descend in zip(cohort.peers, work, strict=True):
                if not peer.spec.frozen:
                    descend(cohort.lr(peer.spec, step))
            found.append([place.clone() for place in places])
        finally:
            copy_all(places, before)
    return all(map(torch.equal, *found))


def _distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Largest relative L2 distance of a tensor from its other (0: equal in all bits; NaN counts as infinite)."""
    if len(some) != len(others):
        return float("inf")
    far = [float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in zip(some, others, strict=True)
           if not torch.equal(a, b)]
    return max((one if one == one else float("inf") for one in far), default=0.0)


def _offsets() -> list[int]:
    """Where the GPUs' global generators stand."""
    return [one.get_offset() for one in torch.cuda.default_generators] if torch.cuda.is_initialized() else []
