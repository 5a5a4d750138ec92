"""The arithmetic of who learns from what, and of who lives where."""

from __future__ import annotations

from typing import Any

import pytest

from mat_dist.config.presets import fill_loss
from mat_dist.config.schema import AttackConfig, LossConfig, OptimConfig, PeerConfig, ThreatConfig, UnionConfig
from mat_dist.core.graph import CohortPlan
from mat_dist.core.optim import ema_decay_at, lr_at
from mat_dist.distributed.placement import Placement
from mat_dist.errors import EnvironmentFault


def plan(preset: str, peers: int = 3, **loss: object) -> CohortPlan:
    sections = [LossConfig(preset=preset, **loss) for _ in range(peers)]  # type: ignore[arg-type]
    return CohortPlan.of([PeerConfig(loss=fill_loss(section, i, peers)) for i, section in enumerate(sections)])


@pytest.mark.parametrize("preset,learned,taught,shares", [
    ("at", (1,), (), False),
    ("mat_share", (0, 2, 1), (), True),
    ("mat_kd", (1,), (0, 2), True),
    ("dml_at", (1,), (1,), False),
    ("mat", (0, 2, 1), (0, 1, 2), True),
    ("trades", (3, 1), (), False),
    ("mat_trades", (0, 2, 3, 1), (0, 1, 2), True),
    ("cat", (3, 1), (0, 2), True),
])
def test_every_preset_forwards_what_its_formula_needs_and_nothing_else(
        preset: str, learned: tuple[int, ...], taught: tuple[int, ...], shares: bool) -> None:
    cohort = plan(preset)
    assert cohort.peers[1].learned == learned
    assert cohort.taught[1] == taught
    assert cohort.shares_aes == shares


def test_weights_of_a_row_add_up_to_the_stated_totals() -> None:
    row = plan("mat", 4, hard_own=0.7, kd_weight=0.4, kd_own=0.1).peers[2]
    assert row.hard == pytest.approx({0: 0.06, 1: 0.06, 2: 0.42, 3: 0.06})
    assert row.distilled == pytest.approx({0: 0.12, 1: 0.12, 2: 0.04, 3: 0.12})


def test_a_coefficient_left_open_is_named() -> None:
    full = fill_loss(LossConfig(), 0, 1)
    with pytest.raises(ValueError, match=r"loss\.kd_own, loss\.temperature"):
        CohortPlan.of([PeerConfig(loss=full.model_copy(update={"kd_own": None, "temperature": None}))])


def test_muting_moves_shares_to_the_others_and_is_undone_by_muting_nobody() -> None:
    cohort = plan("mat", 4, hard_own=0.7)
    row = cohort.listening([2], []).peers[0]
    assert row.hard == pytest.approx({0: 0.35, 1: 0.075, 3: 0.075}) and row.teachers(0) == (1, 3)
    assert cohort.listening([2], []).listening([], []) == cohort


def test_only_one_attacks_in_its_turn_and_all_learn_from_it() -> None:
    cohort = plan("mat", 4, attackers="one")
    assert cohort.period == 4 and plan("mat", 4).period == 1
    for turn in range(8):
        now = cohort.listening([], [], turn)
        assert now.crafts == tuple(i == turn % 4 for i in range(4)) and now.taught == ((turn % 4,),) * 4
        assert all(row.hard == {turn % 4: 0.5} == row.distilled for row in now.peers)
    muted = cohort.listening([1], [], 1)  # of 0, 2, 3 the second; the muted one attacks itself, of all four
    assert [row.source for row in muted.peers] == [2, 1, 2, 2]


def test_partners_go_round_and_each_peer_is_the_partner_of_one() -> None:
    cohort = plan("mat", 4, attackers="partner", hard_own=0.75)
    assert cohort.period == 3
    for turn in range(3):
        rows = cohort.listening([], [], turn).peers
        partners = [(k + 1 + turn) % 4 for k in range(4)]
        assert [row.learned for row in rows] == [(p, k) for k, p in enumerate(partners)]
        assert [row.hard for row in rows] == [{k: 0.375, p: 0.125} for k, p in enumerate(partners)]
        assert [row.distilled for row in rows] == [{k: 0.25, p: 0.25} for k, p in enumerate(partners)]


