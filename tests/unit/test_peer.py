"""A peer: averaged weights, clipping, weight decay, batch statistics, keyed draws, exact state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.core.peer import Peer
from mat_dist.core.state_hash import state_hash
from mat_dist.models.modes import set_bn_forwards
from tests import cohorts
from tests.cohorts import Net, batch, cohort_config, first_view, nets


def make_peer(model: nn.Module | None = None, *, stream: int = 0, **optim: Any) -> Peer:
    config = cohort_config("at", 1, optim=optim, entry={"stream": stream})
    return cohorts.make_peer(model if model is not None else nets(1)[0], config)


def learn(peer: Peer, step: int, lr: float = 0.1) -> None:
    """One step of ordinary training on the batch of `step`."""
    x, y = batch(step)
    nn.functional.cross_entropy(peer.learn(x, (step, 0, 0)), y).backward()
    peer.reduced()
    peer.update(step, lr, ())
    peer.average(step)


# ------------------------------------------------------------------------------------------------ averaged weights


def test_averaged_weights_follow_the_recursion_with_the_warm_up_of_the_decay() -> None:
    peer = make_peer(ema_decay=0.3)
    expected = {k: v.double().clone() for k, v in peer.model.state_dict().items()}
    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]):
        learn(peer, step)
        for k, v in peer.model.state_dict().items():
            expected[k] = decay * expected[k] + (1 - decay) * v.double() if v.is_floating_point() else v.double()
    assert peer.ema is not None and set(peer.ema) == set(expected)
    for k, v in peer.ema.items():
        assert (v.double() - expected[k]).abs().max() < 1e-6, k
    moved = (peer.ema["body.0.weight"] - peer.model.state_dict()["body.0.weight"]).abs().max()
    assert moved > 1e-4  # the average lags behind


def test_averaged_weights_do_not_change_the_trained_ones() -> None:
    one, other = make_peer(), make_peer(ema_decay=0.9)
    for step in range(3):
        learn(one, step)
        learn(other, step)
    assert one.ema is None
    assert state_hash(one.model.state_dict()) == state_hash(other.model.state_dict())


# ------------------------------------------------------------------------------------------------ gradient and decay


@pytest.mark.parametrize("most", [0.01, 1000.0])
def test_the_gradient_is_clipped_as_torch_clips_it(most: float) -> None:
    peer, other = make_peer(clip_norm=most), nets(1)[0]
    x, y = batch(0)
    nn.functional.cross_entropy(peer.learn(x, (0, 0, 0)), y).backward()
    nn.functional.cross_entropy(other(x), y).backward()
    norm = nn.utils.clip_grad_norm_(other.parameters(), most)
    assert peer.reduced().item() == pytest.approx(norm.item(), rel=1e-6)  # the norm before clipping
    for mine, theirs in zip(peer.gradients(), other.parameters(), strict=True):
        assert theirs.grad is not None and torch.allclose(mine, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_single_non_finite_gradient_shows_in_the_norm(bad: float) -> None:
    peer = make_peer(clip_norm=1.0)
    peer.gradients()[3].view(-1)[-1] = bad
    assert not peer.reduced().isfinite()


def test_a_parameter_that_took_no_part_has_gradient_0_and_still_decays() -> None:
    peer = make_peer(weight_decay=0.5, args={"momentum": 0.0})
    before = copy.deepcopy(peer.model.state_dict())
    assert all(not g.any() for g in peer.gradients())
    peer.update(0, 0.1, ())
    for name, p in peer.model.named_parameters():
        assert torch.allclose(p, before[name] * (1 - 0.1 * 0.5)), name


def test_norm_layers_and_biases_are_spared_weight_decay_on_request() -> None:
    peer = make_peer(weight_decay=0.5, args={"momentum": 0.0, "decay_norm_bias": False})
    before = copy.deepcopy(peer.model.state_dict())
    peer.gradients()
    peer.update(0, 0.1, ())
    factors = {n: (p / before[n]).nanmean().item() for n, p in peer.model.named_parameters() if before[n].any()}
    assert factors == pytest.approx({"body.0.weight": 0.95, "body.1.weight": 1.0, "body.3.weight": 0.95,
                                     "body.4.weight": 1.0, "body.7.weight": 0.95, "body.7.bias": 1.0})


def test_layers_that_a_network_keeps_fixed_are_not_trained() -> None:
    net = nets(1)[0]
    net.body[0].requires_grad_(False)
    before = net.body[0].weight.clone()
    peer = make_peer(net, weight_decay=0.5)
    learn(peer, 0)
    assert torch.equal(peer.model.body[0].weight, before) and not peer.model.body[0].weight.requires_grad
    assert not torch.equal(peer.model.body[3].weight, nets(1)[0].body[3].weight)


@pytest.mark.parametrize("nesterov", [False, True])
def test_an_update_is_sgd_with_momentum_and_drops_the_gradient(nesterov: bool) -> None:
    peer = make_peer(args={"momentum": 0.5, "nesterov": nesterov}, weight_decay=0.1)
    w = next(peer.model.parameters())
    expected, velocity = w.detach().clone(), torch.zeros_like(w)
    for step, lr in enumerate((0.1, 0.02)):
        for g in peer.gradients():
            g.fill_(step + 1.0)
        g = torch.full_like(w, step + 1.0) + 0.1 * expected
        velocity = 0.5 * velocity + g
        expected = expected - lr * (g + 0.5 * velocity if nesterov else velocity)
        peer.update(step, lr, ())
        assert all(p.grad is None for p in peer.model.parameters())
    assert torch.allclose(w, expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------ batch statistics


@pytest.mark.parametrize("sources", [2, 5])
def test_several_forwards_move_running_statistics_as_far_as_one(sources: int) -> None:
    """Forwards of one batch: 1 - (1 - m)^(1/S) applied S times is m applied once."""
    one, several = make_peer(), make_peer()
    set_bn_forwards(several.model, sources)
    x, _ = batch(0)
    one.learn(x, (0, 0, 0))
    for number in range(sources):
        several.learn(x, (0, number, 0))
    for mine, theirs in zip(one.model.buffers(), several.model.buffers(), strict=True):
        if mine.is_floating_point():
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)
            assert not torch.equal(mine, torch.zeros_like(mine))


def test_teaching_gives_the_logits_of_learning_without_graph_or_trace() -> None:
    peer = make_peer()
    x, _ = batch(0)
    before = state_hash(peer.state())
    taught = peer.teach(x, (0, 0, 0))
    assert state_hash(peer.state()) == before and not taught.requires_grad
    learnt = peer.learn(x, (0, 0, 0))
    assert torch.equal(taught, learnt.detach()) and learnt.requires_grad
    assert state_hash(peer.state()) != before  # learning does move the statistics


def test_weights_in_bf16_forwards_stay_fp32_and_logits_too() -> None:
    config = cohort_config("at", 1, step={"precision": "bf16"})
    peer = cohorts.make_peer(nets(1)[0], config)
    x, _ = batch(0)
    rounded, exact = peer.learn(x, (0, 0, 0)), make_peer().learn(x, (0, 0, 0))
    assert rounded.dtype == torch.float32 and {p.dtype for p in peer.model.parameters()} == {torch.float32}
    assert 0 < (rounded - exact).abs().max() < 0.2


# ------------------------------------------------------------------------------------------------ keyed draws


class Dropping(Net):
    """The net with dropout before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body.insert(6, nn.Dropout(0.5))


