"""The copy that an attack differentiates: the same function as the model, whatever the model is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist.attacks.attack_copy import AttackCopy, _WideConv2d
from mat_dist.config.schema import ModelConfig
from mat_dist.core.peer import Peer
from mat_dist.models import build_model
from mat_dist.models.modes import frozen
from tests.cohorts import cohort_config, first_view, make_peer

SHAPE = (3, 16, 16)


def trained(name: str, norm: str | None = None) -> nn.Module:
    """A network whose weights, affine parameters and running statistics are no longer the initial ones."""
    torch.manual_seed(0)
    net = build_model(ModelConfig(name=name, width=0.25, norm=norm), shape=SHAPE, classes=10, mean=[0.4] * 3,
                      std=[0.3] * 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(4):
        F.cross_entropy(net(torch.rand(16, *SHAPE)), torch.randint(10, (16,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def operators(model: nn.Module, copy: AttackCopy, x: Tensor) -> list[str]:
    with torch.profiler.profile() as seen, frozen(model), torch.no_grad():
        copy(x)
    return [event.name for event in seen.events()]


@pytest.mark.parametrize("name", ["tiny_cnn", "small_cnn", "resnet18", "preact_resnet18", "mobilenet_v2"])
def test_a_copy_gives_the_logits_and_the_input_gradient_of_its_model_in_eval_mode(name: str) -> None:
    model, x = trained(name).double(), torch.rand(5, *SHAPE, dtype=torch.float64)
    copy = AttackCopy(model, x)
    assert copy.reason == ""
    copy.refresh(x)
    found = []
    with frozen(model):
        for called in (copy, model):
            x_in = x.clone().requires_grad_()
            logits = called(x_in)
            found.append((logits, torch.autograd.grad(logits.square().sum(), x_in)[0]))
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).abs().max() < 1e-10 * theirs.abs().max()


@pytest.mark.parametrize(("name", "left"), [("small_cnn", 0), ("resnet18", 0), ("preact_resnet18", 9)])
def test_batch_norms_after_convolutions_are_gone(name: str, left: int) -> None:
    """Of the 17 batch norms of a pre-activation ResNet-18, 8 follow a convolution that nothing else reads."""
    model, x = trained(name), torch.rand(2, *SHAPE)
    assert operators(model, AttackCopy(model, x), x).count("aten::batch_norm") == left


def test_a_copy_follows_its_model_only_when_refreshed() -> None:
    model, x = trained("small_cnn"), torch.rand(5, *SHAPE)
    copy = AttackCopy(model, x)
    with frozen(model), torch.no_grad():
        before = copy(x)
        for value in model.state_dict().values():
            value += 0.01 if value.is_floating_point() else 0
        copy.refresh(x)
        assert (copy(x) - model(x)).abs().max() < 1e-4
        assert (copy(x) - before).abs().max() > 1e-3


def test_the_model_keeps_its_parts() -> None:
    model, x = trained("resnet18"), torch.rand(2, *SHAPE)
    parts = {name: id(module) for name, module in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    AttackCopy(model, x, torch.bfloat16).refresh(x)
    assert {name: id(module) for name, module in model.named_modules()} == parts
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_without_batch_norm_there_is_nothing_to_copy_but_in_bf16() -> None:
    model, x = trained("small_cnn", norm="group"), torch.rand(2, *SHAPE)
    assert AttackCopy(model, x)._called is model
    cast = AttackCopy(model, x, torch.bfloat16)
    weights = [p.dtype for p in cast._called.parameters() if p.ndim > 1]
    assert weights == [torch.bfloat16] * 6


class Residual(nn.Module):
    """A convolution whose output is read by a batch norm and by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.norm.running_var.fill_(3.0)  # type: ignore[union-attr]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = self.conv(x_BCHW)
        return self.head((self.norm(out) + out).mean((2, 3)))  # type: ignore[no-any-return]


