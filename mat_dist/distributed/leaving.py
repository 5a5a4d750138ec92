"""How a rank ends: its process groups keep it neither from telling why nor from leaving. Imports no torch."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from mat_dist.distributed.waiting import begun

ABORT_SECONDS = 3.0  # a healthy group needs milliseconds


def abort_groups() -> bool:
    """End process groups that still stand, since this rank failed or they could not be closed -> whether any stood. To
    close them could, over NCCL, mean to wait for exchanges that never end."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return False
    with suppress(Exception):  # what counts is the error before
        begun(dist.distributed_c10d._abort_process_group, "abort").result(ABORT_SECONDS)
    return True


def leave(code: int) -> None:
    """The last act of a rank that has told its end. Where its groups stood, the interpreter may not come to its own."""
    if abort_groups():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
