"""What an attempt held that ran out of memory, before it is tried again with less."""

from __future__ import annotations

import gc
import traceback

import torch


def release(error: BaseException | None) -> None:
    """Free what the attempt that failed with `error` held. Its frames hold tensors, and these graphs, for as long as
    somebody has the error; cycles hold frames; torch keeps what it got from the device."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    torch.cuda.empty_cache()
