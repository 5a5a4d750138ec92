"""Threats: norm balls intersected with the box [0, 1], as pure hooks for the attack loops.

    random      a random point, for a start
    step        one steepest-ascent step of a given length
    project     back onto the ball and the box
    settle      inside to the last bit

All work on batches x_BCHW in image space. Guarantees of `Threat.start` and of an attack's result, tested: every pixel
lies in [0, 1] exactly, and the distance to the clean image, measured in float64, is at most eps (1 + 1e-6).
"""

from mat_dist.attacks.l1 import L1_SHARE, L1Region
from mat_dist.attacks.regions import L2Region, LinfRegion, Region, per_image
from mat_dist.attacks.threat import GAUSSIAN_START_STD, Threat, eps_text

__all__ = ["GAUSSIAN_START_STD", "L1_SHARE", "L1Region", "L2Region", "LinfRegion", "Region", "Threat", "eps_text",
           "per_image"]
