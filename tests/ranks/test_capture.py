"""Steps that are recorded once and launched again leave the bits that eager steps leave."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mat_dist.attacks.training_attack import Found
from mat_dist.config.schema import Config
from mat_dist.core import optim
from mat_dist.core.cohort import Cohort
from mat_dist.core.hooks import Hook
from mat_dist.core.peer import Peer
from mat_dist.core.step import Batch, compute
from mat_dist.data.augment import AugmentedView
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.errors import MatError, NonFinite
from mat_dist.training import capture
from mat_dist.training.capture import captured_steps
from tests.cohorts import BATCH, Net, batch, broken, build, exploding, hashes, largest_difference, nets, one_step
from tests.ranks.test_host_waits import CASES, config
from tests.recorder import CpuRecorder

Run = Callable[..., list[Any]]
STEPS = 8  # steps 1, 2, 4 and 8 run eagerly anyway
FOLLOW = {"strategy msd", "strategy eat", "attack free", "method warm_start"}  # their operations follow the step


def trained(mesh: Mesh, made: Config, models: list[nn.Module], engine: str,
            recorder: CpuRecorder | None = None, steps: int = STEPS, resumed: Cohort | None = None
            ) -> tuple[Cohort, list[str]]:
    """A cohort after some steps, some of them log steps, and what was told. `resumed`: it goes on after another one,
    whose state was written and read."""
    notes: list[str] = []
    step_of = made.step.model_copy(update={"engine": engine})
    cohort = build(made.model_copy(update={"step": step_of}), mesh, models, steps_per_epoch=2)
    rows = torch.arange(cohort.rows.start, cohort.rows.stop)
    cohort.shown = lambda step: AugmentedView.plain(rows, BATCH)
    work = captured_steps(cohort, notes.append, recorder)
    def data(*given: Any) -> list[Tensor]:
        return [tensor.to(mesh.device) for tensor in batch(*given)]

    for peer, other in zip(cohort.peers, resumed.peers if resumed else (), strict=False):
        peer.load(tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), other.state()))
    for step in range(steps // 2 if resumed else 0, steps):
        one_step(cohort, step // made.train.replays, log=step % 3 == 2, compute=work, data=data)
    return cohort, notes


# What differs in the formula alone does so in an eager step too.
ALIKE = ("attack loss", "start ", "pgd in", "apgd in l2")


QUICK = {"preset mat", "preset trades", "strategy max", "strategy ramp", "strategy random", "method awp", "method swa",
         "apgd in l1", "attack n_fgsm", "memory recompute", "accumulate 2", "teachers ema", "wire int8",
         "precision fp16"}


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough)
                                  for name in CASES if name not in FOLLOW and not name.startswith(ALIKE)])
def test_captured_steps_leave_the_bits_of_eager_ones(name: str, run_ranks: Run) -> None:
    case, recorder = CASES[name], CpuRecorder()
    models = nets(len(case.peers), dtype=torch.float64 if case.step.precision == "fp64" else torch.float32)

    def both(mesh: Mesh) -> tuple[list[Cohort], list[str]]:
        plain, _ = trained(mesh, case, models, "eager")
        captured, notes = trained(mesh, case, models, "graph", recorder)
        return [plain, captured], notes

    ((cohorts, notes),) = run_ranks(both, len(case.peers), 1)
    assert notes == [] and len(recorder.made) >= 1
    assert hashes(cohorts[:1]) == hashes(cohorts[1:])


FUSED = {"optim": {"args": {"fused": True}, "schedule": "onecycle", "ema_decay": 0.9, "clip_norm": 1.0}}


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adam"])
def test_captured_updates_follow_the_rate(name: str, layers: bool, run_ranks: Run,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused optimizer's step is captured too; its rate and the averaged weights change from step to step. `layers`:
    some learn at a share of it."""
    entry = {"loss": {"preset": "mat"}, "optim": {**FUSED["optim"], "name": name, "lr": 0.01}}
    made, models, recorder = config(entry, entry, train={"epochs": 4}), nets(2), CpuRecorder()
    groups = optim._groups

    def shared(*given: Any) -> list[dict[str, Any]]:
        return [{**group, "lr_scale": 0.75 ** (5 - n)} for n, group in enumerate(groups(*given))]

    if layers:
        monkeypatch.setattr(optim, "_groups", shared)

    def both(mesh: Mesh) -> tuple[list[Cohort], list[str]]:
        (plain, _), (captured, notes) = (trained(mesh, made, models, engine, recorder) for engine in ("eager", "graph"))
        return [plain, captured], notes

    (((plain, captured), notes),) = run_ranks(both, 2, 1)
    assert notes == [] and len(recorder.made) == 2 * 3  # of plain and log steps: the work, and the updates of two peers
    assert hashes([plain]) == hashes([captured])


