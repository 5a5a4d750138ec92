"""The mesh: process groups, collectives between ranks, devices. The only file that touches torch.distributed.

Verbs act along an axis of the placement; an axis of size 1 has no group and its verbs return their input, so
callers never ask how many ranks there are. Nothing that arrives is unpickled: tensors and JSON bytes only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mat_dist.config.schema import CommConfig, Config
from mat_dist.distributed.arithmetic import set_fp32
from mat_dist.distributed.heartbeat import Heartbeat
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.placement import Placement
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import EnvironmentFault, PeerSilent

LISTEN = timedelta(seconds=0.5)  # how long an exchange inside local work waits before it asks who failed
RESTART = "start again to continue from the newest checkpoint"


class Mesh:
    """This rank's place and its process groups (None along an axis of size 1).

    Args:
        placement: arithmetic of peers and ranks.
        device: where tensors live.
        world: small gloo group of all ranks for headers, votes and text; CPU tensors only.
        peer: group along the peer axis (AEs and logits).
        replica: group along the replica axis (gradients).
        staged: move CUDA tensors through host memory (gloo).
        beat: heartbeat of this rank, None where there is one rank or ranks are threads.
        timeout: seconds after which a rank is given up.
    """

    def __init__(self, placement: Placement, device: torch.device, *, world: Any = None, peer: Any = None,
                 replica: Any = None, staged: bool = False, beat: Heartbeat | None = None,
                 timeout: float = 600.0) -> None:
        self.placement, self.device, self._timeout = placement, device, timeout
        self.beat = beat
        self.where = "start"  # what the ranks are about to do, for messages
        self._world, self._peer, self._replica = world, peer, replica
        self._staged = staged

    # ---------------------------------------------------------------- tensors

    def gather_peers(self, local_L: Tensor) -> Tensor:
        """(L, ...) here -> (P, ...) on every rank, in peer order, contiguous, without gradient."""
        return self._gather(local_L.detach(), self._peer)

    def gather_world(self, row: Sequence[int]) -> list[list[int]]:
        """One row of integers here -> the rows of all ranks, by rank. Travels over the control group."""
        table = self._gather(torch.tensor([list(row)], dtype=torch.int64), self._world)
        return table.tolist()

    def average_replicas(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type by their mean over the replicas, in place, in one flat all-reduce."""
        if self._replica is None or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        moved = flat.cpu() if self._staged else flat
        with self._naming("gradient average"):
            dist.all_reduce(moved, group=self._replica)
        flat = moved.to(flat.device).div_(self.placement.replicas)
        for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(mean.view_as(t))

    def gather_replicas(self, local_B: Tensor) -> Tensor:
        """(B, ...) here -> the rows of all replicas in their order, on every one of them, without gradient."""
        return self._gather(local_B.detach(), self._replica)

    def gather_statistics(self, row: Tensor) -> Tensor:
        """`gather_replicas` inside local work, where another replica may have failed: then its error is raised."""
        return self._gather(row.detach(), self._replica, local_work=True)

    def tell_replicas(self, error: dict[str, Any] | None) -> None:
        """Local work failed here (code, what, where, how): replicas that wait in `gather_statistics` must not go on."""
        if error is not None and self._replica is not None and self.beat is not None:
            self.beat.fail(error)

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

    def meet(self, point: str) -> None:
        """Wait for all ranks however long they take, as long as they live: for phases of unknown length."""
        if self.beat is not None:
            self.beat.meet(point, self._timeout)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather_world([0])

    # ---------------------------------------------------------------- inside

    def _gather(self, local: Tensor, group: Any, local_work: bool = False) -> Tensor:
        local = local.contiguous()
        if group is None:
            return local
        staged = self._staged and local.is_cuda
        sent = local.cpu() if staged else local
        out = sent.new_empty(group.size() * sent.shape[0], *sent.shape[1:])
        # all_gather_into_tensor was renamed in torch 2.14 and warns there.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self._naming("gather"):
            # On a GPU nothing waits here but its stream.
            waiting = gather(out, sent, group=group, async_op=local_work and not sent.is_cuda)
            while waiting is not None and not self._ended(waiting):
                if self.beat is not None and (failure := self.beat.failure()) is not None:
                    raise failure
        return out.to(local.device) if staged else out

    @staticmethod
    def _ended(waiting: dist.Work) -> bool:
        """Wait a while for an exchange -> whether it is done. Raises the backend's error."""
        try:
            return bool(waiting.wait(LISTEN))
        except RuntimeError:
            if waiting.is_completed():
                raise
            return False

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Turn the backend's error, which names nobody or the wrong rank, into the guilty rank."""
        where = f"{what} of {self.where}"
        if self.beat is not None:
            self.beat.arrive(self.where)
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            # gloo begins with its source file and ends with advice.
            text = re.sub(r"^\[\S+:\d+\] ", "", str(error).splitlines()[0]).partition(". ")[0]
            if self.beat is not None and (failure := self.beat.failure()) is not None:
                raise failure from error
            if self.beat is None:
                raise PeerSilent(f"a peer stopped answering: {text}", where, RESTART) from error
            raise self.beat.blame(where, text) from error