class Branching(nn.Module):
    """A batch norm that is called or not, as the images decide, and one convolution that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.first.running_var.fill_(3.0)  # type: ignore[union-attr]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = self.first(self.conv(x_BCHW))
        return self.second(self.conv(out)).flatten(1)[:, :10] if out.sum() > -1e9 else out.flatten(1)[:, :10]


@pytest.mark.parametrize("made", [Residual, Branching])
def test_a_convolution_that_somebody_else_reads_is_not_folded(made: type[nn.Module]) -> None:
    model, x = made(), torch.rand(2, *SHAPE)
    copy = AttackCopy(model, x)
    assert copy.reason == "" and copy._called is model


class Peeking(nn.Module):
    """Reads the convolution's output where autograd does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Residual()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = self.net.conv(x_BCHW)
        return self.net.head((self.net.norm(out) + out.detach()).mean((2, 3)))  # type: ignore[no-any-return]


class Late(nn.Module):
    """Reads the convolution's output a second time once a gate has opened."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.gate = Residual(), nn.Parameter(torch.zeros(()))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = self.net.conv(x_BCHW)
        return self.net.head((self.net.norm(out) + self.gate * out.detach()).mean((2, 3)))  # type: ignore[no-any-return]


class Remembering(Residual):
    """Reads what a hook has kept of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.register_forward_pre_hook(lambda module, given: setattr(self, "seen", given[0].data))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head((self.norm(self.conv(x_BCHW)) + self.seen).mean((2, 3)))  # type: ignore[no-any-return]


class Squaring(nn.BatchNorm2d):
    """A batch norm of somebody's own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.weight[:, None, None]


class Borrowing(nn.Module):
    """Uses the convolution's weight a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Residual()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        again = F.conv2d(x_BCHW, self.net.conv.weight, self.net.conv.bias)
        return self.net.head((self.net.norm(self.net.conv(x_BCHW)) + again).mean((2, 3)))  # type: ignore[no-any-return]


class Noisy(nn.Module):
    """Draws in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained("tiny_cnn")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.net(x_BCHW + 0.1 * torch.randn_like(x_BCHW))
        return out


def fresh(model: nn.Module) -> nn.Module:
    """With batch norms as they are made: nearly the identity in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return model


