"""The arithmetic of who learns from what, and of who lives where."""

from __future__ import annotations

import pytest

from mat_dist.config.presets import fill_loss
from mat_dist.config.schema import LossConfig, OptimConfig, PeerConfig
from mat_dist.errors import EnvironmentFault
from mat_dist.mesh.placement import Placement
from mat_dist.plan import CohortPlan
from mat_dist.schedules import ema_decay_at, lr_at


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