def test_work_in_fp64_is_captured_beside_an_optimizer_whose_kernels_take_rates_in_fp32(run_ranks: Run) -> None:
    entry = {"loss": {"preset": "at"}, "optim": {**FUSED["optim"], "lr": 0.01}}
    made, models, recorder = config(entry, precision="fp64"), nets(1, dtype=torch.float64), CpuRecorder()

    def both(mesh: Mesh) -> tuple[list[Cohort], list[str]]:
        (plain, _), (captured, notes) = (trained(mesh, made, models, engine, recorder) for engine in ("eager", "graph"))
        return [plain, captured], notes

    (((plain, captured), notes),) = run_ranks(both, 1, 1)
    assert notes == [] and len(recorder.made) == 2
    assert hashes([plain]) == hashes([captured])


@pytest.mark.parametrize("name", ["preset mat", "preset trades", "memory recompute", "teachers ema", "wire int8"])
def test_on_several_ranks_graphs_lie_between_exchanges(name: str, run_ranks: Run,
                                                            one_draws_at_a_time: None) -> None:
    case = CASES[name]
    models, recorders = nets(len(case.peers)), [CpuRecorder() for _ in case.peers]

    def both(mesh: Mesh) -> list[Cohort]:
        recorder = recorders[mesh.placement.rank]
        (plain, _), (captured, notes) = (trained(mesh, case, models, engine, recorder) for engine in ("eager", "graph"))
        assert notes == []
        return [plain, captured]

    found = run_ranks(both, len(case.peers), len(case.peers))
    assert all(len(recorder.made) == 2 * 3 for recorder in recorders)  # two kinds of step, two exchanges in each
    assert hashes([one for one, _ in found]) == hashes([captured for _, captured in found])


def test_a_rank_that_cannot_record_goes_on_beside_one_that_can(run_ranks: Run,
                                                                      one_draws_at_a_time: None) -> None:
    case, models = CASES["preset mat"], nets(3)

    def both(mesh: Mesh) -> tuple[list[Cohort], list[str]]:
        recorder = CpuRecorder()
        if mesh.placement.rank == 1:
            recorder.begin = broken  # type: ignore[method-assign]
        captured, notes = trained(mesh, case, models, "graph", recorder)
        return [trained(mesh, case, models, "eager")[0], captured], notes

    found = run_ranks(both, 3, 3)
    assert [len(notes) for _, notes in found] == [0, 2, 0] and "cat sat" in found[1][1][0]  # two kinds of step
    assert hashes([one for (one, _), _ in found]) == hashes([captured for (_, captured), _ in found])


