"""Images as PNG files and as data URIs."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image
from torch import Tensor

SIDE = 96  # smaller images are enlarged by a whole factor to about this many pixels


def png(image_CHW: Tensor) -> bytes:
    """A PNG of an image in [0, 1]: grey for one channel, colours for three, the mean of any other number."""
    levels = (image_CHW.detach().to("cpu", torch.float32).clamp(0, 1) * 255).round().to(torch.uint8)
    if len(levels) == 3:
        picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    else:
        picture = Image.fromarray(levels.float().mean(0).round().to(torch.uint8).numpy())
    factor = max(round(SIDE / max(picture.size)), 1)
    stream = io.BytesIO()
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(
        stream, "PNG", optimize=True)
    return stream.getvalue()


def scaled(perturbation_CHW: Tensor) -> Tensor:
    """A perturbation as an image: 0 is grey, its largest pixel white or black."""
    largest = float(perturbation_CHW.abs().amax()) or 1.0
    return 0.5 + perturbation_CHW / (2 * largest)


def data_uri(content: bytes) -> str:
    """A PNG inside the page."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
