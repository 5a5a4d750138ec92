"""Noise inside the ball: the floor that every attack must beat."""

from __future__ import annotations

import math

from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.norms import Threat


def noisy(kind: str, x_BCHW: Tensor, threat: Threat, *, stream: int) -> Tensor:
    """x plus one draw of noise, in the ball and in [0, 1] -> (B, C, H, W).

    Args:
        kind: `uniform` in the ball, or `gaussian`: normal noise about as long as the ball is wide, projected. For linf
            its standard deviation is eps / 2; for l2 and l1 the expected (squared) length is eps.
        stream: key of the draw.
    """
    region = threat.region(x_BCHW)
    if kind == "uniform":
        return threat.start("uniform", region, x_BCHW, stream=stream)
    values = x_BCHW[0].numel()
    # E|N(0, 1)| = sqrt(2 / pi)
    std = threat.eps * {"linf": 0.5, "l2": 1 / math.sqrt(values), "l1": math.sqrt(math.pi / 2) / values}[threat.norm]
    noise = rng.normal(stream, x_BCHW.shape, device=x_BCHW.device, dtype=x_BCHW.dtype)
    return region.settle(region.project(x_BCHW + std * noise))
