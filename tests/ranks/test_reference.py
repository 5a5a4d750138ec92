"""The package against a plain single-process training that was written from the formulas alone (fp64): presets,
baselines, options, unions, roles, and who teaches on whose views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.methods.unions import msd
from tests import cohorts
from tests.reference_mat import (
    ATTACK_STEPS,
    Case,
    Formula,
    Look,
    Reference,
    Z,
    agree,
    ce,
    ce_per_image,
    craft,
    kl,
    kl_per_image,
    mixed_images,
    start_noise,
)

Run = Callable[..., list[Any]]
LINF, L2, L1 = Threat("linf", 0.1), Threat("l2", 0.8), Threat("l1", 0.6)
slow = pytest.mark.slow

# ------------------------------------------------------------------------------------------------ presets

P = 3


def preset_loss(preset: str) -> Formula:
    """L_k of each preset as docs/loss.md writes it, of three peers."""
    def loss(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
        others = [i for i in range(P) if i != k]
        def opinion(look: Look) -> Tensor:
            return sum(kl(t(i, look), z(k, look)) for i in others) / len(others)  # type: ignore[return-value]
        everywhere = lambda: sum(opinion(j) for j in range(P)) / P  # noqa: E731
        if preset == "at":
            return ce(z(k, k), y)
        if preset == "mat_share":
            return sum(ce(z(k, j), y) for j in range(P)) / P  # type: ignore[return-value]
        if preset == "mat_kd":
            return 0.5 * ce(z(k, k), y) + 0.5 * opinion(k)
        if preset == "dml_at":
            return 0.5 * ce(z(k, k), y) + 0.5 * sum(kl(t(i, i), z(k, k)) for i in others) / len(others)
        if preset == "mat":
            return 0.5 * ce(z(k, k), y) + 0.5 * everywhere()
        if preset == "trades":
            return trades(k, z, t, y, step)
        if preset == "mat_trades":
            return trades(k, z, t, y, step) + 0.5 * everywhere()
        assert preset == "cat"
        if k % 2 == 0:
            return trades(k, z, t, y, step) / 20 + 19 / 20 * opinion(k)
        alp = 0.5 * ce(z(k, k), y) + 0.5 * ce(z(k, "clean"), y) + ((z(k, k) - z(k, "clean")) ** 2).mean()
        return alp / 20 + 19 / 20 * opinion(k)
    return loss


def preset_looks(preset: str) -> Callable[[int, int], list[Look]]:
    """What has a gradient, in the order that the running statistics see it: others, clean, own."""
    def learned(k: int, step: int) -> list[Look]:
        others: list[Look] = [j for j in range(P) if j != k]
        return {"at": [k], "mat_share": [*others, k], "mat_kd": [k], "dml_at": [k], "mat": [*others, k],
                "trades": ["clean", k], "mat_trades": [*others, "clean", k], "cat": ["clean", k]}[preset]
    return learned


GAUSSIAN = {"trades": {0, 1, 2}, "mat_trades": {0, 1, 2}, "cat": {0, 2}}  # peers whose attack is that of TRADES


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("preset", ["at", "mat_share", "mat_kd", "dml_at", "mat", "trades", "mat_trades", "cat"])
def test_every_preset_equals_the_plain_formula_over_5_steps(preset: str, threat: Threat, run_ranks: Run) -> None:
    entry = {"loss": preset, "threat": {"norm": threat.norm, "eps": threat.eps}}
    case = Case([entry] * P, preset_loss(preset), preset_looks(preset), images=cohorts.batch, attack_steps=4)
    for k, spec in enumerate(case.config().peers):
        own = k in GAUSSIAN.get(preset, set())
        assert (spec.attack.loss, spec.attack.start) == (("kl_clean", "gaussian") if own else ("ce", "uniform"))
    agree(case, run_ranks, steps=5, moved=1e-3)


# ------------------------------------------------------------------------------------------------ baselines


def mart(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """Wang et al., ICLR 2020, equation 10 with lambda 6; 1.0001 and 1e-12 as in the code."""
    p, q = z(k, "clean").softmax(1), z(k, k).softmax(1)
    rows = torch.arange(len(y))
    wrong = torch.stack([torch.cat([q[b, :y[b]], q[b, y[b] + 1:]]).max() for b in rows])
    boosted = -q[rows, y].log() - (1.0001 - wrong + 1e-12).log()
    return (boosted + 6 * kl_per_image(z(k, "clean"), z(k, k)) * (1 - p[rows, y])).mean()


def ard(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """Goldblum et al., AAAI 2020, alpha 1: T^2 KL at T 30, averaged over 10 classes."""
    return 30**2 / 10 * kl(t(1, "clean") / 30, z(0, 0) / 30)


def rslad(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """Zi et al., ICCV 2021: 5/6 on AEs, 1/6 on clean images, averaged over 10 classes."""
    return (5 / 6 * kl(t(1, "clean"), z(0, 0)) + 1 / 6 * kl(t(1, "clean"), z(0, "clean"))) / 10


def lbgat(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """Cui et al., ICCV 2021, beta 0: one loss for both nets, the gradient through both sides of the square."""
    return ce(z(0, "clean"), y) + ((z(1, 1) - z(0, "clean")) ** 2).mean()


def peeraid(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """Jung et al., CVPR 2024, for CIFAR-10: gamma 1, 0.1, T 1; lambda 0, 1, 1, T 5; KL averaged over 10 classes."""
    if k == 0:
        return ce(z(0, 1), y) + 0.1 / 10 * kl(t(1, 1), z(0, 1))
    return 25 / 10 * (kl(t(0, 1) / 5, z(1, 1) / 5) + kl(z(1, "clean") / 5, z(1, 1) / 5))


def at(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return ce(z(k, k), y)


def smooth(logits: Tensor, y: Tensor, share: float) -> Tensor:
    """All classes count `share` together, the label the rest."""
    return (1 - share) * ce(logits, y) - share * logits.log_softmax(1).mean(1).mean()


def smoothed(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return smooth(z(k, k), y, 0.4)


def trades(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return ce(z(k, "clean"), y) + 6 * kl(z(k, "clean"), z(k, k))


def mat(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """Three peers."""
    others = [i for i in range(3) if i != k]
    return 0.5 * ce(z(k, k), y) + 0.5 / 6 * sum(kl(t(i, j), z(k, j)) for i in others for j in range(3))


def listening(where: str) -> Formula:
    """`mat` in which each image listens to some of the teachers."""
    def loss(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
        total = 0.5 * ce(z(k, k), y)
        for j in range(3):
            for i in (i for i in range(3) if i != k):
                each = kl_per_image(t(i, j), z(k, j))
                for b in range(len(y)):
                    right = bool(t(i, j)[b].argmax() == y[b])
                    heard = right if where == "teacher_right" else right and bool(z(k, j)[b].argmax() != y[b])
                    total = total + 0.5 / 6 / len(y) * heard * each[b]
        return total
    return loss


def warming(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """A fifth of an epoch of ten steps: steps 0 and 1 alone, with the whole weight on own AEs."""
    return ce(z(k, k), y) if step < 2 else mat(k, z, t, y, step)


def late(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """Alone for two steps, then a tenth by smoothed labels and the rest by two teachers on the AEs of all three."""
    if step < 2:
        return smooth(z(k, k), y, 0.2)
    lessons = [kl(t(i, j), z(k, j)) for i in range(3) if i != k for j in range(3)]
    return 0.1 * smooth(z(k, k), y, 0.2) + 0.9 * sum(lessons) / len(lessons)


def ring(k: int, step: int) -> list[Look]:
    """The others' AEs, then the own ones, of three peers."""
    return [*(j for j in range(3) if j != k), k]


