"""The arithmetic of who learns from what, of what travels, and of who lives where."""

from __future__ import annotations

from typing import Any

import pytest

from mat_dist.config.presets import fill_loss, fill_peer
from mat_dist.config.schema import LossConfig, PeerConfig
from mat_dist.core.graph import CLEAN, CohortGraph, View
from mat_dist.distributed.placement import Placement
from mat_dist.errors import EnvironmentFault

LINF, L2, L1 = ({"norm": norm, "eps": eps} for norm, eps in (("linf", 0.1), ("l2", 0.5), ("l1", 2.0)))
ALL = "linf:0.1,l2:0.5,l1:2"


def cohort(*entries: dict[str, Any], warming_up: tuple[int, ...] = ()) -> CohortGraph:
    """A graph; entries have preset, role, strategy, threats, threat, frozen, attack and other fields of the loss."""
    specs = []
    for entry in entries:
        own = dict(entry)
        union = {name: own.pop(name) for name in ("strategy", "threats") if name in own}
        peer = {name: own.pop(name) for name in ("role", "frozen", "threat") if name in own}
        attack = {"loss": own.pop("attack")} if "attack" in own else {}
        specs.append(PeerConfig.model_validate({**peer, "union": union, "attack": attack, "loss": own}))
    return CohortGraph.of([fill_peer(spec, i, len(specs)) for i, spec in enumerate(specs)], warming_up)


def equal_peers(preset: str, peers: int = 3, **loss: Any) -> CohortGraph:
    return cohort(*[{"preset": preset, **loss}] * peers)


def firsts(*makers: int) -> tuple[View, ...]:
    """The first views of these peers; -1: the clean images."""
    return tuple(View(maker) for maker in makers)


@pytest.mark.parametrize("preset,learned,taught,travels", [
    ("at", (1,), (), False),
    ("mat_share", (0, 2, 1), (), True),
    ("mat_kd", (1,), (0, 2), True),
    ("dml_at", (1,), (1,), False),
    ("mat", (0, 2, 1), (0, 1, 2), True),
    ("trades", (-1, 1), (), False),
    ("mat_trades", (0, 2, -1, 1), (0, 1, 2), True),
    ("cat", (-1, 1), (0, 2), True),
])
def test_every_preset_forwards_what_its_formula_needs_and_nothing_else(
        preset: str, learned: tuple[int, ...], taught: tuple[int, ...], travels: bool) -> None:
    graph = equal_peers(preset)
    assert graph.peers[1].learned == firsts(*learned)
    assert graph.taught[1] == firsts(*taught)
    assert graph.travelling == (set(firsts(0, 1, 2)) if travels else set())


def test_weights_of_a_peer_add_up_to_the_stated_totals() -> None:
    row = equal_peers("mat", 4, hard_own=0.7, kd_weight=0.4, kd_own=0.1).peers[2]
    assert row.hard == pytest.approx(dict(zip(firsts(0, 1, 2, 3), (0.06, 0.06, 0.42, 0.06), strict=True)))
    assert row.distilled == pytest.approx(dict(zip(firsts(0, 1, 2, 3), (0.12, 0.12, 0.04, 0.12), strict=True)))


def test_a_coefficient_left_open_is_named() -> None:
    full = fill_loss(LossConfig(), 0, 1)
    with pytest.raises(ValueError, match=r"loss\.kd_own, loss\.temperature"):
        CohortGraph.of([PeerConfig(loss=full.model_copy(update={"kd_own": None, "temperature": None}))])


def test_an_owner_teaches_only_on_its_own_examples() -> None:
    graph = equal_peers("mat", 3, teacher_set="owner")
    assert [graph.peers[0].teachers(View(j)) for j in range(3)] == [(), (1,), (2,)]
    assert graph.taught == (firsts(0), firsts(1), firsts(2))


def test_clean_teachers_forward_the_clean_images_without_learning_from_them() -> None:
    graph = equal_peers("mat_kd", 3, teacher_input="clean")
    assert graph.taught == ((CLEAN,),) * 3 and graph.forwarded(0) == (CLEAN,) and graph.travelling == set()


