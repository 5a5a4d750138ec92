"""What the launcher said of this process, and where ranks would meet. The only file that reads RANK and MASTER_ADDR.

Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
from dataclasses import dataclass

from mat_dist.errors import EnvironmentFault

LOOPBACK_INTERFACE = "lo"
DEFAULT_PORT = 29500  # torchrun's --master-port
LAUNCHER_DIED = signal.SIGRTMAX  # its parent's number still is the old one then, since threads end one by one
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
# Who starts several tasks: its name, where a task finds its number, and how many there are.
_TASKS = (("SLURM", "SLURM_PROCID", "SLURM_NTASKS"), ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
          ("MPI", "PMI_RANK", "PMI_SIZE"), ("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
          ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"), ("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
          ("PALS", "PALS_RANKID", ""), ("ALPS", "ALPS_APP_PE", ""), ("PMIx", "PMIX_RANK", ""))  # they tell no number
# Where a task finds its number, how many there are, its number on its node, and how many there are on each node.
_ON_NODE = (("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
            *([start + end for end in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
              for start in ("OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "JSM_NAMESPACE_", "PMI_")))


@dataclass(frozen=True)
class Launch:
    """What the launcher said: torchrun's and SLURM's environment, or one process."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    job_id: str | None = None
    restart: int = 0
    restarts_left: bool = False
    master: tuple[str, int] | None = None
    run_id: str = "none"
    agent_store: bool = False
    requeue: int = 0  # how often SLURM has started the job again

    @classmethod
    def from_environment(cls) -> Launch:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_*, TORCHELASTIC_*, SLURM_JOB_ID,
        SLURM_RESTART_COUNT, and where LOCAL_RANK is not told, what srun or mpirun tell of their tasks.

        Raises EnvironmentFault where they contradict each other, or do not say where the ranks meet.
        """
        env = os.environ
        numbers = _numbers()
        job = env.get("SLURM_JOB_ID")
        if job and "SLURM_ARRAY_JOB_ID" in env:
            job = f"{env['SLURM_ARRAY_JOB_ID']}-{env.get('SLURM_ARRAY_TASK_ID', '0')}"
        restart, most = numbers["TORCHELASTIC_RESTART_COUNT"], numbers["TORCHELASTIC_MAX_RESTARTS"]
        if job is None and most > 0 and env.get("TORCHELASTIC_RUN_ID", "none") != "none":
            job = env["TORCHELASTIC_RUN_ID"]
        master = None
        if numbers["WORLD_SIZE"] > 1:
            end = Endpoint.from_environment()
            if end.address is None or not end.given:
                raise _contradiction(f"WORLD_SIZE={numbers['WORLD_SIZE']} without MASTER_ADDR and MASTER_PORT")
            master = end.address, end.port
            if "LOCAL_RANK" not in env and not _on_node():
                raise _contradiction(f"WORLD_SIZE={numbers['WORLD_SIZE']} without LOCAL_RANK")
        return cls(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"],
                   job, restart, restart < most, master, env.get("TORCHELASTIC_RUN_ID", "none"),
                   env.get("TORCHELASTIC_USE_AGENT_STORE") == "True", numbers["SLURM_RESTART_COUNT"])

    def refuse_tasks(self) -> None:
        """Raise EnvironmentFault where srun or mpirun has started several tasks, and nothing made ranks of them: each
        would train the whole cohort, into one folder."""
        env = os.environ
        if "WORLD_SIZE" in env:
            return
        for name, rank, size in _TASKS:
            batch = name == "SLURM" and env.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in env
            told = env.get("SLURM_STEP_NUM_TASKS", env.get(size, "")) if name == "SLURM" else env.get(size, "")
            count, key = (told, size) if told.isdigit() else (env.get(rank, ""), rank)
            if rank in env and count.isdigit() and int(count) > (key == size) and not batch:
                raise EnvironmentFault(
                    f"{f'{count} {name} tasks' if key == size else f'task {count} of {name}'}, but no torchrun: each "
                    "would train the whole cohort", f"{key}={count} without WORLD_SIZE",
                    "start one torchrun per node (launch/slurm_multinode.sbatch does), or unset "
                    f"{key} where the tasks are runs of their own")

    def follow_launcher(self) -> None:
        """Ask the kernel for a signal when torchrun dies, so that no rank goes on without it; keep torch's C++ from
        telling what this process tells in one line."""
        if self.world > 1:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            ctypes.CDLL(None).prctl(_DEATH_SIGNAL, LAUNCHER_DIED, 0, 0, 0)

    def stay_on_node(self) -> None:
        """Let gloo listen on the loopback interface alone, where torchrun says that all ranks are on this node.

        Without this gloo listens on the address of the host name, which the network can reach (and fails where the
        name has none). An interface that the user names is left alone.
        """
        alone = os.environ.get("LOCAL_WORLD_SIZE") == str(self.world)
        if alone and LOOPBACK_INTERFACE in (name for _, name in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)

    @property
    def meeting_place(self) -> str:
        """Where the ranks meet, for messages."""
        return "MASTER_ADDR={}, MASTER_PORT={}".format(*self.master or ("", ""))

    @property
    def node(self) -> range:
        """The ranks on this node; torchrun numbers them in a row."""
        return range(self.rank - self.local_rank, self.rank - self.local_rank + self.local_world)

    def speaks_for(self, guilty: tuple[int, ...] = ()) -> bool:
        """Whether this rank tells the user, and writes how the run ended: the lowest one that is still sound."""
        return self.rank == next((rank for rank in range(self.world) if rank not in guilty), None)


def _numbers() -> dict[str, int]:
    """The launcher's numbers. Raises EnvironmentFault where they cannot be true."""
    env, numbers = os.environ, {}
    local_rank, local_world = _on_node() or ("0", env.get("WORLD_SIZE", "1"))
    for key, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", local_rank),
                         ("LOCAL_WORLD_SIZE", local_world), ("TORCHELASTIC_RESTART_COUNT", "0"),
                         ("TORCHELASTIC_MAX_RESTARTS", "0"), ("SLURM_RESTART_COUNT", "0")):
        text = env.get(key, default)
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise _contradiction(f"{key}={text[:40]!r} is not a number from 0")
        numbers[key] = int(text)
    for key, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if key in env and other not in env:
            raise _contradiction(f"{key}={numbers[key]} without {other}")
    for less, more, beyond in (("RANK", "WORLD_SIZE", 1), ("LOCAL_RANK", "LOCAL_WORLD_SIZE", 1),
                               ("LOCAL_WORLD_SIZE", "WORLD_SIZE", 0), ("LOCAL_RANK", "RANK", 0)):
        if numbers[less] + beyond > numbers[more]:
            raise _contradiction(f"{less}={numbers[less]} does not fit {more}={numbers[more]}")
    if env.get("GROUP_WORLD_SIZE") == f"{numbers['WORLD_SIZE'] / numbers['LOCAL_WORLD_SIZE']:g}":
        # With torchrun --virtual-local-rank each is told that it is the first of its node.
        numbers["LOCAL_RANK"] = numbers["RANK"] % numbers["LOCAL_WORLD_SIZE"]
    return numbers


