"""Ranks, replicas, micro-batches and memory: where and how a cohort trains does not change what it learns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mat_dist.attacks.attack_copy import AttackCopy
from mat_dist.config.schema import Config
from mat_dist.core.cohort import Cohort
from mat_dist.core.graph import PeerGraph, View
from mat_dist.core.hooks import Hook, Views
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import ConfigError
from tests.cohorts import (
    BATCH,
    batch,
    build,
    cohort_config,
    cut,
    first_view,
    hashes,
    largest_difference,
    nets,
    one_step,
    resumed_and_refused,
    train,
)
from tests.ranks.test_reference import AWP, CASES, EXPERTS, L1, LINF, TEACHER, alone, cohort, experts
from tests.reference_mat import configured, mixed_images

Run = Callable[..., list[Any]]
slow = pytest.mark.slow
fp32 = partial(configured, precision="fp32")
EAT = {**alone("eat", "linf:0.1,l1:2")[0], "optim": {"ema_decay": 0.9}}
TWO_BY_TWO = [experts("avg", (LINF, L1), hard_own=0.5)[i] for i in (0, 2, 1, 2)]  # each generalist hears both
SPREAD: dict[str, list[dict[str, Any]]] = {
    "generalist": cohort("ramp", kd_weight=0.5),
    "max of each peer beside a generalist": [*alone("max"), *cohort("max")[1:]],
    "peeraid": CASES["peeraid"].peers,
    "rslad": [{"loss": "rslad"}, TEACHER],
    "two students of two teachers": [{"loss": "rslad"}, TEACHER,
                                     {"loss": {"preset": "ard", "hard_weight": 0.5}}, TEACHER],
    "lbgat": [{"loss": "lbgat", **AWP}] * 2,
    "awp": [{"loss": "mat", **AWP}] * 4,
    "eat": [EAT] * 2,
    "msd, random, avg": [*alone("msd"), *alone("random"), *alone("avg"), *alone("max")],
    "mart": [{"loss": {"preset": "mart", "kd_weight": 0.5, "kd_own": 0.5}}] * 4,
    "trust": [{"loss": {"preset": "mat", "kd_where": "teacher_right", "warmup_epochs": 0.1}}] * 4,
    **{name: EXPERTS[name].peers for name in EXPERTS if len(EXPERTS[name].peers) == 4},
    "generalists beside specialists": TWO_BY_TWO,
    "views of unions among peers": [*alone("avg"), {"loss": "mat"}, *alone("max"), {"loss": "mat"}],
}
FAST = ("rslad", "eat", "mat_union, all ways", "experts, fed back")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=slow) for name in SPREAD])
def test_ranks_do_not_change_a_bit(name: str, run_ranks: Run) -> None:
    count = len(SPREAD[name])
    models, config = nets(count), fp32(SPREAD[name])
    one = hashes(run_ranks(lambda mesh: train(config, mesh, models, 3), count, 1))
    for world in sorted({2, count}):
        assert hashes(run_ranks(lambda mesh: train(config, mesh, models, 3, log=True), count, world)) == one


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("preset", ["mat", "cat", ["at", "mat_kd", "trades", "dml_at"]])
def test_ranks_do_not_change_a_bit_of_presets_with_averaged_weights_and_clipping(preset: Any, world: int,
                                                                                 run_ranks: Run) -> None:
    models = nets(4)
    config = cohort_config(preset, 4, optim={"ema_decay": 0.9, "clip_norm": 1.0})
    one = run_ranks(lambda mesh: train(config, mesh, models, 6), 4, 1)
    spread = run_ranks(lambda mesh: train(config, mesh, models, 6, log=True), 4, world)
    assert hashes(spread) == hashes(one)


@slow
@pytest.mark.parametrize("name", ["raw", "experts"])
def test_ranks_do_not_change_a_bit_with_averaged_teachers(name: str, run_ranks: Run) -> None:
    models = nets(4)
    peers = [{"loss": "mat"}] * 3 + [TEACHER] if name == "raw" else experts("max", hard_own=0.5)
    averaging = [{**peer, "optim": {"ema_decay": 0.6}} for peer in peers]
    runs = [hashes(run_ranks(lambda mesh: train(fp32(averaging, teachers="ema"), mesh, models, 3), 4, world))
            for world in (1, 2, 4)]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("form", ["fp16", "int8"])
@pytest.mark.parametrize("peers", ["mat", "at", "experts"])
def test_shortened_aes_are_the_same_for_every_placement_and_move_the_weights_little(peers: str, form: str,
                                                                                   run_ranks: Run) -> None:
    """With `at` only log steps exchange AEs: what a peer trains on keeps all its bits, whether or not it is logged."""
    def config(**step: Any) -> Config:
        if peers == "experts":
            return fp32(experts("avg", hard_own=0.5), 3, **step)
        return cohort_config(peers, 4, step=step)

    models = nets(4)
    one = run_ranks(lambda mesh: train(config(wire=form), mesh, models, 4), 4, 1)
    spread = run_ranks(lambda mesh: train(config(wire=form), mesh, models, 4, log=True), 4, 4)
    assert hashes(spread) == hashes(one)
    full = run_ranks(lambda mesh: train(config(), mesh, models, 1), 4, 1)
    short = run_ranks(lambda mesh: train(config(wire=form), mesh, models, 1), 4, 1)
    moved = largest_difference(full, short)
    assert moved == 0 if peers == "at" else 0 < moved < 1e-2


@pytest.mark.parametrize("index", [0, 2, 3])
def test_an_at_peer_of_four_is_bitwise_a_cohort_of_one(index: int, run_ranks: Run) -> None:
    models = nets(4)
    four = run_ranks(lambda mesh: train(cohort_config("at", 4), mesh, models, 5), 4, 2)
    config = cohort_config("at", 1, entry={"stream": index, "name": f"peer{index}"})
    one = run_ranks(lambda mesh: train(config, mesh, [models[index]], 5), 1, 1)
    assert hashes(four)[index] == hashes(one)[0]


@pytest.mark.parametrize("name", ["mat_union, all ways", "experts, fed back"])
def test_a_resumed_cohort_of_experts_goes_on_bit_by_bit(name: str, run_ranks: Run) -> None:
    models, config = nets(4), fp32(EXPERTS[name].peers)
    run_ranks(lambda mesh: resumed_and_refused(partial(train, config, mesh, models), 5, 2), 4, 1)


# ------------------------------------------------------------------------------------------------ what travels


@pytest.mark.parametrize("world,sent", [(1, [6]), (2, [2, 4]), (4, [1, 1, 1, 3])])
def test_ranks_send_as_many_views_as_the_one_with_most_and_zeros_for_what_they_lack(
        world: int, sent: list[int], run_ranks: Run) -> None:
    models, config = nets(4), fp32(experts("avg", hard_own=0.5))

    def one(mesh: Mesh) -> tuple[int, int, bool]:
        cohort, seen = build(config, mesh, models), []
        plain = cohort.packed
        cohort.packed = lambda *args: seen.append(plain(*args)) or seen[0]  # type: ignore[method-assign]
        one_step(cohort, 0)
        filled = [bool(view.any()) for view in seen[0]]
        return len(filled), sum(filled), sorted(filled, reverse=True) == filled

    found = run_ranks(one, 4, world)
    assert found == [(max(sent), count, True) for count in sent]


def test_a_view_that_nobody_else_needs_neither_travels_nor_changes_hands(run_ranks: Run) -> None:
    """A union that is learnt at home: nothing but headers and the vote, except at log steps."""
    models, config = nets(2), fp32([*alone("max"), {"loss": "at"}])

    def one(mesh: Mesh) -> list[int]:
        cohort, gathered = build(config, mesh, models), []
        plain = mesh.gather_peers
        mesh.gather_peers = lambda local: gathered.append(len(local)) or plain(local)  # type: ignore[method-assign]
        one_step(cohort, 0)
        quiet = list(gathered)
        one_step(cohort, 1, log=True)
        assert cohort.graph.travelling == frozenset()
        return [*quiet, gathered[0]]

    assert run_ranks(one, 2, 2) == [[1], [1]]  # the first view of each peer, for the transfer table


def test_what_nobody_learns_or_teaches_on_is_not_made(run_ranks: Run) -> None:
    """The first net of LBGAT learns clean images: no attack but for the transfer table of a log step."""
    models, made = nets(2), []

    def one(mesh: Mesh) -> None:
        cohort = build(fp32(CASES["lbgat"].peers), mesh, models)
        for peer in cohort.peers:
            def noting(part: Any, views: Any, guide: Any, attack: Any = peer.attack) -> Any:
                made.append(tuple(views))
                return attack(part, views, guide)
            peer.attack = noting  # type: ignore[method-assign]
        one_step(cohort, 0)
        one_step(cohort, 1, log=True)

    run_ranks(one, 2, 1)
    assert made == [(), (View(1),), (View(0),), (View(1),)]


# ------------------------------------------------------------------------------------------------ memory, micro-batches


@pytest.mark.parametrize("preset", ["at", "mat", "mat_share", "mat_trades", "cat", "dml_at"])
def test_recompute_equals_keep_for_every_preset(preset: str, run_ranks: Run) -> None:
    models, runs = nets(3, dtype=torch.float64), []
    for memory in ("keep", "recompute"):
        config = cohort_config(preset, 3, step={"precision": "fp64", "memory": memory})
        runs.append(run_ranks(lambda mesh, c=config: train(c, mesh, models, 4), 3, 1))
    assert largest_difference(*runs) < 1e-11


RECOMPUTED = ("max", "ramp", "ramp+projection", "mart", "rslad", "lbgat", "peeraid", "mat+awp", "trades+awp",
              "mart+awp", "teachers=ema", "generalist ramp", "generalist that feeds back", *EXPERTS)


@pytest.mark.parametrize("name", [n if n == "mat_union, all ways" else pytest.param(n, marks=slow)
                                  for n in RECOMPUTED])
def test_recompute_equals_keep(name: str, run_ranks: Run) -> None:
    count = len(CASES[name].peers)
    models, runs = nets(count, dtype=torch.float64), []
    for memory in ("keep", "recompute"):
        config = CASES[name].config(memory=memory)
        runs.append(run_ranks(lambda mesh, c=config: train(c, mesh, models, 3), count, 1))
    assert largest_difference(*runs) < 1e-11


def test_recompute_keeps_the_order_of_forwards_where_clean_images_lie_between_rivals(run_ranks: Run) -> None:
    """The running statistics depend on the order."""
    entries = [{**alone("max")[0], "loss": {"preset": "at", "clean_weight": 0.5}}]
    models, runs = nets(1, dtype=torch.float64), []
    for memory in ("keep", "recompute"):
        config = configured(entries, memory=memory)
        runs.append(run_ranks(lambda mesh, c=config: train(c, mesh, models, 3), 1, 1))
    assert largest_difference(*runs) < 1e-11


class Pulling(Hook):
    """A method of somebody's own: the logits on two views of the cohort come together."""

    views = (View(2), View(0))

    def couples(self, row: PeerGraph) -> Sequence[View]:
        return self.views

    def loss(self, row: PeerGraph, logits: Views, y_B: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
        return (logits[View(2)] - logits[View(0)]).square().mean()


def pulled(run_ranks: Run, memory: str, preset: str = "mat_share") -> list[Cohort]:
    models, step = nets(3, dtype=torch.float64), {"precision": "fp64", "memory": memory}
    config = cohort_config(preset, 3, step=step)

    def one(mesh: Mesh) -> Cohort:
        cohort = build(config, mesh, models)
        for peer in cohort.peers:
            peer.hooks.append(Pulling(peer))
        return train(config, mesh, models, 3, cohort=cohort)

    return run_ranks(one, 3, 1)


def test_recompute_equals_keep_where_a_method_couples_views_of_others(run_ranks: Run) -> None:
    assert largest_difference(pulled(run_ranks, "keep"), pulled(run_ranks, "recompute")) < 1e-11


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_a_method_that_couples_a_view_that_its_peer_does_not_learn_is_told_so(memory: str, run_ranks: Run) -> None:
    with pytest.raises(ConfigError, match=r"View\(maker=2.*does not learn from.*Pulling.couples.*row.learned"):
        pulled(run_ranks, memory, "at")


@pytest.mark.parametrize("preset", ["mat", "mat_trades"])
def test_microbatches_equal_the_plain_step_without_batch_norm(preset: str, run_ranks: Run) -> None:
    models = nets(3, norm="group", dtype=torch.float64)
    reference, parts = (cohort_config(preset, 3, step={"precision": "fp64"}, train=cut(n)) for n in (1, 4))
    plain = run_ranks(lambda mesh: train(reference, mesh, models, 4), 3, 1)
    assert largest_difference(plain, run_ranks(lambda mesh: train(parts, mesh, models, 4), 3, 3)) < 1e-10


REPLICATED = ("mart", "rslad", "student_wrong", "generalist max", "mat_union, all ways", "experts, fed back")


@slow
@pytest.mark.parametrize("name", ["max", "lbgat", "peeraid", *REPLICATED])
def test_microbatches_and_replicas_equal_the_plain_step_of_a_case(name: str, run_ranks: Run) -> None:
    count = len(CASES[name].peers)
    models = nets(count, norm="group", dtype=torch.float64)
    def result(world: int, **step: Any) -> list[Cohort]:
        return run_ranks(lambda mesh: train(CASES[name].config(**step), mesh, models, 3), count, world)
    assert largest_difference(result(1), result(1, accumulate=2)) < 1e-10
    if name in REPLICATED:
        models = nets(count, dtype=torch.float64)
        assert largest_difference(result(1), result(2 * count)) < 1e-9


@slow
def test_micro_batches_add_up_to_one_natural_gradient(run_ranks: Run) -> None:
    entries = [{"loss": {"preset": "at", "clean_weight": 0.5}, "optim": {"clip_norm": 0.5},
                "union": {"strategy": "ramp", "threats": EASY}, "methods": {"ramp": {"projection": 0.7, "weight": 0}}}]
    models, runs = nets(1, norm="group", dtype=torch.float64), []
    for parts in (1, 2):
        config = configured(entries, accumulate=parts)
        runs.append(run_ranks(lambda mesh, c=config: train(c, mesh, models, 3), 1, 1))
    assert 0 < largest_difference(*runs) < 1e-10


# ------------------------------------------------------------------------------------------------ replicas


def test_eight_ranks_agree_with_four_to_1e_9_in_fp64(run_ranks: Run) -> None:
    models = nets(4, dtype=torch.float64)
    config = cohort_config("mat", 4, step={"precision": "fp64"}, optim={"clip_norm": 0.5, "ema_decay": 0.9})
    four = run_ranks(lambda mesh: train(config, mesh, models, 5), 4, 4)
    eight = run_ranks(lambda mesh: train(config, mesh, models, 5), 4, 8)
    hashes(eight)
    assert 0 < largest_difference(four, eight) < 1e-9


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_replicas_train_the_function_of_one_with_batch_norm_and_keep_equal_bits(memory: str, run_ranks: Run) -> None:
    """Weights, averaged weights, running statistics and their counters, on 1, 2 and 4 ranks."""
    models = nets(1, dtype=torch.float64)
    config = cohort_config("trades", 1, step={"precision": "fp64", "memory": memory}, optim={"ema_decay": 0.9})
    one, two, four = (run_ranks(lambda mesh: train(config, mesh, models, 4, log=True), 1, world)
                      for world in (1, 2, 4))
    assert all(largest_difference(one, more) < 1e-9 and hashes(more) for more in (two, four))
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(one[0].peers[0].ema.values(), four[0].peers[0].ema.values(),
                                                         strict=True))


