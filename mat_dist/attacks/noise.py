"""Noise inside the ball: the floor that every attack must beat."""

from __future__ import annotations

import torch
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
        return region.start("uniform", stream=stream)
    std = threat.eps * (threat.kind.noise / threat.kind.span(torch.ones(x_BCHW.shape[1:])))
    noise = rng.normal(stream, x_BCHW.shape, device=x_BCHW.device, dtype=x_BCHW.dtype)
    return region.inside(x_BCHW + std * noise)
