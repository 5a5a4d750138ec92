"""`bench memory`: peak memory of the step with both settings of `step.memory`, and of the naive trainer.

Each contestant runs in a process of its own: a peak cannot be taken back, and allocators keep what they have.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from mat_dist.bench.references import recipe_of, reference_trainers
from mat_dist.bench.subject import Subject
from mat_dist.config.schema import Config
from mat_dist.distributed.device import prepare_torch
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.errors import EnvironmentFault

CONTESTANTS = ("keep", "recompute", "naive")
STEPS = 2  # the second one has momentum buffers from its start
_MIB = 1 << 20


def measure_memory(config: Config, shape: tuple[int, int, int], classes: int, device: torch.device) -> dict[str, Any]:
    """MiB that a few steps need on top of what the process holds before them: models, images, libraries.

    On a GPU the peak of its tensors, models included. Raises ConfigError for settings that the references do not know,
    EnvironmentFault where memory cannot be measured.
    """
    recipe_of(config)
    if device.type == "cpu" and not Path("/proc/self/statm").is_file():
        raise EnvironmentFault("this system does not tell how much memory a process holds", "bench memory",
                               "run it on Linux or on a GPU")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        found = {name: pool.apply(peak_of, (name, config, shape, classes, str(device))) for name in CONTESTANTS}
    return {"rounds": STEPS, "peak_mib": found,
            **{f"{name}_over_naive": found[name] / found["naive"] for name in ("recompute", "keep")}}


def peak_of(name: str, config: Config, shape: tuple[int, int, int], classes: int, device_name: str) -> float:
    """Peak of one contestant in this process, in MiB."""
    prepare_torch(config)
    device = torch.device(device_name)
    if name != "naive":
        config = config.model_copy(update={"step": config.step.model_copy(update={"memory": name})})
    subject = Subject.make(config, Mesh(Placement.place(len(config.peers), 1, 0), device), shape, classes)
    step = subject.step if name != "naive" else reference_trainers(subject)["naive"]
    before = _held(device)
    for _ in range(STEPS):
        step()
    return round(_peak(device) - before, 1)


def _peak(device: torch.device) -> float:
    """Largest resident set so far, or the most that tensors took on the GPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB


def _held(device: torch.device) -> float:
    """What this process holds already, in MiB; on a GPU nothing is taken off."""
    if device.type == "cuda":
        return 0.0
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / _MIB
