"""Attacks: one PGD loop for every norm, start and loss."""

from mat_dist.attacks.pgd import ATTACK_LOSSES, margin, pgd

__all__ = ["ATTACK_LOSSES", "margin", "pgd"]