@contextmanager
def open_mesh(peers: int, comm: CommConfig, device: torch.device, launch: Launch, *,
              stop: StopFlag) -> Iterator[Mesh]:
    """Form the process groups of this launch, and leave them at the end.

    Args:
        stop: the stop request of this rank; heartbeats carry it to and from the others.

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
    launch.stay_on_node()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        # torchrun's store outlives a restart, and gloo would connect to the addresses of the attempt before (torch
        # 2.14): keys carry the restart. Where rank 0 has to open the store, torch does that.
        store = _store(launch, timeout, "groups") if launch.agent_store else None
        dist.init_process_group(backend, timeout=timeout, rank=launch.rank, world_size=launch.world, store=store)
    except (RuntimeError, ValueError) as error:
        raise EnvironmentFault(f"the ranks cannot meet: {error}", "MASTER_ADDR, MASTER_PORT",
                               "start with torchrun, and check that the port is free and reachable") from error
    beat = None
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        peer = _own_group(placement.peer_axis(), placement.rank, timeout)
        replica = _own_group(placement.replica_axis(), placement.rank, timeout)
        if launch.master is not None:
            beat = _heartbeat(placement, launch, timeout, stop)
            if backend == "nccl" and replica is not None:
                beat.release = replica.abort  # the host does not wait for it, but the device does
        mesh = Mesh(placement, device, world=control, peer=peer, replica=replica, staged=backend == "gloo", beat=beat,
                    timeout=comm.timeout)
        mesh.barrier()  # gloo connects lazily: use the group once while everybody is certainly there
        yield mesh
    finally:
        if beat is not None:
            beat.close()
        dist.destroy_process_group()


def _heartbeat(placement: Placement, launch: Launch, timeout: timedelta, stop: StopFlag) -> Heartbeat:
    """A heartbeat over a store client of its own."""
    def peers_of(rank: int) -> str:
        return ", ".join(map(str, Placement.place(placement.peers, placement.world, rank).local_peers))

    return Heartbeat(_store(launch, timeout, "beats"), placement.rank, placement.world, node=launch.node,
                     peers_of=peers_of, stop=stop)


def _store(launch: Launch, timeout: timedelta, purpose: str) -> dist.Store:
    """A new client of the launch's store, with keys of this restart."""
    assert launch.master is not None
    host, port = launch.master
    client = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(f"mat_dist/{launch.run_id}/{launch.restart}/{purpose}", client)


def _own_group(axis: list[list[int]], rank: int, timeout: timedelta) -> Any:
    """Create every group of an axis (all ranks must) and return this rank's, None where it would be alone."""
    if len(axis[0]) == 1:
        return None
    groups = [dist.new_group(ranks, timeout=timeout) for ranks in axis]
    return next(g for g, ranks in zip(groups, axis, strict=True) if rank in ranks)


def choose_device(config: Config, *, local_rank: int, local_world: int) -> torch.device:
    """The device of this rank. Raises EnvironmentFault when there are GPUs but too few: never a silent CPU run."""
    count = torch.cuda.device_count() if config.run.device != "cpu" else 0
    if config.run.device == "cuda" and count == 0:
        raise EnvironmentFault("no GPU is visible", "run.device=cuda",
                               "use run.device=cpu, or check CUDA_VISIBLE_DEVICES")
    if count == 0:
        return torch.device("cpu")
    if local_world > count and config.comm.backend != "gloo":
        raise EnvironmentFault(f"{local_world} ranks on this node but {count} GPUs", "run.device",
                               "use run.device=cpu, or comm.backend=gloo to let ranks share a GPU, or fewer ranks")
    return torch.device("cuda", local_rank % count)


def ranks_per_device(device: torch.device, local_world: int) -> int:
    """How many ranks of this node share a device, at most."""
    return -(-local_world // torch.cuda.device_count()) if device.type == "cuda" else local_world


def prepare_torch(config: Config) -> None:
    """Threads per rank, the arithmetic of fp32, and deterministic kernels where they are asked for."""
    torch.set_num_threads(config.run.threads)
    if config.step.precision in ("tf32", "ieee"):
        set_fp32(config.step.precision)
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.run.deterministic


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
