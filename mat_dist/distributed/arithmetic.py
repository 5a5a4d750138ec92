"""How exactly fp32 is computed where the hardware can be faster than exact, as GPUs with TF32.

torch has two generations of switches, which must agree: its compiler reads the old ones, and reading them is an error
where they differ from the new ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch


def _switches() -> list[Any]:
    """All that have an `fp32_precision`; those that others follow come first."""
    all_of_them, cudnn, mkldnn = torch.backends, torch.backends.cudnn, torch.backends.mkldnn
    return [all_of_them, cudnn, mkldnn, torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn,  # type: ignore[attr-defined]
            mkldnn.matmul, mkldnn.conv, mkldnn.rnn]  # type: ignore[attr-defined]


def set_fp32(kind: str) -> None:
    """Compute fp32 as `ieee` says, or with `tf32`, in convolutions and matrix products, in this process."""
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    for switch in _switches():
        switch.fp32_precision = kind


@contextmanager
def strict_arithmetic() -> Iterator[None]:
    """Plain fp32: no TF32, deterministic convolutions; settings are restored."""
    with kept_arithmetic():
        set_fp32("ieee")
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """No half precision in here, whatever the caller has switched on."""
    with ExitStack() as scopes:
        for kind in ("cpu", *["cuda"] * torch.cuda.is_available()):
            scopes.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def kept_arithmetic() -> Iterator[None]:
    """Whatever is set inside, afterwards the arithmetic of this process is as it was."""
    cudnn, products, convolutions = torch.backends.cudnn, None, None
    with suppress(RuntimeError):  # torch does not tell where the generations differ
        products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = cudnn.allow_tf32
    before, flags = [switch.fp32_precision for switch in _switches()], (cudnn.deterministic, cudnn.benchmark)
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = flags
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        for switch in _switches():
            switch.fp32_precision = "none"  # then it follows another one, or has torch's default
        for switch, value in zip(_switches(), before, strict=True):
            if switch.fp32_precision != value:
                switch.fp32_precision = value