class Odd(Net):
    """A model that does something that a recording would repeat."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * {"torch": lambda: 1 + torch.rand(()), "numpy": lambda: 1 + np.random.rand(),
                                     "python": lambda: 1 + random.random(),
                                     "count": lambda: 1 + self.calls % 3}[self.kind]()


@pytest.mark.parametrize(("kind", "reason"), [("torch", "random"), ("numpy", "random"), ("python", "random"),
                                              ("count", "differ")])
def test_a_model_that_a_recording_would_change_runs_eagerly_and_the_user_is_told(kind: str, reason: str,
                                                                                 run_ranks: Run) -> None:
    case, models = CASES["preset at"], [Odd(kind), *nets(2)]

    def both(mesh: Mesh) -> tuple[list[Cohort], list[str]]:
        captured, notes = trained(mesh, case, models, "graph", CpuRecorder())
        return [trained(mesh, case, models, "eager")[0], captured], notes

    ((cohorts, notes),) = run_ranks(both, 3, 1)
    assert notes and all("run eagerly" in note and reason in note for note in notes)
    assert kind == "count" or hashes(cohorts[:1]) == hashes(cohorts[1:])


def test_where_graphs_leave_no_memory_for_eager_steps_all_run_eagerly_and_the_user_is_told(run_ranks: Run) -> None:
    case, models = CASES["preset mat"], nets(3)

    def both(mesh: Mesh) -> tuple[list[Cohort], list[str]]:
        captured, notes = trained(mesh, case, models, "graph", CpuRecorder(fits=False))
        return [trained(mesh, case, models, "eager")[0], captured], notes

    ((cohorts, notes),) = run_ranks(both, 3, 1)
    assert notes and all("leave no memory" in note and "train.batch_size" in note for note in notes)
    assert hashes(cohorts[:1]) == hashes(cohorts[1:])


@pytest.mark.parametrize(("made", "world", "reason"), [
    (CASES["strategy msd"], 1, "method unions follows the step"), (CASES["attack free"], 1, "free_at"),
    (CASES["preset at"].model_copy(update={"peers": CASES["preset at"].peers[:1]}), 2, "replicas")])
def test_what_is_never_recorded_is_told_once(made: Config, world: int, reason: str, run_ranks: Run) -> None:
    models = nets(len(made.peers))
    for _, notes in run_ranks(lambda mesh: trained(mesh, made, models, "graph", CpuRecorder(), 2),
                              len(made.peers), world):
        assert len(notes) == 1 and reason in notes[0]


@pytest.mark.parametrize(("engine", "told"), [("auto", 0), ("compile", 0), ("graph", 1), ("eager", 0)])
def test_without_a_gpu_only_who_asks_for_graphs_is_told(engine: str, told: int, run_ranks: Run) -> None:
    models, notes = nets(3), list[str]()
    (work,) = run_ranks(lambda mesh: captured_steps(build(config(
        *[{"loss": {"preset": "at"}}] * 3, engine=engine), mesh, models), notes.append), 3, 1)
    assert work is compute and len(notes) == told and all("no GPU" in note for note in notes)


def test_a_recording_that_breaks_off_leaves_weights_that_a_hook_had_moved(run_ranks: Run,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hook would put back was never computed."""
    case, models, plain = CASES["method awp"], nets(3), Peer.backward

    def broken_in_recordings(peer: Peer, *given: Any) -> Tensor:
        return broken() if peer.attack_of_training.captured else plain(peer, *given)

    monkeypatch.setattr(Peer, "backward", broken_in_recordings)

    def both(mesh: Mesh) -> tuple[list[Cohort], list[str]]:
        captured, notes = trained(mesh, case, models, "graph", CpuRecorder())
        return [trained(mesh, case, models, "eager")[0], captured], notes

    ((cohorts, notes),) = run_ranks(both, len(case.peers), 1)
    assert len(notes) == 2 and "cat sat" in notes[0]
    assert hashes(cohorts[:1]) == hashes(cohorts[1:])


def test_a_refused_step_that_was_played_leaves_no_trace(run_ranks: Run) -> None:
    """Images that are not numbers, after the step is recorded."""
    models = nets(3)

    def refused(mesh: Mesh) -> tuple[dict[int, str], dict[int, str]]:
        recorder = CpuRecorder()
        cohort, _ = trained(mesh, CASES["preset trades"], models, "graph", recorder, 6)
        work = captured_steps(cohort, print, recorder)
        for step in (6, 7, 8, 9):
            one_step(cohort, step, compute=work)
        made, before = len(recorder.made), hashes([cohort])
        with pytest.raises(NonFinite):
            one_step(cohort, 10, compute=work, data=lambda *given: (batch(*given)[0] * torch.nan, batch(*given)[1]))
        assert len(recorder.made) == made
        return before, hashes([cohort])

    ((before, after),) = run_ranks(refused, 3, 1)
    assert before == after


