"""One step: it leaves no trace where it may not, names who failed on all ranks alike, and gives back what was moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mat_dist.core.cohort import Cohort
from mat_dist.core.graph import CLEAN
from mat_dist.core.hooks import Hook
from mat_dist.core.state_hash import state_hash
from mat_dist.core.step import Ask, Batch, train_step
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import EnvironmentFault, MatError, NonFinite, PeerFailed
from mat_dist.models.modes import batch_stats_only
from mat_dist.training.trainer import Trainer
from tests.cohorts import (
    BATCH,
    batch,
    broken,
    build,
    cohort_config,
    cut,
    exploding,
    failed_step,
    first_view,
    largest_difference,
    make_peer,
    nets,
    one_step,
    state_hashes,
    train,
)
from tests.ranks.test_host_waits import CASES as SETTINGS
from tests.ranks.test_placement import EAT, TOGETHER
from tests.ranks.test_reference import AWP, CASES, L2, LINF, TEACHER, experts
from tests.reference_mat import configured

Run = Callable[..., list[Any]]


def test_an_attack_and_teaching_leave_no_trace_in_a_peer(run_ranks: Run) -> None:
    def probe(mesh: Mesh) -> None:
        cohort = build(cohort_config("mat", 1, loss={"kd_weight": 0.0}), mesh, nets(1))
        peer, (x, y) = cohort.peers[0], batch(0)
        before, flags = state_hash(peer.state()), [m.training for m in peer.model.modules()]
        first_view(peer, x, y)
        peer.teach(x, (0, 0, 0))
        assert state_hash(peer.state()) == before
        assert [m.training for m in peer.model.modules()] == flags
        assert all(p.requires_grad and p.grad is None for p in peer.model.parameters())
    run_ranks(probe, 1, 1)


def test_the_transfer_table_is_the_accuracy_of_each_peer_on_each_first_view_and_clean_images(run_ranks: Run) -> None:
    """Also where nobody needs an AE but its maker, or more views travel than the table shows."""
    for config in (cohort_config(["at", "mat", "trades"], 3),
                   configured(experts("avg", (LINF, L2)), precision="fp32")):
        models = nets(3)
        tables = run_ranks(lambda mesh, c=config, m=models: one_step(build(c, mesh, m), 0, log=True).transfer_PS, 3, 3)
        def expected(mesh: Mesh, config: Any = config, models: Any = models) -> Tensor:
            cohort, (x, y), rows = build(config, mesh, models), batch(0), []
            inputs = [first_view(p, x, y) for p in cohort.peers] + [x]
            for peer in cohort.peers:
                with torch.no_grad(), batch_stats_only(peer.model):
                    rows.append(torch.tensor([(peer.model(s).argmax(1) == y).float().mean() for s in inputs]))
            return torch.stack(rows)
        (direct,) = run_ranks(expected, 3, 1)
        assert all(torch.equal(t, direct) for t in tables)


def test_the_losses_that_are_logged_are_the_mean_over_micro_batches_and_replicas(run_ranks: Run) -> None:
    models = nets(2, norm="group", dtype=torch.float64)
    def logged(world: int, parts: int) -> list[Tensor]:
        config = cohort_config("mat", 2, step={"precision": "fp64"}, train=cut(parts))
        return run_ranks(lambda mesh: one_step(build(config, mesh, models), 0, log=True).loss_P, 2, world)
    (whole,) = logged(1, 1)
    for found in (*logged(1, 4), *logged(2, 1), *logged(4, 2)):
        assert torch.allclose(found, whole, atol=1e-6) and len(found) == 2


def test_a_part_of_a_batch_knows_its_rows() -> None:
    whole = Batch(torch.arange(8.0), torch.arange(8), step=3, first_row=16)
    parts = list(whole.split(4))
    assert [(p.x_BCHW.tolist(), p.y_B.tolist(), p.step, p.first_row, p.parts) for p in parts] == [
        ([2.0 * n, 2.0 * n + 1], [2 * n, 2 * n + 1], 3, 16 + 2 * n, 4) for n in range(4)]
    assert parts[1].draw(7) == (3, 7, 18)


def test_micro_batches_that_do_not_divide_the_rows_of_a_replica_are_refused(run_ranks: Run) -> None:
    config, models = cohort_config("at", 2, train=cut(8)), nets(2)
    errors = run_ranks(lambda mesh: build(config, mesh, models), 2, 4, errors="return")
    assert all(isinstance(e, EnvironmentFault) and "4 images per replica" in str(e) for e in errors)


def test_frozen_peers_do_not_change(run_ranks: Run) -> None:
    models = nets(3)
    teacher = {**TEACHER, **AWP, "optim": {"ema_decay": 0.9}}
    config = configured([{"loss": "rslad"}, teacher, {"loss": "mat"}], precision="fp32")
    (cohort,) = run_ranks(lambda mesh: train(config, mesh, models, 2, log=True), 3, 1)
    assert state_hash(cohort.peers[1].model.state_dict()) == state_hash(models[1].state_dict())
    assert all(state_hash(cohort.peers[i].model.state_dict()) != state_hash(models[i].state_dict()) for i in (0, 2))


def test_a_guide_thinks_with_the_weights_of_the_step_in_each_micro_batch(run_ranks: Run) -> None:
    """The perturbation of the first micro-batch is gone when the second one asks for guidance."""
    entries = [{**entry, **AWP} for entry in CASES["peeraid"].peers]
    models, seen = nets(2, norm="group"), []
    def one(mesh: Mesh) -> None:
        cohort = build(configured(entries, precision="fp32", accumulate=2), mesh, models)
        guide = cohort.peers[0]
        before, teach = state_hash(guide.model.state_dict()), guide.teach
        def noting(x: Tensor, draw: Any) -> Tensor:
            if draw[1] == guide.row.number(CLEAN):
                seen.append(state_hash(guide.model.state_dict()) == before)
            return teach(x, draw)
        guide.teach = noting  # type: ignore[method-assign]
        one_step(cohort, 0)
    run_ranks(one, 2, 1)
    assert seen == [True, True]


def test_each_moment_of_a_step_reaches_a_hook_once_in_the_stated_order(run_ranks: Run) -> None:
    """As mat_dist/core/hooks.py states it."""
    order = ["begin", "craft", "choose", "start", "attacked", "climb", "before_forward", "inputs", "after_backward",
             "gradients", "after_reduce", "proposed", "commit"]
    models = nets(1)

    def one(mesh: Mesh) -> None:
        told: list[str] = []

        class Noting(Hook):
            def __getattribute__(self, name: str) -> Any:
                if name in order or name == "abort":
                    told.append(name)
                return super().__getattribute__(name)

        cohort = build(cohort_config("at", 1), mesh, models)
        cohort.peers[0].hooks.append(Noting(cohort.peers[0]))
        one_step(cohort, 0)
        assert told == order
        told.clear()
        failed_step(cohort, "backward", here=True)
        assert told[-1] == "abort" and "commit" not in told

    run_ranks(one, 1, 2)  # replicas, which average gradients


# ------------------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize("what,names", [
    ("batch", "rank 2 differs in the batch"), ("shape", "shape or type"), ("type", "shape or type"),
    ("step", "rank 2 differs in the step number")])
def test_other_data_on_one_rank_is_found_before_it_is_used(what: str, names: str, run_ranks: Run) -> None:
    models = nets(4)
    def one(mesh: Mesh) -> str:
        cohort = build(cohort_config("mat", 4), mesh, models)
        (x, y), odd = batch(0), mesh.placement.rank == 2
        if odd and what == "batch":
            x = x.flip(0)
        if odd and what == "shape":
            x, y = x[:4], y[:4]
        if odd and what == "type":
            plain = cohort.peers[0].attack
            cohort.peers[0].attack = lambda *a: {  # type: ignore[method-assign]
                view: adv.double() for view, adv in plain(*a).items()}
        with pytest.raises(PeerFailed) as caught:
            train_step(cohort, Batch(x, y, 7 if odd and what == "step" else 0))
        return str(caught.value)
    texts = run_ranks(one, 4, 4)
    assert len(set(texts)) == 1 and names in texts[0]


@pytest.mark.parametrize("preset", ["mat", "at"])
def test_what_one_rank_asks_reaches_all_at_the_same_step(preset: str, run_ranks: Run) -> None:
    models = nets(4)
    def one(mesh: Mesh) -> list[tuple[bool, bool]]:
        cohort, last = build(cohort_config(preset, 4), mesh, models), mesh.placement.rank == 3
        told = [one_step(cohort, s, ask=Ask(stop=last and s == 1, ready=not (last and s == 2))) for s in range(4)]
        return [(outcome.stop, outcome.ready) for outcome in told]
    assert run_ranks(one, 4, 4) == [[(False, True), (True, True), (False, False), (False, True)]] * 4


# ------------------------------------------------------------------------------------------------ failures


def refused(cohort: Cohort, spoil: Callable[[Cohort], None], at: int = 2) -> tuple[MatError, set[int]]:
    """Train, spoil something before step `at` -> its error, and the peers whose whole state is as it was before it."""
    for step in range(at):
        one_step(cohort, step)
    before = state_hashes(cohort)
    spoil(cohort)
    with pytest.raises(MatError) as caught:
        one_step(cohort, at)
    assert all(p.grad is None for peer in cohort.peers for p in peer.model.parameters())
    return caught.value, {i for i, found in state_hashes(cohort).items() if found == before[i]}


def at_peer(index: int, change: Callable[[Any], None]) -> Callable[[Cohort], None]:
    """Do this to one peer, where it lives."""
    return lambda cohort: [change(peer) for peer in cohort.peers if peer.index == index]  # type: ignore[return-value]


def breaking(method: str) -> Callable[[Any], None]:
    return lambda peer: setattr(peer, method, broken)


def spoil_weight(peer: Any) -> None:
    with torch.no_grad():
        next(peer.model.parameters())[0] = float("nan")


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("spoil", [spoil_weight, exploding])
def test_a_non_finite_peer_is_named_and_changes_nobody(spoil: Any, world: int, run_ranks: Run) -> None:
    config, models = cohort_config("mat", 4), nets(4)
    results = run_ranks(lambda mesh: refused(build(config, mesh, models), at_peer(2, spoil)), 4, world)
    assert {str(error) for error, _ in results} == {str(results[0][0])}
    assert isinstance(results[0][0], NonFinite) and "peer 2 " in str(results[0][0]) and "step 2" in str(results[0][0])
    assert {i for _, same in results for i in same} >= {0, 1, 3}  # weights, optimizer, averaged weights, BN buffers


PHASES = ["attack", "begin_learning", "learn", "forward", "opinions", "backward", "reduced"]


@pytest.mark.parametrize("phase", PHASES)
def test_an_error_in_one_peer_stops_all_ranks_with_one_text(phase: str, run_ranks: Run) -> None:
    config, models = cohort_config("mat", 4), nets(4)
    results = run_ranks(lambda mesh: refused(build(config, mesh, models), at_peer(1, breaking(phase))), 4, 4)
    (text,) = {str(error) for error, _ in results}
    assert "the cat sat on the cable" in text and "peer1" in text and "rank 1" in text and "step 2" in text
    assert isinstance(results[0][0], PeerFailed)
    assert {i for _, same in results for i in same} == {0, 1, 2, 3}


@pytest.mark.parametrize("name,world", [("mat", 4), ("awp", 2), ("awp", 4)])
def test_replicas_survive_a_failure_before_any_of_their_exchanges(name: str, world: int, run_ranks: Run) -> None:
    """Of a step up in weights (AWP), and of gradients."""
    models = nets(2)
    config = cohort_config("mat", 2) if name == "mat" else configured(TOGETHER["awp"] * 2, precision="fp32")
    method = "backward" if name == "mat" else "climb"
    texts = run_ranks(lambda mesh: str(failed_step(build(config, mesh, models), method,
                                                   here=mesh.placement.rank == world - 1)), 2, world)
    assert len(set(texts)) == 1 and "the cat sat on the cable" in texts[0]


@pytest.mark.parametrize("call", range(4))
def test_replicas_that_wait_in_a_batch_norm_learn_at_once_that_another_has_failed(call: int, run_ranks: Run) -> None:
    """In the forward or the backward pass, where no header can tell them; not after the timeout of the exchange."""
    models, config = nets(1), cohort_config("at", 1)

    def one(mesh: Mesh) -> tuple[MatError, set[int]]:
        def lacking(row: Tensor, plain: Any = mesh.gather_statistics) -> Tensor:
            if len(calls) == 2 * 4 + call and mesh.placement.rank == 1:
                raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
            calls.append(1)
            return plain(row)

        calls: list[int] = []
        mesh.gather_statistics = lacking  # type: ignore[method-assign]
        return refused(build(config, mesh, models), lambda cohort: None)

    results = run_ranks(one, 1, 4)
    assert {str(error) for error, _ in results} == {str(results[0][0])} and all(same == {0} for _, same in results)
    error = results[0][0]
    assert isinstance(error, PeerFailed) and error.how.startswith("use a smaller train.batch_size")
    assert error.what == "OutOfMemoryError: tried to allocate 2.00 GiB" and "step 2" in error.where
    assert ("forward" if call < 2 else "backward") in error.where and "rank 1, peer 0" in error.where


def test_an_error_of_a_device_that_shows_up_at_the_vote_is_that_rank_s_failure(run_ranks: Run) -> None:
    class Lost(Tensor):
        def tolist(self) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def one(mesh: Mesh) -> str:
        cohort = build(cohort_config("at", 2), mesh, models)
        if mesh.placement.rank == 1:
            cohort.peers[0].reduced = lambda: torch.zeros(()).as_subclass(Lost)  # type: ignore[method-assign]
            cohort.peers[0].forget = partial(lost, cohort.peers[0].forget)  # type: ignore[method-assign]
        return str(refused(cohort, lambda cohort: None, 0)[0])

    def lost(plain: Callable[[], None]) -> None:
        plain()
        raise RuntimeError("CUDA error: an illegal memory access was encountered (when the step is undone)")

    models = nets(2)
    (text,) = set(run_ranks(one, 2, 2))
    assert "CUDA error" in text and "step 0, device, rank 1, peer 1" in text


class Failing(Hook):
    """A method of somebody's own that fails."""

    def __init__(self, peer: Any, verb: str) -> None:
        super().__init__(peer)
        setattr(self, verb, broken)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("verb", ["begin", "proposed", "commit"])
