"""The device of a rank, and torch's settings for a run."""

from __future__ import annotations

import torch

from mat_dist.config.schema import Config
from mat_dist.errors import EnvironmentFault


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
    """Threads per rank, and deterministic kernels where they are asked for."""
    torch.set_num_threads(config.run.threads)
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.run.deterministic


def device_name(device: torch.device) -> str:
    """The device as people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
