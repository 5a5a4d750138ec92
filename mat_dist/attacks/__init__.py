"""Attacks: PGD and APGD for every norm, start and loss."""

from mat_dist.attacks.apgd import APGD_L1_SHARE, Apgd, apgd
from mat_dist.attacks.pgd import ATTACK_LOSSES, margin, pgd

__all__ = ["APGD_L1_SHARE", "ATTACK_LOSSES", "Apgd", "apgd", "margin", "pgd"]