def mine(k: int, step: int) -> list[Look]:
    return [k]


def pair(k: int, step: int) -> list[Look]:
    return ["clean", k]


TEACHER = {"frozen": True}
AWP = {"methods": {"awp": {"gamma": 0.02}}}
CASES = {
    "at_wa": Case([{"loss": "at_wa", "optim": {"ema_decay": 0.9}}], smoothed, mine),
    "mart": Case([{"loss": "mart"}], mart, pair),
    "ard": Case([{"loss": "ard"}, TEACHER], ard, mine),
    "rslad": Case([{"loss": "rslad"}, TEACHER], rslad, pair, guides={0: (1,)}),
    "lbgat": Case([{"loss": "lbgat"}] * 2, lbgat, lambda k, step: ["clean"] if k == 0 else [1]),
    "peeraid": Case([{"loss": "peeraid"}] * 2, peeraid, lambda k, step: [1] if k == 0 else ["clean", 1],
                    guides={1: (0,)}),
    "at+awp": Case([{"loss": "at", **AWP}], at, mine, own=at),
    "trades+awp": Case([{"loss": "trades", **AWP}], trades, pair, own=trades),
    "mart+awp": Case([{"loss": "mart", **AWP}], mart, pair, own=mart),
    "mat+awp": Case([{"loss": "mat", **AWP}] * 3, mat, ring, own=at),
    "teacher_right": Case([{"loss": {"preset": "mat", "kd_where": "teacher_right"}}] * 3, listening("teacher_right"),
                          ring),
    "student_wrong": Case([{"loss": {"preset": "mat", "kd_where": "student_wrong"}}] * 3, listening("student_wrong"),
                          ring),
    "warm-up": Case([{"loss": {"preset": "mat", "warmup_epochs": 0.2}}] * 3, warming,
                    lambda k, step: [k] if step < 2 else ring(k, step)),
    "mat_late": Case([{"loss": {"preset": "mat_late", "warmup_epochs": 0.2}, "optim": {"ema_decay": 0.9}}] * 3, late,
                     lambda k, step: [k] if step < 2 else ring(k, step)),
    "teachers=ema": Case([{"loss": "mat", "optim": {"ema_decay": 0.6}}] * 3, mat, ring, step={"teachers": "ema"}),
}