def test_an_owner_teaches_only_on_its_own_examples() -> None:
    cohort = plan("mat", 3, teacher_set="owner")
    assert [cohort.peers[0].teachers(j) for j in range(3)] == [(), (1,), (2,)]
    assert cohort.taught == ((0,), (1,), (2,))


def test_clean_teachers_forward_the_clean_images_without_learning_from_them() -> None:
    cohort = plan("mat_kd", 3, teacher_input="clean")
    assert cohort.taught == ((3,), (3,), (3,)) and cohort.forwarded(0) == (3,) and not cohort.shares_aes


def test_recompute_groups_hold_every_learned_slot_once_in_order() -> None:
    for preset in ("at", "mat", "mat_trades", "cat", "trades", "mat_share"):
        for row in plan(preset).peers:
            assert tuple(s for group in row.groups() for s in group) == row.learned


# ------------------------------------------------------------------------------------------------ roles and unions

L1 = ThreatConfig(norm="l1", eps=2.0)
L2 = ThreatConfig(norm="l2", eps=0.5)
ALL = "linf:0.1,l2:0.5,l1:2"


def cohort(*entries: dict[str, Any]) -> CohortPlan:
    """A plan; entries have preset, role, strategy, threats, threat, frozen and other fields of the loss."""
    specs = []
    for i, entry in enumerate(entries):
        own = dict(entry)
        union = UnionConfig(strategy=own.pop("strategy", None), threats=own.pop("threats", None))
        role, frozen, threat = own.pop("role", "peer"), own.pop("frozen", False), own.pop("threat", ThreatConfig())
        attack = AttackConfig(loss=own.pop("attack", "ce"))
        loss = fill_loss(LossConfig(**own), i, len(entries), role, union)
        specs.append(PeerConfig(role=role, frozen=frozen, threat=threat, union=union, attack=attack, loss=loss))
    return CohortPlan.of(specs)


SPECIALISTS: tuple[dict[str, Any], ...] = tuple({"role": "specialist", "threat": t} for t in (L1, L2))
GENERALIST: dict[str, Any] = {"role": "generalist"}
PEER: dict[str, Any] = {"role": "peer"}


def test_who_hears_whom() -> None:
    plan_ = cohort(*SPECIALISTS, GENERALIST, GENERALIST, PEER, {**PEER, "frozen": True},
                   {"role": "specialist", "frozen": True})
    heard = [row.heard for row in plan_.peers]
    assert heard[0] == (2, 3, 4, 5, 6) and heard[1] == (2, 3, 4, 5, 6)  # not the other specialist, but the frozen one
    assert heard[2] == (0, 1, 4, 5, 6) and heard[3] == (0, 1, 4, 5, 6)
    assert heard[4] == (0, 1, 2, 3, 5, 6)
    assert plan_.peers[5].learned == () == plan_.peers[6].learned


def test_mat_with_roles_is_specialists_alone_and_a_generalist_taught_by_owners() -> None:
    plan_ = cohort(*SPECIALISTS, GENERALIST)
    assert [row.hard for row in plan_.peers[:2]] == [{0: 1.0}, {1: 1.0}]
    last = plan_.peers[2]
    assert last.hard == {0: 0.25, 1: 0.25} and last.distilled == {0: 0.25, 1: 0.25}
    assert [last.teachers(slot) for slot in range(3)] == [(0,), (1,), ()]
    assert plan_.crafts == (True, True, False) and plan_.taught == ((0,), (1,), ())
    assert plan_.shares_aes and last.learned == (0, 1)


def test_a_specialist_that_is_fed_back_listens_to_the_generalist_on_its_own_examples() -> None:
    plan_ = cohort({**SPECIALISTS[0], "kd_weight": 0.4}, SPECIALISTS[1], GENERALIST)
    assert plan_.peers[0].hard == {0: 0.6} and plan_.peers[0].distilled == {0: 0.4}
    assert plan_.peers[0].teachers(0) == (2,) and plan_.taught[2] == (0,)


