"""`scale`: time per step against peers, batch and image size; a cost model, its error, its prediction.

The model, with L peers per rank, S sources per peer, B images per batch, C H W values per image, K attack steps:

    seconds = fixed + L peer + L B C H W (K attack + S learn) + exchanges

The four constants are fitted to two thirds of the measured points; the error is that of the other third.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from benchmarks.command import Watch
from benchmarks.speed.subject import Subject
from benchmarks.speed.timing import interleaved, of_all_ranks, timed
from mat_dist.config.schema import Config
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.errors import StopRequested
from mat_dist.runs.console import duration

BATCHES, SIDES, STEPS, PEERS = (16, 32, 64), (16, 32), (2, 10), (1, 2, 4)
MESSAGES = (1 << 12, 1 << 16, 1 << 20, 1 << 24)  # bytes per rank
SAMPLES = 5  # timings of a message


@dataclass(frozen=True)
class Point:
    """What a measured step was, as far as its cost depends on it."""

    peers_per_rank: int
    sources: int
    batch: int
    values: int
    attack_steps: int

    def features(self) -> list[float]:
        work = self.peers_per_rank * self.batch * self.values
        return [1.0, self.peers_per_rank, work * self.attack_steps, work * self.sources]


@dataclass(frozen=True)
class Costs:
    """Seconds: of a step, of a peer, of one attack pass and one learning pass of one value of one image."""

    fixed: float
    peer: float
    attack: float
    learn: float

    def seconds(self, point: Point) -> float:
        """Predicted compute time of a step."""
        return float(np.dot(list(vars(self).values()), point.features()))

    @classmethod
    def fit(cls, points: list[Point], seconds: list[float]) -> Costs:
        """Least squares of the relative error, no constant below 0."""
        from scipy.optimize import nnls

        rows = np.array([point.features() for point in points]) / np.array(seconds)[:, None]
        scale = np.abs(rows).max(0)
        found, _ = nnls(rows / scale, np.ones(len(points)))
        return cls(*map(float, found / scale))


@dataclass(frozen=True)
class Network:
    """Bytes per second that a GPU receives, and seconds per message."""

    name: str
    bandwidth: float
    latency: float


# Effective bandwidth per GPU in bytes/s: four fifths to nine tenths of the nominal rate; latency of a small message.
NETWORKS = (Network("NVLink", 300e9, 5e-6), Network("InfiniBand NDR", 45e9, 5e-6),
            Network("InfiniBand HDR", 22e9, 5e-6), Network("100 Gbit Ethernet", 10e9, 3e-5),
            Network("10 Gbit Ethernet", 1.1e9, 5e-5))
# Not measured by this command: a ResNet-50 at 224 x 224 in bf16 on an H100 is taken to do 8,250 forward-size passes
# per second; an attack pass is 2 of them, a learning pass 3.
IMAGENET = Costs(0.0, 0.0, 2 / 8250 / (3 * 224 * 224), 3 / 8250 / (3 * 224 * 224))
MATTERS = 0.05  # share of a step from which communication counts


LEAST = 6  # points that make a fit


def measure_scale(config: Config, mesh: Mesh, shape: tuple[int, int, int], classes: int, rounds: int,
                  watch: Watch) -> dict[str, Any]:
    """Measure a grid of steps and messages, fit, predict -> figures.

    Raises StopRequested for a signal that comes before some points are measured.
    """
    points, seconds = _measured(config, mesh, shape, classes, rounds, watch)
    kept = [n for n in range(len(points)) if n % 3 != 2]
    held = [n for n in range(len(points)) if n % 3 == 2]
    costs = Costs.fit([points[n] for n in kept], [seconds[n] for n in kept])
    errors = [costs.seconds(points[n]) / seconds[n] - 1 for n in held]
    return {
        "rounds": rounds, "device": str(mesh.device), "ranks": mesh.placement.world,
        "points": [{**asdict(p), "seconds": s, "model_s": costs.seconds(p), "held_out": n in held}
                   for n, (p, s) in enumerate(zip(points, seconds, strict=True))],
        "costs": asdict(costs),
        "held_out_error": {"median": statistics.median(map(abs, errors)), "largest": max(map(abs, errors))},
        "messages": _messages(mesh),
        "predictions": predictions(costs, config, shape, classes),
    }


def _measured(config: Config, mesh: Mesh, shape: tuple[int, int, int], classes: int, rounds: int,
              watch: Watch) -> tuple[list[Point], list[float]]:
    """Points of the grid, and the median seconds of a step at each."""
    points: list[Point] = []
    seconds: list[float] = []
    grid = _grid(config, mesh, shape)
    watch.say(f"{len(grid)} points, the largest first")
    began, work = time.monotonic(), [_work(*one) for one in grid]
    for number, (changed, (channels, height, width)) in enumerate(grid):
        if number:
            left = sum(work[number:]) * (time.monotonic() - began) / sum(work[:number])
            watch.now(f"point {number + 1} of {len(grid)}, about {duration(left)} left")
        subject = Subject.make(changed, _mesh_of(changed, mesh), (channels, height, width), classes)
        try:
            times = of_all_ranks(mesh, interleaved({"step": subject.step}, rounds, mesh, watch))["step"]
        except StopRequested:
            if len(points) < LEAST:
                raise
            break
        points.append(Point(len(subject.cohort.peers), subject.sources, changed.train.batch_size,
                            channels * height * width, changed.peers[0].attack.steps))
        seconds.append(statistics.median(t.wall for t in times))
    return points, seconds


def _work(config: Config, shape: tuple[int, int, int]) -> int:
    """Passes times values of a step, as far as they can be known before it is built."""
    peers = len(config.peers)
    return peers * config.train.batch_size * math.prod(shape) * (2 * config.peers[0].attack.steps + 3 * peers)


def _grid(config: Config, mesh: Mesh, shape: tuple[int, int, int]) -> list[tuple[Config, tuple[int, int, int]]]:
    """Every second point of the grid, large ones first, so that memory runs out at once or never.

    Several ranks keep the number of peers that they were started for.
    """
    counts = [n for n in PEERS if n <= len(config.peers)] if mesh.placement.world == 1 else [len(config.peers)]
    found = []
    for number, (peers, side, batch, steps) in enumerate(product(counts, SIDES, BATCHES, STEPS)):
        if (number + number // len(STEPS)) % 2:
            continue
        specs = tuple(spec.model_copy(update={"attack": spec.attack.model_copy(update={"steps": steps})})
                      for spec in config.peers[:peers])
        train = config.train.model_copy(update={"batch_size": batch})
        found.append((config.model_copy(update={"peers": specs, "train": train}), (shape[0], side, side)))
    return found[::-1]


def _mesh_of(config: Config, mesh: Mesh) -> Mesh:
    """The mesh for this many peers."""
    if mesh.placement.world > 1:
        return mesh
    return Mesh(Placement.place(len(config.peers), 1, 0), mesh.device)


def _messages(mesh: Mesh) -> dict[str, Any]:
    """Median seconds of an all-gather by bytes per rank; latency and bandwidth fitted. Empty with one rank."""
    if mesh.placement.peer_ranks == 1:
        return {}
    found = []
    for size in MESSAGES:
        sent = torch.zeros(1, size // 4, device=mesh.device)
        mesh.gather_peers(sent)
        times = []
        for _ in range(SAMPLES):
            mesh.barrier()
            times.append(timed(partial(mesh.gather_peers, sent), mesh.device).wall)
        found.append(statistics.median(max(turn) for turn in zip(*mesh.gather_json(times), strict=True)))
    received = [(mesh.placement.peer_ranks - 1) * size for size in MESSAGES]
    return {"bytes_per_rank": list(MESSAGES), "seconds": found, "latency_s": found[0],
            "bandwidth_bytes_per_s": received[-1] / found[-1]}


def predictions(costs: Costs, config: Config, shape: tuple[int, int, int], classes: int) -> list[dict[str, Any]]:
    """Predicted steps of many GPUs over several networks, one peer per GPU and 4 peers with replicas."""
    first = config.peers[0]
    cases = [("measured", costs, shape, classes, config.train.batch_size, first.attack.steps),
             ("ImageNet, ResNet-50, H100 (assumed compute)", IMAGENET, (3, 224, 224), 1000, 128, first.attack.steps)]
    rows = []
    for name, compute, size, labels, batch, steps in cases:
        values = size[0] * size[1] * size[2]
        for gpus in (4, 16, 64, 256):
            for peers in sorted({4, gpus}):
                local = max(1, batch // (gpus // peers)) if peers < gpus else batch
                busy = compute.seconds(Point(1, peers, local, values, steps))
                received = 4 * local * (peers - 1) * (values + peers * labels)
                for network in NETWORKS:
                    moved = received / network.bandwidth + 5 * network.latency * gpus.bit_length()
                    rows.append({"case": name, "gpus": gpus, "peers": peers, "replicas": gpus // peers,
                                 "network": network.name, "compute_s": busy, "exchange_s": moved,
                                 "share": moved / (busy + moved), "matters": moved / (busy + moved) > MATTERS})
    return rows