def test_a_step_with_numbers_that_are_not_finite_decides_nothing(run_ranks: Run) -> None:
    """In fp16 the scale overflows now and then: the step after it is recorded."""
    models = nets(3)

    def captured(mesh: Mesh) -> tuple[int, list[str]]:
        recorder, notes = CpuRecorder(), list[str]()
        cohort = build(CASES["preset trades"], mesh, models)
        work = captured_steps(cohort, notes.append, recorder)
        one_step(cohort, 0, compute=work)
        learn = cohort.peers[0].learn
        exploding(cohort.peers[0])
        with pytest.raises(NonFinite):
            one_step(cohort, 1, compute=work)
        cohort.peers[0].learn = learn  # type: ignore[method-assign]
        one_step(cohort, 2, compute=work)
        return len(work._tapes), notes  # type: ignore[attr-defined]

    assert run_ranks(captured, 3, 1) == [(1, [])]


def test_steps_of_an_optimizer_that_keeps_nothing_are_captured(run_ranks: Run) -> None:
    made = config({"loss": {"preset": "at"}, "optim": {"args": {"momentum": 0.0}}})
    models, recorder = nets(1), CpuRecorder()
    run_ranks(lambda mesh: trained(mesh, made, models, "graph", recorder, 3), 1, 1)
    assert recorder.made


