"""Baselines, options, unions and roles against formulas written from their papers, on plain tensors (fp64)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.config.schema import Config
from mat_dist.methods.unions import msd
from tests import cohorts
from tests.cohorts import BATCH, CLASSES, complete, nets, train
from tests.reference_mat import Reference, Slot, Table, ce, ce_per_image, kl, kl_per_image, start_noise

STEPS, ATTACK_STEPS = 3, 2
LINF, L2, L1 = Threat("linf", 0.1), Threat("l2", 0.8), Threat("l1", 0.6)
Z = Callable[[int, Slot], Tensor]
Formula = Callable[[int, Z, Z, Tensor, int], Tensor]  # (peer, logits, constant logits, labels, step) -> loss


def images(step: int, rows: int = BATCH, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Grey ones: an l1 step treats values at 0 or 1 apart, and rounding would decide which are."""
    x, y = cohorts.batch(step, rows, dtype)
    return 0.35 + 0.3 * x, y


def mixed_images(step: int, rows: int = BATCH, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The same with mixed labels (B, K), half of them of two classes."""
    x, y = images(step, rows, dtype)
    share = torch.tensor([0.0, 0.3] * (rows // 2), dtype=dtype)[:, None]
    classes = torch.eye(CLASSES, dtype=dtype)
    return x, (1 - share) * classes[y] + share * classes[y.flip(0)]


@dataclass
class Case:
    """A cohort and what each of its peers should minimise.

    Attributes:
        peers: the entries of the configuration.
        loss: of a peer.
        learned: its slots with a gradient, in the order that its running statistics see them.
        own: its loss were it alone, which AWP climbs.
        craft: its AEs where they are not PGD on its own threat.
        guides: the teachers whose clean predictions guide its attack.
        natural: its loss on clean images, whose gradient is projected.
        images: images and labels of a step.
    """

    peers: list[dict[str, Any]]
    loss: Formula
    learned: Callable[[int, int], list[Slot]]
    own: Formula | None = None
    craft: Callable[[Reference, int, int, Tensor, Tensor], Tensor] | None = None
    guides: dict[int, tuple[int, ...]] = field(default_factory=dict)
    natural: Formula | None = None
    images: Callable[..., tuple[Tensor, Tensor]] = images
    step: dict[str, Any] = field(default_factory=dict)

    def config(self, **step: Any) -> Config:
        def full(loss: str | dict[str, Any]) -> dict[str, Any]:
            return {"preset": loss} if isinstance(loss, str) else loss
        entries = [{"threat": {"norm": "linf", "eps": 0.1}, **entry, "attack": {"steps": ATTACK_STEPS},
                    "loss": full(entry.get("loss", "at")),
                    "optim": {"lr": 0.1, "schedule": "constant", **entry.get("optim", {})}} for entry in self.peers]
        return complete({"peers": entries, "train": {"batch_size": BATCH, "epochs": 1000},
                         "step": {"precision": "fp64", **self.step, **step}})


def craft(peer: Reference, spec: Any, threat: Threat, number: int, k: int, step: int, x: Tensor, y: Tensor,
          guide: Tensor | None = None, held: list[Tensor] | None = None) -> Tensor:
    """PGD AEs of peer k for the `number`-th of its threats."""
    key = rng.key(0, "attack", step, *((number,) if number else ()), k)
    noise = start_noise(key, spec.attack.start, threat, x)
    return peer.attack(x, y, noise, threat, steps=ATTACK_STEPS, loss=spec.attack.loss, guide=guide,
                       held=held)


def climb(case: Case, peer: Reference, k: int, gamma: float, inputs: Callable[[int, Slot], Tensor], y: Tensor,
          step: int) -> list[Tensor]:
    """AWP: each weight tensor goes up the own loss by gamma times its norm -> the weights before."""
    before, passing = peer.w, Table({k: peer}, inputs, set())  # type: ignore[arg-type]
    assert case.own is not None
    gradients = torch.autograd.grad(case.own(k, passing.z, passing.t, y, step), before, allow_unused=True)
    peer.w = [(w + gamma * w.norm() * g / g.norm() if w.ndim > 1 and g is not None else w).detach().requires_grad_()
              for w, g in zip(before, gradients, strict=True)]
    return before


def projected(adversarial: tuple[Tensor, ...], natural: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """RAMP, equations 4 to 7 with beta 0.5: a layer's natural gradient by its cosine, unless that is negative."""
    mixed, cosines = [], []
    for g_a, g_n in zip(adversarial, natural, strict=True):
        cosines.append(torch.cosine_similarity(g_a.flatten(), g_n.flatten(), dim=0).item())
        kept = cosines[-1] * g_n if cosines[-1] > 0 else torch.zeros_like(g_n)
        mixed.append(0.5 * kept + 0.5 * g_a)
    assert max(cosines) > 0.1
    return tuple(mixed)


def reference_step(case: Case, config: Config, peers: list[Reference], step: int) -> None:
    """One step of all peers."""
    x, y = case.images(step)
    fixed = {k for k, spec in enumerate(config.peers) if spec.frozen}
    clean = Table(peers, lambda k, slot: x, fixed)
    aes: dict[tuple[int, Slot], Tensor] = {}
    for k, (peer, spec) in enumerate(zip(peers, config.peers, strict=True)):
        threats = [Threat(n, float(e)) for n, e in (t.split(":") for t in (spec.union.threats or "").split(",") if t)]
        guide = None
        if k in case.guides:
            guide = torch.stack([clean.t(i, "clean").softmax(1) for i in case.guides[k]]).mean(0).log()
        own = threats[0] if threats else Threat(spec.threat.norm, spec.threat.eps)
        aes[k, k] = case.craft(peer, k, step, x, y) if case.craft else craft(peer, spec, own, 0, k, step, x, y, guide)
        for n, threat in enumerate(threats[1:], 1):
            aes[k, ("own", n)] = craft(peer, spec, threat, n, k, step, x, y)

    def inputs(k: int, slot: Slot) -> Tensor:
        return x if slot == "clean" else aes[k, slot] if isinstance(slot, tuple) else aes[slot, slot]

    kept = {k: climb(case, peers[k], k, spec.optim.awp_gamma, inputs, y, step)
            for k, spec in enumerate(config.peers) if spec.optim.awp_gamma}
    table = Table(peers, inputs, fixed)
    teach = table.t if config.step.teachers == "raw" else lambda i, slot: peers[i].averaged_logits(inputs(i, slot))
    training = [k for k in range(len(peers)) if k not in fixed]
    losses = {k: case.loss(k, table.z, teach, y, step) for k in training}
    gradients = {k: torch.autograd.grad(losses[k], peers[k].w, retain_graph=True) for k in training}
    if case.natural is not None:
        gradients = {k: projected(g, torch.autograd.grad(case.natural(k, table.z, teach, y, step), peers[k].w))
                     for k, g in gradients.items()}
    for k in training:
        peers[k].w = kept.get(k, peers[k].w)
        peers[k].descend(gradients[k])
        peers[k].settle([table.stats[k, slot] for slot in case.learned(k, step)])
        peers[k].average(config.peers[k].optim.ema_decay or 0.0, step)


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


def smoothed(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """The label counts 0.6, all classes 0.4 together."""
    return 0.6 * ce(z(k, k), y) - 0.4 * z(k, k).log_softmax(1).mean(1).mean()


def trades(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return ce(z(k, "clean"), y) + 6 * kl(z(k, "clean"), z(k, k))


def mat(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """Three peers."""
    others = [i for i in range(3) if i != k]
    return 0.5 * ce(z(k, k), y) + 0.5 / 6 * sum(kl(t(i, j), z(k, j)) for i in others for j in range(3))


def trusted(where: str, gate: float) -> Formula:
    """`mat` in which each image listens to the teachers by p(y)^gate, and to some not at all."""
    def loss(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
        total = 0.5 * ce(z(k, k), y)
        for j in range(3):
            for i in (i for i in range(3) if i != k):
                each = kl_per_image(t(i, j), z(k, j))
                for b in range(len(y)):
                    right = t(i, j)[b].argmax() == y[b]
                    student = z(k, j)[b].argmax() == y[b]
                    heard = {"all": True, "teacher_right": right, "student_wrong": right and not student}[where]
                    total = total + 0.5 / 6 / len(y) * heard * t(i, j).softmax(1)[b, y[b]] ** gate * each[b]
        return total
    return loss


def warming(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    """A fifth of an epoch of ten steps: steps 0 and 1 alone, with the whole weight on own AEs."""
    return ce(z(k, k), y) if step < 2 else mat(k, z, t, y, step)


def ring(k: int, step: int) -> list[Slot]:
    """The others' AEs, then the own ones, of three peers."""
    return [*(j for j in range(3) if j != k), k]


def mine(k: int, step: int) -> list[Slot]:
    return [k]


def pair(k: int, step: int) -> list[Slot]:
    return ["clean", k]


TEACHER = {"frozen": True}
CASES = {
    "at_wa": Case([{"loss": "at_wa", "optim": {"ema_decay": 0.9}}], smoothed, mine),
    "mart": Case([{"loss": "mart"}], mart, pair),
    "ard": Case([{"loss": "ard"}, TEACHER], ard, mine),
    "rslad": Case([{"loss": "rslad"}, TEACHER], rslad, pair, guides={0: (1,)}),
    "lbgat": Case([{"loss": "lbgat"}] * 2, lbgat, lambda k, step: ["clean"] if k == 0 else [1]),
    "peeraid": Case([{"loss": "peeraid"}] * 2, peeraid, lambda k, step: [1] if k == 0 else ["clean", 1],
                    guides={1: (0,)}),
    "at+awp": Case([{"loss": "at", "optim": {"awp_gamma": 0.02}}], at, mine, own=at),
    "trades+awp": Case([{"loss": "trades", "optim": {"awp_gamma": 0.02}}], trades, pair, own=trades),
    "mat+awp": Case([{"loss": "mat", "optim": {"awp_gamma": 0.02}}] * 3, mat, ring, own=at),
    "gate": Case([{"loss": {"preset": "mat", "gate": 0.7}}] * 3, trusted("all", 0.7), ring),
    "teacher_right": Case([{"loss": {"preset": "mat", "kd_where": "teacher_right"}}] * 3, trusted("teacher_right", 0),
                          ring),
    "student_wrong": Case([{"loss": {"preset": "mat", "kd_where": "student_wrong", "gate": 0.1}}] * 3,
                          trusted("student_wrong", 0.1), ring),
    "warm-up": Case([{"loss": {"preset": "mat", "warmup_epochs": 0.2}}] * 3, warming,
                    lambda k, step: [k] if step < 2 else ring(k, step)),
    "teachers=ema": Case([{"loss": "mat", "optim": {"ema_decay": 0.6}}] * 3, mat, ring, step={"teachers": "ema"}),
}

# ------------------------------------------------------------------------------------------------ unions and roles

THREE = "linf:0.1,l2:0.8,l1:0.6"
OWN: list[Slot] = [("own", 1), ("own", 2), 0]  # l2, l1, linf: a peer's first threat comes last


def average_of(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return sum(ce(z(0, slot), y) for slot in OWN) / 3  # type: ignore[return-value]


def worst_of(zs: list[Tensor], y: Tensor) -> Tensor:
    """Image by image the largest loss."""
    return torch.stack([max(ce_per_image(z, y)[b] for z in zs) for b in range(len(y))]).mean()


def ramp_pair(q: Tensor, r: Tensor, y: Tensor) -> Tensor:
    """RAMP, equation 4: KL between the norms' predictions on images that are right on the first, their mean."""
    right = [b for b in range(len(y)) if q[b].argmax() == y[b]]
    return kl_per_image(q, r)[right].mean() if right else torch.zeros((), dtype=q.dtype)


def maximum(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return worst_of([z(0, slot) for slot in OWN], y)


def ramp(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
    return maximum(k, z, t, y, step) + 5 * ramp_pair(z(0, 0), z(0, ("own", 2)), y)


def generalist(hard: Callable[[Z, Tensor], Tensor], feedback: bool = False) -> Formula:
    """Specialists 0, 1, 2 learn alone or half from peer 3; it learns half from their AEs, half from their makers."""
    def loss(k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
        if k == 3:
            return 0.5 * hard(z, y) + 0.5 / 3 * sum(kl(t(j, j), z(3, j)) for j in range(3))
        return 0.5 * ce(z(k, k), y) + 0.5 * kl(t(3, k), z(k, k)) if feedback else ce(z(k, k), y)
    return loss


def from_all(k: int, step: int) -> list[Slot]:
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
    """MSD; its own reference is in tests/unit/test_union.py."""
    threats, key = (LINF, L2, L1), rng.key(0, "attack", step, k)
    start = (x + start_noise(key, "uniform", LINF, x)).clamp(0, 1)
    return msd(lambda images: peer.logits(images, None), x, y, regions=[t.region(x) for t in threats],
               step_sizes=[2.5 * t.eps / ATTACK_STEPS for t in threats], start_BCHW=start, loss="ce",
               steps=ATTACK_STEPS, stream=key).detach()


def union_slots(k: int, step: int) -> list[Slot]:
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


def own_too(k: int, step: int) -> list[Slot]:
    return [0, 1, 2, 3] if k == 3 else [k]


CASES |= {
    "avg": Case(alone("avg"), average_of, union_slots),
    "max": Case(alone("max"), maximum, union_slots),
    "ramp": Case(alone("ramp"), ramp, union_slots),
    "ramp+projection": Case([{"loss": "at", "union": {"strategy": "ramp", "threats": THREE, "projection_beta": 0.5}}],
                            ramp, union_slots, natural=lambda k, z, t, y, step: ce(z(k, "clean"), y)),
    "avg+awp": Case([{**alone("avg")[0], "optim": {"awp_gamma": 0.02}}], average_of, union_slots, own=at),
    "msd": Case(alone("msd"), at, mine, craft=steepest),
    "generalist": Case(cohort(None), generalist(mean_of), from_all),
    "generalist avg": Case(cohort("avg"), generalist(mean_of), from_all),
    "generalist max": Case(cohort("max"), generalist(max_of), from_all),
    "generalist ramp": Case(cohort("ramp"), generalist(ramp_of), from_all),
    "generalist with msd of its own": Case(with_own("msd"), half_own, own_too, craft=by_generalist(steepest)),
    "generalist with a norm of its own": Case(with_own("random"), half_own, own_too, craft=by_generalist(Drawn(False))),
    "generalist that feeds back": Case(cohort(None, kd_weight=0.5), generalist(mean_of, feedback=True), from_all),
}


class Received:
    """A generalist that learns from one specialist per batch, at random or the less robust one more often: hard labels
    and its maker's opinion on its AEs, half and half."""

    stream = 13  # E-AT has drawn all three after four steps

    def __init__(self, eat: bool) -> None:
        self.eat, self.held, self.seen, self.path = eat, [0] * 3, [0] * 3, []

    def drawn(self, step: int) -> int:
        if len(self.path) <= step:
            n = rng.key(0, "norm", step, self.stream) % 3
            if self.eat:
                chances = [1 - h / s for h, s in zip(self.held, self.seen, strict=True)] if all(self.seen) else [1] * 3
                u = rng.uniform(rng.key(0, "eat", step, self.stream), (1,), dtype=torch.float64).item()
                u *= sum(chances)
                n = int(u >= chances[0]) + int(u >= chances[0] + chances[1])
            self.path.append(n)
        return self.path[step]

    def loss(self, k: int, z: Z, t: Z, y: Tensor, step: int) -> Tensor:
        if k < 3:
            return ce(z(k, k), y)
        j = self.drawn(step)
        self.held[j] += int((z(3, j).argmax(1) == y).sum())
        self.seen[j] += len(y)
        return 0.5 * ce(z(3, j), y) + 0.5 * kl(t(j, j), z(3, j))

    def learned(self, k: int, step: int) -> list[Slot]:
        return [self.drawn(step)] if k == 3 else [k]


def agree(case: Case, run_ranks: Callable[..., list[Any]], steps: int = STEPS) -> None:
    """Train both; weights and running statistics are equal, frozen peers as before, and the others moved."""
    count = len(case.peers)
    assert count not in (BATCH, CLASSES)  # equal sizes would hide a wrong axis
    models, config = nets(count, dtype=torch.float64), case.config()
    (ours,) = run_ranks(lambda mesh: train(config, mesh, models, steps, dtype=torch.float64, data=case.images),
                        count, 1)
    peers = [Reference(m) for m in models]
    for step in range(steps):
        reference_step(case, config, peers, step)
    for peer, theirs, model in zip(ours.peers, peers, models, strict=True):
        assert theirs.differences(peer.model.state_dict()) < 1e-9, peer.name
        moved = (peer.model.state_dict()["body.0.weight"] - model.state_dict()["body.0.weight"]).abs().max()
        assert moved == 0 if peer.spec.frozen else moved > 1e-4


# "student_wrong", "generalist" and "generalist with msd of its own" cover them in the fast part.
SLOW = ("gate", "teacher_right", "generalist avg", "generalist with a norm of its own")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_a_baseline_equals_its_formula(name: str, run_ranks: Callable[..., list[Any]]) -> None:
    agree(CASES[name], run_ranks)


MIXED = ("at_wa", "ard", "rslad", "lbgat", "peeraid", "trades+awp", "mat+awp", "warm-up", "avg", "max", "msd",
         "generalist that feeds back", "generalist max")


@pytest.mark.parametrize("name", [n if n in ("at_wa", "trades+awp", "max") else pytest.param(n, marks=pytest.mark.slow)
                                  for n in MIXED])
def test_a_baseline_with_mixed_labels_equals_its_formula(name: str, run_ranks: Callable[..., list[Any]]) -> None:
    agree(replace(CASES[name], images=mixed_images), run_ranks)


@pytest.mark.parametrize("eat", [False, True], ids=["random", "eat"])
def test_a_norm_per_step_is_drawn_and_trained_against(eat: bool, run_ranks: Callable[..., list[Any]]) -> None:
    drawn = Drawn(eat)
    agree(Case(alone("eat" if eat else "random"), at, mine, craft=drawn), run_ranks)
    assert len(set(drawn.path)) > 1


@pytest.mark.parametrize("eat", [False, True], ids=["random", "eat"])
def test_a_generalist_learns_from_one_specialist_per_step(eat: bool, run_ranks: Callable[..., list[Any]]) -> None:
    received = Received(eat)
    entries = cohort("eat" if eat else "random")
    entries[3]["stream"] = received.stream
    agree(Case(entries, received.loss, received.learned), run_ranks, steps=7)
    assert set(received.path) == {0, 1, 2} and sum(received.seen) == 7 * BATCH and sum(received.held) > 0
