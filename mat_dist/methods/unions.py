"""Several norms for one peer: which of its threats it trains against, batch by batch, image by image, step by step.

    avg, max      the mean over norms, the worst of each image (Tramer and Boneh, "Adversarial training and robustness
                  for multiple perturbations", NeurIPS 2019): views for each threat, which the loss combines
    msd           in every step the norm whose step raises the loss most, per image (Maini, Wong and Kolter,
                  "Adversarial robustness against the union of multiple perturbation models", ICML 2020)
    random        one norm per batch, at random (SAT: Madaan, Shin and Hwang, "Learning to generate noise for
                  multi-attack robustness", ICML 2021)
    eat           one norm per batch, the less robust one more often (E-AT: Croce and Hein, "Adversarial robustness
                  against multiple and single l_p-threat models via quick fine-tuning of robust classifiers", ICML 2022)

The preset `mat_union`: a generalist learns labels on the worst of its own AEs, and half from what the specialist of
each norm says of its AE of that norm. Specialists learn alone (their kd_weight > 0 lets the generalist feed back).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from mat_dist.config.methods import Method, Preset, Strategy, register_method
from mat_dist.config.rules import entries, heard_by
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.core.hooks import Hook
from mat_dist.errors import ConfigError
from mat_dist.methods import norms, pgd, rng, torch, training_attack

if TYPE_CHECKING:
    from torch import Tensor

    from mat_dist.attacks.norms import Region
    from mat_dist.attacks.pgd import Model
    from mat_dist.attacks.training_attack import Found, TrainingAttack
    from mat_dist.core.peer import Peer
    from mat_dist.core.step import Batch

MSD_TOPS = (5, 20)  # an l1 step of MSD moves so many values, drawn anew in each step (its code, locuslab/robust_union)
EAT_UNSEEN = 0.5  # weight of every norm until all were used (its code, fra31/robust-finetuning)


def msd(model: Model, x_BCHW: Tensor, y_B: Tensor, *, regions: Sequence[Region], step_sizes: Sequence[float],
        start_BCHW: Tensor, loss: str, steps: int, stream: int, teacher_BK: Tensor | None = None) -> Tensor:
    """Multi steepest descent -> AEs (B, C, H, W), each in one of the regions, detached.

    Each step tries the step of every norm, projected onto its own region, and goes on from the one with the highest
    loss, image by image; the best point of all steps counts. A step costs one gradient and as many forwards as norms.

    Args:
        model: images in [0, 1] -> logits, frozen by the caller as for `pgd`.
        regions: feasible sets of x_BCHW, one per norm.
        step_sizes: length of a step in each region's norm. Published for CIFAR-10 (50 steps, 0.03, 0.5, 12): linf
            0.003, l2 0.05, l1 1 (the top k values by 0.05 * 20 / k each).
        start_BCHW: first iterate; published: x_BCHW.
        loss, teacher_BK: as for `pgd`.
        steps: number of steps, >= 1.
        stream: key of the draws: k of the l1 steps, uniform in 5..20.
    """
    objective = pgd.attack_loss(model, x_BCHW, y_B, loss, teacher_BK)
    adv = best = start_BCHW.detach()
    best_B = torch.full_like(x_BCHW.flatten(1)[:, 0], -torch.inf)
    owner_B = torch.zeros_like(best_B, dtype=torch.int64)
    for number in range(steps):
        _, _, grad = pgd.loss_and_gradient(model, objective, adv)
        top = min(_drawn(stream, number), x_BCHW[0].numel())
        tried = [region.project(region.step(adv, grad, size, top))
                 for region, size in zip(regions, step_sizes, strict=True)]
        with torch.no_grad():
            values_NB = torch.stack([objective(model(one).to(x_BCHW.dtype)) for one in tried])
        value_B, which_B = values_NB.max(0)
        adv = _pick(tried, which_B)
        better_B = value_B > best_B
        best = torch.where(norms.per_image(better_B, adv), adv, best)
        best_B, owner_B = torch.where(better_B, value_B, best_B), torch.where(better_B, which_B, owner_B)
    return _pick([region.round_inward(best) for region in regions], owner_B)


def _drawn(stream: int, number: int) -> int:
    """How many values the step of this number moves in a sparse norm."""
    low, high = MSD_TOPS
    return low + rng.key(stream, "msd-top", number) % (high - low + 1)


def _pick(batches: Sequence[Tensor], which_B: Tensor) -> Tensor:
    """Image b of batch which_B[b] -> (B, C, H, W)."""
    picked = batches[0]
    for index, batch in enumerate(batches[1:], 1):
        picked = torch.where(norms.per_image(which_B == index, batch), batch, picked)
    return picked


@dataclass
class EatChoice:
    """E-AT's choice of a norm, published for linf and l1 (l2 follows from them): with weight 1 - robust accuracy.

    The accuracies run from the start of the training. Counts are those of the whole batch, over replicas, so that all
    ranks choose alike.

    Attributes:
        held: images per norm that were classified correctly at every point of the attack, as E-AT's code counts.
        seen: images per norm that were attacked.
    """

    held: list[int]
    seen: list[int]

    def weights(self) -> list[float]:
        """Chance of each norm; they sum to 1."""
        if all(self.seen):
            raw = [1 - held / seen for held, seen in zip(self.held, self.seen, strict=True)]
        else:
            raw = [EAT_UNSEEN] * len(self.seen)
        total = sum(raw)
        # A model that withstands everything leaves no weight.
        return [weight / total for weight in raw] if total > 0 else [1 / len(raw)] * len(raw)

    def choose(self, *, stream: int) -> int:
        """Index of the norm of a step, keyed by `stream`; the same wherever the counts are the same."""
        u = rng.uniform(stream, (1,), dtype=torch.float64).item()
        for index, weight in enumerate(self.weights()[:-1]):
            if u < weight:
                return index
            u -= weight
        return len(self.seen) - 1

    def update(self, norm: int, held: int, seen: int) -> None:
        """Count an attacked batch: `held` of `seen` images withstood the attack of index `norm`."""
        self.held[norm] += held
        self.seen[norm] += seen


class Drawn(Hook):
    """One threat per batch, each as likely; the draw is the same on all replicas."""

    name = "unions"
    repeats = True

    def choose(self, step: int) -> int:
        return self.peer.stream("norm", step) % len(self.peer.threats)


class LessRobust(Hook):
    """E-AT: linf or l1 (l2 follows from them), drawn by the robust accuracy so far."""

    name = "unions"

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
        self.drawn = [n for n, threat in enumerate(peer.threats) if threat.norm != "l2"]
        self.choice = EatChoice([0] * len(self.drawn), [0] * len(self.drawn))
        self.abort()
        peer.attack_of_training.counts = True

    def choose(self, step: int) -> int:
        return self.drawn[self.choice.choose(stream=self.peer.stream("eat", step))]

    def attacked(self, part: Batch, threat: int, found: Found) -> None:
        assert found.held_B is not None
        place = self.drawn.index(threat)
        self._counts[0, place, 0] += found.held_B.sum()
        self._counts[0, place, 1] += len(part.y_B)

    def proposed(self) -> Sequence[Tensor]:
        return [self._counts]

    def commit(self, step: int, shared: Sequence[Tensor]) -> None:
        """Counts are those of the whole batch, over replicas, so that all ranks choose alike. They are read here, after
        the vote, when the device has nothing to do."""
        for place, (held, seen) in enumerate(shared[0].sum(0).tolist()):
            self.choice.update(place, held, seen)
        self.abort()

    def abort(self) -> None:
        device = next(self.peer.model.parameters()).device
        self._counts = torch.zeros(1, len(self.drawn), 2, dtype=torch.int64, device=device)

    def state_dict(self) -> dict[str, Any]:
        return {"eat": asdict(self.choice)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self.choice = EatChoice(**state["eat"])


class Steepest(Hook):
    """MSD: the first view is made by all threats together; the attack runs eagerly."""

    name = "unions"

    def craft(self, attack: TrainingAttack, part: Batch, guide_BK: Tensor | None) -> Tensor | None:
        settings = attack.settings
        assert settings.start is not None and settings.loss is not None
        stream = self.peer.stream("attack", part.step)

        def make(rows: slice) -> Found:
            x_BCHW, first_row = part.x_BCHW[rows], part.first_row + rows.start
            regions = [attack.region(x_BCHW, number) for number in range(len(attack.threats))]
            start = regions[0].start(settings.start or "", stream=stream, first_row=first_row)
            with attack.ready(x_BCHW) as model:
                return training_attack.Found(msd(
                    model, x_BCHW, part.y_B[rows], regions=regions, step_sizes=attack.sizes,
                    start_BCHW=start, loss=settings.loss or "", steps=settings.steps, stream=stream,
                    teacher_BK=None if guide_BK is None else guide_BK[rows]))

        return attack.fitting(make, len(part.x_BCHW)).adv_BCHW


HOOKS = {"random": Drawn, "eat": LessRobust, "msd": Steepest}


def _hook(peer: Peer) -> Hook:
    return HOOKS[peer.spec.union.strategy or ""](peer)


def _draws(spec: PeerConfig) -> bool:
    """Whether a peer makes one batch of AEs against several threats."""
    return spec.union.strategy in HOOKS and bool(spec.union.threats)


def _attack_passes(spec: PeerConfig, steps: Fraction) -> tuple[Fraction, Fraction]:
    """E-AT looks at PGD's last point, MSD at each step of each norm."""
    looks = spec.union.strategy == "eat" and spec.attack.method == "pgd"
    tried = len(spec.union.balls) if spec.union.strategy == "msd" else 0
    return steps, looks + steps * tried


