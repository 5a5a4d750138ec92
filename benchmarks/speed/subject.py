"""What is measured: a cohort of the settings on made-up images, its step, the step without guards, and its limit.

The only file of the benchmark that knows how the core of mat_dist is made.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.speed.timing import synchronise
from mat_dist.attacks.attack_copy import AttackCopy
from mat_dist.attacks.training_attack import HALVES
from mat_dist.config.schema import Config
from mat_dist.core.cohort import Cohort
from mat_dist.core.graph import CohortGraph, View
from mat_dist.core.guard import Guard
from mat_dist.core.step import Batch, Clock, Compute, compute, train_step
from mat_dist.data.batches import Batches
from mat_dist.data.images import ImageSet
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import ConfigError
from mat_dist.models.modes import frozen
from mat_dist.models.registry import DTYPES, Images
from mat_dist.rng import key, keyed_rng
from mat_dist.training.capture import captured_steps
from mat_dist.training.feed import Feed

BATCHES = 4  # made-up batches; an epoch is as long


@dataclass
class Subject:
    """A cohort of one rank on made-up images.

    Attributes:
        images, labels: uint8 (N, C, H, W) and int64 (N,) on the CPU.
        number: of the next step.
        compute: the step's engine.
        feed: its batches.
    """

    config: Config
    cohort: Cohort
    batches: Batches
    images: Tensor
    labels: Tensor
    number: int = 0
    compute: Compute = compute
    feed: Feed = field(init=False)
    clocks: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def make(cls, config: Config, mesh: Mesh, shape: tuple[int, int, int], classes: int) -> Subject:
        """Fresh weights and random images of `shape` (C, H, W).

        Raises ConfigError for settings with which steps differ from each other or from what is compared.
        """
        graph = CohortGraph.of(config.peers)
        for peer, guides in zip(config.peers, graph.guides, strict=True):
            for bad, where, how in ((peer.attack.method == "free", "attack.method", "write method: pgd"),
                                    ("warm_start" in peer.methods, "methods.warm_start", "leave it out"),
                                    (bool(guides), "attack.loss", "write loss: ce")):
                if bad:
                    raise ConfigError("the benchmark measures steps that are all alike, in which every peer attacks "
                                      "by itself", where, how)
        count = BATCHES * config.train.batch_size
        with keyed_rng(key(config.run.seed, "bench")):
            images = torch.randint(256, (count, *shape), dtype=torch.uint8)
            labels = torch.randint(classes, (count,))
        cohort = Cohort.build(config, mesh, Images(shape, classes, (0.5,) * shape[0], (0.25,) * shape[0]),
                              steps_per_epoch=BATCHES)
        batches = Batches(ImageSet(images.to(mesh.device), labels.to(mesh.device)), seed=config.run.seed,
                          batch_size=config.train.batch_size, augment=config.data.augment, device=mesh.device,
                          dtype=DTYPES[config.step.precision], rows=cohort.rows, classes=classes)
        return cls(config, cohort, batches, images, labels,
                   compute=captured_steps(cohort, cohort.peers[0].notes.append))

    def __post_init__(self) -> None:
        self.feed = Feed(self.cohort, self.batches)

    @property
    def mesh(self) -> Mesh:
        return self.cohort.mesh

    @property
    def sources(self) -> int:
        """Inputs that a peer learns on, the largest number over the peers."""
        return max(len(row.learned) for row in self.cohort.graph.peers)

    @property
    def places(self) -> list[str]:
        """What ranks exchange in a step, in order."""
        cohort, several = self.cohort, self.mesh.placement.replicas > 1
        part = ["AEs", *["climb"] * (cohort.climbs and several), "logits", *["counts"] * cohort.counts]
        return [*part * cohort.accumulate, *["gradients"] * several, "vote"]

    def notes(self) -> list[str]:
        """What the peers of all ranks have to tell, e.g. that an engine cannot run."""
        told = self.mesh.gather_json([note for peer in self.cohort.peers for note in peer.notes])
        return [note for rank in told for note in rank]

    def batch(self) -> Batch:
        """The next batch, as the trainer gets it."""
        return Batch(*self.batches.at(self.number), self.number, self.cohort.rows.start)

    def step(self) -> None:
        """One whole training step, data included; its phases are kept in `clocks`, where it is captured those of the
        host."""
        clock = PhaseClock(self.mesh.device, self.places) if self.compute is compute else Clock()
        batch = self.feed.fetch(self.number)
        clock.lap("data")
        train_step(self.cohort, batch, clock=clock, compute=self.feed.behind(self.compute))
        self.clocks.append(clock.seconds)
        self.number += 1

    def logged_step(self) -> Tensor:
        """One whole training step that also measures what a log step does -> loss of each peer, (P,)."""
        loss_P = train_step(self.cohort, self.batch(), log=True, compute=self.compute).loss_P
        self.number += 1
        assert loss_P is not None
        return loss_P

    def attacks(self) -> list[tuple[Tensor, Tensor]]:
        """Where each peer of this rank begins its attack on the next batch, and the AEs that it reaches."""
        batch = self.batch()
        return [(peer.threat.region(batch.x_BCHW).start("uniform", stream=peer.stream("attack", self.number)),
                 peer.attack(batch, [View(peer.index)])[View(peer.index)]) for peer in self.cohort.peers]

    def plain_models(self) -> list[nn.Module]:
        """Copies of the peers' models in fp32 and contiguous layout."""
        return [copy.deepcopy(peer.model).float().to(memory_format=torch.contiguous_format)
                for peer in self.cohort.peers]

    def unguarded_step(self) -> None:
        """The same mathematics without headers, vote, checksum, finite checks, rollback and clocks."""
        cohort, batch = self.cohort, self.batch()
        for part in batch.split(cohort.accumulate):
            self._learn(part)
        cohort.mesh.average_replicas(cohort.gradients())
        for peer in cohort.peers:
            peer.reduced()
        cohort.update(Guard(cohort.mesh, "update", batch.step), batch.step, cohort.proposed(),
                      [peer.descend for peer in cohort.peers])
        self.number += 1

    def _learn(self, part: Batch) -> None:
        cohort, graph, peers = self.cohort, self.cohort.graph, self.cohort.peers
        made = [peer.attack(part, cohort.makes(peer, False)) for peer in peers]
        views = cohort.unpacked(self._gathered(cohort.packed(made, part, False)), made, part, False)
        climbs = [[hook.climb(part, views) for hook in peer.hooks] for peer in peers]
        cohort.mesh.average_replicas([one for climb in climbs for tensors in climb for one in tensors])
        inputs = [peer.begin_learning(climb, views) for peer, climb in zip(peers, climbs, strict=True)]
        known = [peer.forward(part, seen, graph.taught[peer.index])
                 for peer, seen in zip(peers, inputs, strict=True)]
        told = self._gathered(cohort.told([peer.opinions(part, seen, logits, graph.taught[peer.index])
                                           for peer, seen, logits in zip(peers, inputs, known, strict=True)], known,
                                          part))
        for peer, seen, logits in zip(peers, inputs, known, strict=True):
            counts = [hook.count(peer.row, partial(peer.constant, part, seen, logits), part.y_B)
                      if cohort.counts else None for hook in peer.hooks]
            cohort.mesh.average_replicas([one for one in counts if one is not None])
            peer.backward(part, seen, logits, lambda teacher, view: told[teacher, graph.position[teacher, view]],
                          counts)

    def _gathered(self, local: Tensor) -> Tensor:
        return self.mesh.gather_peers(local) if len(local) else local