class Gated(Net):
    """A model that reads the weight of a convolution itself, as soon as its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.gate * self.body[0].weight.square().sum())


def test_a_copy_that_is_found_wrong_is_not_attacked_by_recorded_steps_either(run_ranks: Run) -> None:
    """Each step that runs eagerly, such as the 16th, compares it."""
    with_gate = config({"loss": {"preset": "at"}})
    models = [Gated()]

    def both(mesh: Mesh) -> tuple[Cohort, Cohort, int]:
        recorder = CpuRecorder()
        plain, captured = build(with_gate, mesh, models), build(with_gate, mesh, models)
        plain.peers[0].attack_of_training._called = plain.peers[0].model
        work = captured_steps(captured, print, recorder)
        for step in range(20):
            if step == 15:
                captured.peers[0].load(copy.deepcopy(plain.peers[0].state()))
                for cohort in (plain, captured):
                    cohort.peers[0].model.gate.fill_(1)  # type: ignore[operator, union-attr]
            one_step(captured, step, compute=work)
            one_step(plain, step)
        return plain, captured, len(recorder.made)

    ((plain, captured, made),) = run_ranks(both, 1, 1)
    assert made == 2 and not captured.peers[0].attack_of_training.copies
    assert hashes([plain]) == hashes([captured])


def test_steps_of_a_warm_up_make_room_for_those_after_it(run_ranks: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MOST", 1)
    made, models = config(*[{"loss": {"preset": "mat_kd", "warmup_epochs": 2}}] * 2), nets(2)

    def captured(mesh: Mesh) -> list[Cohort]:
        recorders = [CpuRecorder(), CpuRecorder()]
        found = [trained(mesh, made, models, "graph", recorder, steps)[0] for recorder, steps in
                 zip(recorders, (4, 7), strict=True)]
        assert [len(one.made) for one in recorders] == [1, 2]
        return [trained(mesh, made, models, "eager", None, 7)[0], found[1]]

    ((plain, found),) = run_ranks(captured, 2, 1)
    assert hashes([plain]) == hashes([found])


def test_a_hook_that_cannot_choose_ends_the_step_of_all_ranks(run_ranks: Run, one_draws_at_a_time: None) -> None:
    case, models = CASES["strategy random"], nets(3)

    def failing(mesh: Mesh) -> str:
        cohort = build(case.model_copy(update={"peers": case.peers[:1] * 2}), mesh, models)
        if mesh.placement.rank == 1:
            cohort.peers[0].hooks[0].choose = broken  # type: ignore[method-assign]
        with pytest.raises(MatError) as caught:
            one_step(cohort, 0, compute=captured_steps(cohort, print, CpuRecorder()))
        return str(caught.value)

    one, other = run_ranks(failing, 2, 2)
    assert one == other and "cat sat" in one


class Keeper(Hook):
    """Keeps what its peer attacks with."""

    name, repeats = "keeper", True

    def attacked(self, part: Batch, threat: int, found: Found) -> None:
        self.made = found.adv_BCHW.mean((1, 2, 3))

    def proposed(self) -> list[Tensor]:
        return [self.made]

    def commit(self, step: int, shared: Sequence[Tensor]) -> None:
        self.kept = [*getattr(self, "kept", []), *shared]


def test_what_a_hook_keeps_of_a_captured_step_is_not_overwritten_by_the_next(run_ranks: Run,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def with_keeper(cohort: Cohort, *given: Any, plain: Any = Cohort.__init__, **named: Any) -> None:
        plain(cohort, *given, **named)
        cohort.peers[0].hooks.append(Keeper(cohort.peers[0]))

    monkeypatch.setattr(Cohort, "__init__", with_keeper)
    made, models, recorder = config({"loss": {"preset": "at"}}), nets(1), CpuRecorder()
    ((plain, captured),) = run_ranks(lambda mesh: [
        trained(mesh, made, models, engine, recorder)[0].peers[0].hooks[-1].kept  # type: ignore[attr-defined]
        for engine in ("eager", "graph")], 1, 1)
    assert recorder.made and len(plain) == STEPS
    assert all(map(torch.equal, plain, captured))


def test_a_comparison_waits_for_the_device_with_a_limit(run_ranks: Run) -> None:
    """An exchange may be under way with a rank that never comes."""
    def waited(mesh: Mesh) -> list[int]:
        calls = list[int]()
        cohort = build(CASES["preset at"], mesh, models)
        work = captured_steps(cohort, print, CpuRecorder())
        for step in range(3):
            mesh.await_device = lambda step=step: calls.append(step)  # type: ignore[method-assign]
            one_step(cohort, step, compute=work)
        return calls

    models = nets(3)
    assert run_ranks(waited, 3, 1) == [[0, 1, 1, 2]]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["preset at", "preset mat", "preset trades", "strategy max", "method awp",
                                  "apgd in l1", "memory recompute", "precision bf16"])
def test_on_a_gpu_captured_steps_leave_the_weights_of_eager_ones(name: str) -> None:
    case, place = CASES[name], Placement.place(len(CASES[name].peers), 1, 0)
    mesh = Mesh(place, torch.device("cuda"))
    models = [model.cuda() for model in nets(len(case.peers))]
    (plain, _), (captured, notes) = (trained(mesh, case, models, engine) for engine in ("eager", "graph"))
    assert notes == []
    assert largest_difference([plain], [captured]) < (1e-2 if name == "precision bf16" else 1e-5)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_resumed_cohort_goes_on_with_captured_steps_as_if_it_had_never_stopped(where: str) -> None:
    """On a GPU with the fused optimizer, whose state lies elsewhere than a file's."""
    case, mesh = CASES["preset mat"], Mesh(Placement.place(3, 1, 0), torch.device(where))
    models = [model.to(where) for model in nets(3)]

    def run(**given: Any) -> Cohort:
        found, notes = trained(mesh, case, models, "graph", CpuRecorder() if where == "cpu" else None, **given)
        assert notes == []
        return found

    whole, resumed = run(), run(resumed=run(steps=STEPS // 2))
    assert largest_difference([whole], [resumed]) <= (0 if where == "cpu" else 1e-5)
