"""Presets of the mutual loss: named coefficients, and the training attack that belongs to them.

The formula of the MAT paper (Liu, Lau, Souri, Feizi, Chellappa, IEEE TIFS 17, 2022) is not public; ours is a
reconstruction whose named special cases are published methods. Formulas and sources: docs/method.md.
Weights count `batchmean` KL: summed over classes, averaged over the batch.
"""

from __future__ import annotations

from typing import Any

from mat_dist.config.fields import parse_threats
from mat_dist.config.schema import AttackConfig, LossConfig, OptimConfig, ThreatConfig, UnionConfig

BASE: dict[str, Any] = {
    "hard_weight": None, "hard_own": 1.0, "hard_loss": "ce", "clean_weight": 0.0, "kd_weight": 0.0, "kd_own": None,
    "kd_clean": 0.0, "kd_loss": "kl", "kd_where": "all", "attackers": "all", "gate": 0.0, "temperature": 1.0,
    "t2_scale": True,
    "teacher_input": "same_ae", "teacher_agg": "mean_kl", "teacher_set": "all", "trades_beta": 0.0,
    "trades_temperature": 1.0, "mart_beta": 0.0, "pair_weight": 0.0, "base_scale": 1.0, "label_smoothing": 0.0,
    "warmup_epochs": 0.0,
}
_KD = {"kd_weight": 0.5}
_TRADES = {"clean_weight": 1.0, "hard_weight": 0.0, "trades_beta": 6.0}  # beta 6: Zhang et al., ICML 2019
PRESETS: dict[str, dict[str, Any]] = {
    # Madry et al., ICLR 2018: every peer alone. The control.
    "at": {},
    # With averaged weights (EMA_DECAY) and label smoothing 0.4: "PGD-AT-WA" of the FastAT benchmark, 50.49 under
    # AutoAttack where plain `at` has 44.33 (ResNet-18, last epoch, arXiv 2604.22853).
    "at_wa": {"label_smoothing": 0.4},
    # Own and peers' AEs with hard labels, spread evenly (hard_own = 1 / sources), no distillation.
    "mat_share": {"hard_own": None},
    # Own AEs only, peers' opinion on them: Deep Mutual Learning (Zhang et al., CVPR 2018) on AEs.
    "mat_kd": {**_KD, "kd_own": 1.0},
    # As mat_kd, but each peer's opinion on its own AE.
    "dml_at": {**_KD, "kd_own": 1.0, "teacher_input": "own_ae"},
    # Hard labels on own AEs, distillation spread evenly over all AEs: from a small trial, where even hard weights lost
    # 7 points of PGD-100 (docs/method.md). The search found nothing that beats independent peers (docs/evidence.md).
    "mat": {**_KD},
    "trades": _TRADES,
    "mat_trades": {**_TRADES, **_KD},
    # Misclassification-aware AT (Wang et al., ICLR 2020): boosted cross-entropy, lambda 6.
    "mart": {"hard_loss": "bce", "mart_beta": 6.0},
    # Adversarially robust distillation (Goldblum et al., AAAI 2020), its code: T 30, alpha 1, which leaves no hard
    # labels; KL is averaged over the 10 classes there, hence a tenth.
    "ard": {"hard_weight": 0.0, "kd_weight": 0.1, "kd_own": 1.0, "temperature": 30.0, "teacher_input": "clean",
            "teacher_set": "frozen"},
    # Robust soft label distillation (Zi et al., ICCV 2021): 5/6 on AEs, 1/6 on clean images, averaged over the 10
    # classes like ARD.
    "rslad": {"hard_weight": 0.0, "kd_weight": 5 / 60, "kd_own": 1.0, "kd_clean": 1 / 60, "teacher_input": "clean",
              "teacher_set": "frozen"},
}
# Collaborative adversarial training (Liu et al., arXiv 2303.14922, and its code): 1/20 own loss, 19/20 distillation
# of the peers on my AE at T = 1; a TRADES-type net (even index) beside an ALP-type net (odd index: Kannan et al.,
# 2018).
_CAT_BASE = {"base_scale": 1 / 20, "kd_weight": 19 / 20, "kd_own": 1.0}
_CAT = ({**_CAT_BASE, **_TRADES}, {**_CAT_BASE, "hard_weight": 0.5, "clean_weight": 0.5, "pair_weight": 1.0})
# Learnable boundary guided AT (Cui et al., ICCV 2021), beta 0: a net that learns clean images and a robust one whose
# logits on AEs meet the other's on clean images. There one loss trains both; here each side of the squared
# difference has its own copy of it, which gives the same gradients.
_LBGAT = ({"hard_weight": 0.0, "clean_weight": 1.0, "kd_clean": 1.0, "kd_loss": "mse", "teacher_input": "own_ae"},
          {"hard_weight": 0.0, "kd_weight": 1.0, "kd_own": 1.0, "kd_loss": "mse", "teacher_input": "clean"})
# PeerAiD (Jung et al., CVPR 2024), the weights of its code for CIFAR-10: a peer that learns the student's AEs, and the
# student that learns from the peer, T 5; KL is averaged over the 10 classes there, hence a tenth of 0.1, 1 and 1. Two
# things differ: there the peer guides the attack in eval mode, and its KL also moves the student.
_PEERAID = ({"hard_weight": 1.0, "hard_own": 0.0, "kd_weight": 0.01, "kd_own": 0.0},
            {"hard_weight": 0.0, "kd_weight": 0.1, "kd_own": 1.0, "temperature": 5.0, "trades_beta": 0.1,
             "trades_temperature": 5.0})
