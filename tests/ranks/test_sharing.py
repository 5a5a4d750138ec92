"""What peers share beside opinions, against formulas on plain tensors (fp64) and under every placement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mat_dist.config import load_config
from mat_dist.core import trainer
from mat_dist.core.cohort import Cohort, state_hash
from mat_dist.core.step import train_step
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.errors import NonFinite
from mat_dist.models.registry import Images
from tests.cohorts import batch, build, nets, train
from tests.ranks.test_baselines import TEACHER, Case, Slot, Z, agree, at, images, mat, mine, reference_step, ring
from tests.ranks.test_baselines_step import configured
from tests.ranks.test_step import hashes, largest_difference
from tests.reference_mat import Reference, ce, kl
from tests.small_runs import interrupted, run_small

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

    def run(mesh: Mesh) -> None:
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


# ------------------------------------------------------------------------------------------------ mean weights


def blend(peers: list[Reference], share: float) -> None:
    """Every peer goes a share of the way to the mean weights and running statistics of all."""
    for kind in ("w", "running"):
        for n in range(len(getattr(peers[0], kind))):
            mean = sum(getattr(p, kind)[n].detach() for p in peers) / len(peers)
            for p in peers:
                before = getattr(p, kind)[n].detach()
                getattr(p, kind)[n] = (before + share * (mean - before)).requires_grad_(kind == "w")


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_peers_are_pulled_to_their_mean_weights_before_these_are_averaged(share: float, run_ranks: Run) -> None:
    models = nets(3, dtype=torch.float64)
    config = Case([{"loss": "at", "optim": {"ema_decay": 0.6}}] * 3, at, mine, step={"pull": share, "pull_every": 2})
    (ours,) = run_ranks(lambda mesh: train(config.config(), mesh, models, 5, dtype=torch.float64, data=images), 3, 1)
    plain, peers = Case([{"loss": "at"}] * 3, at, mine), [Reference(model) for model in models]
    for peer in peers:
        peer.average(0.0, 0)
    for step in range(5):
        kept = [peer.ema for peer in peers]
        reference_step(plain, plain.config(), peers, step)
        if step % 2 == 1:
            blend(peers, share)
        for peer, ema in zip(peers, kept, strict=True):
            peer.ema = ema
            peer.average(0.6, step)
    for mine_, theirs in zip(ours.peers, peers, strict=True):
        assert theirs.differences(mine_.model.state_dict()) < 1e-9
        assert mine_.ema is not None
        averaged = [mine_.ema[name] for name in (*Reference.names, *Reference.statistics)]
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(averaged, theirs.ema, strict=True))


def pulling(**step: Any) -> Any:
    return configured([{"loss": "mat", "optim": {"ema_decay": 0.9}}] * 4, **{"pull": 0.3, "pull_every": 2, **step})


def test_placement_does_not_change_the_mean_weights(run_ranks: Run) -> None:
    models = nets(4)
    alone = hashes(run_ranks(lambda mesh: train(pulling(), mesh, models, 4), 4, 1))
    assert alone != hashes(run_ranks(lambda mesh: train(pulling(pull=0.0), mesh, models, 4), 4, 1))
    assert hashes(run_ranks(lambda mesh: train(pulling(), mesh, models, 4), 4, 2)) == alone


@slow
def test_placement_does_not_change_the_mean_weights_on_more_ranks(run_ranks: Run) -> None:
    models = nets(4)
    alone, spread = (hashes(run_ranks(lambda mesh: train(pulling(), mesh, models, 4), 4, world)) for world in (1, 4))
    assert alone == spread
    hashes(run_ranks(lambda mesh: train(pulling(), mesh, models, 4), 4, 8))  # replicas agree, averaged weights as well


def test_peers_pulled_all_the_way_have_one_set_of_weights(run_ranks: Run) -> None:
    models = nets(4)
    cohorts = run_ranks(lambda mesh: train(pulling(pull=1.0), mesh, models, 4), 4, 2)
    states = [peer.model.state_dict() for cohort in cohorts for peer in cohort.peers]
    assert len({state_hash(state) for state in states}) == 1
    assert state_hash(states[0]) != state_hash(models[0].state_dict())


def test_nothing_travels_between_two_pulls(run_ranks: Run) -> None:
    def count(config: Any) -> list[int]:
        gathered = [0]

        def run(mesh: Mesh) -> None:
            plain = mesh.gather_peers

            def noting(local: Tensor) -> Tensor:
                gathered[-1] += 1
                return plain(local)

            mesh.gather_peers = noting  # type: ignore[method-assign]
            cohort = build(config, mesh, nets(4))
            for step in range(4):
                train_step(cohort, *batch(step), step)
                gathered.append(0)
        run_ranks(run, 4, 1)
        return gathered[:-1]
    without, tensors = count(pulling(pull=0.0)), 8 + 4  # weights, and running statistics of two norms
    assert count(pulling()) == [n + tensors * pulls for n, pulls in zip(without, (0, 1, 0, 1), strict=True)]


def test_a_peer_in_quarantine_neither_counts_nor_moves(run_ranks: Run) -> None:
    models = nets(4)

    def run(mesh: Mesh) -> Any:
        cohort = build(pulling(pull=1.0, pull_every=1), mesh, models)
        cohort.mute([1], until=9)
        train_step(cohort, *batch(0), 0)
        return [peer.model.state_dict() for peer in cohort.peers]

    found = [state_hash(state) for states in run_ranks(run, 4, 2) for state in states]
    assert len(set(found)) == 2 and found.count(found[1]) == 1


def test_weights_that_overflow_in_an_update_reach_nobody_and_are_named(run_ranks: Run) -> None:
    models = nets(4)

    def run(mesh: Mesh) -> tuple[str, bool]:
        cohort = build(pulling(pull_every=1), mesh, models)
        for peer in cohort.peers:
            if peer.index == 2:
                def bursting(step: int, lr: float, update: Any = peer.update, model: Any = peer.model) -> None:
                    update(step, lr)
                    with torch.no_grad():
                        next(model.parameters())[0] = float("inf")
                peer.update = bursting  # type: ignore[method-assign]
        train_step(cohort, *batch(0), 0)
        others = [p for p in cohort.peers if p.index != 2]
        sound = all(v.isfinite().all() for p in others for v in p.model.state_dict().values())
        with pytest.raises(NonFinite) as caught:
            train_step(cohort, *batch(1), 1)
        return str(caught.value), sound

    for text, sound in run_ranks(run, 4, 2):
        assert sound and "peer 2 " in text


# ------------------------------------------------------------------------------------------------ initial weights


def test_peers_with_one_init_stream_start_alike_and_part_by_their_noise() -> None:
    config = load_config("digits", ["loss=at", "peers=3", "peers.1.init_stream=0", "attack.steps=1", "run.device=cpu",
                                    "train.batch_size=8"])
    cohort = Cohort.build(config, Mesh(Placement.place(3, 1, 0), torch.device("cpu")),
                          Images((1, 8, 8), 10, (0.5,), (0.25,)), steps_per_epoch=1)
    before = [state_hash(peer.model.state_dict()) for peer in cohort.peers]
    assert before[0] == before[1] != before[2]
    train_step(cohort, torch.rand(8, 1, 8, 8), torch.arange(8), 0)
    after = [state_hash(peer.model.state_dict()) for peer in cohort.peers]
    assert len(set(after)) == 3


# ------------------------------------------------------------------------------------------------ resume


@slow
@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_resumed_run_keeps_turns_and_pulls(at: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("peers=3", "loss.attackers=one", "step.pull=0.5", "step.pull_every=2", "checkpoint.every_steps=1",
                "peers.all.init_stream=0", "optim.ema_decay=0.9")
    whole = run_small(tmp_path, "whole", *settings)
    with monkeypatch.context() as patch:
        interrupted(patch, (trainer, "train_step"), at, lambda: RuntimeError("enough"))
        assert run_small(tmp_path, "cut", *settings).code != 0
    resumed = run_small(tmp_path, "cut", *settings)
    assert (whole.code, resumed.code) == (0, 0) and resumed.hashes() == whole.hashes()
