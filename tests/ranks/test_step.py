"""The step under every placement, memory setting and failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mat_dist.core.cohort import Cohort, state_hash
from mat_dist.core.step import train_step
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import MatError, NonFinite, PeerFailed
from mat_dist.models.modes import batch_stats_only
from tests.cohorts import BATCH, batch, build, cohort_config, failed_step, hashes, largest_difference, nets, train

Run = Callable[..., list[Any]]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("preset", ["mat", "cat", ["at", "mat_kd", "trades", "dml_at"]])
def test_placement_does_not_change_a_bit(preset: Any, world: int, run_ranks: Run) -> None:
    models = nets(4)
    config = cohort_config(preset, 4, optim={"ema_decay": 0.9, "clip_norm": 1.0})
    alone = run_ranks(lambda mesh: train(config, mesh, models, 6), 4, 1)
    spread = run_ranks(lambda mesh: train(config, mesh, models, 6, log=True), 4, world)
    assert hashes(spread) == hashes(alone)


def test_eight_ranks_agree_with_four_to_1e_9_in_fp64(run_ranks: Run) -> None:
    models = nets(4, norm="group", dtype=torch.float64)
    config = cohort_config("mat", 4, step={"precision": "fp64"}, optim={"clip_norm": 0.5, "ema_decay": 0.9})
    four = run_ranks(lambda mesh: train(config, mesh, models, 5, dtype=torch.float64), 4, 4)
    eight = run_ranks(lambda mesh: train(config, mesh, models, 5, dtype=torch.float64), 4, 8)
    hashes(eight)
    assert 0 < largest_difference(four, eight) < 1e-9


def test_replicas_on_the_cpu_keep_equal_running_statistics(run_ranks: Run) -> None:
    models = nets(2)
    hashes(run_ranks(lambda mesh: train(cohort_config("mat", 2), mesh, models, 3), 2, 4))


@pytest.mark.parametrize("index", [0, 2, 3])
def test_an_at_peer_of_four_is_bitwise_a_cohort_of_one(index: int, run_ranks: Run) -> None:
    models = nets(4)
    four = run_ranks(lambda mesh: train(cohort_config("at", 4), mesh, models, 5), 4, 2)
    config = cohort_config("at", 1, entry={"stream": index, "name": f"peer{index}"})
    one = run_ranks(lambda mesh: train(config, mesh, [models[index]], 5), 1, 1)
    assert hashes(four)[index] == hashes(one)[0]


@pytest.mark.parametrize("agg", ["mean_kl", "mean_prob"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_summed_opinions_teach_what_all_logits_teach(agg: str, world: int, run_ranks: Run) -> None:
    models = nets(4, dtype=torch.float64)
    runs = []
    for opinions, ranks in (("all", 1), ("summed", world)):
        config = cohort_config("mat", 4, step={"precision": "fp64", "opinions": opinions},
                               loss={"teacher_agg": agg, "temperature": 2.0})
        runs.append(run_ranks(lambda mesh, c=config: train(c, mesh, models, 4, dtype=torch.float64), 4, ranks))
    assert 0 < largest_difference(*runs) < 1e-9


@pytest.mark.parametrize("form", ["fp16", "int8"])
@pytest.mark.parametrize("preset", ["mat", "at"])
def test_shortened_aes_are_the_same_for_every_placement_and_move_the_weights_little(preset: str, form: str,
                                                                                   run_ranks: Run) -> None:
    """Also with `at`, where only log steps exchange AEs: logging must not change what a peer trains on."""
    models = nets(4)
    config = cohort_config(preset, 4, step={"wire": form})
    alone = run_ranks(lambda mesh: train(config, mesh, models, 4), 4, 1)
    spread = run_ranks(lambda mesh: train(config, mesh, models, 4, log=True), 4, 4)
    assert hashes(spread) == hashes(alone)
    full = run_ranks(lambda mesh: train(cohort_config(preset, 4), mesh, models, 1), 4, 1)
    short = run_ranks(lambda mesh: train(config, mesh, models, 1), 4, 1)
    assert 0 < largest_difference(full, short) < 1e-2


@pytest.mark.parametrize("preset", ["at", "mat", "mat_share", "mat_trades", "cat", "dml_at"])
def test_recompute_equals_keep(preset: str, run_ranks: Run) -> None:
    models = nets(3, dtype=torch.float64)
    runs = []
    for memory in ("keep", "recompute"):
        config = cohort_config(preset, 3, step={"precision": "fp64", "memory": memory})
        runs.append(run_ranks(lambda mesh, c=config: train(c, mesh, models, 4, dtype=torch.float64), 3, 1))
    assert largest_difference(*runs) < 1e-11


@pytest.mark.parametrize("preset", ["mat", "mat_trades"])
def test_microbatches_and_joint_forwards_equal_the_plain_step_without_batch_norm(preset: str, run_ranks: Run) -> None:
    models = nets(3, norm="group", dtype=torch.float64)
    reference = cohort_config(preset, 3, step={"precision": "fp64"})
    plain = run_ranks(lambda mesh: train(reference, mesh, models, 4, dtype=torch.float64), 3, 1)
    for setting in ({"microbatches": 4}, {"bn": "joint"}, {"channels_last": False}):
        config = cohort_config(preset, 3, step={"precision": "fp64", **setting})
        other = run_ranks(lambda mesh, c=config: train(c, mesh, models, 4, dtype=torch.float64), 3, 3)
        assert largest_difference(plain, other) < 1e-10


def test_joint_batch_norm_sees_one_batch_of_all_sources(run_ranks: Run) -> None:
    models = nets(2)
    results = []
    for bn in ("separate", "joint"):
        config = cohort_config("mat", 2, step={"bn": bn})
        results.append(run_ranks(lambda mesh, c=config: train(c, mesh, models, 1), 2, 1))
    assert largest_difference(*results) > 1e-4
    counts = [c[0].peers[0].model.state_dict()["body.1.num_batches_tracked"].item() for c in results]
    assert counts == [2, 1]


def test_an_attack_and_teaching_leave_no_trace_in_a_peer(run_ranks: Run) -> None:
    def probe(mesh: Mesh) -> None:
        cohort = build(cohort_config("mat", 1, loss={"kd_weight": 0.0}), mesh, nets(1))
        peer, (x, y) = cohort.peers[0], batch(0)
        before, flags = state_hash(peer.state()), [m.training for m in peer.model.modules()]
        peer.attack(x, y, 0)
        peer.teach(x, (0, 0, 0))
        assert state_hash(peer.state()) == before
        assert [m.training for m in peer.model.modules()] == flags
        assert all(p.requires_grad and p.grad is None for p in peer.model.parameters())
    run_ranks(probe, 1, 1)


def test_the_transfer_table_is_the_accuracy_of_each_peer_on_each_source(run_ranks: Run) -> None:
    models = nets(3)
    config = cohort_config(["at", "mat", "trades"], 3)
    def one(mesh: Mesh) -> torch.Tensor:
        cohort = build(config, mesh, models)
        x, y = batch(0)
        table = train_step(cohort, x, y, 0, log=True).transfer_PS
        assert table is not None
        return table
    tables = run_ranks(one, 3, 3)
    def expected(mesh: Mesh) -> torch.Tensor:
        cohort = build(config, mesh, models)
        x, y = batch(0)
        inputs = [p.attack(x, y, 0) for p in cohort.peers] + [x]
        rows = []
        for peer in cohort.peers:
            with torch.no_grad(), batch_stats_only(peer.model):
                rows.append(torch.tensor([(peer.model(s).argmax(1) == y).float().mean() for s in inputs]))
        return torch.stack(rows)
    (direct,) = run_ranks(expected, 3, 1)
    assert all(torch.equal(t, direct) for t in tables)


# ------------------------------------------------------------------------------------------------ failures


def poisoned(mesh: Mesh, models: list[Any], spoil: Callable[[Cohort, int], None], steps: int = 3,
             at: int = 2) -> tuple[Cohort, dict[int, str]]:
    """Train, spoil something before step `at`; the error and the state hashes from before it."""
    cohort = build(cohort_config("mat", 4), mesh, models)
    for step in range(at):
        x, y = batch(step)
        train_step(cohort, x, y, step)
    before = {p.index: state_hash(p.state()) for p in cohort.peers}
    spoil(cohort, at)
    x, y = batch(at)
    with pytest.raises(MatError) as caught:
        train_step(cohort, x, y, at)
    after = {p.index: state_hash(p.state()) for p in cohort.peers}
    assert all(p.grad is None for peer in cohort.peers for p in peer.model.parameters())
    return caught.value, {i: h for i, h in after.items() if h == before[i]}  # type: ignore[return-value]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("what", ["weight", "loss"])
def test_a_non_finite_peer_is_named_and_changes_nobody(what: str, world: int, run_ranks: Run) -> None:
    def spoil(cohort: Cohort, step: int) -> None:
        for peer in cohort.peers:
            if peer.index == 2 and what == "weight":
                with torch.no_grad():
                    next(peer.model.parameters())[0] = float("nan")
            if peer.index == 2 and what == "loss":
                peer.learn = lambda x, draw, f=peer.learn: f(x, draw) * float("inf")  # type: ignore[method-assign]
    models = nets(4)
    results = run_ranks(lambda mesh: poisoned(mesh, models, spoil), 4, world)
    assert {str(error) for error, _ in results} == {str(results[0][0])}
    assert isinstance(results[0][0], NonFinite) and "peer 2 " in str(results[0][0]) and "step 2" in str(results[0][0])
    unchanged = {i for _, same in results for i in same}
    assert unchanged >= {0, 1, 3}  # weights, optimizer, averaged weights and BN buffers


@pytest.mark.parametrize("phase", ["attack", "learn", "clip"])
def test_an_error_in_one_peer_stops_all_ranks_with_one_text(phase: str, run_ranks: Run) -> None:
    def spoil(cohort: Cohort, step: int) -> None:
        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("the cat sat on the cable")
        for peer in cohort.peers:
            if peer.index == 1:
                setattr(peer, phase, broken)
    models = nets(4)
    results = run_ranks(lambda mesh: poisoned(mesh, models, spoil), 4, 4)
    texts = {str(error) for error, _ in results}
    assert len(texts) == 1
    text = texts.pop()
    assert "the cat sat on the cable" in text and "peer1" in text and "rank 1" in text and "step 2" in text
    assert isinstance(results[0][0], PeerFailed)
    assert {i for _, same in results for i in same} == {0, 1, 2, 3}


@pytest.mark.parametrize("what,names", [
    ("batch", "rank 2 differs in the batch"), ("shape", "shape or type"), ("type", "shape or type"),
    ("step", "rank 2 differs in the step number")])
def test_other_data_on_one_rank_is_found_before_it_is_used(what: str, names: str, run_ranks: Run) -> None:
    models = nets(4)
    def one(mesh: Mesh) -> str:
        cohort = build(cohort_config("mat", 4), mesh, models)
        x, y = batch(0)
        odd = mesh.placement.rank == 2
        if odd and what == "batch":
            x = x.flip(0)
        if odd and what == "shape":
            x, y = x[:4], y[:4]
        if odd and what == "type":
            cohort.peers[0].attack = lambda *a, f=cohort.peers[0].attack: f(*a).double()  # type: ignore[method-assign]
        with pytest.raises(PeerFailed) as caught:
            train_step(cohort, x, y, 7 if odd and what == "step" else 0)
        return str(caught.value)
    texts = run_ranks(one, 4, 4)
    assert len(set(texts)) == 1 and names in texts[0]


def test_a_stop_request_of_one_rank_reaches_all_at_the_same_step(run_ranks: Run) -> None:
    models = nets(4)
    def one(mesh: Mesh) -> list[bool]:
        cohort = build(cohort_config("mat", 4), mesh, models)
        return [train_step(cohort, *batch(s), s, stop=mesh.placement.rank == 3 and s == 1).stop for s in range(3)]
    assert run_ranks(one, 4, 4) == [[False, True, False]] * 4


def test_replicas_survive_a_failure_between_backward_and_average(run_ranks: Run) -> None:
    models = nets(2)
    def one(mesh: Mesh) -> str:
        cohort = build(cohort_config("mat", 2), mesh, models)
        return failed_step(cohort, "loss", "no gradient today", here=mesh.placement.rank == 3)
    texts = run_ranks(one, 2, 4)
    assert len(set(texts)) == 1 and "no gradient today" in texts[0]


def test_a_batch_is_split_over_replicas_in_order(run_ranks: Run) -> None:
    models = nets(2)
    rows = run_ranks(lambda mesh: build(cohort_config("at", 2), mesh, models).rows, 2, 4)
    assert rows == [slice(0, BATCH // 2)] * 2 + [slice(BATCH // 2, BATCH)] * 2


def test_turns_go_on_after_everybody_was_muted(run_ranks: Run) -> None:
    """The step, not what was heard before it, says whose turn it is: a run resumed there could not know."""
    def one(mesh: Mesh) -> list[Any]:
        cohort = build(cohort_config("mat", 2, loss={"attackers": "one"}), mesh, two)
        cohort.mute([0, 1], until=3)
        cohort.begin(2)
        cohort.begin(3)
        resumed = build(cohort_config("mat", 2, loss={"attackers": "one"}), mesh, two)
        resumed.begin(3)
        return [row.learned for row in cohort.plan.peers] + [row.learned for row in resumed.plan.peers]

    two = nets(2)
    (found,) = run_ranks(one, 2, 1)
    assert found[:2] == found[2:]


def test_nobody_learns_from_a_muted_peer_until_its_quarantine_ends(run_ranks: Run) -> None:
    def one(mesh: Mesh) -> list[Any]:
        cohort = build(cohort_config("mat", 3, loss={"hard_own": 0.5}), mesh, nets3)
        before = cohort.plan
        cohort.mute([1], until=4)
        muted = cohort.plan
        cohort.begin(3)
        assert cohort.plan is muted
        cohort.begin(4)
        assert cohort.plan == before
        return [muted.peers[0].hard, muted.peers[0].distilled, muted.peers[0].teachers(2), muted.peers[1].learned]
    nets3 = nets(3)
    (found,) = run_ranks(one, 3, 1)
    assert found[0] == pytest.approx({0: 0.25, 2: 0.25}) and found[1] == pytest.approx({0: 1 / 6, 2: 1 / 3})
    assert found[2] == (2,) and found[3] == (0, 2, 1)
