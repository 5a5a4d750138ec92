"""`engines`: one step under each value of `step.engine`, what the device does meanwhile, and what a launch costs."""

from __future__ import annotations

from collections import Counter
from time import perf_counter
from typing import Any

import torch

from benchmarks.command import Watch
from benchmarks.speed.subject import Subject
from benchmarks.speed.timing import Spread, synchronise, timed
from mat_dist.config.schema import Config
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import StopRequested

ENGINES = ("eager", "graph", "compile")
WARM_UP = 6  # steps: by then one is recorded, and kernels are chosen
LAUNCHES = 20_000
CLASSES = {"convolution": ("conv", "fprop", "dgrad", "wgrad", "cutlass", "gemm", "nhwc"), "compiled": ("triton",),
           "batch norm": ("batch_norm",), "copy": ("memcpy", "memset", "copy"), "optimizer": ("multi_tensor", "fused")}


def measure_engines(config: Config, mesh: Mesh, image: tuple[int, int, int], classes: int, rounds: int,
                    watch: Watch) -> dict[str, Any]:
    """Each engine by itself, since they share a device's caches -> figures.

    Steps follow each other without a wait in between, as in training; `apart` waits for the device after each.
    """
    found: dict[str, Any] = {"launch_us": 1e6 * launch_seconds(mesh.device), "engines": {}, "notes": []}
    for engine in ENGINES:
        if watch.stopped:
            break
        watch.say(f"engine {engine}")
        chosen = config.model_copy(update={"step": config.step.model_copy(update={"engine": engine})})
        subject = Subject.make(chosen, mesh, image, classes)
        began = perf_counter()
        for _ in range(WARM_UP):
            subject.step()
        synchronise(mesh.device)
        ready, apart = perf_counter() - began, [timed(subject.step, mesh.device).wall for _ in range(rounds)]
        found["engines"][engine] = {"ready_s": ready, "apart_s": vars(Spread.of(apart)),
                                    "step_s": together(subject, rounds), **on_the_device(subject)}
        found["notes"] += [f"{engine}: {note}" for note in subject.notes()]
    if not found["engines"]:
        raise StopRequested("stopped before one engine was timed", "benchmark", "give it more time")
    return found


def launch_seconds(device: torch.device) -> float:
    """What one small operation takes where thousands follow each other."""
    x = torch.ones(1024, device=device)
    for _ in range(100):
        x.add_(1)
    synchronise(device)
    began = perf_counter()
    for _ in range(LAUNCHES):
        x.add_(1)
    synchronise(device)
    return (perf_counter() - began) / LAUNCHES


def together(subject: Subject, rounds: int) -> float:
    """Seconds per step of some that nobody waits for in between."""
    synchronise(subject.mesh.device)
    began = perf_counter()
    for _ in range(rounds):
        subject.step()
    synchronise(subject.mesh.device)
    return (perf_counter() - began) / rounds


def on_the_device(subject: Subject, steps: int = 3) -> dict[str, Any]:
    """Kernels of a step and the time that they take, by class; nothing on a CPU."""
    if subject.mesh.device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            subject.step()
        synchronise(subject.mesh.device)
    kernels = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spent: Counter[str] = Counter()
    for event in kernels:
        spent[class_of(event.name)] += event.time_range.elapsed_us() / 1e6 / steps
    return {"kernels": len(kernels) / steps, "busy_s": sum(spent.values()), "classes_s": dict(spent.most_common())}


def class_of(kernel: str) -> str:
    """Convolution, compiled, ... or elementwise."""
    name = kernel.lower()
    return next((kind for kind, words in CLASSES.items() if any(word in name for word in words)), "elementwise")
