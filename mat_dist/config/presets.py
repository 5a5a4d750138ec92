"""Presets of the mutual loss: named coefficients, and the training attack that belongs to them.

The formula of the MAT paper (Liu, Lau, Souri, Feizi, Chellappa, IEEE TIFS 17, 2022) is not public; ours is a
reconstruction whose named special cases are published methods. Formulas and sources: docs/method.md.
Weights count `batchmean` KL: summed over classes, averaged over the batch.
"""

from __future__ import annotations

from typing import Any

from mat_dist.config.schema import AttackConfig, LossConfig

BASE: dict[str, Any] = {
    "hard_weight": None, "hard_own": 1.0, "clean_weight": 0.0, "kd_weight": 0.0, "kd_own": None,
    "temperature": 1.0, "t2_scale": True, "teacher_input": "same_ae", "teacher_agg": "mean_kl", "teacher_set": "all",
    "trades_beta": 0.0, "pair_weight": 0.0, "base_scale": 1.0, "label_smoothing": 0.0,
}
_KD = {"kd_weight": 0.5}
_TRADES = {"clean_weight": 1.0, "hard_weight": 0.0, "trades_beta": 6.0}  # beta 6: Zhang et al., ICML 2019
PRESETS: dict[str, dict[str, Any]] = {
    # Madry et al., ICLR 2018: every peer alone. The control.
    "at": {},
    # Own and peers' AEs with hard labels, spread evenly (hard_own = 1 / peers), no distillation.
    "mat_share": {"hard_own": None},
    # Own AEs only, peers' opinion on them: Deep Mutual Learning (Zhang et al., CVPR 2018) on AEs.
    "mat_kd": {**_KD, "kd_own": 1.0},
    # As mat_kd, but each peer's opinion on its own AE.
    "dml_at": {**_KD, "kd_own": 1.0, "teacher_input": "own_ae"},
    # Hard labels on own AEs, distillation spread evenly over all AEs. Provisional until searched; even hard
    # weights lost 7 points of PGD-100 in a small trial (docs/method.md).
    "mat": {**_KD},
    "trades": _TRADES,
    "mat_trades": {**_TRADES, **_KD},
}
# Collaborative adversarial training (Liu et al., arXiv 2303.14922, and its code): 1/20 own loss, 19/20 distillation
# of the peers on my AE at T = 1; a TRADES-type net (even index) beside an ALP-type net (odd index: Kannan et al.,
# 2018).
_CAT_BASE = {"base_scale": 1 / 20, "kd_weight": 19 / 20, "kd_own": 1.0}
CAT = ({**_CAT_BASE, **_TRADES}, {**_CAT_BASE, "hard_weight": 0.5, "clean_weight": 0.5, "pair_weight": 1.0})

_TRADES_ATTACK = {"loss": "kl_clean", "start": "gaussian"}
_PLAIN_ATTACK = {"loss": "ce", "start": "uniform"}


def coefficients(preset: str, index: int, peers: int) -> dict[str, Any]:
    """All coefficients of `preset` for the peer at `index` of a cohort of `peers`."""
    chosen = CAT[index % 2] if preset == "cat" else PRESETS[preset]
    values = {**BASE, **chosen}
    if preset == "mat_share":
        values["hard_own"] = 1 / peers
    return values


def fill_loss(loss: LossConfig, index: int, peers: int) -> LossConfig:
    """`loss` with every empty coefficient replaced by its preset's value.

    `kd_own` falls back to 1 / peers; with `teacher_set: owner` to 0, since the owner of a peer's own AEs is the
    peer itself and cannot teach there.
    """
    values = coefficients(loss.preset, index, peers)
    values.update({k: v for k, v in loss.model_dump().items() if v is not None and k != "preset"})
    if values["hard_weight"] is None:
        values["hard_weight"] = 1 - values["kd_weight"]
    if values["kd_own"] is None:
        values["kd_own"] = 0.0 if values["teacher_set"] == "owner" else 1 / peers
    return LossConfig(preset=loss.preset, **values)


def fill_attack(attack: AttackConfig, preset: str, index: int, eps: float) -> AttackConfig:
    """`attack` with the start and loss that the preset's method uses, and the step length 2.5 eps / steps.

    2.5 eps / steps is the rule of MadryLab/robustness: every point of the ball can be reached. A single step is
    1.25 eps long, as in FGSM-RS (Wong, Rice, Kolter, ICLR 2020: 10/255 for 8/255): 2.5 eps would end on the
    ball's corners whatever the start.
    """
    trades_type = preset in ("trades", "mat_trades") or (preset == "cat" and index % 2 == 0)
    default = _TRADES_ATTACK if trades_type else _PLAIN_ATTACK
    values = {**default, **{k: v for k, v in attack.model_dump().items() if v is not None}}
    values.setdefault("step_size", (2.5 if attack.steps > 1 else 1.25) * eps / attack.steps)
    return AttackConfig(**values)