def test_every_view_has_a_number_of_its_own_that_keys_draws_and_first_views_have_their_maker_s() -> None:
    graph = cohort(*[{"preset": "at", "strategy": "avg", "threats": ALL}] * 4)
    views = [View(maker, threat) for maker in range(4) for threat in range(3)]
    for row in graph.peers:
        assert [row.number(View(maker)) for maker in range(4)] == [0, 1, 2, 3] and row.number(CLEAN) == 4
        assert [row.number(View(row.index, threat)) for threat in (1, 2)] == [5, 6]  # as in version 0.1
        assert len({row.number(view) for view in [CLEAN, *views]}) == 13


# ------------------------------------------------------------------------------------------------ roles and unions

SPECIALISTS: tuple[dict[str, Any], ...] = tuple({"role": "specialist", "threat": t} for t in (L1, L2))
GENERALIST: dict[str, Any] = {"role": "generalist"}
PEER: dict[str, Any] = {"role": "peer"}


def test_who_learns_from_whom() -> None:
    graph = cohort(*SPECIALISTS, GENERALIST, GENERALIST, PEER, {**PEER, "frozen": True},
                   {"role": "specialist", "frozen": True})
    teachers = [row.teachers_of_me for row in graph.peers]
    assert teachers[0] == teachers[1] == (2, 3, 4, 5, 6)  # not the other specialist, but the frozen one
    assert teachers[2] == teachers[3] == (0, 1, 4, 5, 6)
    assert teachers[4] == (0, 1, 2, 3, 5, 6)
    assert graph.peers[5].learned == () == graph.peers[6].learned


def test_mat_with_roles_is_specialists_alone_and_a_generalist_taught_by_owners() -> None:
    graph = cohort(*SPECIALISTS, GENERALIST)
    assert [row.hard for row in graph.peers[:2]] == [{View(0): 1.0}, {View(1): 1.0}]
    last = graph.peers[2]
    assert last.hard == dict.fromkeys(firsts(0, 1), 0.25) == last.distilled
    assert [last.teachers(View(maker)) for maker in range(3)] == [(0,), (1,), ()]
    assert [graph.crafted(i) for i in range(3)] == [firsts(0), firsts(1), ()]
    assert graph.taught == (firsts(0), firsts(1), ()) and last.learned == firsts(0, 1)
    assert graph.travelling == set(firsts(0, 1))


def test_a_specialist_that_is_fed_back_listens_to_the_generalist_on_its_own_examples() -> None:
    graph = cohort({**SPECIALISTS[0], "kd_weight": 0.4}, SPECIALISTS[1], GENERALIST)
    assert graph.peers[0].hard == {View(0): 0.6} and graph.peers[0].distilled == {View(0): 0.4}
    assert graph.peers[0].teachers(View(0)) == (2,) and graph.taught[2] == firsts(0)


@pytest.mark.parametrize("strategy", ["random", "eat", "msd"])
def test_a_generalist_that_crafts_weighs_its_own_example_as_much_as_the_specialists_together(strategy: str) -> None:
    last = cohort(*SPECIALISTS, {**GENERALIST, "strategy": strategy, "threats": ALL}).peers[2]
    assert last.hard == dict(zip(firsts(0, 1, 2), (0.125, 0.125, 0.25), strict=True))
    assert last.mine == firsts(2) and last.rivals == ()


@pytest.mark.parametrize("strategy,views", [("avg", 3), ("max", 3), ("ramp", 3), ("random", 1), ("eat", 1),
                                            ("msd", 1)])
def test_a_union_that_is_learnt_as_a_whole_has_a_view_for_each_threat(strategy: str, views: int) -> None:
    row = cohort({"preset": "at", "strategy": strategy, "threats": ALL}).peers[0]
    mine = tuple(View(0, n) for n in range(views))
    assert row.mine == mine and row.hard == pytest.approx(dict.fromkeys(mine, 1 / views))
    assert row.learned == (*mine[1:], mine[0])
    assert [row.threat_of(view).norm for view in mine] == ["linf", "l2", "l1"][:views]
    assert row.rivals == (mine if strategy in ("max", "ramp") else ())


