"""From the settings of a peer to complete ones: what its preset, its union and its method say of what is left open."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from mat_dist.config.methods import methods, methods_model, presets, strategies
from mat_dist.config.norms import known_norms
from mat_dist.config.schema import AttackConfig, LossConfig, OptimConfig, PeerConfig, ThreatConfig, UnionConfig

BASE: dict[str, Any] = {
    "hard_weight": None, "hard_own": 1.0, "clean_weight": 0.0, "kd_weight": 0.0, "kd_own": None, "kd_clean": 0.0,
    "kd_loss": "kl", "kd_where": "all", "temperature": 1.0, "teacher_input": "same_ae", "teacher_set": "all",
    "pair_kl": 0.0, "pair_mse": 0.0, "label_smoothing": 0.0,
}


def hears(role: str, other: str, other_frozen: bool) -> bool:
    """Whether a peer of one role learns from one of another: generalists and specialists not from their own kind."""
    return other_frozen or role == "peer" or role != other


def fill_peer(peer: PeerConfig, index: int, peers: int, data: str = "") -> PeerConfig:
    """The complete entry of the peer at `index` of a cohort of `peers`, trained on the data set `data`."""
    preset = presets()[peer.loss.preset]
    union = fill_union(peer)
    loss = fill_loss(peer.loss, index, peers, peer.role, union)
    threat = fill_threat(peer.threat, union, data)
    added = methods_model().model_validate(dict(preset.methods[index % len(preset.methods)]))
    return peer.model_copy(update={
        "name": peer.name or f"peer{index}", "stream": index if peer.stream is None else peer.stream, "loss": loss,
        "union": union, "threat": threat, "attack": fill_attack(peer.attack, loss.preset, index, threat),
        "optim": fill_optim(peer.optim, peer),
        "methods": {**{name: getattr(added, name) for name in added.model_fields_set}, **peer.methods}})


def fill_loss(loss: LossConfig, index: int, peers: int, role: str = "peer",
              union: UnionConfig | None = None) -> LossConfig:
    """`loss` of the peer at `index` of a cohort of `peers`, every empty coefficient replaced by its preset's value;
    `warmup_epochs` stays empty where that is a share of the training.

    `kd_own` falls back to an even share, 1 / peers; with `teacher_set: owner` to 0, since the owner of a peer's own AEs
    is the peer itself and cannot teach there.
    """
    chosen = presets()[loss.preset]
    values = {**BASE, "warmup_epochs": None if chosen.warmup else 0.0, **chosen.parts[index % len(chosen.parts)]}
    if peers > 1:
        values.update(chosen.roles.get(role, {}))
    if role == "generalist" and peers > 1 and union is not None and union.threats:
        strategy = strategies().get(union.strategy or "")
        if strategy is not None and not strategy.each:
            values["hard_own"] = 0.5  # it makes AEs of its own, which weigh as much as the specialists' together
    if peers == 1 and role == "generalist" and role in chosen.roles:
        values["kd_weight"] = 0.0  # the baselines of the union: nobody is there to teach
    values.update({k: v for k, v in loss.model_dump().items() if v is not None and k != "preset"})
    if values["hard_weight"] is None:
        values["hard_weight"] = 1 - values["kd_weight"]
    if values["hard_own"] is None:
        values["hard_own"] = 1 / peers
    if values["kd_own"] is None:
        values["kd_own"] = 0.0 if values["teacher_set"] == "owner" else 1 / peers
    return LossConfig(preset=loss.preset, **values)


def fill_union(peer: PeerConfig) -> UnionConfig:
    """The union of a peer with the strategy that belongs to its preset, where nothing is said of it."""
    strategy = presets()[peer.loss.preset].strategy
    if strategy is None or peer.role == "specialist" or peer.frozen or "strategy" in peer.union.model_fields_set:
        return peer.union
    return peer.union.model_copy(update={"strategy": strategy})


def fill_threat(threat: ThreatConfig, union: UnionConfig, data: str = "") -> ThreatConfig:
    """A peer's threat: the first one of its union, where it has one; without a radius with the standard one of its norm
    on the data set, where there is one."""
    if union.balls:
        return ThreatConfig(norm=union.balls[0][0], eps=union.balls[0][1])
    standard = known_norms()[threat.norm].radii.get(data)
    return threat if "eps" in threat.model_fields_set or standard is None else threat.model_copy(
        update={"eps": standard})


def fill_optim(optim: OptimConfig, peer: PeerConfig) -> OptimConfig:
    """`optim` with the averaged weights that belong to a preset, where nothing is said of them; null says: none, and so
    does methods.swa, which averages in its own way."""
    if "swa" in peer.methods:
        return optim.model_copy(update={"ema_decay": None})
    decay = presets()[peer.loss.preset].ema_decay
    if decay is None or peer.averages or "ema_decay" in optim.model_fields_set:
        return optim
    return optim.model_copy(update={"ema_decay": decay})


def fill_attack(attack: AttackConfig, preset: str, index: int, threat: ThreatConfig) -> AttackConfig:
    """`attack` with the start and loss that the preset's method uses, and the step length of `step_size`."""
    chosen = presets()[preset].attack
    values: dict[str, Any] = {"loss": "ce", "start": "uniform", **chosen[index % len(chosen)]}
    for method in methods().values():
        values.update(method.attack_defaults.get(attack.method, {}))
    values.update({k: v for k, v in attack.model_dump().items() if v is not None})
    values.setdefault("step_size", step_size(attack.method, attack.steps, threat.norm, threat.eps))
    return AttackConfig(**values)