@pytest.mark.parametrize("strategy", ["random", "eat", "msd"])
def test_a_generalist_that_crafts_weighs_its_own_example_as_much_as_the_specialists_together(strategy: str) -> None:
    last = cohort(*SPECIALISTS, {**GENERALIST, "strategy": strategy, "threats": ALL}).peers[2]
    assert last.hard == {0: 0.125, 1: 0.125, 2: 0.25} and last.own == (2,) and last.rivals == ()


@pytest.mark.parametrize("strategy", ["random", "eat"])
def test_a_generalist_without_threats_of_its_own_learns_from_one_specialist(strategy: str) -> None:
    plan_ = cohort(*SPECIALISTS, {**GENERALIST, "strategy": strategy})
    for drawn in (0, 1):
        now = plan_.drawing({2: drawn})
        last = now.peers[2]
        assert last.draws and last.hard == {drawn: 0.5} == last.distilled and last.learned == (drawn,)
        assert last.teachers(drawn) == (drawn,) and now.taught[drawn] == (drawn,) and now.crafts == (True, True, False)
    assert plan_ == plan_.drawing({2: 0}) and not any(row.draws for row in plan_.peers[:2])


@pytest.mark.parametrize("strategy,own", [("avg", (0, 2, 3)), ("max", (0, 2, 3)), ("ramp", (0, 2, 3)),
                                          ("random", (0,)), ("eat", (0,)), ("msd", (0,))])
def test_a_union_that_is_learnt_as_a_whole_has_own_slots_beyond_the_clean_one(strategy: str,
                                                                             own: tuple[int, ...]) -> None:
    row = cohort({"preset": "at", "strategy": strategy, "threats": ALL}).peers[0]
    assert row.own == own and row.hard == pytest.approx(dict.fromkeys(own, 1 / len(own)))
    assert row.learned == (*own[1:], 0)
    assert [row.threat_of(slot).norm for slot in own] == ["linf", "l2", "l1"][:len(own)]
    assert row.rivals == (own if strategy in ("max", "ramp") else ())
    assert row.ramp == ((0, 3) if strategy == "ramp" else None)


def test_own_slots_of_a_union_do_not_travel_and_stand_behind_those_of_all_peers() -> None:
    plan_ = cohort({"preset": "at", "strategy": "avg", "threats": ALL}, {"preset": "at"}, {"preset": "at"})
    assert plan_.peers[0].own == (0, 4, 5) and not plan_.shares_aes and plan_.crafts == (True, True, True)


@pytest.mark.parametrize("threats,pair", [((L2, ThreatConfig(), L1), (1, 2)), ((L1, ThreatConfig(), L2), (1, 0)),
                                          ((L2, ThreatConfig()), (0, 1)), ((L2, L1), (0, 1))])
def test_ramp_pairs_linf_with_l1_or_else_the_first_norm_with_the_last(threats: tuple[ThreatConfig, ...],
                                                                      pair: tuple[int, int]) -> None:
    specialists = [{"role": "specialist", "threat": threat} for threat in threats]
    row = cohort(*specialists, {**GENERALIST, "strategy": "ramp"}).peers[-1]
    assert row.ramp == pair


def test_recompute_groups_of_unions_and_pairs_hold_every_learned_slot_once_in_order() -> None:
    for strategy in ("avg", "max", "ramp", "msd"):
        for loss in ({}, {"clean_weight": 0.5}, {"trades_beta": 1.0}, {"mart_beta": 1.0, "kd_clean": 0.1}):
            rows = [*cohort(*SPECIALISTS, {**GENERALIST, "strategy": strategy, "threats": ALL, "hard_own": 0.5, **loss},
                            {"frozen": True}).peers, *cohort({"preset": "at", "strategy": strategy, "threats": ALL,
                                                              **loss}).peers]
            for row in rows:
                groups = row.groups()
                assert tuple(s for group in groups for s in group) == row.learned
                for needed in (set(row.rivals), {row.clean, row.index} if row.paired else set()):
                    assert not needed or any(needed <= set(group) for group in groups)


@pytest.mark.parametrize("preset,crafts,taught", [
    ("lbgat", (False, True), ((2,), (1,))), ("peeraid", (False, True), ((1,), (1,))),
    ("at", (True, True), ((), ())), ("mat", (True, True), ((0, 1), (0, 1)))])
