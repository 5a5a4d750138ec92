"""A rendezvous for torchrun on one node whose store listens on 127.0.0.1 only:

torchrun --nproc_per_node=4 --rdzv-backend=mat_dist_local -m mat_dist.train

torchrun's own stores, also with --standalone and --master-addr=127.0.0.1, listen on all interfaces and ask nobody for a
password (pytorch#173909). setup.cfg registers `local` in the entry-point group `torchrun.handlers`, which torch loads
while torch.distributed.elastic.rendezvous is imported, in every torchrun of this environment: so nothing of torch is
imported here before the handler is asked for, and the handler has its verbs, but not its base class.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

from mat_dist.distributed.agent import LOOPBACK, attend

NAME = "mat_dist_local"


class LocalRendezvous:
    """One agent, so nobody to wait for; its store serves the ranks too, also those of a restart."""

    use_agent_store = True  # ranks connect to the agent's store instead of opening another one

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store: Any = None

    def next_rendezvous(self) -> Any:
        """The store of this node, group rank 0 of 1."""
        from torch.distributed import PrefixStore, TCPStore
        from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

        if self._store is None:
            listener = socket.create_server((LOOPBACK, 0))
            port = listener.getsockname()[1]
            # The store takes the socket over: given a host and port, it would bind to every interface.
            self._store = TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False,
                                   master_listen_fd=listener.detach())
        where = RendezvousStoreInfo(LOOPBACK, self._store.port)
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, where)

    def get_backend(self) -> str:
        return NAME

    def get_run_id(self) -> str:
        return self._run_id

    def is_closed(self) -> bool:
        return False  # no other node could close it

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0  # no other node can join

    def shutdown(self) -> bool:
        self._store = None
        return True


def create(parameters: Any) -> LocalRendezvous:
    """The handler for torchrun's options. Raises ValueError for more than one node."""
    if parameters.max_nodes != 1:
        raise ValueError(f"--rdzv-backend={NAME} is for one node, --nnodes asks for {parameters.max_nodes}")
    return LocalRendezvous(parameters.run_id)


def local() -> Callable[[Any], LocalRendezvous]:
    """What makes the handler. torch asks in every torchrun, also where another one is used."""
    attend(sys.argv[1:])
    return create