def test_recompute_groups_hold_every_learned_view_once_in_order_and_coupled_ones_together() -> None:
    graphs = [equal_peers(preset) for preset in ("at", "mat", "mat_trades", "cat", "trades", "mat_share", "mart")]
    for strategy in ("avg", "max", "ramp", "msd"):
        for loss in ({}, {"clean_weight": 0.5}, {"pair_kl": 1.0}, {"pair_mse": 1.0, "kd_clean": 0.1}):
            own = {"strategy": strategy, "threats": ALL, **loss}
            graphs += [cohort(*SPECIALISTS, {**GENERALIST, "hard_own": 0.5, **own}, {"frozen": True}),
                       cohort({"preset": "at", **own})]
    for row in (row for graph in graphs for row in graph.peers):
        groups = row.groups()
        assert tuple(view for group in groups for view in group) == row.learned
        for needed in (set(row.rivals), {CLEAN, row.mine[0]} if row.paired else set()):
            assert not needed or any(needed <= set(group) for group in groups)


@pytest.mark.parametrize("preset,crafts,taught", [
    ("lbgat", (False, True), ((-1,), (1,))), ("peeraid", (False, True), ((1,), (1,))),
    ("at", (True, True), ((), ())), ("mat", (True, True), ((0, 1), (0, 1)))])
def test_examples_that_nobody_needs_are_not_made(preset: str, crafts: tuple[bool, ...],
                                                 taught: tuple[tuple[int, ...], ...]) -> None:
    graph = equal_peers(preset, 2)
    assert tuple(bool(graph.crafted(i)) for i in range(2)) == crafts
    assert graph.taught == tuple(firsts(*one) for one in taught)


@pytest.mark.parametrize("preset,learned,guides", [("rslad", (-1, 0), ((1,), ())), ("ard", (0,), ((), ()))])
def test_a_frozen_teacher_looks_at_clean_images_and_makes_no_examples(preset: str, learned: tuple[int, ...],
                                                                    guides: tuple[tuple[int, ...], ...]) -> None:
    graph = cohort({"preset": preset}, {"frozen": True})
    assert graph.peers[0].learned == firsts(*learned) and graph.guides == guides
    assert graph.crafted(0) == firsts(0) and graph.crafted(1) == ()
    assert graph.taught == ((), (CLEAN,)) and graph.forwarded(1) == (CLEAN,) and graph.travelling == set()


def test_all_peers_guide_an_attack_where_none_is_frozen() -> None:
    entries = [{"preset": "mat", "attack": "kl_teacher"}] * 3
    assert cohort(*entries).guides == ((1, 2), (0, 2), (0, 1))
    assert cohort(*entries, {"frozen": True}).guides[:2] == ((3,), (3,))


def test_a_warm_up_gives_the_whole_weight_to_own_examples() -> None:
    entries = [{"preset": "mat", "hard_own": 0.5, "kd_weight": 0.4, "kd_clean": 0.1, "clean_weight": 0.3}] * 3
    warm = cohort(*entries, warming_up=(1,))
    assert warm.peers[1].hard == pytest.approx({View(1): 1.1, CLEAN: 0.3}) and warm.peers[1].distilled == {}
    assert warm.peers[0] == cohort(*entries).peers[0] and warm != cohort(*entries)


def test_pure_distillation_has_no_hard_labels_to_warm_up_with() -> None:
    assert cohort({"preset": "rslad"}, {"frozen": True}, warming_up=(0,)).peers[0].learned == ()


# ------------------------------------------------------------------------------------------------ any view travels

THREE_SPECIALISTS = tuple({"role": "specialist", "threat": threat} for threat in (LINF, L2, L1))


def with_experts(**loss: Any) -> CohortGraph:
    return cohort(*THREE_SPECIALISTS, {**GENERALIST, "strategy": "avg", "threats": ALL, "teacher_set": "expert",
                                       "hard_own": 1, "kd_own": 1, **loss})


def test_an_expert_teaches_on_the_views_of_its_norm_and_only_these_travel() -> None:
    graph = with_experts()
    mine = tuple(View(3, n) for n in range(3))
    assert [graph.peers[3].teachers(view) for view in mine] == [(0,), (1,), (2,)]
    assert graph.taught == (mine[:1], mine[1:2], mine[2:], ())
    assert graph.travelling == set(mine)  # the specialists' own ones stay home
    assert [graph.forwarded(i) for i in range(4)] == [mine[:1], mine[1:2], mine[2:], ()]
    assert [graph.crafted(i) for i in range(4)] == [*(firsts(i) for i in range(3)), mine]


