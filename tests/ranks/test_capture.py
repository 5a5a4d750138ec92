"""Steps that are recorded once and launched again leave the bits that eager steps leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mat_dist.config.schema import Config
from mat_dist.core.capture import captured_steps
from mat_dist.core.cohort import Cohort
from mat_dist.data.augment import AugmentedView
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from tests.cohorts import BATCH, batch, build, hashes, largest_difference, nets, one_step
from tests.ranks.test_host_waits import CASES, config
from tests.recorder import CpuRecorder

Run = Callable[..., list[Any]]
STEPS = 8  # steps 1, 2, 4 and 8 run eagerly anyway
FOLLOW = {"strategy msd", "strategy eat", "attack free", "method warm_start"}  # their operations follow the step


def trained(mesh: Mesh, made: Config, models: list[nn.Module], engine: str,
            recorder: CpuRecorder | None = None, steps: int = STEPS) -> tuple[Cohort, list[str]]:
    """A cohort after some steps, some of them log steps, and what was told."""
    notes: list[str] = []
    step_of = made.step.model_copy(update={"engine": engine})
    cohort = build(made.model_copy(update={"step": step_of}), mesh, models, steps_per_epoch=2)
    rows = torch.arange(cohort.rows.start, cohort.rows.stop)
    cohort.shown = lambda step: AugmentedView.plain(rows, BATCH)
    work = captured_steps(cohort, notes.append, recorder)
    def data(*given: Any) -> list[Tensor]:
        return [tensor.to(mesh.device) for tensor in batch(*given)]

    for step in range(steps):
        one_step(cohort, step // made.train.replays, log=step % 3 == 2, compute=work, data=data)
    return cohort, notes


@pytest.mark.parametrize("name", [name for name in CASES if name not in FOLLOW])
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


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adam"])
def test_captured_updates_follow_the_rate(name: str, run_ranks: Run) -> None:
    """A fused optimizer's step is captured too; its rate and the averaged weights change from step to step."""
    entry = {"loss": {"preset": "mat"}, "optim": {**FUSED["optim"], "name": name, "lr": 0.01}}
    made, models, recorder = config(entry, entry, train={"epochs": 4}), nets(2), CpuRecorder()

    def both(mesh: Mesh) -> list[Cohort]:
        return [trained(mesh, made, models, engine, recorder)[0] for engine in ("eager", "graph")]

    ((plain, captured),) = run_ranks(both, 2, 1)
    assert len(recorder.made) == 2 * 3  # of plain and log steps: the work, and the updates of two peers
    assert hashes([plain]) == hashes([captured])


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
