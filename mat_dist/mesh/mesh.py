"""The mesh: collectives between ranks. The only file that touches torch.distributed.

Verbs act along an axis of the placement; an axis of size 1 has no group and its verbs return their input, so
callers never ask how many ranks there are. Nothing that arrives is unpickled: tensors and JSON bytes only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mat_dist.config.schema import CommConfig
from mat_dist.errors import EnvironmentFault, PeerSilent
from mat_dist.mesh.launch import Launch
from mat_dist.mesh.placement import Placement


class Mesh:
    """This rank's place and its process groups (None along an axis of size 1).

    Args:
        placement: arithmetic of peers and ranks.
        device: where tensors live.
        world: small gloo group of all ranks for headers, votes and text; CPU tensors only.
        peer: group along the peer axis (AEs and logits).
        replica: group along the replica axis (gradients).
    """

    def __init__(self, placement: Placement, device: torch.device, *, world: Any = None, peer: Any = None,
                 replica: Any = None, staged: bool = False) -> None:
        self.placement, self.device = placement, device
        self._world, self._peer, self._replica = world, peer, replica
        self._staged = staged  # gloo moves CPU tensors: CUDA tensors go through host memory

    # ---------------------------------------------------------------- tensors

    def gather_peers(self, local_L: Tensor) -> Tensor:
        """(L, ...) here -> (P, ...) on every rank, in peer order, contiguous, without gradient."""
        return self._gather(local_L.detach(), self._peer)

    def gather_replicas(self, local: Tensor) -> Tensor:
        """(n, ...) here -> (replicas * n, ...), in replica order."""
        return self._gather(local.detach(), self._replica)

    def gather_world(self, row: Sequence[int]) -> list[list[int]]:
        """One row of integers here -> the rows of all ranks, by rank. Travels over the control group."""
        table = self._gather(torch.tensor([list(row)], dtype=torch.int64), self._world)
        return table.tolist()

    def sum_world(self, tensor: Tensor) -> Tensor:
        """Sum of a CPU tensor over all ranks, on every rank."""
        if self._world is None:
            return tensor
        total = tensor.clone()
        with self._naming("sum"):
            dist.all_reduce(total, group=self._world)
        return total

    def average_replicas(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type by their mean over the replicas, in place, in one flat all-reduce."""
        if self._replica is None or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        moved = flat.cpu() if self._staged else flat
        with self._naming("gradient average"):
            dist.all_reduce(moved, group=self._replica)
        flat = moved.to(flat.device).div_(self.placement.replicas)
        start = 0
        for t in tensors:
            t.copy_(flat[start:start + t.numel()].view_as(t))
            start += t.numel()

    def synchronise_norms(self, model: torch.nn.Module) -> torch.nn.Module:
        """Batch norm over the replica axis on CUDA; on the CPU, where it has no kernel, the model as it is."""
        if self._replica is None or self.device.type == "cpu":
            return model
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, self._replica)

    # ---------------------------------------------------------------- text and control

    def gather_json(self, value: Any) -> list[Any]:
        """A JSON value of each rank, by rank."""
        if self._world is None:
            return [json.loads(json.dumps(value))]
        data = json.dumps(value).encode()
        sizes = [row[0] for row in self.gather_world([len(data)])]
        padded = torch.zeros(1, max(sizes), dtype=torch.uint8)
        padded[0, :len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = self._gather(padded, self._world)
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]

    def from_lead(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        return self.gather_json(value if self.placement.is_lead else None)[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather_world([0])

    # ---------------------------------------------------------------- inside

    def _gather(self, local: Tensor, group: Any) -> Tensor:
        local = local.contiguous()
        if group is None:
            return local
        staged = self._staged and local.is_cuda
        sent = local.cpu() if staged else local
        out = sent.new_empty(group.size() * sent.shape[0], *sent.shape[1:])
        # all_gather_into_tensor was renamed in torch 2.14 and warns there.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self._naming("gather"):
            gather(out, sent, group=group)
        return out.to(local.device) if staged else out

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Turn the backend's error into ours: a peer's process is gone or silent."""
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            raise PeerSilent(f"a peer stopped answering during a {what}: {error}", f"rank {self.placement.rank}",
                             "see the rank_<r>.log files of the other ranks, then start again to continue from the "
                             "newest checkpoint") from error


@contextmanager
def open_mesh(peers: int, comm: CommConfig, device: torch.device, launch: Launch) -> Iterator[Mesh]:
    """Form the process groups of this launch, and leave them at the end.

    Raises EnvironmentFault when the rank count does not fit, or the ranks cannot meet.
    """
    placement = Placement.place(peers, launch.world, launch.rank)
    if launch.world == 1:
        yield Mesh(placement, device)
        return
    backend = comm.backend if comm.backend != "auto" else ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl" and device.type != "cuda":
        raise EnvironmentFault("nccl needs GPUs", "comm.backend=nccl", "use comm.backend=gloo")
    timeout = timedelta(seconds=comm.timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend, timeout=timeout, rank=launch.rank, world_size=launch.world)
    except (RuntimeError, ValueError) as error:
        raise EnvironmentFault(f"the ranks cannot meet: {error}", "MASTER_ADDR, MASTER_PORT",
                               "start with torchrun, and check that the port is free and reachable") from error
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        peer = _own_group(placement.peer_axis(), placement.rank, timeout)
        replica = _own_group(placement.replica_axis(), placement.rank, timeout)
        mesh = Mesh(placement, device, world=control, peer=peer, replica=replica, staged=backend == "gloo")
        mesh.barrier()  # gloo connects lazily: use the group once while everybody is certainly there
        yield mesh
    finally:
        dist.destroy_process_group()


def _own_group(axis: list[list[int]], rank: int, timeout: timedelta) -> Any:
    """Create every group of an axis (all ranks must) and return this rank's, None where it would be alone."""
    if len(axis[0]) == 1:
        return None
    groups = [dist.new_group(ranks, timeout=timeout) for ranks in axis]
    return next(g for g, ranks in zip(groups, axis, strict=True) if rank in ranks)
