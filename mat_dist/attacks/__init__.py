"""Attacks: PGD and APGD for every norm, start and loss; norms, and how to add one."""

from mat_dist.attacks.apgd import APGD_L1_SHARE, Apgd, apgd
from mat_dist.attacks.norms import L1, L2, Linf, Region, Threat, register_norm, register_threat
from mat_dist.attacks.pgd import ATTACK_LOSSES, margin, pgd
from mat_dist.config.norms import NormInfo

__all__ = [
           "APGD_L1_SHARE",
           "ATTACK_LOSSES",
           "L1",
           "L2",
           "Apgd",
           "Linf",
           "NormInfo",
           "Region",
           "Threat",
           "apgd",
           "margin",
           "pgd",
           "register_norm",
           "register_threat",
]
