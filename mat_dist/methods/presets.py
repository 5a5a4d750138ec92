"""Presets of the mutual loss that need nothing but coefficients.

Of the MAT paper (Liu, Lau, Souri, Feizi, Chellappa, IEEE TIFS 17, 2022) we had the abstracts, not the formula; ours is
a reconstruction whose named special cases are published methods. Formulas and sources: docs/loss.md.
Weights count `batchmean` KL: summed over classes, averaged over the batch.
"""

from __future__ import annotations

from typing import Any

from mat_dist.config.methods import Method, Preset, register_method

KD = {"kd_weight": 0.5}
TRADES = {"clean_weight": 1.0, "hard_weight": 0.0, "pair_kl": 6.0}  # beta 6: Zhang et al., ICML 2019
TRADES_ATTACK = {"loss": "kl_clean", "start": "gaussian"}
# In a cohort with roles `mat` means: specialists learn alone (kd_weight > 0 lets the generalist feed back), the
# generalist learns from their AEs, each taught by its maker.
MAT_ROLES: dict[str, dict[str, Any]] = {
    "specialist": {"kd_weight": 0.0, "kd_own": 1.0},
    "generalist": {"kd_weight": 0.5, "hard_own": 0.0, "kd_own": 0.0, "teacher_set": "owner"},
}

register_method(Method("presets", "mutual adversarial training and its parts", presets={
    # Madry et al., ICLR 2018: every peer alone. The control.
    "at": Preset(),
    # With averaged weights and label smoothing 0.4: "PGD-AT-WA" of the FastAT benchmark, 50.49 under AutoAttack where
    # plain `at` has 44.33 (ResNet-18, last epoch, arXiv 2604.22853).
    "at_wa": Preset(({"label_smoothing": 0.4},), ema_decay=0.9995),
    # Own and peers' AEs with hard labels, spread evenly (hard_own = 1 / sources), no distillation.
    "mat_share": Preset(({"hard_own": None},)),
    # Own AEs only, peers' opinion on them: Deep Mutual Learning (Zhang et al., CVPR 2018) on AEs.
    "mat_kd": Preset(({**KD, "kd_own": 1.0},)),
    # As mat_kd, but each peer's opinion on its own AE.
    "dml_at": Preset(({**KD, "kd_own": 1.0, "teacher_input": "own_ae"},)),
    # Hard labels on own AEs, distillation spread evenly over all AEs: from a small trial, where even hard weights lost
    # 7 points of PGD-100 (docs/references.md). The search of version 0.1 found nothing that beats independent peers
    # (docs/evidence.md).
    "mat": Preset((KD,), roles=MAT_ROLES),
    # Peers that learn alone for a third of the training and afterwards nearly from each other alone, with the smoothing
    # and averages of the row `mat_late` of docs/evidence.md: found by a search on Fashion-MNIST, confirmed on CIFAR-10.
    "mat_late": Preset(({"kd_weight": 0.9, "label_smoothing": 0.2},), ema_decay=0.9995, warmup=1 / 3),
    "trades": Preset((TRADES,), (TRADES_ATTACK,)),
    "mat_trades": Preset(({**TRADES, **KD},), (TRADES_ATTACK,)),
}))