def test_experts_teach_on_each_others_views_too_where_the_student_learns_from_them() -> None:
    graph = with_experts(hard_own=0.5, kd_own=0.5)
    assert graph.travelling == set(firsts(0, 1, 2)) | {View(3, n) for n in range(3)}
    assert graph.taught == (*tuple((*firsts(n), View(3, n)) for n in range(3)), ())
    assert graph.peers[3].distilled == pytest.approx(dict.fromkeys(graph.travelling, 0.5 / 6))


@pytest.mark.parametrize("ranks,sent,width", [
    ([(0, 1, 2, 3)], [["00", "10", "20", "30", "31", "32"]], 6),
    ([(0, 1), (2, 3)], [["00", "10"], ["20", "30", "31", "32"]], 4),
    ([(0,), (1,), (2,), (3,)], [["00"], ["10"], ["20"], ["30", "31", "32"]], 3)])
def test_a_rank_sends_the_views_that_others_need_and_all_send_as_many_as_the_one_with_most(
        ranks: list[tuple[int, ...]], sent: list[list[str]], width: int) -> None:
    graph = with_experts(hard_own=0.5)
    assert [["".join(map(str, view)) for view in graph.sent(peers)] for peers in ranks] == sent
    assert graph.width(ranks) == width


def test_at_log_steps_every_first_view_is_sent_and_further_ones_only_where_they_are_needed() -> None:
    alone = cohort({"preset": "at", "strategy": "avg", "threats": ALL}, {"preset": "at"})
    assert alone.travelling == set() and alone.sent([0, 1]) == [] and alone.width([(0,), (1,)]) == 0
    assert alone.sent([0, 1], log=True) == list(firsts(0, 1)) and alone.width([(0,), (1,)], log=True) == 1
    assert with_experts().sent([0, 3]) == [View(3, n) for n in range(3)]
    assert with_experts().sent([0, 3], log=True) == [View(0), *(View(3, n) for n in range(3))]


def test_opinions_are_gathered_in_as_many_places_as_the_busiest_teacher_needs() -> None:
    graph = with_experts(hard_own=0.5, kd_own=0.5)
    assert graph.most_taught == 2 and cohort({"preset": "at"}).most_taught == 0
    assert graph.position == {(n, view): place for n in range(3) for place, view in enumerate((View(n), View(3, n)))}


def test_specialists_may_learn_from_each_of_the_generalist_s_views() -> None:
    specialist = {**THREE_SPECIALISTS[0], "hard_own": 0.25, "kd_weight": 0.4, "kd_own": 0.0}
    graph = cohort(specialist, *THREE_SPECIALISTS[1:], {**GENERALIST, "strategy": "max", "threats": ALL, "hard_own": 1})
    views = [View(3, n) for n in range(3)]
    assert graph.peers[0].hard == pytest.approx({View(0): 0.15, **dict.fromkeys(views, 0.15)})
    assert graph.peers[0].distilled == pytest.approx(dict.fromkeys(views, 0.4 / 3))
    assert graph.peers[0].learned == (*views, View(0)) and graph.taught[3] == tuple(views)
    assert set(views) <= graph.travelling and View(0) not in graph.peers[1].learned


# ------------------------------------------------------------------------------------------------ placement


@pytest.mark.parametrize("peers", [1, 2, 3, 4, 6])
def test_every_legal_world_hosts_every_peer_on_every_replica_once(peers: int) -> None:
    for world in range(1, 17):
        legal = peers % world == 0 or world % peers == 0
        if not legal:
            with pytest.raises(EnvironmentFault, match="do not fit"):
                Placement.place(peers, world, 0)
            continue
        ranks = [Placement.place(peers, world, r) for r in range(world)]
        for group in ranks[0].peer_axis():
            assert [p for r in group for p in ranks[r].local_peers] == list(range(peers))
        for group in ranks[0].replica_axis():
            assert len({tuple(ranks[r].local_peers) for r in group}) == 1
            assert [ranks[r].replica for r in group] == list(range(ranks[0].replicas))
        rows = [ranks[r].shard(24) for r in ranks[0].replica_axis()[0]] if 24 % ranks[0].replicas == 0 else []
        assert [i for s in rows for i in range(s.start, s.stop)] == (list(range(24)) if rows else [])


def test_unequal_shards_are_refused() -> None:
    with pytest.raises(EnvironmentFault, match="multiple of 3"):
        Placement.place(2, 6, 0).shard(10)
