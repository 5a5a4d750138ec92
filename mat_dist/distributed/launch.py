"""What the launcher said of this process, and where ranks would meet. The only file that reads RANK and MASTER_ADDR.

Imports no torch.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from mat_dist.errors import EnvironmentFault

LOOPBACK_INTERFACE = "lo"
DEFAULT_PORT = 29500  # torchrun's --master-port


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
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, TORCHELASTIC_*, SLURM_JOB_ID, SLURM_RESTART_COUNT."""
        env = os.environ
        try:
            numbers = {key: int(env.get(key, default)) for key, default in (
                ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"),
                ("LOCAL_WORLD_SIZE", env.get("WORLD_SIZE", "1")),
                ("TORCHELASTIC_RESTART_COUNT", "0"), ("TORCHELASTIC_MAX_RESTARTS", "0"),
                ("SLURM_RESTART_COUNT", "0"))}
        except ValueError as error:
            raise EnvironmentFault(f"a launcher variable is not a number: {error}", "RANK, WORLD_SIZE, LOCAL_RANK",
                                   "start with torchrun, or unset them for one process") from None
        job = env.get("SLURM_JOB_ID")
        if job and "SLURM_ARRAY_JOB_ID" in env:
            job = f"{env['SLURM_ARRAY_JOB_ID']}-{env.get('SLURM_ARRAY_TASK_ID', '0')}"
        port = env.get("MASTER_PORT", "")
        master = (env["MASTER_ADDR"], int(port)) if port.isdigit() and "MASTER_ADDR" in env else None
        restart, most = numbers["TORCHELASTIC_RESTART_COUNT"], numbers["TORCHELASTIC_MAX_RESTARTS"]
        if job is None and most > 0 and env.get("TORCHELASTIC_RUN_ID", "none") != "none":
            job = env["TORCHELASTIC_RUN_ID"]
        return cls(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"],
                   job, restart, restart < most, master, env.get("TORCHELASTIC_RUN_ID", "none"),
                   env.get("TORCHELASTIC_USE_AGENT_STORE") == "True", numbers["SLURM_RESTART_COUNT"])

    def stay_on_node(self) -> None:
        """Let gloo listen on the loopback interface alone, where torchrun says that all ranks are on this node.

        Without this gloo listens on the address of the host name, which the network can reach (and fails where the
        name has none). An interface that the user names is left alone.
        """
        alone = os.environ.get("LOCAL_WORLD_SIZE") == str(self.world)
        if alone and LOOPBACK_INTERFACE in (name for _, name in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)

    @property
    def node(self) -> range:
        """The ranks on this node; torchrun numbers them in a row."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_world)

    def speaks_for(self, guilty: tuple[int, ...] = ()) -> bool:
        """Whether this rank tells the user, and writes how the run ended: the lowest one that is still sound."""
        sound = [rank for rank in range(self.world) if rank not in guilty]
        return bool(sound) and self.rank == sound[0]


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