# ------------------------------------------------------------------------------------------------ unions and roles

THREE = "linf:0.1,l2:0.8,l1:0.6"
OWN: list[Look] = [(0, 1), (0, 2), 0]  # l2, l1, linf: a peer's first threat comes last


def average_of(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return sum(ce(z(0, look), y) for look in OWN) / 3  # type: ignore[return-value]


def worst_of(zs: list[Tensor], y: Tensor) -> Tensor:
    """Image by image the largest loss."""
    return torch.stack([max(ce_per_image(z, y)[b] for z in zs) for b in range(len(y))]).mean()


def ramp_pair(q: Tensor, r: Tensor, y: Tensor) -> Tensor:
    """RAMP, equation 4: KL between the norms' predictions on images that are right on the first, their mean."""
    right = [b for b in range(len(y)) if q[b].argmax() == y[b]]
    return kl_per_image(q, r)[right].mean() if right else torch.zeros((), dtype=q.dtype)


def maximum(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return worst_of([z(0, look) for look in OWN], y)


def ramp(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return maximum(k, z, t, y, step) + 5 * ramp_pair(z(0, 0), z(0, (0, 2)), y)


def generalist(hard: Callable[[Z, Tensor], Tensor], feedback: bool = False) -> Formula:
    """Specialists 0, 1, 2 learn alone or half from peer 3; it learns half from their AEs, half from their makers."""
    def loss(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
        if k == 3:
            return 0.5 * hard(z, y) + 0.5 / 3 * sum(kl(t(j, j), z(3, j)) for j in range(3))
        return 0.5 * ce(z(k, k), y) + 0.5 * kl(t(3, k), z(k, k)) if feedback else ce(z(k, k), y)
    return loss


def from_all(k: int, step: int) -> list[Look]:
    return [0, 1, 2] if k == 3 else [k]


def cohort(strategy: str | None, **specialist: Any) -> list[dict[str, Any]]:
    """Three specialists and a generalist."""
    three = [{"role": "specialist", "threat": {"norm": t.norm, "eps": t.eps}, "loss": {"preset": "mat", **specialist}}
             for t in (LINF, L2, L1)]
    return [*three, {"role": "generalist", "loss": "mat", "union": {"strategy": strategy}}]


def alone(strategy: str, threats: str = THREE) -> list[dict[str, Any]]:
    return [{"loss": "at", "union": {"strategy": strategy, "threats": threats}}]


def mean_of(z: Z, y: Tensor) -> Tensor:
    return sum(ce(z(3, j), y) for j in range(3)) / 3  # type: ignore[return-value]


def max_of(z: Z, y: Tensor) -> Tensor:
    return worst_of([z(3, j) for j in range(3)], y)


def ramp_of(z: Z, y: Tensor) -> Tensor:
    return max_of(z, y) + 5 * ramp_pair(z(3, 0), z(3, 2), y)


class Drawn:
    """SAT and E-AT: one norm per step, drawn by the published stream; E-AT never draws l2."""

    def __init__(self, eat: bool) -> None:
        self.threats = (LINF, L2, L1)
        self.spec = Case(alone("random"), at, mine).config().peers[0]
        self.eat, self.held, self.seen, self.path = eat, [0, 0], [0, 0], []

    def __call__(self, peer: Reference, k: int, step: int, x: Tensor, y: Tensor) -> Tensor:
        n = rng.key(0, "norm", step, k) % 3
        if self.eat:
            chances = [1 - h / s for h, s in zip(self.held, self.seen, strict=True)] if all(self.seen) else [1, 1]
            u = rng.uniform(rng.key(0, "eat", step, k), (1,), dtype=torch.float64).item()
            n = 2 * int(u >= chances[0] / sum(chances))
        points: list[Tensor] = []
        adv = craft(peer, self.spec, self.threats[n], n, k, step, x, y, held=points)
        if self.eat:
            assert len(points) == ATTACK_STEPS + 1
            self.held[n // 2] += sum(all(bool(point[b]) for point in points) for b in range(len(y)))
            self.seen[n // 2] += len(y)
        self.path.append(n)
        return adv


def steepest(peer: Reference, k: int, step: int, x: Tensor, y: Tensor) -> Tensor:
    """MSD; its own reference is in tests/unit/test_methods.py."""
    threats, key = (LINF, L2, L1), rng.key(0, "attack", step, k)
    start = (x + start_noise(key, "uniform", LINF, x)).clamp(0, 1)
    return msd(lambda images: peer.logits(images, None), x, y, regions=[t.region(x) for t in threats],
               step_sizes=[2.5 * t.eps / ATTACK_STEPS for t in threats], start_BCHW=start, loss="ce",
               steps=ATTACK_STEPS, stream=key).detach()


def union_looks(k: int, step: int) -> list[Look]:
    return OWN


def with_own(strategy: str) -> list[dict[str, Any]]:
    """Three specialists and a generalist that makes AEs of its own beside theirs."""
    entries = cohort(strategy)
    entries[3]["union"]["threats"] = THREE
    return entries


def half_own(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """Hard labels count half, on its own AEs as much as on the specialists' together; the rest is their opinion."""
    return generalist(lambda z, y: 0.5 * ce(z(3, 3), y) + 0.5 * mean_of(z, y))(k, z, t, y, step)


def by_generalist(own: Callable[[Reference, int, int, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The generalist's AEs by `own`, those of the specialists by PGD on their threats."""
    specs = Case(with_own("msd"), half_own, from_all).config().peers

    def made(peer: Reference, k: int, step: int, x: Tensor, y: Tensor) -> Tensor:
        return own(peer, k, step, x, y) if k == 3 else craft(peer, specs[k], (LINF, L2, L1)[k], 0, k, step, x, y)
    return made


def own_too(k: int, step: int) -> list[Look]:
    return [0, 1, 2, 3] if k == 3 else [k]


CASES |= {
    "avg": Case(alone("avg"), average_of, union_looks),
    "max": Case(alone("max"), maximum, union_looks),
    "ramp": Case(alone("ramp"), ramp, union_looks),
    "ramp+projection": Case([{"loss": "at", "union": {"strategy": "ramp", "threats": THREE},
                             "methods": {"ramp": {"projection": 0.5}}}],
                            ramp, union_looks, natural=lambda k, z, t, y, step: ce(z(k, "clean"), y)),
    "avg+awp": Case([{**alone("avg")[0], **AWP}], average_of, union_looks, own=at),
    "msd": Case(alone("msd"), at, mine, craft=steepest),
    "generalist": Case(cohort(None), generalist(mean_of), from_all),
    "generalist avg": Case(cohort("avg"), generalist(mean_of), from_all),
    "generalist max": Case(cohort("max"), generalist(max_of), from_all),
    "generalist ramp": Case(cohort("ramp"), generalist(ramp_of), from_all),
    "generalist with msd of its own": Case(with_own("msd"), half_own, own_too, craft=by_generalist(steepest)),
    "generalist with a norm of its own": Case(with_own("random"), half_own, own_too, craft=by_generalist(Drawn(False))),
    "generalist that feeds back": Case(cohort(None, kd_weight=0.5), generalist(mean_of, feedback=True), from_all),
}


# ------------------------------------------------------------------------------------------------ any view teaches


def experts(strategy: str, norms: tuple[Threat, ...] = (LINF, L2, L1), **generalist: Any) -> list[dict[str, Any]]:
    """Specialists of these norms, and a generalist with AEs of its own for each norm, on which the specialist of the
    same norm teaches."""
    entries = [{"role": "specialist", "threat": {"norm": t.norm, "eps": t.eps}, "loss": "mat"} for t in norms]
    loss = {"preset": "mat", "hard_own": 1.0, "kd_weight": 0.4, "kd_own": 1.0, "teacher_set": "expert", **generalist}
    threats = ",".join(f"{t.norm}:{t.eps}" for t in norms)
    return [*entries, {"role": "generalist", "loss": loss, "union": {"strategy": strategy, "threats": threats}}]


def taught_by_experts(hard: Callable[[Z, Tensor], Tensor], g: int = 3, kd: float = 0.4, back: float = 0) -> Formula:
    """Specialists alone, or with the share `back` on the generalist's opinion of their AEs; generalist g, on its AE of
    each norm, also by the opinion of the specialist of that norm."""
    def loss(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
        if k < g:
            return (1 - back) * ce(z(k, k), y) + (back * kl(t(g, k), z(k, k)) if back else 0)
        return (1 - kd) * hard(z, y) + kd / g * sum(kl(t(n, (g, n)), z(g, (g, n))) for n in range(g))
    return loss


def own_mean(g: int = 3) -> Callable[[Z, Tensor], Tensor]:
    return lambda z, y: sum(ce(z(g, (g, n)), y) for n in range(g)) / g  # type: ignore[return-value]


def own_worst(z: Z, y: Tensor) -> Tensor:
    return worst_of([z(3, (3, n)) for n in range(3)], y)


def worst_of_six(z: Z, y: Tensor) -> Tensor:
    return worst_of([z(3, look) for look in (0, 1, 2, (3, 0), (3, 1), (3, 2))], y)


def fed_back(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """Specialists learn from the generalist's three views too, half of the labels and three quarters of the opinions,
    all of which are the generalist's."""
    if k == 3:
        return taught_by_experts(own_mean())(k, z, t, y, step)
    hard = 0.5 * ce(z(k, k), y) + 0.5 * sum(ce(z(k, (3, n)), y) for n in range(3)) / 3
    soft = 0.25 * kl(t(3, k), z(k, k)) + 0.75 * sum(kl(t(3, (3, n)), z(k, (3, n))) for n in range(3)) / 3
    return 0.5 * hard + 0.5 * soft


def generalist_looks(*received: Look, g: int = 3) -> Callable[[int, int], list[Look]]:
    return lambda k, step: [*received, *((g, n) for n in range(1, g)), g] if k == g else [k]


def feeding_back() -> list[dict[str, Any]]:
    entries = experts("avg")
    loss = {"preset": "mat", "hard_own": 0.5, "kd_weight": 0.5, "kd_own": 0.25}
    return [*({**entry, "loss": loss} for entry in entries[:3]), entries[3]]


def mat_union(back: float | None = None, **generalist: Any) -> list[dict[str, Any]]:
    """Its preset says what `experts("max")` writes out."""
    three = [{**entry, "loss": {"preset": "mat_union", "kd_weight": back}} for entry in experts("max")[:3]]
    return [*three, {"role": "generalist", "loss": {"preset": "mat_union", **generalist}, "union": {"threats": THREE}}]


EXPERTS = {
    "mat_union": Case(mat_union(), taught_by_experts(own_worst, kd=0.5), generalist_looks()),
    "mat_union, all ways": Case(mat_union(0.3, hard_own=0.5, kd_weight=0.7), taught_by_experts(
        worst_of_six, kd=0.7, back=0.3), generalist_looks(0, 1, 2)),
    "experts, avg": Case(experts("avg"), taught_by_experts(own_mean()), generalist_looks()),
    "experts, max": Case(experts("max"), taught_by_experts(own_worst), generalist_looks()),
    "experts, avg and received": Case(experts("avg", hard_own=0.5), taught_by_experts(
        lambda z, y: 0.5 * own_mean()(z, y) + 0.5 * mean_of(z, y)), generalist_looks(0, 1, 2)),
    "experts, max and received": Case(experts("max", hard_own=0.5), taught_by_experts(worst_of_six),
                                      generalist_looks(0, 1, 2)),
    "two experts": Case(experts("avg", (LINF, L1)), taught_by_experts(own_mean(2), 2), generalist_looks(g=2)),
    "experts, fed back": Case(feeding_back(), fed_back, lambda k, step: [
        *([] if k == 3 else [3]), (3, 1), (3, 2), k]),
}
CASES |= EXPERTS

# "student_wrong", "generalist" and "generalist with msd of its own" cover them in the fast part.
SLOW = ("teacher_right", "generalist avg", "experts, max", "experts, max and received",
        "generalist with a norm of its own", "mart+awp")


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow) if n in SLOW else n for n in CASES])
def test_a_loss_equals_its_formula(name: str, run_ranks: Run) -> None:
    agree(CASES[name], run_ranks)


MIXED = ("at_wa", "ard", "rslad", "lbgat", "peeraid", "trades+awp", "mat+awp", "warm-up", "avg", "max", "msd",
         "generalist that feeds back", "generalist max", "experts, max")


@pytest.mark.parametrize("name", [n if n in ("at_wa", "trades+awp", "max") else pytest.param(n, marks=slow)
                                  for n in MIXED])
def test_a_loss_with_mixed_labels_equals_its_formula(name: str, run_ranks: Run) -> None:
    agree(replace(CASES[name], images=mixed_images), run_ranks)


@pytest.mark.parametrize("eat", [False, True], ids=["random", "eat"])
def test_a_norm_per_step_is_drawn_and_trained_against(eat: bool, run_ranks: Run) -> None:
    drawn = Drawn(eat)
    agree(Case(alone("eat" if eat else "random"), at, mine, craft=drawn), run_ranks)
    assert len(set(drawn.path)) > 1