# By parity of the peer's index.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"cat": _CAT, "lbgat": _LBGAT, "peeraid": _PEERAID}
# In a cohort with roles `mat` means: specialists learn alone (kd_weight > 0 lets the generalist feed back), the
# generalist learns from their AEs, each taught by its maker.
ROLES: dict[str, dict[str, Any]] = {
    "specialist": {"kd_weight": 0.0, "kd_own": 1.0},
    "generalist": {"kd_weight": 0.5, "hard_own": 0.0, "kd_own": 0.0, "teacher_set": "owner"},
}
DRAWS_OR_MSD = ("random", "eat", "msd")  # strategies that make one batch of AEs
EMA_DECAY = {"at_wa": 0.9995}  # of presets that average weights; the FastAT benchmark's

_TRADES_ATTACK = {"loss": "kl_clean", "start": "gaussian"}
_MART_ATTACK = {"loss": "ce", "start": "gaussian"}  # its code
_TEACHER_ATTACK = {"loss": "kl_teacher", "start": "gaussian"}
_FREE_ATTACK = {"loss": "ce", "start": "zero"}
_PLAIN_ATTACK = {"loss": "ce", "start": "uniform"}


def coefficients(preset: str, index: int, peers: int, role: str = "peer",
                 union: UnionConfig | None = None) -> dict[str, Any]:
    """All coefficients of `preset` for the peer at `index` of a cohort of `peers`."""
    chosen = PAIRS[preset][index % 2] if preset in PAIRS else PRESETS[preset]
    values = {**BASE, **chosen}
    if preset == "mat" and peers > 1:
        values.update(ROLES.get(role, {}))
    if role == "generalist" and peers > 1 and union is not None and union.threats and union.strategy in DRAWS_OR_MSD:
        values["hard_own"] = 0.5  # these craft an AE of their own, which weighs as much as the specialists' together
    if preset == "mat" and peers == 1 and role == "generalist":
        values["kd_weight"] = 0.0  # the baselines of the union: nobody is there to teach
    return values


def hears(role: str, other: str, other_frozen: bool) -> bool:
    """Whether a peer of one role learns from one of another: generalists and specialists not from their own kind."""
    return other_frozen or role == "peer" or role != other


def fill_loss(loss: LossConfig, index: int, peers: int, role: str = "peer",
              union: UnionConfig | None = None) -> LossConfig:
    """`loss` with every empty coefficient replaced by its preset's value.

    `kd_own` falls back to an even share, 1 / peers (with `attackers: partner` 1 / 2); with `teacher_set: owner` to 0,
    since the owner of a peer's own AEs is the peer itself and cannot teach there.
    """
    values = coefficients(loss.preset, index, peers, role, union)
    values.update({k: v for k, v in loss.model_dump().items() if v is not None and k != "preset"})
    even = 1 / (2 if values["attackers"] == "partner" else peers)
    if values["hard_weight"] is None:
        values["hard_weight"] = 1 - values["kd_weight"]
    if values["hard_own"] is None:
        values["hard_own"] = even
    if values["kd_own"] is None:
        values["kd_own"] = 0.0 if values["teacher_set"] == "owner" else even
    return LossConfig(preset=loss.preset, **values)


def fill_threat(threat: ThreatConfig, union: UnionConfig) -> ThreatConfig:
    """A peer's threat: the first one of its union, where it has one that can be read."""
    try:
        norm, eps = parse_threats(union.threats or "")[0]
        return ThreatConfig.model_validate({"norm": norm, "eps": eps})
    except ValueError:  # also pydantic's
        return threat


def fill_optim(optim: OptimConfig, preset: str) -> OptimConfig:
    """`optim` with the averaged weights that belong to a preset, where nothing is said of them; null says: none."""
    said = optim.averages or "ema_decay" in optim.model_fields_set
    if preset in EMA_DECAY and not said:
        return optim.model_copy(update={"ema_decay": EMA_DECAY[preset]})
    return optim


def fill_attack(attack: AttackConfig, preset: str, index: int, threat: ThreatConfig) -> AttackConfig:
    """`attack` with the start and loss that the preset's method uses, and the step length of `step_size`."""
    default = _PLAIN_ATTACK
    if preset in ("trades", "mat_trades", "lbgat") or (preset == "cat" and index % 2 == 0):
        default = _TRADES_ATTACK
    if preset == "mart":
        default = _MART_ATTACK
    if preset == "rslad" or (preset == "peeraid" and index % 2 == 1):
        default = _TEACHER_ATTACK
    if attack.method == "free":
        default = _FREE_ATTACK
    values = {**default, **{k: v for k, v in attack.model_dump().items() if v is not None}}
    values.setdefault("step_size", step_size(attack.method, attack.steps, threat.norm, threat.eps))
    values.setdefault("l1_share", 0.05 if attack.method == "apgd" else 0.01)  # 5 %: E-AT's code; 1 %: threats/l1.py
    return AttackConfig(**values)


def step_size(method: str, steps: int, norm: str, eps: float) -> float:
    """Default length of a (first) step.

    PGD: 2.5 eps / steps, the rule of MadryLab/robustness: every point of the ball can be reached. A single step is
    1.25 eps long, as in FGSM-RS (Wong, Rice, Kolter, ICLR 2020: 10/255 for 8/255): 2.5 eps would end on the
    ball's corners whatever the start. APGD: the diameter of the ball (Croce and Hein, ICML 2020), for l1 its radius
    (ICML 2021). N-FGSM: eps (de Jorge et al., NeurIPS 2022). Free-AT: eps (Shafahi et al., NeurIPS 2019).
    """
    if method == "apgd":
        return eps if norm == "l1" else 2 * eps
    if method in ("n_fgsm", "free"):
        return eps
    return (2.5 if steps > 1 else 1.25) * eps / steps