def step_size(method: str, steps: int, norm: str, eps: float) -> float:
    """Default length of a (first) step.

    PGD: 2.5 eps / steps, the rule of MadryLab/robustness: every point of the ball can be reached. A single step is
    1.25 eps long, as in FGSM-RS (Wong, Rice, Kolter, ICLR 2020: 10/255 for 8/255): 2.5 eps would end on the
    ball's corners whatever the start. APGD: the diameter of the ball (Croce and Hein, ICML 2020), for l1 its radius
    (ICML 2021). N-FGSM: eps (de Jorge et al., NeurIPS 2022). Free-AT: eps (Shafahi et al., NeurIPS 2019).
    """
    if method == "apgd":
        return known_norms()[norm].apgd_step * eps
    if method in ("n_fgsm", "free"):
        return eps
    return (2.5 if steps > 1 else 1.25) * eps / steps


@dataclass(frozen=True)
class LossWeights:
    """The loss of one peer with no coefficient left open; the fields are those of `LossConfig`, but for the preset's
    share of the training in which the peer learns alone, which counts where `warmup_epochs` is None."""

    hard_weight: float
    hard_own: float
    clean_weight: float
    kd_weight: float
    kd_own: float
    kd_clean: float
    kd_loss: str
    kd_where: str
    temperature: float
    teacher_input: str
    teacher_set: str
    pair_kl: float
    pair_mse: float
    label_smoothing: float
    warmup_epochs: float | None
    warmup_share: float

    @classmethod
    def of(cls, loss: LossConfig) -> LossWeights:
        """From a complete section (`fill_loss`). Raises ValueError naming the fields that are empty."""
        share = presets()[loss.preset].warmup
        values = {field.name: getattr(loss, field.name) for field in fields(cls) if field.name != "warmup_share"}
        empty = [f"loss.{name}" for name, value in values.items()
                 if value is None and not (name == "warmup_epochs" and share)]
        if empty:
            raise ValueError(f"empty: {', '.join(empty)}; fill_loss takes them from the preset")
        return cls(**values, warmup_share=share)

    def alone(self) -> LossWeights:
        """While the peer warms up: all weight of labels and teachers is on the labels of own AEs."""
        hard = self.hard_weight + self.kd_weight + self.kd_clean if self.hard_weight else 0.0
        return replace(self, hard_weight=hard, hard_own=1.0, kd_weight=0.0, kd_clean=0.0)