def squaring() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), Squaring(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize("made", [lambda: fresh(Peeking()), lambda: fresh(Remembering()),
                                  lambda: fresh(Borrowing()), squaring], ids=["peeking", "hook", "weight", "norm"])
def test_a_copy_that_errs_only_after_updates_is_found_at_once(made: Any) -> None:
    torch.manual_seed(0)
    model, x = made(), torch.rand(2, *SHAPE)
    before = [value.clone() for value in model.state_dict().values()]
    copy = AttackCopy(model, x)
    assert "other logits" in copy.reason and copy._called is model
    assert all(map(torch.equal, before, model.state_dict().values()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_copy_that_errs_from_some_step_on_is_found_then_and_the_model_attacked_itself(precision: str) -> None:
    torch.manual_seed(0)
    step = {"precision": precision}
    peer = make_peer(Late(), cohort_config("at", 1, step=step))
    x, y = torch.rand(4, *SHAPE), torch.arange(4)
    for number in range(12):
        if number == 4:
            assert peer.notes == []
            with torch.no_grad():
                peer.model.gate.fill_(0.3)
        adv = first_view(peer, x, y, number)
    assert len(peer.notes) == 1 and "other logits" in peer.notes[0]
    plain = make_peer(peer.model, cohort_config("at", 1, step=step))
    attacked_itself(plain)
    assert torch.equal(adv, first_view(plain, x, y, number))


def attacked_itself(peer: Peer) -> None:
    """Let a peer's attack do without a copy."""
    peer.attack_of_training._called = peer.model


def test_a_model_that_draws_in_eval_mode_has_a_copy_too() -> None:
    model, x = Noisy(), torch.rand(2, *SHAPE)
    copy = AttackCopy(model, x)
    copy.refresh(x)
    assert copy.reason == "" and copy._called is not model


class Locked(nn.Module):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained("tiny_cnn")

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot copy")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.net(x_BCHW)
        return out


@pytest.mark.parametrize(("made", "reason"), [(Peeking, "other logits"), (Locked, "cannot copy")])
def test_a_model_that_cannot_be_copied_is_attacked_itself_and_the_user_is_told(made: type[nn.Module],
                                                                              reason: str) -> None:
    peer = make_peer(made(), cohort_config("at", 1))
    x, y = torch.rand(4, *SHAPE), torch.arange(4)
    for step in range(2):
        first_view(peer, x, y, step)
    assert len(peer.notes) == 1 and reason in peer.notes[0] and "peer0" in peer.notes[0]


def test_layers_with_hooks_keep_their_own_weights() -> None:
    """Weight normalisation makes the weight anew in each pass."""
    model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Flatten(),
                          nn.Linear(4 * 14 * 14, 10))
    x = torch.rand(2, *SHAPE)
    copy = AttackCopy(model, x)
    assert copy._called is model or copy.reason == ""
    with frozen(model), torch.no_grad():
        assert torch.allclose(copy(x), model(x), atol=1e-5)


@pytest.mark.parametrize(("precision", "differ", "weaker"), [("fp32", 0.01, 1e-4), ("bf16", 0.4, 0.01)])
def test_an_attack_on_the_copy_is_as_strong(precision: str, differ: float, weaker: float) -> None:
    """Cross-entropy of the AEs by the fp32 model. Signs of gradients near zero flip: 30 % of the pixels in bf16, with a
    copy or without, since this net has seen four batches."""
    x, y = torch.rand(32, *SHAPE), torch.randint(10, (32,))
    found = []
    for given in ("fp32", precision):
        peer = make_peer(trained("small_cnn"), cohort_config("at", 1, eps=0.05, steps=5, step={"precision": given}))
        if not found:
            attacked_itself(peer)
        aes = first_view(peer, x, y)
        with frozen(peer.model), torch.no_grad():
            found.append((aes, F.cross_entropy(peer.model(aes), y)))
    (plain, reference), (fast, ce) = found
    assert ((plain - fast).abs() > 1e-5).float().mean() < differ
    assert abs(ce - reference) < weaker * reference


def test_a_wide_first_layer_gives_the_same_images_and_gradients() -> None:
    """To rounding of sums that have further zeros."""
    conv, x = nn.Conv2d(3, 5, 3, stride=2, padding=1, dtype=torch.float64), torch.rand(2, 3, 7, 7, dtype=torch.float64)
    wide = _WideConv2d(conv)
    wide.bias = conv.bias
    found = [(y := made(leaf := x.clone().requires_grad_()), *torch.autograd.grad(y.square().sum(), leaf))
             for made in (conv, wide)]
    assert wide.weight.shape == (5, 8, 3, 3)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))


# ------------------------------------------------------------------------------------------------ engines


def attacked(engine: str, device: str = "cpu", precision: str = "fp32") -> tuple[Peer, Tensor]:
    """A peer and its AEs of the second of two batches, its weights changed in between."""
    config = cohort_config("at", 1, eps=0.05, steps=4, step={"engine": engine, "precision": precision})
    peer = make_peer(trained("small_cnn").to(device), config)
    torch.manual_seed(1)
    for number in range(2):
        x, y = torch.rand(16, *SHAPE).to(device), torch.randint(10, (16,)).to(device)
        aes = first_view(peer, x, y, number)
        with torch.no_grad():
            for parameter in peer.model.parameters():
                parameter *= 1.1
    return peer, aes


def test_a_compiler_that_fails_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, **_: Any) -> Any:
        def call(x: Tensor) -> Tensor:
            raise NotImplementedError("no such kernel")
        return call
    monkeypatch.setattr(torch, "compile", broken)
    peer, aes = attacked("compile")
    assert len(peer.notes) == 1 and "no such kernel" in peer.notes[0]
    assert torch.equal(aes, attacked("eager")[1])


@pytest.mark.slow
def test_a_compiled_attack_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced with its gradient, but run by torch's own kernels: a C++ compiler would take a minute."""
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: compile_model(model, backend="aot_eager", **how))
    peer, aes = attacked("compile")
    assert peer.notes == []
    assert ((aes - attacked("eager")[1]).abs() > 1e-5).float().mean() < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_a_compiled_attack_is_the_same(precision: str) -> None:
    peer, aes = attacked("compile", "cuda", precision)
    assert peer.notes == []
    same = attacked("eager", "cuda", precision)[1]
    assert ((aes - same).abs() > 1e-5).float().mean() < (0.02 if precision == "fp32" else 0.4)
