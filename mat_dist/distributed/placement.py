"""P peers on R ranks by arithmetic; no process group needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mat_dist.errors import EnvironmentFault


@dataclass(frozen=True)
class Placement:
    """Where one rank stands.

    R <= P: each rank hosts P / R peers, lying contiguously, so that gather order is peer order.
    R > P: each peer has R / P replicas that share its batch; ranks [P k, P (k + 1)) form replica k, so the
    large AE exchange stays among neighbours (one node) and only gradients cross replicas.
    """

    peers: int
    world: int
    rank: int

    @classmethod
    def place(cls, peers: int, world: int, rank: int) -> Placement:
        """Raises EnvironmentFault (exit code 6) for a rank count that fits neither way."""
        if peers % world and world % peers:
            listed = ", ".join(map(str, [*cls(peers, 1, 0).fitting, 3 * peers]))
            error = EnvironmentFault(f"{world} ranks do not fit {peers} peers", "torchrun --nproc_per_node x --nnodes",
                                     f"use {listed}, ... ranks, or change the number of peers")
            error.shared = True  # all ranks compute it
            raise error
        return cls(peers, world, rank)

    @property
    def fitting(self) -> list[int]:
        """Numbers of ranks that fit the peers, up to two for each."""
        return [n for n in range(1, self.peers + 1) if self.peers % n == 0] + [2 * self.peers]

    @property
    def peers_per_rank(self) -> int:
        return max(1, self.peers // self.world)

    @property
    def replicas(self) -> int:
        return max(1, self.world // self.peers)

    @property
    def peer_ranks(self) -> int:
        """Ranks along the peer axis."""
        return self.world // self.replicas

    @property
    def replica(self) -> int:
        """Index of this rank on the replica axis."""
        return self.rank // self.peer_ranks

    @property
    def local_peers(self) -> range:
        """Peers that live on this rank."""
        first = self.rank % self.peer_ranks * self.peers_per_rank
        return range(first, first + self.peers_per_rank)

    def peers_of(self, rank: int) -> str:
        """The peers of a rank, for messages."""
        return ", ".join(map(str, replace(self, rank=rank).local_peers))

    def peers_by_rank(self) -> list[range]:
        """The peers of each rank along the peer axis."""
        return [replace(self, rank=rank).local_peers for rank in range(self.peer_ranks)]

    @property
    def is_lead(self) -> bool:
        """Rank 0 writes records and manifests."""
        return self.rank == 0

    @property
    def owns_files(self) -> bool:
        """Whether this rank writes its peers' checkpoint files: the first replica does."""
        return self.replica == 0

    def peer_axis(self) -> list[list[int]]:
        """Rank lists that together hold every peer once, by replica."""
        return [list(range(k * self.peer_ranks, (k + 1) * self.peer_ranks)) for k in range(self.replicas)]

    def replica_axis(self) -> list[list[int]]:
        """Rank lists that hold the same peers, by position on the peer axis."""
        return [list(range(p, self.world, self.peer_ranks)) for p in range(self.peer_ranks)]

    def shard(self, rows: int) -> slice:
        """This replica's rows of a batch of `rows`. Raises EnvironmentFault unless the shards are equal."""
        if rows % self.replicas:
            raise EnvironmentFault(f"a batch of {rows} images cannot be split over {self.replicas} replicas",
                                   "train.batch_size", f"use a multiple of {self.replicas}, or fewer ranks")
        size = rows // self.replicas
        return slice(self.replica * size, (self.replica + 1) * size)

    def describe(self) -> str:
        """One line for logs and --dry-run."""
        replicas = f", {self.replicas} replicas of each peer" * (self.replicas > 1)
        ranks = f"{self.world} rank{'s' * (self.world > 1)}"
        return f"{self.peers} peers on {ranks}: {self.peers_per_rank} per rank{replicas}"
