"""A rendezvous for torchrun on one node whose store listens on 127.0.0.1 only:

torchrun --nproc_per_node=4 --rdzv-backend=mat_dist_local -m mat_dist.train

torchrun's own stores, also with --standalone and --master-addr=127.0.0.1, listen on all interfaces and ask nobody for a
password (pytorch#173909). torchrun finds this one through torchrun_plugin.py.
"""

from __future__ import annotations

import socket

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

NAME = "mat_dist_local"
LOOPBACK = "127.0.0.1"


class LocalRendezvous(RendezvousHandler):
    """One agent, so nobody to wait for; its store serves the ranks too, also those of a restart."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store: TCPStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """The store of this node, group rank 0 of 1."""
        if self._store is None:
            listener = socket.create_server((LOOPBACK, 0))
            port = listener.getsockname()[1]
            # The store takes the socket over: given a host and port, it would bind to every interface.
            self._store = TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False,
                                   master_listen_fd=listener.detach())
        where = RendezvousStoreInfo(LOOPBACK, self._store.port)
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, where)

    @property
    def use_agent_store(self) -> bool:
        """Ranks connect to the agent's store instead of opening another one."""
        return True

    def get_backend(self) -> str:
        """The name for --rdzv-backend."""
        return NAME

    def get_run_id(self) -> str:
        """What --rdzv-id says."""
        return self._run_id

    def is_closed(self) -> bool:
        """Never: no other node could close it."""
        return False

    def set_closed(self) -> None:
        """Nobody else to tell."""

    def num_nodes_waiting(self) -> int:
        """No other node can join."""
        return 0

    def shutdown(self) -> bool:
        """Close the store."""
        self._store = None
        return True


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """The handler for torchrun's options. Raises ValueError for more than one node."""
    if parameters.max_nodes != 1:
        raise ValueError(f"--rdzv-backend={NAME} is for one node, --nnodes asks for {parameters.max_nodes}")
    return LocalRendezvous(parameters.run_id)