def _on_node() -> tuple[str, str] | None:
    """LOCAL_RANK and LOCAL_WORLD_SIZE where the ranks are tasks of srun or mpirun."""
    env = os.environ
    for rank, world, local, nodes in ([env.get(name, "") for name in names] for names in _ON_NODE):
        # SLURM tells the numbers of all nodes, as in 4(x2),3
        sizes = [one for one, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", nodes) for _ in range(int(times or 1))]
        if local and sizes and (rank, world) == (env.get("RANK"), env.get("WORLD_SIZE")):
            return local, {str(n): one for n, one in enumerate(sizes)}.get(env.get("SLURM_NODEID", ""), sizes[0])
    return None


def _contradiction(what: str) -> EnvironmentFault:
    return EnvironmentFault(what, "environment of this rank", "start with torchrun, or unset RANK, WORLD_SIZE, "
                            "LOCAL_RANK and LOCAL_WORLD_SIZE for one process")


@dataclass(frozen=True)
class Endpoint:
    """Where ranks would meet, and through which interface they would talk: what is set before a launch."""

    address: str | None = None  # MASTER_ADDR
    port: int = DEFAULT_PORT  # MASTER_PORT
    given: bool = False  # whether MASTER_PORT is set
    gloo: str | None = None  # GLOO_SOCKET_IFNAME: names of interfaces separated by commas
    nccl: str | None = None  # NCCL_SOCKET_IFNAME: beginnings of names; `^` excludes, `=` asks for the whole name

    @classmethod
    def from_environment(cls) -> Endpoint:
        """Raises EnvironmentFault for a MASTER_PORT that is no port."""
        env = os.environ
        text = env.get("MASTER_PORT") or str(DEFAULT_PORT)
        if not (text.isascii() and text.isdigit() and 0 < int(text[:9]) < 65536 and len(text) < 6):
            raise EnvironmentFault(f"{text[:40]!r} is no port", "MASTER_PORT", "set it to a number from 1024 to 65535")
        return cls(env.get("MASTER_ADDR") or None, int(text), bool(env.get("MASTER_PORT")),
                   env.get("GLOO_SOCKET_IFNAME") or None, env.get("NCCL_SOCKET_IFNAME") or None)
