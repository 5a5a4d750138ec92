"""The soundness checks: models that hide their gradients are caught, honest ones are not, and so are planted faults."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.attacks.random_search import random_search
from mat_dist.config.schema import DataConfig
from mat_dist.data import as_float, load_data
from mat_dist.errors import NotReportable
from mat_dist.evaluation.attacks import AttackPlan, Job, Target, attack_one, predict
from mat_dist.evaluation.soundness import CHECKS, examine, judge, total
from tests.documents import table

pytestmark = pytest.mark.slow  # 40 s of attacks

COUNT = 80
LINF, L2, L1 = Threat("linf", 0.1), Threat("l2", 0.5), Threat("l1", 1.0)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then test images and labels."""
    data = load_data(DataConfig(), seed=0, batch_size=64)
    x, y = data.train.batch(torch.arange(1000))
    x_test, y_test = data.test.batch(torch.arange(COUNT))
    return as_float(x), y, as_float(x_test), y_test


def fit(model: nn.Module, x: Tensor, y: Tensor, eps: float, epochs: int = 8) -> nn.Module:
    """Train with FGSM examples of radius eps (0: clean images)."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(epochs):
        order = rng.permutation(epoch, len(x))
        for rows in order.split(50):
            images = x[rows].clone().requires_grad_(True)
            if eps:
                (g,) = torch.autograd.grad(F.cross_entropy(model(images), y[rows]), images)
                images = (images + eps * g.sign()).clamp(0, 1).detach()
            optimizer.zero_grad()
            F.cross_entropy(model(images.detach()), y[rows]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def honest(digits: tuple[Tensor, ...]) -> dict[str, nn.Module]:
    x, y = digits[:2]
    with rng.keyed_rng(1):
        return {
            "linear": fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), x, y, 0.0),
            "mlp": fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), x, y, 0.1),
            "cnn": fit(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                                     nn.Flatten(), nn.Linear(128, 10)), x, y, 0.1)}


def failed(model: nn.Module, x: Tensor, y: Tensor, *threats: Threat, job: Job | None = None) -> set[str]:
    """Names of the checks that a model does not pass."""
    job = job or Job(threats, {"pgd": AttackPlan(20)}, ("pgd",), "standard", (), False, 0)
    threats = job.threats
    target = Target("model", model, (model,))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tried = {t.label: attack_one(target, x, y, predict(model, x), t, job, 0) for t in threats}
        counts = examine(target, x, y, tried, job, 0)
    return {v.check for v in judge(total([counts])) if not v.passed}


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn"])
def test_an_honest_model_passes_every_check(name: str, honest: dict[str, nn.Module],
                                            digits: tuple[Tensor, ...]) -> None:
    assert failed(honest[name], *digits[2:], LINF, L2, L1) == set()


class Scaled(nn.Module):
    """Logits so large that the softmax is exactly 0 or 1 in fp32: cross-entropy has no gradient where it is right."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return 1e4 * self.model(x_BCHW)


class Quantised(Scaled):
    """Pixels rounded to 5 levels: the gradient is 0 everywhere."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.model((4 * x_BCHW).round() / 4)


class Noisy(Scaled):
    """Fresh noise on the image at each call."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.model(x_BCHW + 0.2 * torch.randn_like(x_BCHW))


@pytest.mark.parametrize(("mask", "named"), [
    (Scaled, {"zero gradients", "gradient-free"}), (Quantised, {"zero gradients", "gradient-free", "large eps"}),
    (Noisy, {"deterministic", "batch size"})])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_model_that_hides_its_gradient_fails_two_checks(mask: Callable[[nn.Module], nn.Module], named: set[str],
                                                          name: str, honest: dict[str, nn.Module],
                                                          digits: tuple[Tensor, ...]) -> None:
    found = failed(mask(honest[name]).eval(), *digits[2:], LINF)
    assert named <= found and len(found) >= 2


@pytest.mark.parametrize("mask", [Scaled, Quantised, Noisy])
def test_constraint_relaxation_makes_no_masked_model_sound(mask: Callable[[nn.Module], nn.Module],
                                                           honest: dict[str, nn.Module],
                                                           digits: tuple[Tensor, ...]) -> None:
    job = Job((LINF,), {}, ("cr",), transfer=False)
    assert failed(mask(honest["cnn"]).eval(), *digits[2:], job=job) and not failed(honest["cnn"], *digits[2:], job=job)


