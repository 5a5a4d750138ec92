"""Optimizers, learning rates and averaged weights, against torch's own classes and numbers by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mat_dist.config import load_config
from mat_dist.config.schema import OptimConfig
from mat_dist.core.optim import LossScale, average, build_optimizer, check_optimizers, ema_decay_at, lr_at, pace
from mat_dist.core.peer import Peer
from mat_dist.core.state_hash import state_hash
from mat_dist.errors import ConfigError
from mat_dist.models.registry import DTYPES
from mat_dist.train import main
from tests.cohorts import cohort_config, complete, make_peer, nets


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    """A small problem: batches and rates are functions of the step."""
    for n in range(first, first + steps):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(n))
        model(x).tanh().sum().backward()
        if n == 1:
            next(model.parameters()).grad = None  # a parameter that took no part in one step
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + n)
        optimizer.step()
        optimizer.zero_grad()


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


CLASSES: list[tuple[dict[str, Any], type[torch.optim.Optimizer], dict[str, Any]]] = [  # settings, class, arguments
    ({"name": "sgd"}, torch.optim.SGD, {"momentum": 0.9}),
    ({"name": "sgd", "args": {"momentum": 0.0}}, torch.optim.SGD, {"momentum": 0.0}),
    ({"name": "sgd", "args": {"nesterov": True}}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ({"name": "adamw"}, torch.optim.AdamW, {}),
    ({"name": "adamw", "args": {"betas": [0.8, 0.95], "eps": 1e-6}}, torch.optim.AdamW,
     {"betas": (0.8, 0.95), "eps": 1e-6}),
    ({"name": "RMSprop", "args": {"alpha": 0.5, "momentum": 0.3}}, torch.optim.RMSprop,
     {"alpha": 0.5, "momentum": 0.3}),
    ({"name": "Adagrad"}, torch.optim.Adagrad, {}),
]


@pytest.mark.parametrize("given,kind,arguments", CLASSES, ids=str)
def test_an_optimizer_is_the_class_of_torch_step_by_step(given: dict[str, Any], kind: Any,
                                                         arguments: dict[str, Any]) -> None:
    ours, theirs = net(), net()
    mine = build_optimizer(ours, OptimConfig(lr=0.1, weight_decay=0.01, **given))
    assert type(mine) is kind
    optimizer = kind(theirs.parameters(), lr=0.1, weight_decay=0.01, **arguments)
    for step in range(4):
        descend(ours, mine, 1, step)
        descend(theirs, optimizer, 1, step)
        assert equal(ours, theirs)
    assert not equal(ours, net())


def test_norm_layers_and_biases_are_a_group_without_decay_where_the_settings_say_so() -> None:
    ours, theirs = net(), net()
    mine = build_optimizer(ours, OptimConfig(name="adamw", lr=0.1, weight_decay=0.5, args={"decay_norm_bias": False}))
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    spared = [p for p in theirs.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": spared, "weight_decay": 0.0}], lr=0.1,
                                  weight_decay=0.5)
    descend(ours, mine, 3)
    descend(theirs, optimizer, 3)
    assert equal(ours, theirs)


@pytest.mark.parametrize("momentum,nesterov", [(0.9, False), (0.9, True)])
def test_the_state_that_version_0_1_wrote_goes_on_bit_by_bit(momentum: float, nesterov: bool) -> None:
    """Its own SGD stored these keys, with a buffer for the parameters that had taken part."""
    whole, model = net(), net()
    args = {"momentum": momentum, "nesterov": nesterov}
    optim = OptimConfig(lr=0.1, weight_decay=5e-4, args=args)
    uninterrupted = build_optimizer(whole, optim)
    descend(whole, uninterrupted, 6)
    before = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=5e-4, foreach=False, **args)
    descend(model, before, 3)
    state = before.state_dict()
    old = {"state": {n: {"momentum_buffer": one["momentum_buffer"].clone()} for n, one in state["state"].items()},
           "param_groups": [{key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov",
                                                         "params")} for group in state["param_groups"]]}
    after = build_optimizer(model, optim)
    after.load_state_dict(old)
    descend(model, after, 3, first=3)
    assert equal(model, whole)


def test_a_state_of_other_groups_is_refused() -> None:
    state = build_optimizer(net(), OptimConfig(args={"decay_norm_bias": False})).state_dict()
    with pytest.raises(ValueError, match="group"):
        build_optimizer(net(), OptimConfig()).load_state_dict(state)


@pytest.mark.parametrize("optim,key,found", [
    ({"name": "adamx"}, "peers.1.optim.name", r"no optimizer adamx.*adamw.*Adagrad, Adam,.*RMSprop"),
    ({"name": "LBFGS"}, "peers.1.optim.name", "no optimizer LBFGS"),
    ({"name": "Optimizer"}, "peers.1.optim.name", "no optimizer Optimizer"),
    ({"args": {"beta": 0.9}}, "peers.1.optim.args", r"SGD has no argument beta.*dampening.*momentum, nesterov"),
    ({"args": {"lr": 0.9}}, "peers.1.optim.args", "lr among the arguments of SGD.*write optim.lr"),
    ({"name": "Rprop"}, "peers.1.optim.weight_decay", "Rprop has no weight decay"),
    ({"name": "adamw", "args": {"momentum": 0.9}}, "peers.1.optim.args", r"AdamW has no argument momentum.*betas"),
    ({"name": "adamw", "args": {"betas": [0.9, 2.0]}}, "peers.1.optim", "AdamW refuses its settings: .*beta"),
    ({"name": "adamw", "args": {"betas": 0.9}}, "peers.1.optim", "AdamW refuses its settings"),
    ({"args": {"nesterov": True, "momentum": 0}}, "peers.1.optim", "SGD refuses its settings: Nesterov")], ids=str)
def test_what_a_class_does_not_take_is_refused_with_its_own_list(optim: dict[str, Any], key: str, found: str) -> None:
    with pytest.raises(ConfigError, match=found) as caught:
        build_optimizer(net(), OptimConfig(**optim), "peers.1")
    assert caught.value.where == key


def test_a_wrong_argument_of_one_peer_is_one_line_of_the_command(tmp_path: Any,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    words = ["peers=2", "peers.1.optim={name: adamw, args: {momentum: 0.9}}", f"run.root={tmp_path}",
             "run.device=cpu", "log.console=off"]
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "AdamW has no argument momentum (peers.1.optim.args): it takes amsgrad, betas" in line


def test_each_peer_has_the_optimizer_of_its_own_entry() -> None:
    config = load_config("digits", ["peers=3", "optim.lr=0.05", "peers.1.optim={name: adamw, lr: 0.001}",
                                    "peers.2.optim.args={momentum: 0.5}"])
    made = [build_optimizer(net(), spec.optim) for spec in config.peers]
    assert [type(one).__name__ for one in made] == ["SGD", "AdamW", "SGD"]
    assert [one.param_groups[0]["lr"] for one in made] == [0.05, 0.001, 0.05]
    assert [one.param_groups[0].get("momentum") for one in made] == [0.9, None, 0.5]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("name", ["adamw", "NAdam"])  # NAdam keeps a product of floats beside its tensors, in fp32
def test_a_peer_goes_on_bit_by_bit_from_its_state(name: str, precision: str) -> None:
    config = cohort_config("at", 1, optim={"name": name, "lr": 0.01, "ema_decay": 0.9}, step={"precision": precision})
    one, other = (make_peer(net.to(DTYPES[precision]), config) for net in (nets(1)[0], nets(2)[1]))

    def update(step: int, *peers: Any) -> None:
        for peer in peers:
            for place, gradient in enumerate(peer.gradients()):
                gradient.fill_(0.01 * (step + place))
            peer.update(step, 0.01, [])
            peer.average(step)
    for step in range(3):
        update(step, one)
    other.load(copy.deepcopy(one.state()))
    for step in range(3, 5):
        update(step, one, other)
    assert equal(one.model, other.model) and not equal(one.model, nets(1)[0].to(DTYPES[precision]))


# ------------------------------------------------------------------------------------------------ rates


def optim(**values: object) -> OptimConfig:
    return OptimConfig(lr=0.4, **values)  # type: ignore[arg-type]


def test_schedules_match_hand_computed_rates() -> None:
    def at(step: int, o: OptimConfig) -> float:
        return lr_at(step, total_steps=100, steps_per_epoch=10, optim=o)
    piecewise = optim(schedule="piecewise", milestones=(0.5, 0.75))
    assert [at(s, piecewise) for s in (0, 49, 50, 74, 75, 99)] == pytest.approx([0.4, 0.4, 0.04, 0.04, 0.004, 0.004])
    cosine = optim(schedule="cosine", warmup_epochs=2)
    assert [at(s, cosine) for s in (0, 9, 19, 20, 60)] == pytest.approx([0.02, 0.2, 0.4, 0.4, 0.2])
    onecycle = optim(schedule="onecycle")
    assert [at(s, onecycle) for s in (0, 14, 29, 30, 65, 99)] == pytest.approx([0.4 / 30, 0.2, 0.4, 0.4, 0.2, 0.4 / 70])
    assert [at(s, optim(schedule="constant")) for s in (0, 99)] == [0.4, 0.4]


# ------------------------------------------------------------------------------------------------ averaged weights


def test_ema_decay_warms_up_to_its_final_value() -> None:
    assert [ema_decay_at(t, 0.99) for t in (0, 8, 89, 10_000)] == pytest.approx([0.1, 0.5, 90 / 99, 0.99])
    assert [ema_decay_at(t, 0.5) for t in (0, 1, 8, 100)] == [1 / 10, 2 / 11, 0.5, 0.5]


def test_floating_tensors_are_averaged_and_integers_copied() -> None:
    ema = {"w": torch.tensor([1.0, 2.0]), "running_var": torch.tensor([4.0]), "count": torch.tensor(3)}
    average(ema, {"w": torch.tensor([2.0, 0.0]), "running_var": torch.tensor([0.0]), "count": torch.tensor(9)}, 0.75)
    assert ema["w"].tolist() == [1.25, 1.5] and ema["running_var"].tolist() == [3.0] and ema["count"].item() == 9


@pytest.mark.parametrize("args,says", [
    ({"foreach": True, "fused": True}, "refuses its settings: `fused` and `foreach`"),
    ({"betas": [0.9]}, "refuses its settings"), ({"betas": []}, "refuses its settings"),
    ({"capturable": True}, "has no argument capturable"), ({"differentiable": True}, "has no argument differentiable"),
], ids=str)
def test_arguments_with_which_a_class_cannot_be_made_or_cannot_step_are_refused(args: dict[str, Any],
                                                                                says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_optimizer(net(), OptimConfig(name="adamw", args=args))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Rprop"])
def test_an_optimizer_that_a_gpu_stored_goes_on_on_a_cpu_as_one_of_a_cpu_does(name: str) -> None:
    """There it is fused, or its counts lie on the device."""
    config = complete({"peers": [{"optim": {"name": name, "lr": 0.1, "weight_decay": 0.0}}]})
    made = [make_peer(net(), config) for _ in range(3)]

    def step(peer: Peer) -> None:
        for number, parameter in enumerate(peer.model.parameters()):
            parameter.grad = torch.full_like(parameter, number + 1.0)
        peer.descend(0.1)

    step(made[0])
    stored = made[0].state()
    for peer in made[1:]:
        state = copy.deepcopy(stored)
        for group in state["optimizer"]["param_groups"] if peer is made[1] else ():
            group.update({key: value for key, value in (("fused", True), ("foreach", None), ("capturable", True))
                          if key in group})
        peer.load(state)
        step(peer)
    assert state_hash(made[1].state()) == state_hash(made[2].state())


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_fused_optimizer_goes_on_from_a_file_as_if_it_had_not_stopped(name: str) -> None:
    """Files hold tensors in rows, weights of convolutions lie channels last, and fused kernels do not look."""
    config = complete({"peers": [{"optim": {"name": name, "lr": 0.1, "args": {"fused": True}}}]})
    one, other = (make_peer(copy.deepcopy(model).to(memory_format=torch.channels_last), config)
                  for model in [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())] * 2)
    for number in range(3):
        if number == 1:
            other.load(tree_map_only(Tensor, lambda tensor: tensor.detach().clone(
                memory_format=torch.contiguous_format), one.state()))
        for peer in (one, other):
            for parameter in peer.model.parameters():
                parameter.grad = parameter.detach().sin()
            peer.descend(0.1)
    assert state_hash(one.state()) == state_hash(other.state())


# ------------------------------------------------------------------------------------------------ layers and precisions


def test_layers_of_a_transformer_learn_at_a_share_of_the_next_one_s_rate() -> None:
    """0.5 to the number of layers above; biases, norms and position embeddings without weight decay."""
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=3)
    depth = len(net.blocks)
    made = build_optimizer(nn.Sequential(nn.Identity(), net), OptimConfig(
        name="adamw", lr=0.1, weight_decay=0.05, args={"layer_decay": 0.5, "decay_norm_bias": False}))
    pace(made, 0.2)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in made.param_groups for p in group["params"]}
    assert len(rates) == len(list(net.parameters()))
    assert rates[id(net.head.weight)] == (0.2, 0.05) and rates[id(net.head.bias)] == (0.2, 0.0)
    for number, block in enumerate(net.blocks):
        assert rates[id(block.mlp.fc1.weight)][0] == pytest.approx(0.2 * 0.5 ** (depth - number))
    assert rates[id(net.patch_embed.proj.weight)] == (pytest.approx(0.2 * 0.5 ** (depth + 1)), 0.05)


def test_what_stands_round_a_transformer_of_timm_learns_too() -> None:
    """As the last layer does, at the whole rate."""
    timm = pytest.importorskip("timm")
    net = nn.Sequential(nn.BatchNorm2d(3), timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=3),
                        nn.Linear(3, 2))
    made = build_optimizer(net, OptimConfig(name="adamw", lr=0.1, weight_decay=0.05,
                                            args={"layer_decay": 0.5, "decay_norm_bias": False}))
    pace(made, 0.2)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in made.param_groups for p in group["params"]}
    assert set(rates) == set(map(id, net.parameters()))
    assert (rates[id(net[2].weight)], rates[id(net[0].weight)]) == ((0.2, 0.05), (0.2, 0.0))


@pytest.mark.parametrize(("value", "told"), [(0, "a number in"), (1.5, "a number in"), ("x", "a number in")])
def test_a_layer_decay_that_is_none_is_refused(value: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_optimizers(complete({"peers": [{"optim": {"args": {"layer_decay": value}}}]}))


def test_a_network_whose_layers_have_no_order_is_refused_a_layer_decay() -> None:
    with pytest.raises(ConfigError, match="only models of timm"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(args={"layer_decay": 0.75}))


def test_a_loss_scale_is_halved_by_an_overflow_and_doubled_after_2000_updates() -> None:
    scale, other = LossScale(torch.device("cpu"), True), LossScale(torch.device("cpu"), True)
    (leaf := torch.ones(2, requires_grad=True)).sum().mul(3.0)
    scale.up((leaf * 3).sum()).backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [3 * 2.0**16] * 2
    scale.down([leaf.grad])
    assert leaf.grad.tolist() == [3.0] * 2
    scale.after(overflow=True)
    for _ in range(1999):
        scale.after(overflow=False)
    other.load(scale.state())
    for one in (scale, other):
        assert one.up(torch.ones(())) == 2.0**15
        one.after(overflow=False)
        assert one.up(torch.ones(())) == 2.0**16
    assert LossScale(torch.device("cpu"), False).state() == {}
