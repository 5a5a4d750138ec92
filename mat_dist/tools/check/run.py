"""The checks that need torch: ranks, device, data, models, memory, run folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mat_dist.config.schema import Config
from mat_dist.core.cohort import replica_rows
from mat_dist.distributed.groups import choose_device, prepare_torch
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.placement import Placement
from mat_dist.errors import EnvironmentFault
from mat_dist.tools.check import memory, storage
from mat_dist.tools.check.data import check_data, known_sample
from mat_dist.tools.check.findings import Answer, Report
from mat_dist.tools.check.models import Measured, alike, check_model

GIB = 1 << 30
BUSY = 0.1  # share of a GPU's memory that others may use before a warning


def check_run(report: Report, config: Config | None, ranks: int, nodes: int, name: str) -> None:
    """Add what is found; a failed check does not keep the others from being made."""
    if config is not None:
        prepare_torch(config)
    launch = report.ask("ranks", check_ranks, config, ranks, nodes)
    device = report.ask("device", check_device, config, launch)
    sample = report.ask("data", check_data, config)
    if sample is None and config is not None:
        sample = known_sample(config)  # noise of the right shape: the models can be tried all the same
    measured: dict[int, Measured] = {}
    for peers in alike(config) if config is not None else []:
        title = f"model {_listed(peers)}"
        one = report.ask(title, check_model, config, peers, sample, device or torch.device("cpu"))
        if one is not None:
            measured |= dict.fromkeys(peers, one)
    whole = measured if config is not None and len(measured) == len(config.peers) else None
    report.ask("memory", memory.check_memory, config, launch, device, sample, whole)
    report.ask("run folder", storage.check_run_folder, config, name)
    report.ask("disk", storage.check_disk, config, sample, whole)
    if nodes > 1:
        report.ask("shared folder", storage.check_shared, config, nodes)


def _listed(peers: tuple[int, ...]) -> str:
    """`peer 0`, `peers 0-3`, `peers 0, 2`."""
    if len(peers) == 1:
        return f"peer {peers[0]}"
    in_a_row = peers == tuple(range(peers[0], peers[-1] + 1))
    return f"peers {peers[0]}-{peers[-1]}" if in_a_row else f"peers {', '.join(map(str, peers))}"


def check_ranks(config: Config, ranks: int, nodes: int) -> Answer[Launch]:
    """Rank 0 of the launch. Raises EnvironmentFault for a number of ranks that fits neither peers, batch nor nodes."""
    place = Placement.place(len(config.peers), ranks, 0)
    replica_rows(place, config.train.batch_size, config.step.microbatches)
    if ranks % nodes:
        raise EnvironmentFault(f"{ranks} ranks on {nodes} nodes", "--ranks, --nodes",
                               "torchrun starts the same number of ranks on every node: use a multiple of --nodes")
    fitting = [n for n in range(1, 2 * place.peers + 1) if place.peers % n == 0 or n % place.peers == 0]
    found = f"{place.describe()}; {', '.join(map(str, fitting))}, ... ranks fit"
    return Answer(Launch(world=ranks, local_world=ranks // nodes), found)


def check_device(config: Config, launch: Launch) -> Answer[torch.device]:
    """The device of the first rank of a node. Raises EnvironmentFault as a run would."""
    local = launch.local_world
    choose_device(config, local_rank=local - 1, local_world=local)
    device = choose_device(config, local_rank=0, local_world=local)
    if device.type == "cpu":
        return _cpu(config, launch)
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    free = [torch.cuda.mem_get_info(n) for n in range(min(local, len(names)))]
    busy = [n for n, (left, total) in enumerate(free) if left < total * (1 - BUSY)]
    found = f"{len(names)} x {names[0]}, {min(total for _, total in free) / GIB:.0f} GiB each"
    warning = f"another program uses memory of GPU {', '.join(map(str, busy))}: see nvidia-smi" if busy else ""
    return Answer(device, found, warning)


def _cpu(config: Config, launch: Launch) -> Answer[torch.device]:
    if config.comm.backend == "nccl":
        raise EnvironmentFault("nccl needs GPUs", "comm.backend=nccl", "use comm.backend=gloo")
    cores, threads = len(os.sched_getaffinity(0)), launch.local_world * config.run.threads
    warning = ""
    if config.run.device == "auto" and Path("/proc/driver/nvidia/version").exists():
        built = "sees none" if torch.version.cuda else "is a build for the CPU"
        warning = (f"this machine has an NVIDIA driver, but torch {built}: install torch with CUDA, check "
                   "CUDA_VISIBLE_DEVICES, or say run.device=cpu")
    elif threads > cores:
        warning = f"{threads} threads share {cores} cores, steps take that much longer: use fewer ranks or threads"
    found = f"cpu, {cores} cores for {threads} threads of all ranks"
    return Answer(torch.device("cpu"), found, warning)
