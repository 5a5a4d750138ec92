"""One image file as RGB bytes: which formats and pixel types are read, and what is told of those that are converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
EXTENSIONS = MappingProxyType({
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".ppm": "PPM", ".pgm": "PPM",
    ".pbm": "PPM", ".pnm": "PPM", ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF"})
MODES = MappingProxyType({  # pixel types that are read, and what the log counts
    "RGB": "", "RGBA": "", "L": "grey", "LA": "grey", "1": "black and white", "P": "palette", "PA": "palette",
    "RGBX": "fourth channel left out", "CMYK": "CMYK without its colour profile", "YCbCr": "YCbCr"})
MOST_PIXELS = 89_478_485  # Pillow warns above this and goes on; we refuse
MOST_RESIZED = 1 << 24  # pixels of a whole resized image; of a larger one only the square is made
MOST_TEXT = 1 << 26  # bytes of a PNG's colour profile or text; for more than 1 MiB Pillow would refuse the image
_BITS, _SAMPLES = 258, 277  # TIFF tags: bits of each channel, number of channels


def read_image(path: Path, side: int | None, tell: Callable[[str], object] = str) -> np.ndarray:
    """One image as uint8 (H, W, 3); with `side`, its shorter side is resized to it and the centre square cut out.

    Bilinear with antialiasing, as torchvision's Resize and CenterCrop, whose import takes as long as 5000 small images.
    An image of the right size is left untouched. `tell` gets what was converted, a few words for each kind. Raises what
    Pillow raises; ValueError for more than 89 million pixels, before they are allocated, and for pixels that do not fit
    into 8 bits.
    """
    PngImagePlugin.MAX_TEXT_CHUNK = MOST_TEXT
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        if image.size[0] * image.size[1] > MOST_PIXELS:
            raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, at most {MOST_PIXELS} are decoded")
        _check_type(image)
        told = [MODES[image.mode]]
        if getattr(image, "is_animated", False):
            told.append("several frames or pages, the first one taken")
        kind = str(image.format).replace("MPO", "JPEG")  # a JPEG with others behind it
        ending = path.suffix.lower()
        if EXTENSIONS.get(ending, kind) != kind:
            told.append(f"{kind} named {ending}")
        rgb = _rgb(image, told)
    pixels = np.asarray(rgb if side is None else _square(rgb, side))
    for kind in filter(None, told):
        tell(kind)
    return pixels


def _check_type(image: ImageFile.ImageFile) -> None:
    """Pillow would keep the high byte of 16-bit colours, cut 16-bit grey off at 255, and say nothing."""
    args = image.tile[0][3] if image.tile else ""  # what the decoder is told
    args = args if isinstance(args, tuple) else (args,)
    tags = getattr(image, "tag_v2", {})
    deep = (image.format == "PNG" and ";16" in str(args[0])) or max(tags.get(_BITS, (8,))) > 8 or (
        image.format == "PPM" and any(isinstance(most, int) and most > 255 for most in args))
    if deep or image.mode not in MODES:
        name = f"{image.mode} with more than 8 bits" if deep and image.mode in MODES else image.mode
        raise ValueError(f"pixels of type {name}, 8 bits per channel are needed")
    if tags.get(_SAMPLES, 1) > 4:
        raise ValueError(f"{tags[_SAMPLES]} channels, at most 4 are read")


def _rgb(image: ImageFile.ImageFile, told: list[str]) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    if seen.getchannel("A").getextrema()[0] == 255:
        return seen.convert("RGB")
    told.append("transparent, blended onto white")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def _square(rgb: Image.Image, side: int) -> Image.Image:
    if rgb.size == (side, side):
        return rgb
    whole = [max(side, length * side // min(rgb.size)) for length in rgb.size]
    left, top = (round((length - side) / 2) for length in whole)
    cut = (left, top, left + side, top + side)
    if whole[0] * whole[1] <= MOST_RESIZED:
        return rgb.resize((whole[0], whole[1]), Image.Resampling.BILINEAR).crop(cut)
    # Of a thin image the square alone, the same but for rounding: 65000 x 1 would become 14 million x 224.
    x, y = (length / resized for length, resized in zip(rgb.size, whole, strict=True))
    return rgb.resize((side, side), Image.Resampling.BILINEAR, (cut[0] * x, cut[1] * y, cut[2] * x, cut[3] * y))
