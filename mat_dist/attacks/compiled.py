"""A model whose passes are compiled, or run as they are where the compiler fails."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mat_dist.attacks.memory import release


def compiled(model: Callable[[Tensor], Tensor], tell: Callable[[str], None]) -> Callable[[Tensor], Tensor]:
    """`torch.compile(model)`, for one shape of batch at a time; from its first failure on the model itself.

    Args:
        tell: gets one line then.
    """
    called: Callable[[Tensor], Tensor] | None = None
    failed = False

    def call(x_BCHW: Tensor) -> Tensor:
        nonlocal called, failed
        if not failed:
            try:
                called = called or torch.compile(model, dynamic=False)
                return called(x_BCHW)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers raise anything; the model raises it again if it is its own
                failed = True
                release(error)
                tell(f"its passes are not compiled: {type(error).__name__}: {error}".splitlines()[0])
        return model(x_BCHW)

    return call
