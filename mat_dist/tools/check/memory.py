"""How much memory a rank will need, from graphs that were measured on a few images. Good to some 20 %."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mat_dist.config.schema import Config
from mat_dist.core.graph import CohortGraph
from mat_dist.data.images import available_bytes
from mat_dist.data.load import DEVICE_SHARE
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.placement import Placement
from mat_dist.errors import EnvironmentFault
from mat_dist.tools.check import Answer
from mat_dist.tools.check.models import Measured, Sample

GIB = 1 << 30
CUDA_CONTEXT = 700 << 20  # context, cuBLAS and cuDNN workspaces, NCCL buffers of one process: 0.5 to 1 GiB
ATTACK_IMAGES = 12  # image-sized tensors beside the graph: region (float64 while it is made), iterate, gradient, start
SHOWN = 5 << 20  # smaller parts are left out of the line
TIGHT = 0.8  # of the memory: the estimate may be a fifth too low


@dataclass(frozen=True)
class Need:
    """Bytes of one rank. The parts that are not there at the same time are in `step` and `evaluation`.

    Attributes:
        base: interpreter, libraries, CUDA context.
        images: the data set, where each rank holds its own copy.
        state: weights, momentum, averaged weights, perturbations that are carried on.
        step: gradients, graphs, AEs and logits of a training step, at most.
        evaluation: all peers' models and the graph of the ensemble's attack.
        saving: copies of the state while a checkpoint is written (in host memory).
    """

    base: int
    images: int
    state: int
    step: int
    evaluation: int
    saving: int

    def total(self, *, saving: bool) -> int:
        """At most, with or without the copies of a checkpoint under way."""
        return self.base + self.images + self.state + max(self.step, self.evaluation) + (self.saving if saving else 0)


def check_memory(config: Config, launch: Launch, device: torch.device, sample: Sample,
                 measured: Mapping[int, Measured]) -> Answer[Need]:
    """Compare the fullest rank with what its device has. Raises EnvironmentFault where it cannot fit."""
    on_gpu = device.type == "cuda"
    sharing = -(-launch.local_world // torch.cuda.device_count()) if on_gpu else launch.local_world
    if on_gpu:
        have = (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) // sharing
        base = CUDA_CONTEXT
    else:
        have, base = (available_bytes() + resident_bytes()) // sharing, resident_bytes()
    images = _images(config, sample, device, have)
    need = max((rank_need(config, launch, rank, sample, measured, base=base, images=images)
                for rank in range(min(launch.world, len(config.peers)))), key=lambda one: one.total(saving=not on_gpu))
    total = need.total(saving=not on_gpu)
    parts = asdict(need)
    shown = {name: value for name, value in parts.items() if value > SHOWN and not (on_gpu and name == "saving")}
    listed = ", ".join(f"{name} {value / GIB:.2f}" for name, value in shown.items())
    place = "GPU" if on_gpu else "this machine"
    found = (f"about {total / GIB:.2f} GiB per rank, {have / GIB:.2f} GiB of {place} are free for it "
             f"(GiB: {listed})")
    how = "use step.memory=recompute, more train.accumulate, a smaller train.batch_size or eval.chunk, or more ranks"
    if total > have:
        raise EnvironmentFault(found, "estimate", how)
    warning = f"close to the limit, and the estimate may be a fifth too low: {how}" if total > TIGHT * have else ""
    return Answer(need, found, warning, {**parts, "total": total, "available": have})


def rank_need(config: Config, launch: Launch, rank: int, sample: Sample, measured: Mapping[int, Measured], *, base: int,
              images: int) -> Need:
    """The estimate for one rank; see `Need`."""
    place = Placement.place(len(config.peers), launch.world, rank)
    graph = CohortGraph.of(config.peers)
    local = [measured[index] for index in place.local_peers]
    batch = config.train.batch_size // place.replicas // config.train.accumulate
    pixels, numbers = sample.x_BCHW[0].nbytes, sample.images.classes * sample.x_BCHW.itemsize
    graphs = [len(graph.peers[index].learned) for index in place.local_peers]
    if config.step.memory == "keep":
        learning = sum(count * one.learn.at(batch) for count, one in zip(graphs, local, strict=True))
    else:
        groups = (max((len(group) for group in graph.peers[index].groups()), default=0) for index in place.local_peers)
        learning = max(count * one.learn.at(batch) for count, one in zip(groups, local, strict=True))
    # In a backward pass the gradients of two activations stand beside the graph.
    learning += 2 * max(one.largest.at(batch) for one in local)
    attacking = max(one.attack.at(batch) for one in local) + ATTACK_IMAGES * pixels * batch
    adversarial = (2 * len(local) + len(graph.travelling)) * pixels * batch
    clean = config.train.batch_size // place.replicas * pixels
    logits = (place.peers * graph.most_taught + sum(graphs)) * numbers * batch
    gradients = sum(one.gradients for one in local)
    reduced = 2 * gradients if place.replicas > 1 else max(one.gradients for one in local)  # flat copy; weight decay
    step = max(learning, attacking, reduced) + adversarial + clean + logits + gradients
    everyone = measured.values()
    chunk = _evaluated(config, sample)
    evaluation = sum(one.weights + one.attack.at(chunk) for one in everyone) + ATTACK_IMAGES * pixels * chunk
    state = sample.state_bytes(config, {index: measured[index] for index in place.local_peers})
    return Need(base, images, state, int(step), int(evaluation) if chunk else 0, 2 * state)


def _evaluated(config: Config, sample: Sample) -> int:
    """Images that the evaluator attacks at once, at most; 0 where it never does."""
    most = config.eval.chunk
    splits = [min(config.eval.size or most, most if sample.val is None else sample.val)] if config.eval.every else []
    splits += [min(config.eval.test_size or most, most if sample.test is None else sample.test)] \
        if config.eval.test_steps else []
    return min(most, max(splits, default=0))


def _images(config: Config, sample: Sample, device: torch.device, have: int) -> int:
    """Bytes of the data set in the memory that is looked at; on the CPU they are in `base` already, or mapped."""
    if device.type != "cuda" or config.data.residency in ("host", "mmap"):
        return 0
    if config.data.residency == "device" or sample.nbytes < have * DEVICE_SHARE:
        return sample.nbytes
    return 0


def resident_bytes() -> int:
    """Resident memory of this process: the libraries and the data set, as in each rank."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return 400 << 20
    return pages * os.sysconf("SC_PAGE_SIZE")