def test_a_hook_that_fails_on_one_rank_outside_learning_stops_all_with_one_text(verb: str, world: int,
                                                                               run_ranks: Run) -> None:
    """Also on replicas, which gather what it proposed; after the vote the next step tells it."""
    config, models = cohort_config("at", 2), nets(2)

    def one(mesh: Mesh) -> tuple[str, bool]:
        cohort, last = build(config, mesh, models), mesh.placement.rank == world - 1
        before = state_hashes(cohort)
        if last:
            cohort.peers[0].hooks.append(Failing(cohort.peers[0], verb))
        if verb == "commit":
            one_step(cohort, 0)
            assert (cohort.failure is not None) == last
        elif not last:
            cohort.peers[0].hooks.append(Hook(cohort.peers[0]))
        with pytest.raises(PeerFailed) as caught:
            one_step(cohort, 1 if verb == "commit" else 0)
        return str(caught.value), state_hashes(cohort) == before

    found = run_ranks(one, 2, world)
    (text,) = {text for text, _ in found}
    assert "the cat sat on the cable" in text and "step 0" in text
    assert f"rank {world - 1}" in text and "peer1" in text.replace("peer 1", "peer1")
    assert all(same for _, same in found) == (verb != "commit")


def test_an_optimizer_that_fails_is_told_by_the_next_step_and_by_a_save(run_ranks: Run) -> None:
    def one(mesh: Mesh) -> None:
        cohort = build(cohort_config("at", 1), mesh, models)
        cohort.peers[0].optimizer.step = broken
        one_step(cohort, 0)
        with pytest.raises(PeerFailed, match=r"the cat sat.*step 0, update of peer0"):
            one_step(cohort, 1)
        trainer = object.__new__(Trainer)
        trainer.cohort = cohort
        with pytest.raises(PeerFailed, match=r"the cat sat.*step 0, update of peer0"):
            trainer.prepare(1)

    models = nets(1)
    run_ranks(one, 1, 1)