def test_an_attack_of_replicas_runs_on_a_folded_copy_with_the_statistics_of_the_whole_batch(run_ranks: Run) -> None:
    models, config = nets(1, dtype=torch.float64), cohort_config("at", 1, step={"precision": "fp64"})

    def one(mesh: Mesh) -> Tensor:
        cohort = train(config, mesh, models, 2)
        (peer,) = cohort.peers
        assert peer.notes == [] and copy.deepcopy(peer.model) is not peer.model
        called = peer.attack_of_training._called
        assert isinstance(called, AttackCopy) and not [m for m in called._called.modules()
                                                       if isinstance(m, nn.BatchNorm2d)]
        return first_view(peer, *batch(9, dtype=torch.float64))

    (whole,) = run_ranks(one, 1, 1)
    for adv in run_ranks(one, 1, 2):
        assert (adv - whole).abs().max() < 1e-9


def test_a_batch_is_split_over_replicas_in_order(run_ranks: Run) -> None:
    models = nets(2)
    rows = run_ranks(lambda mesh: build(cohort_config("at", 2), mesh, models).rows, 2, 4)
    assert rows == [slice(0, BATCH // 2)] * 2 + [slice(BATCH // 2, BATCH)] * 2


EASY = "linf:0.001,l2:0.01,l1:0.01"  # so weak that images stay right: RAMP pairs them, E-AT counts them
STEEP = {"methods": {"awp": {"gamma": 0.05}}}
TOGETHER: dict[str, list[dict[str, Any]]] = {  # what needs more than each replica's own rows
    "ramp": alone("ramp", EASY),
    "eat": alone("eat", EASY),
    "awp": [{"loss": "at", **STEEP}],
    "projection": [{"loss": "at", "union": {"strategy": "ramp", "threats": EASY},
                    "methods": {"ramp": {"projection": 0.5}}}],
    "all, side by side": [*alone("ramp", EASY), *alone("eat", EASY), {"loss": "trades", **STEEP}],
}


@pytest.mark.parametrize("memory", ["keep", pytest.param("recompute", marks=slow)])
@pytest.mark.parametrize("name", ["ramp", "eat", "awp", "projection",
                                  pytest.param("all, side by side", marks=slow)])
def test_replicas_count_the_whole_batch(name: str, memory: str, run_ranks: Run) -> None:
    """Two ranks with half of the rows each, and different shares of right images, are one rank with all of them."""
    entries, count = TOGETHER[name], len(TOGETHER[name])
    models = nets(count, norm="batch" if name in ("awp", "projection") else "group", dtype=torch.float64)
    config = configured(entries, memory=memory)
    one, two = (run_ranks(lambda mesh: train(config, mesh, models, 4), count, world) for world in (count, 2 * count))
    hashes(two)
    assert 0 < largest_difference(one, two) < 1e-9
    counts = [{p.index: p.state()["methods"] for c in cohorts for p in c.peers} for cohorts in (one, two)]
    assert counts[0] == counts[1]
    if name == "eat":
        told = counts[0][0]["unions"]["eat"]
        assert sum(told["seen"]) == 4 * BATCH and sum(told["held"]) > 0


def test_replicas_pair_what_a_replica_alone_would_not(run_ranks: Run) -> None:
    """The pairing of RAMP with counts of its own on each replica is another loss, by far more than rounding."""
    models, config = nets(1, norm="group", dtype=torch.float64), configured(TOGETHER["ramp"])
    def apart(mesh: Mesh) -> Cohort:
        cohort = build(config, mesh, models)
        cohort.counts = False
        return train(config, mesh, models, 4, cohort=cohort)
    whole = run_ranks(lambda mesh: train(config, mesh, models, 4), 1, 1)
    assert largest_difference(whole, run_ranks(apart, 1, 2)) > 1e-6


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=slow)])
def test_ranks_and_replicas_train_alike_on_mixed_labels(world: int, run_ranks: Run) -> None:
    models = nets(2, dtype=torch.float64)
    config = configured([{"loss": {"preset": "mat", "label_smoothing": 0.1}}, *alone("max")])
    one, more = (run_ranks(lambda mesh: train(config, mesh, models, 3, log=True, data=mixed_images), 2, ranks)
                 for ranks in (1, world))
    assert largest_difference(one, more) < 1e-9
    if world == 2:
        assert hashes(one) == hashes(more)