class Limit:
    """The bare passes of a step: as many forwards and backwards of the same models, and nothing else.

    The attack's passes run on the same folded and cast weights, the others on the model in train mode. No loss, no
    projection, no exchange, no optimizer.
    """

    def __init__(self, subject: Subject) -> None:
        self._cohort, self._steps = subject.cohort, [spec.attack.steps for spec in subject.config.peers]
        self._x = subject.cohort.peers[0].arrange(subject.batch().x_BCHW)
        self._models = [copy.deepcopy(peer.model) for peer in subject.cohort.peers]
        self._called: list[AttackCopy] = []
        dtype = HALVES.get(subject.config.step.precision)
        for model in self._models:
            self._called.append(AttackCopy(model, self._x[:2], dtype))

    def __call__(self) -> None:
        for peer, model, called in zip(self._cohort.peers, self._models, self._called, strict=True):
            with frozen(model), peer.precision():
                for _ in range(self._steps[peer.index]):
                    x_BCHW = self._x.detach().requires_grad_()
                    torch.autograd.grad(called(x_BCHW).sum(), x_BCHW)
            graphs = []
            for _ in peer.row.learned:
                with peer.precision():
                    graphs.append(model(self._x).sum())
            torch.stack(graphs).sum().backward()
            for parameter in model.parameters():
                parameter.grad = None


class PhaseClock(Clock):
    """Names the waits and exchanges of a step after their place, and waits for the device at each lap.

    Args:
        places: what is exchanged in a step, in order; the last one is the vote, which is a header alone.
    """

    def __init__(self, device: torch.device, places: Sequence[str]) -> None:
        self._device, self._places, self._seen = device, places, {"wait": 0, "exchange": 0}
        synchronise(device)
        super().__init__()

    def lap(self, phase: str) -> None:
        synchronise(self._device)
        if phase in self._seen:
            place = self._places[self._seen[phase]]
            self._seen[phase] += 1
            vote = self._seen[phase] == len(self._places)
            phase = place if vote else f"{place}, {'header' if phase == 'wait' else 'exchange'}"
        super().lap(phase)
