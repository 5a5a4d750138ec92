"""Auto-PGD: against a loop over images, against pyautoattack, and as a training attack."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks import APGD_L1_SHARE, apgd, pgd
from mat_dist.attacks.apgd import narrowing
from mat_dist.attacks.norms import L1, Threat
from mat_dist.attacks.training_attack import Plan, TrainingAttack
from mat_dist.config import load_config
from mat_dist.config.schema import DataConfig
from mat_dist.data import ImageSet, as_float, load_data
from mat_dist.evaluation.attacks import AttackPlan, Job, Target, attack_one, correct, craft, predict
from mat_dist.models.modes import frozen
from tests.cohorts import CLASSES, batch, nets

THREATS = [Threat("linf", 0.06), Threat("l2", 0.2), Threat("l1", 0.3)]
NORMS = pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)


def smooth_model(images: Tensor) -> Tensor:
    """Two layers with tanh over 16 values, 4 classes, float64."""
    one, two = rng.normal(1, (16, 12), dtype=torch.float64), rng.normal(2, (12, 4), dtype=torch.float64)
    return 3 * torch.tanh(images.flatten(1) @ one.to(images.device)) @ two.to(images.device)


def some_images(count: int = 3) -> tuple[Tensor, Tensor]:
    x = rng.uniform(3, (count, 1, 4, 4), dtype=torch.float64)
    return x, smooth_model(x).argmax(1)


def one_by_one(x: Tensor, y: Tensor, start: Tensor, threat: Threat, steps: int, share: float) -> tuple[Tensor, bool]:
    """APGD on a batch of one image with lists and branches: its best point, and whether it stayed correct.

    linf, l2: algorithm 1 of Croce and Hein (2020), check points by their formula; l1: as their code has it.
    """
    region, l1 = threat.region(x, share), threat.norm == "l1"

    def look(z: Tensor) -> tuple[float, Tensor, bool]:
        leaf = z.clone().requires_grad_()
        logits = smooth_model(leaf)
        loss = F.cross_entropy(logits, y)
        return loss.item(), torch.autograd.grad(loss, leaf)[0], bool(logits.argmax() == y)

    shares = [0.0, 0.22]
    while not l1 and shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    checks = set(range(int(0.04 * steps), steps + 1, int(0.04 * steps))) if l1 else {
        math.ceil(round(p * steps, 9)) for p in shares[1:]}
    size = full = threat.eps if l1 else 2 * threat.eps
    top, changed = max(1, round(share * 16)), 16.0
    z, before = start, start
    value, g, right = look(z)
    best, best_value, best_g, held = z, value, g, right
    losses, last, halved, value_then = [value], 0, True, value
    for k in range(1, steps + 1):
        new = region.project(region.step(z, g, size, top))
        if k > 1 and not l1:
            new = region.project(z + 0.75 * (new - z) + 0.25 * (z - before))
        before, z = z, new
        value, g, right = look(z)
        losses.append(value)
        held = held and right
        if value > best_value:
            best, best_value, best_g = z, value, g
        if k in checks and l1:
            now = float((best != x).sum())
            if now / changed < 0.95:
                size, z, g = full, best, best_g
            else:
                size = max(size / 1.5, full / 10)
            top, changed = max(1, math.ceil(now / 1.5)), now
        elif k in checks:
            rises = sum(losses[i] > losses[i - 1] for i in range(last + 1, k + 1))
            halved = rises <= 0.75 * (k - last) or (not halved and value_then >= best_value)
            if halved:
                size, z, g = size / 2, best, best_g
            last, value_then = k, best_value
    return best, held


@NORMS
@pytest.mark.parametrize("kind", ["zero", "uniform"])
def test_a_batch_is_attacked_as_its_images_one_by_one(threat: Threat, kind: str) -> None:
    x, y = some_images()
    region = threat.region(x, 0.2)
    start = region.start(kind, stream=5)
    found = apgd(smooth_model, x, y, region=region, start_BCHW=start, loss="ce", steps=100)
    for row in range(len(x)):
        best, held = one_by_one(x[row:row + 1], y[row:row + 1], start[row:row + 1], threat, 100, 0.2)
        assert (found.best_BCHW[row] - best[0]).abs().max() < 1e-7
        assert bool(found.held_B[row]) == held
    assert found.held_B.any() and not found.held_B.all()


@NORMS
@pytest.mark.parametrize("loss", ["ce", "margin", "kl_clean"])
def test_what_is_found_lies_in_the_region_and_is_no_worse_than_the_start(threat: Threat, loss: str) -> None:
    x, y = some_images(40)
    x32, region = x.float(), threat.region(x.float())
    start = region.start("uniform", stream=7)
    def model(images: Tensor) -> Tensor:
        return smooth_model(images.double()).float()
    found = apgd(model, x32, y, region=region, start_BCHW=start, loss=loss, steps=10)
    for adv in (found.best_BCHW, found.wrong_BCHW):
        assert adv.dtype == torch.float32 and adv.min() >= 0 and adv.max() <= 1
        assert (threat.distance(adv, x32) <= threat.eps * (1 + 1e-6)).all()
    assert torch.equal(model(found.wrong_BCHW).argmax(1) == y, found.held_B)
    if loss == "ce":
        values = [F.cross_entropy(model(z), y, reduction="none") for z in (start, found.best_BCHW)]
        assert (values[1] >= values[0] - 1e-4).all()


@pytest.mark.slow  # the first use of such tensors takes seconds
@NORMS
def test_no_decision_is_taken_on_the_host(threat: Threat) -> None:
    """Tensors without values: whoever asks for one gets an error."""
    x = torch.empty(3, 1, 4, 4, dtype=torch.float64, device="meta")
    weight = torch.empty(16, 4, dtype=torch.float64, device="meta")
    y = torch.empty(3, dtype=torch.long, device="meta")
    with pytest.raises(RuntimeError):
        x.sum().item()
    def model(images: Tensor) -> Tensor:
        return images.flatten(1) @ weight
    region = threat.region(x)
    assert apgd(model, x, y, region=region, start_BCHW=x, loss="ce", steps=10).best_BCHW.shape == x.shape
    assert pgd(model, x, y, region=region, start_BCHW=x, loss="ce", steps=3, step_size=0.1).shape == x.shape


def test_apgd_fills_the_pixels_of_a_linear_model_in_the_order_of_its_weights() -> None:
    """The optimum over ball and box is known: the largest weights first, each to the wall."""
    w = rng.normal(8, (16,), dtype=torch.float64)
    x = rng.uniform(9, (5, 1, 4, 4), dtype=torch.float64)
    eps, gain = 2.5, []
    for row in x.flatten(1):
        left, total = eps, 0.0
        for i in w.abs().argsort(descending=True):
            length = min(left, (1 - row[i] if w[i] > 0 else row[i]).item())
            left, total = left - length, total + length * w[i].abs().item()
        gain.append(total)
    def model(images: Tensor) -> Tensor:
        return torch.stack([images.flatten(1) @ w, torch.zeros(len(images), dtype=torch.float64)], 1)
    found = apgd(model, x, torch.ones(5, dtype=torch.long), region=L1(x, eps, 0.2), start_BCHW=x,
                 loss="margin", steps=100)
    reached = model(found.best_BCHW)[:, 0] - model(x)[:, 0]
    assert (reached >= 0.98 * torch.tensor(gain)).all() and (reached <= torch.tensor(gain) + 1e-9).all()


# ------------------------------------------------------------------------------------------------ strength


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small CNN, trained with FGSM examples on digits, and 300 test images that it gets right or wrong."""
    data = load_data(DataConfig(), seed=0, batch_size=64)
    x, y = data.train.batch(torch.arange(1000))
    x = as_float(x)
    with rng.keyed_rng(1):
        model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                              nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(8):
        for rows in rng.permutation(epoch, len(x)).split(50):
            images = x[rows].clone().requires_grad_(True)
            (g,) = torch.autograd.grad(F.cross_entropy(model(images), y[rows]), images)
            optimizer.zero_grad()
            F.cross_entropy(model((images + 0.1 * g.sign()).clamp(0, 1).detach()), y[rows]).backward()
            optimizer.step()
    x_test, y_test = data.test.batch(torch.arange(300))
    return model.eval().requires_grad_(False), as_float(x_test), y_test


