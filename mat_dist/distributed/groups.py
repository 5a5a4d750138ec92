"""The mesh: process groups, collectives between ranks, devices.

Verbs act along an axis of the placement; an axis of size 1 has no group and its verbs return their input, so
callers never ask how many ranks there are. Nothing that arrives is unpickled: tensors and JSON bytes only.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mat_dist.config.schema import CommConfig, Config
from mat_dist.distributed.arithmetic import kept_arithmetic, set_fp32
from mat_dist.distributed.heartbeat import Heartbeat
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.placement import Placement
from mat_dist.distributed.rendezvous import Rendezvous
from mat_dist.distributed.stopping import StopFlag, leave_if
from mat_dist.distributed.waiting import LAP, Wait, begun
from mat_dist.errors import EnvironmentFault, MatError, PeerSilent

RESTART = "start again to continue from the newest checkpoint"
SHARE = "use run.device=cpu, or comm.backend=gloo to let ranks share a GPU, or fewer ranks"
GLOO_TIMEOUT = timedelta(days=30)  # gloo's clock runs on while a job is suspended, and then breaks the group: we count
# NCCL's watchdog ends the rank that waits, whoever is late: it must come after us, who name the guilty one.
NCCL_ROUNDS, NCCL_MORE = 3, 60.0  # times our own timeout, and seconds more
DEVICE_LAP = 1e-4  # seconds between two looks at a device
CLOSE_SECONDS = 5.0  # for groups whose exchanges have all ended


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
        stop: the stop request of this rank.
    """

    def __init__(self, placement: Placement, device: torch.device, *, world: Any = None, peer: Any = None,
                 replica: Any = None, staged: bool = False, beat: Heartbeat | None = None,
                 timeout: float = 600.0, stop: StopFlag | None = None) -> None:
        self.placement, self.device, self._timeout = placement, device, timeout
        self.beat, self._stop = beat, stop
        self.where = "start"  # what the ranks are about to do, for messages
        self._world, self._peer, self._replica = world, peer, replica
        self._staged, self.sharing = staged, 1  # ranks on this rank's device, itself included

    # ---------------------------------------------------------------- tensors

    @property
    def alone(self) -> bool:
        """Whether nothing travels."""
        return self._world is None and self._peer is None

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
        with self._naming("gradient average", self._replica):
            self._await(dist.all_reduce(moved, group=self._replica, async_op=True), moved)
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
        size = max(row[0] for row in self.gather_world([len(data)]))
        padded = torch.frombuffer(bytearray(data.ljust(size)), dtype=torch.uint8)
        return [json.loads(row.tobytes()) for row in self._gather(padded[None], self._world).numpy()]

    def from_lead(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        return self.gather_json(value if self.placement.is_lead else None)[0]

    def meet(self, point: str) -> None:
        """Wait for all ranks however long they take, as long as they live: for phases of unknown length.

        Where the launcher has gone, and its store with it, the next exchange is the meeting: then all ranks stop.
        """
        if self.beat is not None:
            self.beat.meet(point, self._timeout)

    def await_device(self) -> None:
        """Return when a device has done what it was given, which may hold an exchange with a rank that never comes; the
        driver would wait for it without a limit, and without a word. Its own errors are left to who reads from it."""
        beat = self.beat
        if self.device.type != "cuda" or self._staged or beat is None:
            return
        wait = Wait(self._timeout, lambda: beat.word(self.where))
        with suppress(RuntimeError):
            done = torch.cuda.current_stream(self.device).record_event()
            while not done.query():
                if wait.over():
                    raise beat.blame(f"exchange of {self.where} on the device")
                time.sleep(DEVICE_LAP)

    def leave(self) -> None:
        """The run is about to end: signals come too late."""
        if self._stop is not None:
            self._stop.leaving = True

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
        with self._naming("gather", group):
            self._await(gather(out, sent, group=group, async_op=True), sent, local_work)
        return out.to(local.device) if staged else out

    def _await(self, work: Any, sent: Tensor, local_work: bool = False) -> None:
        """Wait for an exchange in laps, so that signals are heard, a suspended job is no slow rank, who is missing is
        told, and an exchange inside local work asks who failed there. Raises RuntimeError."""
        if sent.is_cuda:  # NCCL: the stream waits, not the process
            work.wait()
            return
        wait = Wait(self._timeout, lambda: self.beat.word(self.where) if self.beat is not None else "")
        while not _ended(work):
            if local_work and self.beat is not None and (failure := self.beat.failure()) is not None:
                raise failure
            if wait.over():
                raise RuntimeError(f"no answer within {self._timeout:g} s")

    @contextmanager
    def _naming(self, what: str, group: Any) -> Iterator[None]:
        """Turn the backend's error, which names nobody or the wrong rank, into the guilty rank."""
        where = f"{what} of {self.where}"
        if self.beat is not None:
            self.beat.arrive(self.where, replicas=group is self._replica)
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
    """Form the process groups of this launch, and close them at the end. After an error, or where closing does not end,
    they stand: the error is told first, see `leaving`.

    Args:
        stop: the stop request of this rank; heartbeats carry it to and from the others.

    Raises EnvironmentFault when the rank count does not fit, or the ranks cannot meet.
    """
    placement = Placement.place(peers, launch.world, launch.rank)
    if launch.world == 1:
        launch.refuse_tasks()
        leave_if(stop, "starting", "the launch")
        yield Mesh(placement, device, stop=stop)
        return
    backend = comm.backend if comm.backend != "auto" else ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl" and device.type != "cuda":
        raise EnvironmentFault("nccl needs GPUs", "comm.backend=nccl", "use comm.backend=gloo")
    if dist.is_initialized():
        raise EnvironmentFault("this process has joined a process group already", launch.meeting_place,
                               "leave it before (torch.distributed.destroy_process_group)")
    launch.stay_on_node()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        meeting = Rendezvous(launch, comm.timeout, stop)
        sharing = _sharing(meeting, device, launch.rank, backend)
        mesh, beat = _form(placement, device, backend, comm.timeout, meeting, launch.node, stop)
    except (RuntimeError, ValueError) as error:
        # What follows the first line are addresses of C++.
        raise EnvironmentFault(f"the ranks cannot meet: {str(error).splitlines()[0]}", launch.meeting_place,
                               "start with torchrun, and check that the port is free and reachable") from error
    mesh.sharing = sharing
    try:
        mesh.barrier()  # gloo connects lazily: use the group once while everybody is certainly there
        yield mesh
        with suppress(Exception):  # all is done; `leave` ends what could not be closed
            begun(dist.destroy_process_group, "destroy").result(CLOSE_SECONDS)
    except MatError as error:
        error.shared = True
        raise
    finally:
        beat.close()


def _form(placement: Placement, device: torch.device, backend: str, timeout: float, meeting: Rendezvous, node: range,
          stop: StopFlag) -> tuple[Mesh, Heartbeat]:
    """The groups of ranks that are all there, and this one's heartbeat."""
    patience = GLOO_TIMEOUT if backend == "gloo" else timedelta(seconds=NCCL_ROUNDS * timeout + NCCL_MORE)
    dist.init_process_group(backend, timeout=patience, rank=placement.rank, world_size=placement.world,
                            store=meeting.client("groups"))
    control = dist.new_group(backend="gloo", timeout=GLOO_TIMEOUT)
    peer, replica = (_own_group(axis, placement.rank, patience)
                     for axis in (placement.peer_axis(), placement.replica_axis()))
    beat = Heartbeat(meeting.client("beats"), placement.rank, placement.world, node=node,
                     peers_of=placement.peers_of, stop=stop)
    if backend == "nccl":  # the host does not wait for its groups, but the device does; an abort may wait for another
        beat.release = lambda: [begun(group.abort, "abort") for group in (peer, replica) if group is not None]
    return Mesh(placement, device, world=control, peer=peer, replica=replica, staged=backend == "gloo", beat=beat,
                timeout=timeout, stop=stop), beat


def _ended(work: Any) -> bool:
    """Wait for an exchange for one lap -> whether it has come to its end. Raises RuntimeError where it failed."""
    try:
        return bool(work.wait(timedelta(seconds=LAP)))
    except RuntimeError:
        if work.is_completed():  # it failed, or has ended just now
            return bool(work.wait())
        return False


def _own_group(axis: list[list[int]], rank: int, timeout: timedelta) -> Any:
    """Create every group of an axis (all ranks must) and return this rank's, None where it would be alone."""
    if len(axis[0]) == 1:
        return None
    groups = [dist.new_group(ranks, timeout=timeout) for ranks in axis]
    return next(g for g, ranks in zip(groups, axis, strict=True) if rank in ranks)


def choose_device(config: Config, local_rank: int) -> torch.device:
    """The device of this rank, which may see all GPUs of its node or those of its own alone. Raises EnvironmentFault
    where there is no GPU but there should be."""
    count = torch.cuda.device_count() if config.run.device != "cpu" else 0
    if config.run.device == "cuda" and count == 0:
        raise EnvironmentFault("no GPU is visible", "run.device=cuda",
                               "use run.device=cpu (of a report --device cpu), or check CUDA_VISIBLE_DEVICES")
    return torch.device("cuda", local_rank % count) if count else torch.device("cpu")


def _sharing(meeting: Rendezvous, device: torch.device, rank: int, backend: str) -> int:
    """Meet all ranks -> how many compute on this rank's device, whatever number each has for it. Raises
    EnvironmentFault where some share one over NCCL, which refuses that in many lines unless it is asked not to."""
    gpu = device.type == "cuda"
    devices = meeting.wait_for_all(str(torch.cuda.get_device_properties(device).uuid) if gpu else socket.gethostname())
    shared = [str(other) for other, one in enumerate(devices) if devices.count(one) > 1]
    if shared and backend == "nccl" and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        error = EnvironmentFault(f"ranks {', '.join(shared)} share GPUs, which NCCL refuses",
                                 "CUDA_VISIBLE_DEVICES, LOCAL_RANK", f"let each rank see a GPU of its own, or {SHARE}")
        error.shared = True  # all ranks compute it
        raise error
    return devices.count(devices[rank])


@contextmanager
def prepared_torch(config: Config) -> Iterator[None]:
    """`prepare_torch` for what runs inside; afterwards this process computes as before."""
    threads, strict = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    with kept_arithmetic():
        try:
            prepare_torch(config)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_deterministic_debug_mode(strict)


def prepare_torch(config: Config) -> None:
    """Threads per rank, the arithmetic of fp32, and deterministic kernels where they are asked for."""
    torch.set_num_threads(config.run.threads)
    if config.step.precision in ("tf32", "ieee"):
        set_fp32(config.step.precision)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it; torch insists on it
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.run.deterministic


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