# ------------------------------------------------------------------------------------------------ planted faults


class Around(nn.Module):
    """A model with something before and after it."""

    def __init__(self, model: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.after(self.model(self.before(x_BCHW)))


def same(values: Tensor) -> Tensor:
    return values


def around(model: nn.Module, before: Callable[[Tensor], Tensor] = same,
           after: Callable[[Tensor], Tensor] = same) -> nn.Module:
    return Around(model, before, after).eval()


def told_as(made: Threat, told: Threat, model: nn.Module, x: Tensor, y: Tensor) -> set[str]:
    """Names of the failed checks where the AEs of one threat are taken for those of another."""
    job = Job((told,), {"pgd": AttackPlan(20)}, ("pgd",), "standard", (), False, 0)
    target = Target("model", model, (model,))
    tried = {told.label: attack_one(target, x, y, predict(model, x), made, job, 0)}
    return {v.check for v in judge(total([examine(target, x, y, tried, job, 0)])) if not v.passed}


Models = dict[str, nn.Module]
# Fault -> what is evaluated with it, and the checks that must name it.
FAULTS: dict[str, tuple[Callable[[Models, Tensor, Tensor], set[str]], set[str]]] = {
    "eps for bytes": (lambda m, x, y: told_as(Threat("linf", 25.5), LINF, m["mlp"], x, y), {"inside ball and box"}),
    "eps divided by 255 twice": (lambda m, x, y: told_as(Threat("linf", 0.1 / 255), LINF, m["mlp"], x, y),
                                 {"one step", "gradient-free", "more steps"}),
    "normalised input": (lambda m, x, y: failed(m["mlp"], (x - 0.5) / 0.25, y, LINF), {"images"}),
    "input in bytes": (lambda m, x, y: failed(m["mlp"], 255 * x, y, LINF), {"images"}),
    "dropout left on": (lambda m, x, y: failed(nn.Sequential(nn.Dropout(0.5), m["mlp"]).train(), x, y, LINF),
                        {"eval mode", "deterministic"}),
    "train-mode BN": (lambda m, x, y: failed(copy.deepcopy(m["cnn"]).train(), x, y, LINF), {"eval mode", "batch size"}),
    "probabilities for logits": (lambda m, x, y: failed(around(m["mlp"], after=lambda z: z.softmax(-1)), x, y, LINF),
                                 {"logits"}),
    "clipped logits": (lambda m, x, y: failed(around(m["mlp"], after=lambda z: z.clamp(max=-1e3) + 0 * z), x, y, LINF),
                       {"zero gradients"}),
    "statistics of the batch": (lambda m, x, y: failed(around(m["mlp"], lambda x: x - x.mean(0)), x, y, LINF),
                                {"batch size"}),
    "a step too short": (lambda m, x, y: failed(
        m["mlp"], x, y, job=Job((LINF,), {"pgd": AttackPlan(20, step_size=1e-5)}, ("pgd",), "standard", (), False, 0)),
        {"one step", "gradient-free"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_of_ten_planted_faults_is_caught_and_named(fault: str, honest: Models, digits: tuple[Tensor, ...]) -> None:
    evaluated, named = FAULTS[fault]
    assert len(FAULTS) == 10 and named <= evaluated(honest, *digits[2:])


def test_the_faults_are_told_apart_from_an_honest_evaluation(honest: Models, digits: tuple[Tensor, ...]) -> None:
    assert told_as(LINF, LINF, honest["mlp"], *digits[2:]) == set()


def test_randomness_and_values_that_are_not_finite_are_named(honest: Models, digits: tuple[Tensor, ...]) -> None:
    x, y = digits[2:]
    assert "deterministic" in failed(around(honest["mlp"], lambda x: x + torch.rand(())), x, y, LINF)
    assert "images" in failed(honest["mlp"], x / 0, y, LINF)


@pytest.mark.parametrize(("before", "after"), [
    (lambda x: x.detach(), same), (same, lambda z: F.one_hot(z.argmax(-1), 10).to(z.dtype))], ids=["detached", "vote"])
def test_a_model_without_any_gradient_is_refused(before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor],
                                                 honest: dict[str, nn.Module], digits: tuple[Tensor, ...]) -> None:
    with pytest.raises(NotReportable, match="no gradient with respect to the image"):
        failed(around(honest["mlp"], before, after), *digits[2:], LINF)


def test_noise_or_square_alone_are_no_evaluation(honest: Models, digits: tuple[Tensor, ...]) -> None:
    """What gradient attacks break beyond them counts as a failed check, not as robustness."""
    job = Job((LINF,), {}, ("uniform", "gaussian", "search"), "standard", (), False, 0, 50)
    assert {"one step", "more steps"} <= failed(honest["mlp"], *digits[2:], job=job)


@pytest.mark.parametrize(("plan", "named"), [(AttackPlan(20, step_size=1e-5), "one step"),
                                             (AttackPlan(3, step_size=0.005), "more steps")])
def test_an_attack_that_is_too_weak_is_named(plan: AttackPlan, named: str, honest: dict[str, nn.Module],
                                             digits: tuple[Tensor, ...]) -> None:
    threat = Threat("linf", 0.2)
    job = Job((threat,), {"pgd": plan}, ("pgd",), "standard", (), False, 0)
    assert named in failed(honest["mlp"], *digits[2:], threat, job=job)


def test_an_ae_outside_the_ball_or_the_box_is_named(honest: dict[str, nn.Module], digits: tuple[Tensor, ...]) -> None:
    x, y = digits[2:]
    job = Job((LINF, L2), {"pgd": AttackPlan(1)}, ("pgd",), "standard", (), False, 0)
    target = Target("model", honest["mlp"], (honest["mlp"],))
    for move in (0.101, -2.0):
        tried = {t.label: attack_one(target, x, y, predict(target.model, x), t, job, 0) for t in (LINF, L2)}
        tried[LINF.label].advs["pgd"] = x + move
        verdicts = judge(total([examine(target, x, y, tried, job, 0)]))
        inside = {v.threat: v.passed for v in verdicts if v.check == "inside ball and box"}
        assert inside == {LINF.label: False, L2.label: True}


def test_square_and_transfer_beyond_white_box_are_named() -> None:
    threat = {"n": 1000, "inside ball and box": 0, "square": 0, "gradient-free": 0, "autoattack": 0,
              "transfer": 0}
    model = {"n": 1000, "classes": 10}

    def found(**counts: int) -> set[str]:
        return {v.check for v in judge({"": model, "l1 12": threat | counts}) if not v.passed}

    assert found() == set()
    assert found(square=4, transfer=4) == set()  # 2 standard errors of 4 are 4
    assert found(square=5) == {"gradient-free"} and found(transfer=5) == {"transfer"}
    assert found(autoattack=1) == {"autoattack"}


def test_counts_of_chunks_add_up(honest: dict[str, nn.Module], digits: tuple[Tensor, ...]) -> None:
    chunks = [{"": {"n": 3, "classes": 10, "images": 1}, "t": {"n": 3, "noise": 2}},
              {"": {"n": 4, "classes": 10, "images": 0}, "t": {"n": 4, "noise": 5}}]
    assert total(chunks) == {"": {"n": 7, "classes": 10, "images": 1}, "t": {"n": 7, "noise": 7}}


# ------------------------------------------------------------------------------------------------ the search


@pytest.mark.parametrize("threat", [LINF, L2, L1], ids=lambda t: t.norm)
def test_the_search_stays_inside_and_finds_what_noise_does_not(threat: Threat, honest: dict[str, nn.Module],
                                                               digits: tuple[Tensor, ...]) -> None:
    x, y = digits[2:]
    threat = replace(threat, eps=threat.eps * 2)
    model = honest["mlp"]
    adv = random_search(model, x, y, threat=threat, queries=200, stream=7)
    assert adv.min() >= 0 and adv.max() <= 1 and threat.distance(adv, x).max() <= threat.eps * (1 + 1e-6)
    noise = threat.region(x).start("uniform", stream=7)
    broken = [(predict(model, images) != y).sum() for images in (adv, noise)]
    assert broken[0] > broken[1] + 5
    assert torch.equal(adv[:40], random_search(model, x[:40], y[:40], threat=threat, queries=200, stream=7))


def test_the_documents_list_the_checks() -> None:
    assert [row[0].strip("`") for row in table("docs/evaluation.md", "## Soundness checks")] == list(CHECKS)