def dropping() -> nn.Module:
    with rng.keyed_rng(5):
        return Dropping()


def test_dropout_is_a_function_of_stream_step_view_and_row() -> None:
    x, _ = batch(0)

    def draw(stream: int, *indices: int) -> Tensor:
        return make_peer(dropping(), stream=stream).learn(x, indices).detach()

    base = draw(3, 7, 1, 0)
    assert torch.equal(base, draw(3, 7, 1, 0))
    for other in ((4, 7, 1, 0), (3, 8, 1, 0), (3, 7, 2, 0), (3, 7, 1, 4)):
        assert not torch.equal(base, draw(*other)), other


def test_dropout_does_not_depend_on_the_past_or_on_who_drew_before() -> None:
    """A rank that hosts four peers has drawn more from the global generator than one that hosts a single peer."""
    x, _ = batch(0)
    alone = make_peer(dropping(), stream=1).learn(x, (4, 0, 0))
    torch.manual_seed(99)
    other, crowded = make_peer(dropping(), stream=0), make_peer(dropping(), stream=1)
    other.learn(x, (4, 0, 0))
    torch.rand(17)
    before = torch.get_rng_state()
    assert torch.equal(crowded.learn(x, (4, 0, 0)), alone)
    assert torch.equal(torch.get_rng_state(), before)  # and it leaves the generator as it was


def test_dropout_is_off_in_an_attack() -> None:
    x, y = batch(0)
    peer = make_peer(dropping())
    assert torch.equal(first_view(peer, x, y), first_view(peer, x, y))
    still = make_peer(dropping())
    still.model.body[6].p = 0.0  # type: ignore[index, union-attr]
    assert torch.equal(first_view(peer, x, y), first_view(still, x, y))


def test_start_noise_of_a_replica_is_its_rows_of_the_whole_batch() -> None:
    x, y = batch(0)
    peer = make_peer(nets(1, norm="group")[0])
    whole = first_view(peer, x, y, 3)
    assert torch.allclose(first_view(peer, x[4:], y[4:], 3, first_row=4), whole[4:], atol=1e-6)
    assert not torch.allclose(first_view(peer, x[4:], y[4:], 3), whole[4:], atol=1e-3)


# ------------------------------------------------------------------------------------------------ state


def test_a_loaded_peer_continues_bit_by_bit() -> None:
    optim = {"ema_decay": 0.9, "args": {"decay_norm_bias": False}}
    peer, fresh = make_peer(**optim), make_peer(nets(2)[1], **optim)
    for step in range(3):
        learn(peer, step)
    fresh.load(copy.deepcopy(peer.state()))
    assert state_hash(fresh.state()) == state_hash(peer.state())
    for step in range(3, 6):
        learn(peer, step)
        learn(fresh, step)
    assert state_hash(fresh.state()) == state_hash(peer.state())


def test_loading_its_own_state_changes_nothing() -> None:
    peer = make_peer(ema_decay=0.9)
    learn(peer, 0)
    before = state_hash(peer.state())
    peer.load(peer.state())
    assert state_hash(peer.state()) == before


def test_the_state_hash_sees_values_names_and_types() -> None:
    base = {"a": torch.zeros(2), "b": [1, 2.0]}
    others: list[dict[str, Any]] = [
        {"a": torch.tensor([0.0, 1e-45]), "b": [1, 2.0]}, {"a": torch.zeros(2).double(), "b": [1, 2.0]},
        {"c": torch.zeros(2), "b": [1, 2.0]}, {"a": torch.zeros(2, 1), "b": [1, 2.0]},
        {"a": torch.zeros(2), "b": [1, 2.5]}]
    assert len({state_hash(s) for s in [base, *others]}) == 6
    assert state_hash(copy.deepcopy(base)) == state_hash(base)