REFUSED = [{**EAT, **TOGETHER["awp"][0], "union": EAT["union"]}, *CASES["mat+awp"].peers[:1]]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("spoil", [exploding, breaking("learn")], ids=["infinite", "error"])
def test_a_refused_step_gives_perturbed_weights_and_counts_back(spoil: Any, world: int, run_ranks: Run) -> None:
    models, config = nets(2), configured(REFUSED, precision="fp32")
    results = run_ranks(lambda mesh: refused(build(config, mesh, models), at_peer(1, spoil)), 2, world)
    assert {i for _, same in results for i in same} == {0, 1}


@pytest.mark.parametrize("name", ["projection", "eat", "ramp"])
def test_a_step_after_a_refused_one_is_as_if_it_had_not_been(name: str, run_ranks: Run) -> None:
    models, config = nets(1), configured(TOGETHER[name], precision="fp32")
    def one(mesh: Mesh) -> tuple[dict[int, str], ...]:
        plain, cohort = train(config, mesh, models, 3), train(config, mesh, models, 2)
        learn = cohort.peers[0].learn
        refused(cohort, at_peer(0, exploding), 0)
        cohort.peers[0].learn = learn  # type: ignore[method-assign]
        return state_hashes(plain), state_hashes(train(config, mesh, models, 3, cohort=cohort, first=2))
    ((plain, other),) = run_ranks(one, 1, 1)
    assert plain == other


