"""The AutoAttack adapter against direct calls of pyautoattack."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mat_dist.attacks.norms import Threat
from mat_dist.errors import ConfigError, EnvironmentFault
from mat_dist.evaluation.attacks import predict
from mat_dist.evaluation.autoattack import autoattack, check_classes, chunk_seed

pytestmark = pytest.mark.slow  # 20 s and more of AutoAttack

pyautoattack = pytest.importorskip("pyautoattack", exc_type=ImportError)

THREATS = (Threat("linf", 0.06), Threat("l2", 0.4), Threat("l1", 2.0))
FAST = ("apgd-ce", "apgd-dlr")


def make_model(classes: int) -> nn.Module:
    """A small network with random weights; its predictions are the labels, so that all of it is attacked."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(classes)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, classes)).eval()


def images(model: nn.Module, count: int = 12) -> tuple[Tensor, Tensor]:
    x_BCHW = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    return x_BCHW, model(x_BCHW).argmax(1)


def direct(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, version: str, attacks: list[str] | None,
           seed: int) -> tuple[Tensor, Tensor]:
    """pyautoattack as its documentation says, for ten classes or more."""
    attack = pyautoattack.AutoAttack(model, norm=threat.norm.replace("l", "L", 1), eps=threat.eps, seed=seed,
                                     version=version, attacks=attacks)
    return attack.run_standard_evaluation(x, y, batch_size=len(y))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("auto-attack")
    before, logger.propagate = logger.propagate, False
    yield
    logger.propagate = before


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks with a tenth of the iterations, wherever they are made."""
    made = pyautoattack.AutoAttack.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 10
        self.square.n_queries = 500

    monkeypatch.setattr(pyautoattack.AutoAttack, "__init__", init)


@pytest.mark.parametrize(("version", "custom", "threat"), [
    ("standard", (), THREATS[0]), pytest.param("custom", FAST, THREATS[2], marks=pytest.mark.thorough),
    pytest.param("rand", (), THREATS[1], marks=pytest.mark.thorough),
    *(pytest.param("standard", (), threat, marks=pytest.mark.thorough) for threat in THREATS[1:])],
    ids=lambda v: getattr(v, "norm", None))
def test_the_adapter_gives_the_aes_of_a_direct_call(threat: Threat, version: str, custom: tuple[str, ...]) -> None:
    model = make_model(10)
    x, y = images(model)
    seed = chunk_seed(3, threat.norm, 7)
    found = autoattack(model, x, y, threat, version=version, custom=custom, seed=seed)
    adv, prediction = direct(model, x, y, threat, version=version, attacks=list(custom) or None, seed=seed)
    assert torch.equal(found.adv_BCHW, adv) and torch.equal(predict(model, found.adv_BCHW), prediction)
    assert 0 < (prediction != y).sum() < len(y)  # neither all nor none
    other = autoattack(model, x, y, threat, version="custom", custom=("apgd-ce",), seed=chunk_seed(3, threat.norm, 8))
    assert not torch.equal(found.adv_BCHW, other.adv_BCHW)


@pytest.mark.parametrize(("name", "threat"), [
    *((name, THREATS[0]) for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")),
    ("fab-t", THREATS[1]), ("apgd-t", THREATS[2])], ids=lambda v: getattr(v, "norm", v))
def test_a_part_alone_gives_the_aes_of_a_direct_call(name: str, threat: Threat, short: None) -> None:
    """With a tenth of the iterations, in both; the test above has them all."""
    model = make_model(10)
    x, y = images(model)
    found = autoattack(model, x, y, threat, version="standard", custom=(), seed=4, alone=name)
    attack = pyautoattack.AutoAttack(model, norm=threat.norm.replace("l", "L", 1), eps=threat.eps, seed=4)
    attack.attacks_to_run = [name]
    adv, prediction = attack.run_standard_evaluation(x, y, batch_size=len(y))
    assert torch.equal(found.adv_BCHW, adv) and torch.equal(predict(model, found.adv_BCHW), prediction)
    assert found.attacks == (name,) and (prediction != y).any() and found.warnings == ()


def test_the_first_attack_alone_breaks_what_it_breaks_in_the_standard_version(
        short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyautoattack.square.SquareAttack, "perturb", lambda self, x, y: x)
    model = make_model(10)
    x, y = images(model)
    alone = autoattack(model, x, y, THREATS[0], version="standard", custom=(), seed=4, alone="apgd-ce")
    whole = autoattack(model, x, y, THREATS[0], version="standard", custom=(), seed=4)
    broken = predict(model, alone.adv_BCHW) != y
    assert torch.equal(alone.adv_BCHW[broken], whole.adv_BCHW[broken]) and broken.any()
    assert (predict(model, whole.adv_BCHW) != y).sum() >= broken.sum()


@pytest.mark.parametrize("classes", [2, 3, 4, 9])
def test_targeted_parts_alone_take_fewer_targets_with_few_classes(classes: int) -> None:
    model = make_model(classes)
    x, y = images(model, 4)
    for name in ("fab-t", "apgd-t") if classes >= 4 else ("fab-t",):
        found = autoattack(model, x, y, Threat("linf", 0.3), version="standard", custom=(), seed=1, alone=name)
        assert found.attacks == (name,) and found.warnings == ()


@pytest.mark.parametrize(("classes", "attacks"), [
    (2, ("apgd-ce", "fab-t", "square")), (3, ("apgd-ce", "fab-t", "square")),
    (4, ("apgd-ce", "apgd-t", "fab-t", "square"))])
def test_few_classes_leave_out_what_needs_more(classes: int, attacks: tuple[str, ...],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyautoattack.square.SquareAttack, "perturb", lambda self, x, y: x)
    model = make_model(classes)
    x, y = images(model, 4)
    found = autoattack(model, x, y, Threat("linf", 0.02), version="standard", custom=(), seed=1)
    assert found.attacks == attacks and found.warnings == ()


def test_a_custom_attack_that_needs_more_classes_is_refused() -> None:
    check_classes(("pgd", "autoattack", "apgd-ce", "apgd-dlr"), 3)
    check_classes(("autoattack", "fab-t", "square"), 2)
    with pytest.raises(ConfigError, match="apgd-t needs 4 classes, the model has 3"):
        check_classes(("pgd", "apgd-t"), 3)
    with pytest.raises(ConfigError, match="autoattack needs 2 classes, the model has 1"):
        check_classes(("autoattack",), 1)


def test_what_square_alone_breaks_is_counted(short: None) -> None:
    model = make_model(10)
    x, y = images(model)
    found = autoattack(model, x, y, THREATS[0], version="custom", custom=("square",), seed=1)
    assert found.square_broke == (predict(model, found.adv_BCHW) != y).sum() > 0
    assert autoattack(model, x, y, THREATS[0], version="custom", custom=("apgd-ce",), seed=1).square_broke == 0


def test_generators_logger_and_modes_are_as_before() -> None:
    model = make_model(10).train()
    x, y = images(model)
    torch.manual_seed(4)
    logger = logging.getLogger("auto-attack")
    state, kept = torch.get_rng_state(), (list(logger.handlers), list(logger.filters), logger.propagate)
    autoattack(model, x, y, THREATS[0], version="custom", custom=("apgd-ce",), seed=1)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(p.requires_grad for p in model.parameters())
    assert (logger.handlers, logger.filters, logger.propagate) == kept


@pytest.mark.parametrize(("model", "text"), [
    (nn.Sequential(make_model(10), nn.Softmax(-1)), "probability distribution"),
    (nn.Sequential(make_model(10), nn.Threshold(100.0, 0.0)), "zero gradient")])
def test_the_warnings_of_pyautoattack_are_kept(model: nn.Module, text: str) -> None:
    x, y = images(model)
    found = autoattack(model, x, y, THREATS[0], version="custom", custom=("apgd-dlr",), seed=1)
    assert any(text in warning for warning in found.warnings)


def test_a_missing_package_is_an_error_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    model = make_model(10)
    with pytest.raises(EnvironmentFault, match="mat_dist\\[eval\\]"):
        autoattack(model, *images(model), THREATS[0], version="standard", custom=(), seed=1)
