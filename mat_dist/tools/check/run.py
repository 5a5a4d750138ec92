"""The checks that need torch: ranks, device, data, models, memory, and where a run writes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from mat_dist.config.schema import Config
from mat_dist.core.cohort import replica_rows
from mat_dist.core.optim import check_optimizers
from mat_dist.distributed.groups import SHARE, choose_device, prepare_torch
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.placement import Placement
from mat_dist.errors import CheckpointError, EnvironmentFault, OutputError
from mat_dist.runs.files import free_bytes
from mat_dist.runs.folder import RunFolder, check_writable, create_or_open, resolved
from mat_dist.runs.lock import RunLock
from mat_dist.runs.session import check_continues
from mat_dist.tools.check import Answer, Report
from mat_dist.tools.check.memory import check_memory
from mat_dist.tools.check.models import Measured, Sample, alike, check_data, check_model, known_sample

GIB = 1 << 30
BUSY = 0.1  # share of a GPU's memory that others may use before a warning
SPARE = 1.05  # manifest, evaluation results, logs beside the weights
# Types of /proc/mounts that several machines can have mounted; what stands behind `fuse.` counts too.
SHARED = frozenset({"nfs", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "ceph", "cephfs", "panfs", "wekafs",
                    "glusterfs", "pvfs2", "orangefs", "ocfs2", "gfs2", "afs", "cifs", "smb3", "smbfs", "9p", "virtiofs",
                    "juicefs", "quobyte", "quobyte-client", "moosefs", "mfs", "lizardfs", "sshfs", "s3fs", "daos",
                    "dvs", "vastnfs", "exafs"})
MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})


def check_run(report: Report, config: Config | None, ranks: int, nodes: int, name: str) -> None:
    """Add what is found; a failed check does not keep the others from being made."""
    if config is not None:
        prepare_torch(config)
    launch = report.ask("ranks", check_ranks, config, ranks, nodes)
    device = report.ask("device", check_device, config, launch)
    optimizers = report.ask("optimizers", _optimizers, config)
    sample = report.ask("data", check_data, config)
    if sample is None and config is not None:
        sample = known_sample(config)  # noise of the right shape: the models can be tried all the same
    measured: dict[int, Measured] = {}
    for peers in alike(config) if config is not None else []:
        title = f"model {_listed(peers)}"
        one = report.ask(title, check_model, config if optimizers else None, peers, sample,
                         device or torch.device("cpu"))
        if one is not None:
            measured |= dict.fromkeys(peers, one)
    whole = measured if config is not None and len(measured) == len(config.peers) else None
    report.ask("memory", check_memory, config, launch, device, sample, whole)
    report.ask("run folder", check_run_folder, config, name)
    report.ask("disk", check_disk, config, sample, whole)
    if nodes > 1:
        report.ask("shared folder", check_shared, config, nodes)


def _optimizers(config: Config) -> Answer[bool]:
    """Raises ConfigError with all that classes of torch.optim refuse."""
    check_optimizers(config)
    return Answer(True, ", ".join(dict.fromkeys(spec.optim.name for spec in config.peers)))


def _listed(peers: tuple[int, ...]) -> str:
    """`peer 0`, `peers 0-3`, `peers 0, 2`."""
    if len(peers) == 1:
        return f"peer {peers[0]}"
    in_a_row = peers == tuple(range(peers[0], peers[-1] + 1))
    return f"peers {peers[0]}-{peers[-1]}" if in_a_row else f"peers {', '.join(map(str, peers))}"


def check_ranks(config: Config, ranks: int, nodes: int) -> Answer[Launch]:
    """Rank 0 of the launch. Raises EnvironmentFault for a number of ranks that fits neither peers, batch nor nodes."""
    place = Placement.place(len(config.peers), ranks, 0)
    replica_rows(place, config.train.batch_size, config.train.accumulate)
    if ranks % nodes:
        raise EnvironmentFault(f"{ranks} ranks on {nodes} nodes", "--ranks, --nodes",
                               "torchrun starts the same number of ranks on every node: use a multiple of --nodes")
    found = f"{place.describe()}; {', '.join(map(str, place.fitting))}, ... ranks fit"
    return Answer(Launch(world=ranks, local_world=ranks // nodes), found)


def check_device(config: Config, launch: Launch) -> Answer[torch.device]:
    """The device of the first rank of a node. Raises EnvironmentFault as a run would."""
    device, local, found, warnings = choose_device(config, 0), launch.local_world, "cpu", []
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        if local > len(names) and config.comm.backend != "gloo":
            raise EnvironmentFault(f"{local} ranks on this node but {len(names)} GPUs", "run.device", SHARE)
        free = [torch.cuda.mem_get_info(n) for n in range(min(local, len(names)))]
        busy = [n for n, (left, total) in enumerate(free) if left < total * (1 - BUSY)]
        found = f"{len(names)} x {names[0]}, {min(total for _, total in free) / GIB:.0f} GiB each"
        if busy:
            warnings.append(f"another program uses memory of GPU {', '.join(map(str, busy))}: see nvidia-smi")
    elif config.comm.backend == "nccl":
        raise EnvironmentFault("nccl needs GPUs", "comm.backend=nccl", "use comm.backend=gloo")
    elif config.run.device == "auto" and Path("/proc/driver/nvidia/version").exists():
        built = "sees none" if torch.version.cuda else "is a build for the CPU"
        warnings.append(f"this machine has an NVIDIA driver, but torch {built}: install torch with CUDA, check "
                        "CUDA_VISIBLE_DEVICES, or say run.device=cpu")
    cores, threads = len(os.sched_getaffinity(0)), local * config.run.threads
    if threads > cores:
        warnings.append(f"{threads} threads share {cores} cores, steps take that much longer: use fewer ranks or "
                        "threads, or ask the scheduler for more cores (--cpus-per-task)")
    return Answer(device, f"{found}, {cores} cores for {threads} threads of all ranks", "; ".join(warnings))


# ---------------------------------------------------------------- where a run writes


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(one for one in (path, *path.parents) if os.path.lexists(one))


def check_run_folder(config: Config, name: str) -> Answer[Path]:
    """Whether the run could be opened; what is made to find that out is removed.

    Raises what a run would: OutputError (cannot be written, finished, in use), CheckpointError (other settings,
    nothing to continue), ConfigError.
    """
    root = resolved(config.run.root)
    path = root / config.run.name if config.run.name else None
    if path is None or not os.path.lexists(path):
        if config.run.resume == "must":
            raise CheckpointError("there is no run to continue", str(path or root),
                                  "check run.root and run.name, or set run.resume=auto")
        check_writable(existing(root))
        found = f"{path or root / f'{name}-TIME'}, new" + ("" if root.exists() else "; run.root will be made")
        return Answer(root, found)
    folder = create_or_open(root, config.run.name, config_name=name, resume=config.run.resume, job_id=None,
                            now=datetime.now(UTC))
    holder = RunLock(folder, None).held_by()
    if holder is not None:
        raise OutputError(f"the run is in use by {holder}", str(folder.path),
                          "wait until it ends, stop it, or choose another run.name")
    check_continues(folder, config)
    return Answer(root, f"{folder.path}, to be continued")


def check_disk(config: Config, sample: Sample, measured: Mapping[int, Measured]) -> Answer[int]:
    """Whether keep + best + the one being written fit. Raises OutputError."""
    root = resolved(config.run.root)
    each = int(sample.state_bytes(config, measured) * SPARE)
    count = config.checkpoint.keep + 2
    folder = RunFolder(root / config.run.name) if config.run.name else None
    held = sum(file.stat().st_size for file in folder.checkpoints.rglob("peer_*.*")) if folder else 0
    needed = max(each, count * each - held)
    free = free_bytes(root)
    found = (f"{count} checkpoints of {each / GIB:.3f} GiB need {needed / GIB:.2f} GiB more below {root}, "
             f"{(free or 0) / GIB:.2f} GiB are free")
    details = {"checkpoint_bytes": each, "needed": needed, "free": free}
    if free is None:
        return Answer(needed, found, "the free space cannot be told here: look yourself", details)
    if free < needed:
        raise OutputError(found, "run.root", "free space, choose another run.root, or lower checkpoint.keep")
    return Answer(needed, found, "", details)


def check_shared(config: Config, nodes: int) -> Answer[str]:
    """Whether the nodes see one run.root, by the type of its file system."""
    folder = existing(resolved(config.run.root))
    kind, mount = file_system(folder, Path("/proc/mounts"))
    if kind.removeprefix("fuse.") in SHARED:
        return Answer(kind, f"{folder} is on {kind} (mounted at {mount}), which nodes can share")
    how = (f"run.root must be one folder on all nodes; to see: srun --nodes={nodes} --ntasks-per-node=1 bash -c "
           f"'touch {folder}/seen-by-$(hostname); sleep 5; ls {folder}' must list a file of every node")
    only = " in the memory of this node" if kind in MEMORY else ", usually a disk of this node"
    return Answer(kind, f"{folder} is on {kind or 'an unknown file system'} (mounted at {mount}){only}", how)


def file_system(path: Path, table: Path) -> tuple[str, str]:
    """(type, mount point) of the file system of `path`, from a table like /proc/mounts; ("", "") if it is not there."""
    found = ("", "")
    try:
        lines = table.read_bytes().decode(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return found
    for line in lines:
        columns = line.split(" ")
        if len(columns) < 3:
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), columns[1])  # \040 is a space
        inside = mount == "/" or path == Path(mount) or Path(mount) in path.parents
        if inside and len(mount) >= len(found[1]):  # of several at one place the last one is on top
            found = (columns[2], mount)
    return found
