"""Attacks beside their originals, on small models that are trained here on digits; the figures of docs/attacks.md.

    python benchmarks/attacks.py cr       constraint relaxation beside AutoAttack
    python benchmarks/attacks.py masked   the same on models that hide their gradients, with the evaluation's verdict
    python benchmarks/attacks.py l1       APGD in l1 beside AutoAttack's, with its radii and restarts
    python benchmarks/attacks.py saving   five restarts with and without folded copies and images that are passed by

Each takes minutes on one CPU core, whose seconds are told. AutoAttack needs `pip install --editable '.[eval]'`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import process_time
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mat_dist
from mat_dist import rng
from mat_dist.attacks import APGD_L1_SHARE, Threat, apgd, pgd
from mat_dist.config.schema import DataConfig
from mat_dist.data import as_float, load_data
from mat_dist.evaluation import attacks
from mat_dist.evaluation.attacks import AttackPlan, Job, Target, attack_one, correct, predict
from mat_dist.models import Ensemble

Images = tuple[Tensor, Tensor]


def digits(split: str, count: int, side: int) -> Images:
    """Digits enlarged to side x side."""
    data = load_data(DataConfig(), seed=0, batch_size=64)
    x, y = getattr(data, split).batch(torch.arange(count))
    return F.interpolate(as_float(x), size=(side, side), mode="bilinear"), y


def trained(layers: Callable[[], list[nn.Module]], side: int, eps: float, steps: int, epochs: int = 6) -> nn.Module:
    """A model trained on PGD examples of so many steps."""
    x, y = digits("train", 1000, side)
    with rng.keyed_rng(1):
        model = nn.Sequential(*layers())
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(epochs):
        for rows in rng.permutation(epoch, len(x)).split(50):
            region = Threat("linf", eps).region(x[rows])
            start = region.start("uniform", stream=epoch)
            adv = pgd(model, x[rows], y[rows], region=region, start_BCHW=start, loss="ce", steps=steps,
                      step_size=1.25 * eps / steps)
            optimizer.zero_grad()
            F.cross_entropy(model(adv), y[rows]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def mlp() -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(256, 96), nn.ReLU(), nn.Linear(96, 10)]


def block(inside: int, outside: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, stride, 1), nn.BatchNorm2d(outside), nn.ReLU()]


def cnn() -> list[nn.Module]:
    return [*block(1, 12, 2), *block(12, 24, 2), nn.Flatten(), nn.Linear(384, 10)]


def deep_cnn() -> list[nn.Module]:
    return [*block(1, 12), *block(12, 16, 2), *block(16, 24), *block(24, 32, 2), nn.Flatten(), nn.Linear(512, 10)]


def smooth_cnn() -> list[nn.Module]:
    return [layer if not isinstance(layer, nn.ReLU) else nn.SiLU() for layer in cnn()]


class Masked(nn.Module):
    """A model with something before and after it that hides its gradient."""

    def __init__(self, model: nn.Module, before: Callable[[Tensor], Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.model, self.before, self.scale = model, before, scale

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.scale * self.model(self.before(x_BCHW))


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, float]]:
    """Images through a model, and seconds."""
    found, began = {"forwards": 0.0}, process_time()
    hook = model.register_forward_pre_hook(lambda _, given: found.update(forwards=found["forwards"] + len(given[0])))
    try:
        yield found
    finally:
        hook.remove()
        found["seconds"] = process_time() - began


def tell(*cells: object) -> None:
    shown = (f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print(f"| {' | '.join(shown)} |", flush=True)


def cr() -> None:
    images, threat = digits("test", 100, 16), Threat("linf", 0.15)
    x, y = images
    models: dict[str, nn.Module] = {
        "MLP": trained(mlp, 16, 0.15, 1), "CNN": trained(cnn, 16, 0.15, 2), "deep CNN": trained(deep_cnn, 16, 0.15, 2),
        "smooth CNN": trained(smooth_cnn, 16, 0.15, 3)}
    models["ensemble of the last two"] = Ensemble([models["deep CNN"], models["smooth CNN"]], "prob").eval()
    tell("model", "attack", "robust %", "forwards per image", "seconds", "only here broken")
    for name, model in models.items():
        held = {}
        for method in ("pgd", "cr", "autoattack"):
            with counted(model) as cost:
                adv = mat_dist.attack(model, x, y, threat, method, steps=20)
            held[method] = correct(model, x, y) & correct(model, adv, y)
            alone = held["cr"] & ~held[method] if method == "autoattack" else held["pgd"] & ~held[method]
            tell(name, method, 100 * held[method].double().mean().item(), cost["forwards"] / len(x), cost["seconds"],
                 int(alone.sum()))


def masked() -> None:
    threat, cnn_model = Threat("linf", 0.15), trained(cnn, 16, 0.15, 2)
    few, many = digits("test", 100, 16), digits("test", 300, 16)
    masks: dict[str, nn.Module] = {
        "none": cnn_model, "logits times 10,000": Masked(cnn_model, lambda x: x, 1e4),
        "noise on the image": Masked(cnn_model, lambda x: x + 0.2 * torch.randn_like(x)),
        "pixels of 5 levels": Masked(cnn_model, lambda x: (4 * x).round() / 4)}
    tell("CNN, mask", "robust % under pgd", "under cr", "under autoattack", "reportable with cr", "what fails")
    for name, model in masks.items():
        shares = []
        for method in ("pgd", "cr", "autoattack"):
            adv = mat_dist.attack(model.eval(), *few, threat, method)
            shares.append(100 * (correct(model, *few) & correct(model, adv, few[1])).double().mean().item())
        found = mat_dist.evaluate(model, *many, threats=threat, attacks="cr")
        tell(name, *shares, found.reportable, ", ".join(found.failed))


def robust_l1(model: nn.Module, images: Images, threat: Threat, steps: int, starts: int) -> float:
    x, y = images
    job = Job((threat,), {"pgd": AttackPlan(steps, starts)}, ("pgd",), transfer=False)
    tried = attack_one(Target("model", model, (model,)), x, y, predict(model, x), threat, job, 0)
    return 100 * tried.held(predict(model, x), y, ("pgd",)).double().mean().item()


def l1() -> None:
    from pyautoattack.autopgd_base import APGDAttack

    images, threat = digits("test", 96, 24), Threat("l1", 8.0)
    x, y = images
    model = trained(lambda: [*block(1, 12, 2), *block(12, 24, 2), *block(24, 24), nn.Flatten(), nn.Linear(864, 10)],
                    24, 0.2, 2)
    clean_B = correct(model, x, y)
    tell("steps", "balls", "starts", "ours %", "original %")
    for steps in (10, 20, 100):
        for large, starts in ((False, 1), (True, 1), (True, 5)):
            original = APGDAttack(model, n_iter=steps, norm="L1", n_restarts=starts, eps=threat.eps, loss="ce",
                                  device="cpu", seed=0, use_largereps=large)
            theirs = (clean_B & correct(model, original.perturb(x, y), y)).double().mean().item()
            if large:
                ours = robust_l1(model, images, threat, steps, starts)
            else:
                region = threat.region(x, APGD_L1_SHARE)
                start = region.start("uniform", stream=0)
                found = apgd(model, x, y, region=region, start_BCHW=start, loss="ce", steps=steps)
                ours = 100 * (clean_B & found.held_B).double().mean().item()
            tell(steps, "3, 2, 1 eps" if large else "eps", starts, ours, 100 * theirs)


def saving() -> None:
    x, y = digits("test", 128, 16)
    model = trained(deep_cnn, 16, 0.15, 2)
    clean_B, target = predict(model, x), Target("model", model, (model,))
    tell("eps", "robust %", "plain s", "folded s", "folded, open images s", "share", "share")
    for eps in (0.05, 0.15, 0.25):
        threat, seconds, found = Threat("linf", eps), [], []
        job = Job((threat,), {"pgd": AttackPlan(20, 5)}, ("pgd",), transfer=False)
        for folds, drops in ((False, False), (True, False), (True, True)):
            fold = attacks.folded if folds else lambda model, sample: model
            rows = attacks.OpenRows if drops else lambda model, open_B: model
            times = []
            for _ in range(2):
                with patch.object(attacks, "folded", fold), patch.object(attacks, "OpenRows", rows):
                    began = process_time()
                    tried = attack_one(target, x, y, clean_B, threat, job, 0)
                    times.append(process_time() - began)
            seconds.append(min(times))
            found.append(tried.predictions["pgd"])
        assert all(torch.equal(found[0], other) for other in found), "a number changed"
        robust = 100 * tried.held(clean_B, y, ("pgd",)).double().mean().item()
        tell(str(eps), robust, *seconds, *(f"{one / seconds[0]:.2f}" for one in seconds[1:]))


if __name__ == "__main__":
    parts = {"cr": cr, "masked": masked, "l1": l1, "saving": saving}
    for word in sys.argv[1:] or parts:
        parts[word]()
