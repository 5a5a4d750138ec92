"""How a rank ends: its process groups keep it neither from telling why nor from leaving. Imports no torch."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from mat_dist.distributed.waiting import begun

ABORT_SECONDS = 3.0  # a healthy group needs milliseconds


def leave(code: int) -> None:
    """The last act of a rank that has told its end: leave at once where its groups still stand, since it failed or they
    could not be closed. NCCL would wait for exchanges that never end, here or when the interpreter ends."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return
    with suppress(Exception):  # it has told what counts
        begun(dist.distributed_c10d._abort_process_group, "abort").result(ABORT_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