# ------------------------------------------------------------------------------------------------ memory


def short_of_memory(peer: Any, where: str) -> None:
    """Let memory run out in each forward or backward pass of a peer's learning."""
    def lacking(*args: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    def learn(x: Tensor, draw: Any, plain: Any = peer.learn) -> Tensor:
        logits: Tensor = plain(x, draw)
        logits.register_hook(lacking)  # the graph ends in a node that fails
        return logits

    peer.learn = lacking if where == "forward" else learn


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("preset,world", [("mat", 2), ("at", 2), ("at", 1)])
def test_lack_of_memory_stops_all_changes_nobody_and_says_what_to_set(where: str, preset: str, world: int,
                                                                     run_ranks: Run) -> None:
    config, models = cohort_config(preset, 2), nets(2)
    results = run_ranks(lambda mesh: refused(build(config, mesh, models), at_peer(
        1, lambda peer: short_of_memory(peer, where))), 2, world)
    (text,) = {str(error) for error, _ in results}
    assert "step.memory=recompute" in text and "train.accumulate" in text and "peer1" in text
    assert {i for _, same in results for i in same} == {0, 1}


@pytest.mark.parametrize("world", [1, 2])
def test_an_attack_that_lacks_memory_goes_on_in_halves_with_equal_weights_and_then_stops_all(world: int,
                                                                                            run_ranks: Run) -> None:
    config, models = cohort_config("mat", 2, step={"precision": "fp64"}), nets(2, dtype=torch.float64)

    def one(mesh: Mesh, most: int) -> Cohort:
        cohort = build(config, mesh, models)
        for peer in cohort.peers:
            if peer.index == 1:
                def found(x: Tensor, *args: Any, plain: Any = peer.attack_of_training._found) -> Any:
                    if len(x) > most:
                        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
                    return plain(x, *args)
                peer.attack_of_training._found = found  # type: ignore[method-assign]
        train(config, mesh, models, 3, cohort=cohort)
        for peer in cohort.peers:
            assert [note for note in peer.notes if "halves" in note] == peer.notes and len(peer.notes) == peer.index
        return cohort

    plain = run_ranks(lambda mesh: train(config, mesh, models, 3), 2, world)
    halves = run_ranks(lambda mesh: one(mesh, BATCH // 2), 2, world)
    assert largest_difference(plain, halves) < 1e-11
    errors = run_ranks(lambda mesh: one(mesh, 1), 2, world, errors="return")
    assert len({str(e) for e in errors}) == 1 and "train.accumulate" in str(errors[0]) and "peer1" in str(errors[0])


# ------------------------------------------------------------------------------------------------ fp16


def test_steps_in_fp16_are_those_of_fp32_but_for_rounding(run_ranks: Run) -> None:
    models = nets(2)

    def trained(precision: str) -> list[Cohort]:
        made = cohort_config("mat", 2, norm="l2", eps=0.3, step={"precision": precision})
        return run_ranks(lambda mesh: train(made, mesh, models, 3), 2, 2)

    half, full = trained("fp16"), trained("fp32")
    assert 0 < largest_difference(half, full) < 2e-2  # one activation at zero that changes sides is most of it
    assert all("scale" in peer.state() for cohort in half for peer in cohort.peers)


def test_logits_in_fp16_have_three_bits_more_than_in_bf16() -> None:
    x, _ = batch(0)
    peers = {precision: make_peer(nets(1)[0], cohort_config("at", 1, step={"precision": precision}))
             for precision in ("fp32", "bf16", "fp16")}
    logits = {precision: peer.learn(x, (0, 0, 0)) for precision, peer in peers.items()}
    errors = [(logits[precision] - logits["fp32"]).norm() for precision in ("fp16", "bf16")]
    assert 0 < 4 * errors[0] < errors[1]


@pytest.mark.parametrize("name", ["method awp", "projected gradients"])
def test_gradients_of_hooks_that_are_small_do_not_vanish_in_fp16(name: str) -> None:
    """Its least number is 6e-8. Those of a hook whose length counts are as long as in fp32."""
    case, found = SETTINGS[name], dict[str, Sequence[Tensor]]()
    (x, y), model = batch(0), nets(1)[0]
    with torch.no_grad():
        model.body[7].weight.mul_(1e-6)  # type: ignore[union-attr, operator, index]
    for precision in ("fp32", "fp16"):
        step = case.step.model_copy(update={"precision": precision})
        peer = make_peer(model, case.model_copy(update={"step": step}))
        if name == "method awp":
            found[precision] = peer.hooks[-1].climb(Batch(x, y, 0), dict.fromkeys(peer.row.learned, x))
        else:
            peer.hooks[-1].after_backward(Batch(x, y, 0), {})
            found[precision] = peer.hooks[-1].gradients()
    for exact, half in zip(found["fp32"], found["fp16"], strict=True):
        assert torch.cosine_similarity(exact.flatten(), half.flatten(), dim=0) > 0.7
        assert name == "method awp" or 0.8 < half.norm() / exact.norm() < 1.25


def test_a_gradient_that_overflows_in_fp16_leaves_the_step_out_and_halves_that_peer_s_scale(run_ranks: Run) -> None:
    """As the trainer does it, on all ranks alike."""
    models = nets(2)

    def step(mesh: Mesh) -> tuple[list[bool], list[dict[str, Any]]]:
        cohort = build(cohort_config("at", 2, step={"precision": "fp16"}), mesh, models)
        (peer,) = cohort.peers
        if peer.index == 1:
            peer.scale.load({"scale": {"value": torch.tensor(2.0**40), "calm": 7}})
        before = state_hashes(cohort)
        with pytest.raises(NonFinite) as caught:
            one_step(cohort, 0)
        trainer = Trainer.__new__(Trainer)
        trainer.config, trainer.cohort, trainer.overflows = SimpleNamespace(step=cohort.step), cohort, 0
        assert caught.value.peers == (1,) and state_hashes(cohort) == before
        return [trainer.overflowed(caught.value), trainer.overflowed(NonFinite("", "", ""))], [peer.state()["scale"]]

    (first, (own,)), (second, (other,)) = run_ranks(step, 2, 2)
    assert first == second == [True, False]
    assert (own["value"], other["value"], other["calm"]) == (2.0**16, 2.0**39, 0)
