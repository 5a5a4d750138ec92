"""Attacks without a gradient: noise, the floor that every attack must beat, and random search, for finding out whether
gradients lie."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.attacks.pgd import margin

FIRST_SHARE = 0.5  # side of the first patches as a share of the image's; falls linearly to one pixel


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


def patch_change(threat: Threat, x_BCHW: Tensor) -> float:
    """The change of a pixel before the projection.

    A patch of a quarter of the side alone is as long as the ball is wide: in linf from corner to corner.
    """
    patch = torch.zeros(x_BCHW.shape[1:])
    side = max(1, round(min(patch.shape[1:]) / 4))
    patch[:, :side, :side] = 1
    return 2 * threat.eps / threat.kind.span(patch)


@torch.no_grad()
def random_search(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, *, threat: Threat, queries: int,
                  stream: int) -> Tensor:
    """The best of `queries` proposals, each a model call, image by image -> adversarial batch (B, C, H, W).

    The idea of Square (Andriushchenko et al., ECCV 2020), in a small form for any region: propose a square patch of one
    random colour, project, and keep what raises the margin. It needs only predictions.
    """
    region, size = threat.region(x_BCHW), patch_change(threat, x_BCHW)
    count, channels, height, width = x_BCHW.shape
    device, dtype = x_BCHW.device, x_BCHW.dtype
    # Vertical stripes of random sign, as Square begins.
    sign = _signs(rng.key(stream, "start"), (count, channels, 1, width), device, dtype)
    best = region.inside(x_BCHW + size * sign)
    best_B = margin(model(best), y_B)
    rows = torch.arange(height, device=device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=device).view(1, 1, 1, -1)
    for query in range(1, queries):
        side = max(1, round(FIRST_SHARE * (1 - query / queries) * min(height, width)))
        place = rng.uniform(rng.key(stream, "place", query), (count, 2), device=device, dtype=torch.float64)
        top = (place[:, 0] * (height - side + 1)).long().view(-1, 1, 1, 1)
        left = (place[:, 1] * (width - side + 1)).long().view(-1, 1, 1, 1)
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        sign = _signs(rng.key(stream, "sign", query), (count, channels, 1, 1), device, dtype)
        proposal = region.inside(torch.where(inside, best + size * sign, best))
        value_B = margin(model(proposal), y_B)
        better_B = value_B > best_B
        best = torch.where(better_B.view(-1, 1, 1, 1), proposal, best)
        best_B = torch.where(better_B, value_B, best_B)
    return best


def _signs(stream: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random -1 and 1."""
    return torch.where(rng.bits(stream, shape, device=device) >= 0, 1, -1).to(dtype)