def test_examples_that_nobody_needs_are_not_made(preset: str, crafts: tuple[bool, ...],
                                                 taught: tuple[tuple[int, ...], ...]) -> None:
    plan_ = cohort({"preset": preset}, {"preset": preset})
    assert plan_.crafts == crafts and plan_.taught == taught


@pytest.mark.parametrize("preset,learned,guided", [("rslad", (2, 0), ((1,), ())), ("ard", (0,), ((), ()))])
def test_a_frozen_teacher_looks_at_clean_images_and_makes_no_examples(preset: str, learned: tuple[int, ...],
                                                                    guided: tuple[tuple[int, ...], ...]) -> None:
    attack = "kl_teacher" if preset == "rslad" else "ce"
    plan_ = cohort({"preset": preset, "attack": attack}, {"frozen": True})
    assert plan_.peers[0].learned == learned and plan_.guided == guided
    assert plan_.crafts == (True, False) and plan_.taught == ((), (2,)) and plan_.forwarded(1) == (2,)
    assert not plan_.shares_aes


def test_all_peers_guide_an_attack_where_none_is_frozen() -> None:
    entries = [{"preset": "mat", "attack": "kl_teacher"}] * 3
    assert cohort(*entries).guided == ((1, 2), (0, 2), (0, 1))
    assert cohort(*entries, {"frozen": True}).guided[:2] == ((3,), (3,))


def test_a_warm_up_gives_the_whole_weight_to_own_examples() -> None:
    plan_ = cohort(*[{"preset": "mat", "hard_own": 0.5, "kd_weight": 0.4, "kd_clean": 0.1, "clean_weight": 0.3}] * 3)
    warm = plan_.listening([], [1])
    assert warm.peers[1].hard == pytest.approx({1: 1.1, 3: 0.3}) and warm.peers[1].distilled == {}
    assert warm.peers[0] == plan_.peers[0] and warm.listening([], []) == plan_


def test_pure_distillation_has_no_hard_labels_to_warm_up_with() -> None:
    plan_ = cohort({"preset": "rslad"}, {"frozen": True}).listening([], [0])
    assert plan_.peers[0].learned == ()


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


def optim(**values: object) -> OptimConfig:
    return OptimConfig(lr=0.4, **values)  # type: ignore[arg-type]


def test_schedules_match_hand_computed_rates() -> None:
    def at(step: int, o: OptimConfig) -> float:
        return lr_at(step, total_steps=100, steps_per_epoch=10, optim=o)
    piecewise = optim(schedule="piecewise", milestones=(0.5, 0.75), gamma=0.1)
    assert [at(s, piecewise) for s in (0, 49, 50, 74, 75, 99)] == pytest.approx([0.4, 0.4, 0.04, 0.04, 0.004, 0.004])
    cosine = optim(schedule="cosine", warmup_epochs=2)
    assert [at(s, cosine) for s in (0, 9, 19, 20, 60)] == pytest.approx([0.02, 0.2, 0.4, 0.4, 0.2])
    onecycle = optim(schedule="onecycle")
    assert [at(s, onecycle) for s in (0, 14, 29, 30, 65, 99)] == pytest.approx([0.4 / 30, 0.2, 0.4, 0.4, 0.2, 0.4 / 70])
    assert [at(s, optim(schedule="constant")) for s in (0, 99)] == [0.4, 0.4]


def test_ema_decay_warms_up_to_its_final_value() -> None:
    assert [ema_decay_at(t, 0.99) for t in (0, 8, 89, 10_000)] == pytest.approx([0.1, 0.5, 90 / 99, 0.99])


def test_a_peer_in_quarantine_guides_no_attack() -> None:
    sections = [PeerConfig(loss=fill_loss(LossConfig(preset="at"), i, 3), attack=AttackConfig(loss="kl_teacher"))
                for i in range(3)]
    cohort = CohortPlan.of(sections)
    assert cohort.guided == ((1, 2), (0, 2), (0, 1))
    assert cohort.listening([2], []).guided == ((1,), (0,), (0, 1))