# ---------------------------------------------------------------- rules


def unions_fit(config: Config) -> list[ConfigError]:
    """Two or more norms, each once, with a strategy: of own threats, or of those whose AEs a peer learns from. The
    worst or the mean over several norms is that of plain cross-entropies on AEs."""
    found = []
    for index, (key, peer) in enumerate(entries(config)):
        union, given = peer.union, [norm for norm, _ in peer.union.balls]
        strategy, heard = union.strategy, heard_by(config, index)
        own = bool(strategy and peer.loss.hard_own)
        received = bool(strategy and not peer.loss.hard_own and heard)
        eat, combines = strategy == "eat", strategy is not None and strategy not in HOOKS
        more = sorted(set(given) - {"linf", "l2", "l1"})
        for bad, what, where, how in (
                (given and strategy is None, "union.threats without a strategy", "strategy",
                 "write avg, max, random, eat, msd or ramp"),
                (len(set(given)) < len(given), "a union with one norm twice", "threats", "write each norm once"),
                (own and len(given) < 2, f"strategy {strategy} with {len(given)} threats", "threats",
                 "write two or more, such as linf:8/255,l2:1/2,l1:12"),
                (own and eat and not {"linf", "l1"} <= set(given), "strategy eat without linf and l1", "threats",
                 "name both"),
                (eat and more, f"strategy eat with {', '.join(more)}: E-AT draws linf or l1", "threats",
                 "leave it out, or write strategy: random"),
                (received and given, "union.threats, and this peer learns from the AEs of others alone", "threats",
                 "leave them out: the threats of those peers count; or give loss.hard_own a share, for AEs of its own"),
                (received and not combines, f"strategy {strategy} makes AEs, and those of other peers are finished",
                 "threats", "name the threats for AEs of its own, or write strategy: avg, max or ramp"),
                (received and len({config.peers[i].threat.norm for i in heard}) < 2,
                 f"strategy {strategy}, and the specialists have one norm", "strategy",
                 "add a specialist for each norm"),
                (combines and not peer.loss.hard_weight and not peer.frozen,
                 f"strategy {strategy} with preset {peer.loss.preset}, which has no hard labels on AEs", "strategy",
                 "write loss.preset: at, or strategy random, eat or msd")):
            if bad:
                found.append(ConfigError(what, f"{key}.union.{where}", how))
                break
    return found


register_method(Method(
    "unions", "several threats at once", presets={
        "mat_union": Preset(({"kd_weight": 0.5, "kd_own": 1.0, "teacher_set": "expert"},), strategy="max",
                            roles={"specialist": {"kd_weight": 0.0, "kd_own": 1.0, "teacher_set": "all"}})},
    strategies={
        "avg": Strategy("learn from all threats evenly", each=True),
        "max": Strategy("learn from each image's worst one", each=True, worst=True),
        "random": Strategy("from one drawn per step (SAT)"),
        "eat": Strategy("from linf or l1, the less robust one more often (E-AT)"),
        "msd": Strategy("from the steepest over the threats in each attack step (MSD)")},
    hook=_hook, when=_draws, attack_passes=_attack_passes,
    one_label=(lambda peer: peer.union.strategy == "eat", "union.strategy", "strategy: max"),
    rules=((unions_fit, frozenset({"union", "peers", "loss", "threat"})),)))
