"""Compression: adversarial examples as they travel, all bits, or the perturbation in fewer of them.

The perturbation is sent, not the image: bf16 of an image errs by half a grey level (0.5/255), int8 of a perturbation
within 8/255 by 0.0039 eps. Everybody trains on what is received, the sender too, so all peers see the same images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mat_dist.attacks.norms import Threat, per_image

LEVELS = 127  # of int8, on each side of zero


def encode(form: str, aes_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """What travels of a batch of AEs: bytes (B, n) for `fp16` and `int8`, the AEs themselves for `full`.

    int8 has one scale per image, the largest change of a pixel.
    """
    if form == "full":
        return aes_BCHW
    delta = (aes_BCHW - x_BCHW).flatten(1)
    if form == "fp16":
        return delta.half().view(torch.uint8)
    scale_B1 = delta.abs().amax(1, keepdim=True).float() / LEVELS
    levels = (delta / scale_B1.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
    return torch.cat([levels.view(torch.uint8), scale_B1.view(torch.uint8)], dim=1)


def decode(form: str, sent: Tensor, x_BCHW: Tensor, *threats: Threat) -> Tensor:
    """The AEs that everybody trains on, from `encode`'s result; again inside the sender's threat region and [0, 1], of
    several threats the nearest region, image by image."""
    if form == "full":
        return sent
    if form == "fp16":
        delta = sent.view(torch.float16).to(x_BCHW.dtype)
    else:
        scale_B1 = sent[:, -4:].contiguous().view(torch.float32)
        delta = sent[:, :-4].contiguous().view(torch.int8) * scale_B1.to(x_BCHW.dtype)
    got = x_BCHW + delta.view_as(x_BCHW)
    inside = threats[0].region(x_BCHW).inside(got)
    for threat in threats[1:]:
        other = threat.region(x_BCHW).inside(got)
        nearer_B = (other - got).flatten(1).norm(dim=1) < (inside - got).flatten(1).norm(dim=1)
        inside = torch.where(per_image(nearer_B, got), other, inside)
    return inside