def larger_model() -> tuple[nn.Module, Tensor, Tensor]:
    """A CNN with batch norm, trained with two-step examples on enlarged digits, and 150 test images."""
    data = load_data(DataConfig(), seed=0, batch_size=64)
    def images(split: ImageSet, count: int) -> tuple[Tensor, Tensor]:
        x, y = split.batch(torch.arange(count))
        return F.interpolate(as_float(x), size=(16, 16), mode="bilinear"), y
    x, y = images(data.train, 500)
    with rng.keyed_rng(1):
        model = nn.Sequential(nn.Conv2d(1, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1),
                              nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3, 1, 1), nn.BatchNorm2d(24), nn.ReLU(),
                              nn.Flatten(), nn.Linear(24 * 16, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(6):
        for rows in rng.permutation(epoch, len(x)).split(50):
            region = Threat("linf", 0.2).region(x[rows])
            adv = pgd(model, x[rows], y[rows], region=region, start_BCHW=x[rows], loss="ce", steps=2, step_size=0.15)
            optimizer.zero_grad()
            F.cross_entropy(model(adv), y[rows]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False), *images(data.test, 150)


# Radii at which the model withstands on about half of the images.
STRENGTH = [Threat("linf", 0.13), Threat("l2", 0.7), Threat("l1", 1.6)]


@pytest.mark.slow
@pytest.mark.parametrize("threat", STRENGTH, ids=lambda t: t.norm)
def test_apgd_is_as_strong_as_that_of_pyautoattack(threat: Threat, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    """50 steps, cross-entropy, one start: robust accuracy within 2 points."""
    reference = pytest.importorskip("pyautoattack.autopgd_base")
    model, x, y = trained
    attack = reference.APGDAttack(model, n_iter=50, norm=threat.norm.capitalize(), n_restarts=1, eps=threat.eps,
                                  loss="ce", device="cpu", seed=0)
    with torch.random.fork_rng(devices=[]):
        theirs = (model(attack.perturb(x, y)).argmax(1) == y).double().mean()
    region = threat.region(x, APGD_L1_SHARE)
    start = region.start("uniform", stream=11)
    ours = apgd(model, x, y, region=region, start_BCHW=start, loss="ce", steps=50).held_B.double().mean()
    assert 0.15 < theirs < 0.85
    assert abs(ours - theirs) <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("steps", [20, 50])
def test_l1_apgd_breaks_at_least_what_sparse_pgd_breaks(steps: int, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = trained
    threat = STRENGTH[2]
    region = threat.region(x)
    start = region.start("uniform", stream=11)
    plain = pgd(model, x, y, region=region, start_BCHW=start, loss="ce", steps=steps,
                step_size=2.5 * threat.eps / steps)
    sparse = (model(plain).argmax(1) == y).double().mean()
    adv = craft(model, x, y, threat, AttackPlan(steps), seed=0, chunk=0)  # what evaluations do in l1
    found = correct(model, adv, y)
    assert found.double().mean() <= sparse


@pytest.mark.parametrize(("steps", "balls"), [(100, (30, 30, 40)), (10, (3, 3, 4)), (3, (0, 0, 3))])
def test_l1_searches_three_balls_and_ends_in_the_smallest(steps: int, balls: tuple[int, ...]) -> None:
    """30, 30 and 40 % of the steps at 3, 2 and 1 eps; few steps are for the smallest ball alone."""
    x, y = some_images(20)
    threat, seen = THREATS[2], []

    def watched(images: Tensor) -> Tensor:
        seen.append((threat.distance(images.detach(), x) / threat.eps).amax().item())
        return smooth_model(images)

    found = narrowing(watched, x, y, threat=threat, share=0.2, stream=4, first_row=0, loss="ce", steps=steps,
                      step_size=threat.eps)
    points = [count + 1 for count in balls if count]  # the start of each search is looked at too
    assert len(seen) == sum(points)
    for part, factor in zip(torch.tensor(seen).split(points), (3, 2, 1)[-len(points):], strict=True):
        assert factor - 0.3 < part.max() <= factor * (1 + 1e-6)
    for adv in (found.best_BCHW, found.wrong_BCHW):
        assert adv.min() >= 0 and adv.max() <= 1 and (threat.distance(adv, x) <= threat.eps * (1 + 1e-6)).all()
    assert torch.equal(smooth_model(found.wrong_BCHW).argmax(1) == y, found.held_B)


@pytest.mark.slow
def test_the_evaluation_in_l1_is_as_strong_as_autoattacks_apgd_with_its_radii_and_restarts() -> None:
    """On images of 16 x 16: the original with the schedule, one start and five; 150 images, 10 steps."""
    reference = pytest.importorskip("pyautoattack.autopgd_base")
    model, x, y = larger_model()
    threat, clean = Threat("l1", 3.6), correct(model, x, y)

    def theirs(restarts: int) -> float:
        attack = reference.APGDAttack(model, n_iter=10, norm="L1", n_restarts=restarts, eps=threat.eps, loss="ce",
                                      device="cpu", seed=0, use_largereps=True)
        with torch.random.fork_rng(devices=[]):
            return (clean & correct(model, attack.perturb(x, y), y)).double().mean().item()

    def ours(restarts: int | None) -> float:
        target, plan = Target("model", model, (model,)), AttackPlan(10, restarts)
        job = Job((threat,), {"pgd": plan}, ("pgd",), transfer=False)
        tried = attack_one(target, x, y, predict(model, x), threat, job, 0)
        return (clean & (tried.predictions["pgd"] == y)).double().mean().item()

    region = threat.region(x, APGD_L1_SHARE)
    start = region.start("uniform", stream=3)
    in_one_ball = apgd(model, x, y, region=region, start_BCHW=start, loss="ce", steps=10).held_B.double().mean().item()
    one, five = ours(1), ours(None)
    assert abs(one - theirs(1)) <= 0.02 and abs(five - theirs(5)) <= 0.02
    assert five < one < in_one_ball - 0.04 and ours(5) == five  # five starts are what an evaluation makes in l1


# ------------------------------------------------------------------------------------------------ in training


@NORMS
def test_a_peer_trains_on_the_best_iterates(threat: Threat) -> None:
    config = load_config(None, ["attack.method=apgd", "attack.steps=7", "attack.step_size=0.3", "attack.start=zero",
                                f"threat.norm={threat.norm}", f"threat.eps={threat.eps}"])
    model = nets(1)[0]
    x, y = batch(0)
    attack = TrainingAttack(model, [threat], config.peers[0].attack, config.step, print)
    adv = attack(x, y, Plan(threat=0, stream=0, first_row=0)).adv_BCHW
    with frozen(model):
        expected = apgd(model, x, y, region=threat.region(x, 0.05), start_BCHW=x, loss="ce", steps=7, step_size=0.3)
    # The peer attacks a copy with its norms folded: rounding differs.
    values = [F.cross_entropy(model.eval()(z), y, reduction="none") for z in (adv, expected.best_BCHW, x)]
    assert torch.allclose(values[0], values[1], rtol=1e-3, atol=1e-3)
    assert (values[0] >= values[2] - 1e-4).all() and len(values[0].unique()) > CLASSES - 2


@pytest.mark.parametrize(("norm", "size"), [("linf", 0.4), ("l2", 0.4), ("l1", 0.2)])
def test_the_first_step_is_the_diameter_of_the_ball_and_for_l1_its_radius(norm: str, size: float) -> None:
    config = load_config(None, ["attack.method=apgd", f"threat.norm={norm}", "threat.eps=0.2"])
    assert {peer.attack.step_size for peer in config.peers} == {size}
    given = load_config(None, ["attack.method=apgd", f"threat.norm={norm}", "threat.eps=0.2", "attack.step_size=0.01"])
    assert given.peers[0].attack.step_size == 0.01
