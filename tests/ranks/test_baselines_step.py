"""Baselines, unions and roles under every placement, memory setting and failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mat_dist.config.schema import Config
from mat_dist.core.cohort import Cohort, state_hash
from mat_dist.core.step import train_step
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import MatError
from tests.cohorts import batch, build, failed_step, hashes, largest_difference, nets, train
from tests.ranks.test_baselines import CASES, Case, alone, at, cohort, mixed_images

Run = Callable[..., list[Any]]
EAT = {**alone("eat", "linf:0.1,l1:2")[0], "optim": {"ema_decay": 0.9}}
TEACHER = {"frozen": True}
SPREAD: dict[str, list[dict[str, Any]]] = {
    "generalist": cohort("ramp", kd_weight=0.5),
    "max of each peer beside a generalist": [*alone("max"), *cohort("max")[1:]],
    "peeraid": CASES["peeraid"].peers,
    "rslad": [{"loss": "rslad"}, TEACHER],
    "two students of two teachers": [{"loss": "rslad"}, TEACHER,
                                     {"loss": {"preset": "ard", "hard_weight": 0.5}}, TEACHER],
    "lbgat": [{"loss": "lbgat", "optim": {"awp_gamma": 0.01}}] * 2,
    "awp": [{"loss": "mat", "optim": {"awp_gamma": 0.02, "awp_warmup_epochs": 0.1}}] * 4,
    "eat": [EAT] * 2,
    "generalists that draw": [*cohort("eat")[1:], *cohort("random")[3:]],
    "msd, random, avg": [*alone("msd"), *alone("random"), *alone("avg"), *alone("max")],
    "trust": [{"loss": {"preset": "mat", "gate": 0.1, "kd_where": "teacher_right", "warmup_epochs": 0.1}}] * 4,
}


def configured(entries: list[dict[str, Any]], **step: Any) -> Config:
    return Case(entries, at, lambda k, _: [k]).config(**{"precision": "fp32", **step})


FAST = ("rslad", "eat")
slow = pytest.mark.slow  # a second each


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=slow) for name in SPREAD])
def test_placement_does_not_change_a_bit(name: str, run_ranks: Run) -> None:
    count = len(SPREAD[name])
    models, config = nets(count), configured(SPREAD[name])
    alone_ = hashes(run_ranks(lambda mesh: train(config, mesh, models, 3), count, 1))
    for world in {2, count}:
        spread = run_ranks(lambda mesh: train(config, mesh, models, 3, log=True), count, world)
        assert hashes(spread) == alone_


@slow
def test_placement_does_not_change_a_bit_with_averaged_teachers(run_ranks: Run) -> None:
    models = nets(4)
    config = configured([{"loss": "mat", "optim": {"ema_decay": 0.6}}] * 3 + [TEACHER], teachers="ema")
    runs = [hashes(run_ranks(lambda mesh: train(config, mesh, models, 3), 4, world)) for world in (1, 2, 4)]
    assert runs[0] == runs[1] == runs[2]


@slow
@pytest.mark.parametrize("name", ["max", "ramp", "ramp+projection", "mart", "rslad", "lbgat", "peeraid", "mat+awp",
                                  "trades+awp", "teachers=ema", "generalist ramp", "generalist that feeds back"])
def test_recompute_equals_keep(name: str, run_ranks: Run) -> None:
    count = len(CASES[name].peers)
    models, runs = nets(count, dtype=torch.float64), []
    for memory in ("keep", "recompute"):
        config = CASES[name].config(memory=memory)
        runs.append(run_ranks(lambda mesh, c=config: train(c, mesh, models, 3, dtype=torch.float64), count, 1))
    assert largest_difference(*runs) < 1e-11


def test_recompute_keeps_the_order_of_forwards_where_clean_images_lie_between_rivals(run_ranks: Run) -> None:
    """The running statistics depend on the order."""
    entries = [{**alone("max")[0], "loss": {"preset": "at", "clean_weight": 0.5}}]
    models, runs = nets(1, dtype=torch.float64), []
    for memory in ("keep", "recompute"):
        config = configured(entries, precision="fp64", memory=memory)
        runs.append(run_ranks(lambda mesh, c=config: train(c, mesh, models, 3, dtype=torch.float64), 1, 1))
    assert largest_difference(*runs) < 1e-11


@slow
@pytest.mark.parametrize("name", ["max", "mart", "rslad", "lbgat", "peeraid", "student_wrong", "generalist max"])
def test_microbatches_and_replicas_equal_the_plain_step_without_batch_norm(name: str, run_ranks: Run) -> None:
    count = len(CASES[name].peers)
    models = nets(count, norm="group", dtype=torch.float64)
    def result(world: int, **step: Any) -> list[Cohort]:
        config = CASES[name].config(**step)
        return run_ranks(lambda mesh: train(config, mesh, models, 3, dtype=torch.float64), count, world)
    plain = result(1)
    assert largest_difference(plain, result(1, microbatches=2)) < 1e-10
    if name in ("mart", "rslad", "student_wrong", "generalist max"):
        assert largest_difference(plain, result(2 * count)) < 1e-9


def test_a_guide_thinks_with_the_weights_of_the_step_in_each_micro_batch(run_ranks: Run) -> None:
    """The perturbation of the first micro-batch is gone when the second one asks for guidance."""
    entries = [{**entry, "optim": {"awp_gamma": 0.02}} for entry in CASES["peeraid"].peers]
    models, seen = nets(2, norm="group"), []
    def one(mesh: Mesh) -> None:
        cohort = build(configured(entries, microbatches=2), mesh, models)
        teacher = cohort.peers[0]
        before, teach = state_hash(teacher.model.state_dict()), teacher.teach
        def noting(x: torch.Tensor, draw: Any) -> torch.Tensor:
            if draw[1] == 2:  # the slot of the clean images
                seen.append(state_hash(teacher.model.state_dict()) == before)
            return teach(x, draw)
        teacher.teach = noting  # type: ignore[method-assign]
        train_step(cohort, *batch(0), 0)
    run_ranks(one, 2, 1)
    assert seen == [True, True]


EASY = "linf:0.001,l2:0.01,l1:0.01"  # so weak that images stay right: RAMP pairs them, E-AT counts them
TOGETHER: dict[str, list[dict[str, Any]]] = {  # what needs more than each replica's own rows
    "ramp": alone("ramp", EASY),
    "eat": alone("eat", EASY),
    "awp": [{"loss": "at", "optim": {"awp_gamma": 0.05}}],
    "eat of specialists": [{**entry, "threat": {"norm": norm, "eps": 0.001}}
                           for entry, norm in zip(cohort("eat"), ("linf", "l2", "l1", "linf"), strict=True)],
    "projection": [{"loss": "at", "union": {"strategy": "ramp", "threats": EASY, "projection_beta": 0.5}}],
    "all, side by side": [*alone("ramp", EASY), *alone("eat", EASY),
                          {"loss": "trades", "optim": {"awp_gamma": 0.05, "awp_warmup_epochs": 0.1}}],
}


@pytest.mark.parametrize("memory", ["keep", pytest.param("recompute", marks=slow)])
@pytest.mark.parametrize("name", ["ramp", "eat", "awp", "projection", pytest.param("eat of specialists", marks=slow),
                                  pytest.param("all, side by side", marks=slow)])
def test_replicas_count_the_whole_batch(name: str, memory: str, run_ranks: Run) -> None:
    """Two ranks with half of the rows each, and different shares of right images, are one rank with all of them."""
    entries, count = TOGETHER[name], len(TOGETHER[name])
    models = nets(count, norm="group", dtype=torch.float64)
    config = configured(entries, precision="fp64", memory=memory)
    one, two = (run_ranks(lambda mesh: train(config, mesh, models, 4, dtype=torch.float64), count, world)
                for world in (count, 2 * count))
    hashes(two)
    assert 0 < largest_difference(one, two) < 1e-9
    counts = [{p.index: p.crafter.state() for c in cohorts for p in c.peers} for cohorts in (one, two)]
    assert counts[0] == counts[1] and one[0].draws.state() == two[0].draws.state() == two[-1].draws.state()
    if name == "eat of specialists":
        assert sum(one[0].draws.state()["3"]["held"]) > 0 and sum(one[0].draws.state()["3"]["seen"]) == 4 * 8
    if name == "eat":
        assert sum(counts[0][0]["eat"]["seen"]) == 4 * 8 and sum(counts[0][0]["eat"]["held"]) > 0


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=slow)])
def test_ranks_and_replicas_train_alike_on_mixed_labels(world: int, run_ranks: Run) -> None:
    models = nets(2, norm="group", dtype=torch.float64)
    config = configured([{"loss": {"preset": "mat", "label_smoothing": 0.1}}, *alone("max")], precision="fp64")
    def one_of(mesh: Mesh) -> Cohort:
        return train(config, mesh, models, 3, dtype=torch.float64, log=True, data=mixed_images)
    one, more = (run_ranks(one_of, 2, ranks) for ranks in (1, world))
    assert largest_difference(one, more) < 1e-9
    if world == 2:
        assert hashes(one) == hashes(more)


@slow
def test_micro_batches_add_up_to_one_natural_gradient(run_ranks: Run) -> None:
    entries = [{"loss": {"preset": "at", "clean_weight": 0.5}, "optim": {"clip_norm": 0.5},
                "union": {"strategy": "ramp", "threats": EASY, "projection_beta": 0.7, "ramp_weight": 0}}]
    models, runs = nets(1, norm="group", dtype=torch.float64), []
    for parts in (1, 2):
        config = configured(entries, precision="fp64", microbatches=parts)
        runs.append(run_ranks(lambda mesh, c=config: train(c, mesh, models, 3, dtype=torch.float64), 1, 1))
    assert 0 < largest_difference(*runs) < 1e-10


@slow
@pytest.mark.parametrize("setting", [{"memory": "recompute"}, {"microbatches": 2}])
def test_a_generalist_counts_alike_however_it_learns(setting: dict[str, Any], run_ranks: Run) -> None:
    models, runs = nets(4, norm="group", dtype=torch.float64), []
    for step in ({}, setting):
        config = configured(TOGETHER["eat of specialists"], precision="fp64", **step)
        runs.append(run_ranks(lambda mesh, c=config: train(c, mesh, models, 4, dtype=torch.float64), 4, 1))
    assert largest_difference(*runs) < 1e-10
    assert runs[0][0].draws.state() == runs[1][0].draws.state()


def test_a_refused_step_leaves_the_counts_on_specialists_as_they_were(run_ranks: Run) -> None:
    models, config = nets(4), configured(TOGETHER["eat of specialists"])
    def one(mesh: Mesh) -> None:
        cohort = build(config, mesh, models)
        for step in range(2):
            cohort.begin(step)
            train_step(cohort, *batch(step), step)
        before = cohort.draws.state()
        generalist = cohort.peers[3]
        learn = generalist.learn
        generalist.learn = lambda x, draw: learn(x, draw) * float("inf")  # type: ignore[method-assign]
        cohort.begin(2)
        with pytest.raises(MatError):
            train_step(cohort, *batch(2), 2)
        assert cohort.draws.state() == before and generalist.right == []
    run_ranks(one, 4, 1)


def test_a_generalist_draws_among_those_it_listens_to(run_ranks: Run) -> None:
    models, config = nets(4), configured(cohort("random"))
    def one(mesh: Mesh) -> list[Any]:
        cohort_ = build(config, mesh, models)
        cohort_.mute([0, 2], until=20)
        drawn = []
        for step in range(40):
            cohort_.begin(step)
            row = cohort_.plan.peers[3]
            drawn.append(row.drawn)
            assert row.learned == (row.drawn,) and row.hard == {row.drawn: 0.5} == row.distilled
        cohort_.mute([0, 1, 2], until=50)
        cohort_.begin(40)
        assert cohort_.plan.peers[3].drawn is None and cohort_.plan.peers[3].learned == ()
        resumed = build(config, mesh, models)
        resumed.mute([0, 1, 2], until=50)
        resumed.begin(40)
        assert resumed.plan == cohort_.plan
        return drawn
    (drawn,) = run_ranks(one, 4, 1)
    assert set(drawn[:20]) == {1} and set(drawn[20:]) == {0, 1, 2}


def test_replicas_pair_what_a_replica_alone_would_not(run_ranks: Run) -> None:
    """The pairing of RAMP with counts of its own on each replica is another loss, by far more than rounding."""
    models, config = nets(1, norm="group", dtype=torch.float64), configured(TOGETHER["ramp"], precision="fp64")
    def apart(mesh: Mesh) -> Cohort:
        cohort = build(config, mesh, models)
        for peer in cohort.peers:
            peer.loss = lambda *args, plain=peer.loss: plain(*args[:4])  # type: ignore[method-assign]
        for step in range(4):
            x, y = batch(step, dtype=torch.float64)
            train_step(cohort, x[cohort.rows], y[cohort.rows], step)
        return cohort
    whole = run_ranks(lambda mesh: train(config, mesh, models, 4, dtype=torch.float64), 1, 1)
    assert largest_difference(whole, run_ranks(apart, 1, 2)) > 1e-6


@pytest.mark.parametrize("world", [2, 4])
def test_a_replica_that_fails_before_awp_stops_all(world: int, run_ranks: Run) -> None:
    models, config = nets(2), configured(TOGETHER["awp"] * 2)
    def one(mesh: Mesh) -> str:
        return failed_step(build(config, mesh, models), "uphill", "no way up", here=mesh.placement.rank == world - 1)
    texts = set(run_ranks(one, 2, world))
    assert len(texts) == 1 and "no way up" in texts.pop()


# ------------------------------------------------------------------------------------------------ failures


REFUSED = [{**EAT, "optim": {"awp_gamma": 0.05, "ema_decay": 0.9}}, *CASES["mat+awp"].peers[:1]]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("fault", ["infinite loss", "error after the perturbation"])
def test_a_refused_step_gives_perturbed_weights_and_counts_back(fault: str, world: int, run_ranks: Run) -> None:
    models, config = nets(2), configured(REFUSED)
    def one(mesh: Mesh) -> tuple[dict[int, str], dict[int, str]]:
        cohort = build(config, mesh, models)
        for step in range(2):
            train_step(cohort, *batch(step), step)
        before = {p.index: state_hash(p.state()) for p in cohort.peers}
        for peer in cohort.peers:
            if peer.index == 1:
                def broken(x: torch.Tensor, draw: Any, learn: Any = peer.learn) -> torch.Tensor:
                    if fault == "infinite loss":
                        return learn(x, draw) * float("inf")
                    raise RuntimeError("the mat is out")
                peer.learn = broken  # type: ignore[method-assign]
        with pytest.raises(MatError):
            train_step(cohort, *batch(2), 2)
        return before, {p.index: state_hash(p.state()) for p in cohort.peers}
    for before, after in run_ranks(one, 2, world):
        assert before == after


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_lack_of_memory_leaves_awp_and_eat_as_they_are(where: str, run_ranks: Run) -> None:
    models, config = nets(2, dtype=torch.float64), configured(REFUSED, precision="fp64")
    def one(mesh: Mesh, short: bool) -> Cohort:
        cohort = build(config, mesh, models)
        calls: list[int] = []
        def lacking(*args: Any) -> None:
            if short and not calls:
                calls.append(1)
                raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        for peer in cohort.peers:
            def learn(x: torch.Tensor, draw: Any, plain: Any = peer.learn) -> torch.Tensor:
                if where == "forward":
                    lacking()
                logits = plain(x, draw)
                logits.register_hook(lacking)
                return logits
            peer.learn = learn  # type: ignore[method-assign]
        for step in range(3):
            train_step(cohort, *batch(step, dtype=torch.float64), step)
        assert bool(calls) == short
        return cohort
    plain, short = (run_ranks(lambda mesh, s=short: one(mesh, s), 2, 1) for short in (False, True))
    assert largest_difference(plain, short) < 1e-11
    assert [p.crafter.state() for p in plain[0].peers] == [p.crafter.state() for p in short[0].peers]
    assert sum(plain[0].peers[0].crafter.state()["eat"]["seen"]) == 3 * 8


def test_frozen_peers_do_not_change(run_ranks: Run) -> None:
    models = nets(3)
    teacher = {**TEACHER, "optim": {"awp_gamma": 0.1, "ema_decay": 0.9}}
    config = configured([{"loss": "rslad"}, teacher, {"loss": "mat"}])
    (cohort_,) = run_ranks(lambda mesh: train(config, mesh, models, 2, log=True), 3, 1)
    assert state_hash(cohort_.peers[1].model.state_dict()) == state_hash(models[1].state_dict())
    assert all(state_hash(cohort_.peers[i].model.state_dict()) != state_hash(models[i].state_dict()) for i in (0, 2))
