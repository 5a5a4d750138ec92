"""What setup.cfg registers in the entry-point group `torchrun.handlers`.

torch loads it while torch.distributed.elastic.rendezvous is imported, in every torchrun of this environment: so nothing
of torch is imported here before the handler is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def local() -> Callable[[Any], Any]:
    """The maker of the handler behind --rdzv-backend=mat_dist_local."""

    def create(parameters: Any) -> Any:
        from mat_dist.distributed import rendezvous

        return rendezvous.create(parameters)

    return create
