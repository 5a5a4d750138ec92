"""Collaborative adversarial training (CAT; Liu et al., arXiv 2303.14922, and its code): 1/20 own loss, 19/20
distillation of the peers on my AE at T = 1; a TRADES-type net (even index) beside an ALP-type net (odd index: Kannan et
al., 2018)."""

from __future__ import annotations

from mat_dist.config.methods import Method, Preset, register_method

OWN, KD = 1 / 20, {"kd_weight": 19 / 20, "kd_own": 1.0}

register_method(Method("cat", "collaborative adversarial training (CAT)", presets={"cat": Preset(
    ({**KD, "clean_weight": OWN, "hard_weight": 0.0, "pair_kl": 6 * OWN},
     {**KD, "hard_weight": 0.5 * OWN, "clean_weight": 0.5 * OWN, "pair_mse": OWN}),
    ({"loss": "kl_clean", "start": "gaussian"}, {}))}))
