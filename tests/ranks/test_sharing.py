"""What peers share beside opinions, against formulas on plain tensors (fp64) and under every placement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mat_dist.step import train_step
from tests.cohorts import batch, build, nets, train
from tests.ranks.test_baselines import TEACHER, Case, Slot, Z, agree, at, mat, ring
from tests.ranks.test_baselines_step import configured
from tests.ranks.test_step import hashes, largest_difference
from tests.reference_mat import ce, kl

Run = Callable[..., list[Any]]
slow = pytest.mark.slow


# ------------------------------------------------------------------------------------------------ who attacks


def opinion(k: int, j: Slot, z: Z, t: Z) -> Tensor:
    """The mean distillation of three peers on a slot."""
    return sum(kl(t(i, j), z(k, j)) for i in range(3) if i != k) / 2  # type: ignore[return-value]


def one(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return 0.5 * ce(z(k, step % 3), y) + 0.5 * opinion(k, step % 3, z, t)


def one_trades(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    attacked = z(k, step % 3)
    return ce(z(k, "clean"), y) + 6 * kl(z(k, "clean"), attacked) + 0.5 * opinion(k, step % 3, z, t)


def one_of_two(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """Peer 1 is frozen."""
    return ce(z(0, step % 2), y)


def one_after_warm_up(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return ce(z(k, k), y) if step < 1 else one(k, z, t, y, step)


def next_of(k: int, step: int) -> int:
    """The partner of one of three."""
    return (k + 1 + step % 2) % 3


def partner(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return 0.5 * ce(z(k, k), y) + 0.25 * (opinion(k, k, z, t) + opinion(k, next_of(k, step), z, t))


def partner_share(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return 0.5 * ce(z(k, k), y) + 0.5 * ce(z(k, next_of(k, step)), y)


def some(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return (one, partner, mat)[k](k, z, t, y, step)


def some_slots(k: int, step: int) -> list[Slot]:
    return [[step % 3], [next_of(k, step), k], ring(k, step)][k]


def entry(preset: str, attackers: str, **loss: Any) -> dict[str, Any]:
    return {"loss": {"preset": preset, "attackers": attackers, **loss}}


CASES = {
    "one": Case([entry("mat", "one")] * 3, one, lambda k, step: [step % 3]),
    "one, trades": Case([entry("mat_trades", "one")] * 3, one_trades, lambda k, step: ["clean", step % 3]),
    "one of two, the other frozen": Case([entry("at", "one"), TEACHER], one_of_two, lambda k, step: [step % 2]),
    "one after a warm-up": Case([entry("mat", "one", warmup_epochs=0.1)] * 3, one_after_warm_up,
                                lambda k, step: [k] if step < 1 else [step % 3]),
    "partner": Case([entry("mat", "partner")] * 3, partner, lambda k, step: [next_of(k, step), k]),
    "partner, hard labels": Case([entry("mat_share", "partner")] * 3, partner_share,
                                 lambda k, step: [next_of(k, step), k]),
    "one, partner, all": Case([entry("mat", "one"), entry("mat", "partner"), entry("mat", "all")], some, some_slots),
}


@pytest.mark.parametrize("name", CASES)
def test_attackers_that_change_with_the_step_equal_their_formula(name: str, run_ranks: Run) -> None:
    agree(CASES[name], run_ranks)


@pytest.mark.parametrize("preset,attackers", [
    ("mat", ["one"] * 4), pytest.param("mat_trades", ["partner", "partner", "one", "all"], marks=slow)])
def test_placement_does_not_change_which_attacks_are_learnt(preset: str, attackers: list[str], run_ranks: Run) -> None:
    models, config = nets(4), configured([entry(preset, one) for one in attackers])
    alone = hashes(run_ranks(lambda mesh: train(config, mesh, models, 5), 4, 1))
    for world in (2, 4):
        assert hashes(run_ranks(lambda mesh: train(config, mesh, models, 5, log=True), 4, world)) == alone


@slow
@pytest.mark.parametrize("name", ["one, trades", "partner"])
def test_memory_replicas_and_microbatches_do_not_change_which_attacks_are_learnt(name: str, run_ranks: Run) -> None:
    models = nets(3, norm="group", dtype=torch.float64)

    def result(world: int, **step: Any) -> list[Any]:
        config = CASES[name].config(**step)
        return run_ranks(lambda mesh: train(config, mesh, models, 3, dtype=torch.float64), 3, world)

    plain = result(1)
    for world, step in ((1, {"memory": "recompute"}), (1, {"microbatches": 2}), (6, {})):
        assert largest_difference(plain, result(world, **step)) < 1e-9


def test_a_peer_that_does_not_attack_makes_no_examples(run_ranks: Run) -> None:
    """And `at` with one attacker needs no other forward than that of its source."""
    case, made = Case([entry("at", "one")] * 3, at, ring), []

    def run(mesh: Any) -> None:
        cohort = build(case.config(precision="fp32"), mesh, nets(3))
        for peer in cohort.peers:
            def noting(*args: Any, n: int = peer.index, attack: Any = peer.attack) -> Tensor:
                made.append(n)
                return attack(*args)
            peer.attack = noting  # type: ignore[method-assign]
        for step in range(4):
            cohort.begin(step)
            assert [row.learned for row in cohort.plan.peers] == [(step % 3,)] * 3
            train_step(cohort, *batch(step), step)

    run_ranks(run, 3, 1)
    assert made == [0, 1, 2, 0]
