"""What is measured: a cohort of the settings on made-up images, its step, the step without guards, and its limit.

The only file of the benchmark that knows how the core of mat_dist is made.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.speed.timing import synchronise
from mat_dist.attacks.attack_copy import AttackCopy
from mat_dist.config.schema import Config
from mat_dist.core.cohort import Cohort
from mat_dist.core.opinions import AllLogits
from mat_dist.core.step import Clock, train_step
from mat_dist.data.batches import Batches
from mat_dist.data.images import ImageSet
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import ConfigError
from mat_dist.models.modes import frozen
from mat_dist.models.registry import DTYPES, Images
from mat_dist.rng import key, keyed_rng

BATCHES = 4  # made-up batches; an epoch is as long


@dataclass
class Subject:
    """A cohort of one rank on made-up images.

    Attributes:
        images, labels: uint8 (N, C, H, W) and int64 (N,) on the CPU.
        number: of the next step.
    """

    config: Config
    cohort: Cohort
    batches: Batches
    images: Tensor
    labels: Tensor
    number: int = 0
    clocks: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def make(cls, config: Config, mesh: Mesh, shape: tuple[int, int, int], classes: int) -> Subject:
        """Fresh weights and random images of `shape` (C, H, W).

        Raises ConfigError for settings with which steps differ from each other or from what is compared.
        """
        for peer in config.peers:
            attack = peer.attack
            for bad, where, how in ((attack.split_batch, "attack.split_batch", "split_batch: false"),
                                  (attack.method == "free", "attack.method", "method: pgd"),
                                  (attack.start == "previous", "attack.start", "start: uniform"),
                                  (attack.steps_warmup_epochs > 0, "attack.steps_warmup_epochs", "0"),
                                  (peer.loss.attackers != "all", "loss.attackers", "attackers: all"),
                                  (bool(peer.union.projection_beta), "union.projection_beta", "0")):
                if bad:
                    raise ConfigError("the benchmark measures steps that are all alike, in which every peer attacks "
                                      "the whole batch", where, f"write {how}")
        count = BATCHES * config.train.batch_size
        with keyed_rng(key(config.run.seed, "bench")):
            images = torch.randint(256, (count, *shape), dtype=torch.uint8)
            labels = torch.randint(classes, (count,))
        cohort = Cohort.build(config, mesh, Images(shape, classes, (0.5,) * shape[0], (0.25,) * shape[0]),
                              steps_per_epoch=BATCHES)
        batches = Batches(ImageSet(images.to(mesh.device), labels.to(mesh.device)), seed=config.run.seed,
                          batch_size=config.train.batch_size, augment=config.data.augment, device=mesh.device,
                          dtype=DTYPES[config.step.precision], rows=cohort.rows, classes=classes)
        return cls(config, cohort, batches, images, labels)

    @property
    def mesh(self) -> Mesh:
        return self.cohort.mesh

    @property
    def sources(self) -> int:
        """Inputs that a peer learns on, the largest number over the peers."""
        return max(len(plan.learned) for plan in self.cohort.plan.peers)

    def notes(self) -> list[str]:
        """What the peers of all ranks have to tell, e.g. that an engine cannot run."""
        told = self.mesh.gather_json([note for peer in self.cohort.peers for note in peer.notes])
        return [note for rank in told for note in rank]

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next batch, as the trainer gets it."""
        return self.batches.at(self.number)

    def step(self) -> None:
        """One whole training step, data included; its phases are kept in `clocks`."""
        clock = PhaseClock(self.mesh.device)
        x_BCHW, y_B = self.batch()
        clock.lap("data")
        train_step(self.cohort, x_BCHW, y_B, self.number, clock=clock)
        self.clocks.append(clock.seconds)
        self.number += 1

    def logged_step(self) -> Tensor:
        """One whole training step that also measures what a log step does -> loss of each peer, (P,)."""
        x_BCHW, y_B = self.batch()
        loss_P = train_step(self.cohort, x_BCHW, y_B, self.number, log=True).loss_P
        self.number += 1
        assert loss_P is not None
        return loss_P

    def attacks(self) -> list[tuple[Tensor, Tensor]]:
        """Where each peer of this rank begins its attack on the next batch, and the AEs that it reaches."""
        x_BCHW, y_B = self.batch()
        return [(peer.threat.region(x_BCHW).start("uniform", stream=peer.stream("attack", self.number)),
                 peer.attack(x_BCHW, y_B, self.number)) for peer in self.cohort.peers]

    def plain_models(self) -> list[nn.Module]:
        """Copies of the peers' models in fp32 and contiguous layout."""
        return [copy.deepcopy(peer.model).float().to(memory_format=torch.contiguous_format)
                for peer in self.cohort.peers]

    def unguarded_step(self) -> None:
        """The same mathematics without headers, vote, checksum, finite checks and clocks."""
        cohort, number = self.cohort, self.number
        x_BCHW, y_B = self.batch()
        plan, peers = cohort.plan, cohort.peers
        first = cohort.rows.start
        aes = torch.stack([peer.attack(x_BCHW, y_B, number, first) for peer in peers])
        inputs = [*cohort.mesh.gather_peers(aes), x_BCHW]
        known = [{slot: peer.learn(inputs[slot], (number, slot, first)) for slot in plan.peers[peer.index].learned}
                 for peer in peers]
        told = aes.new_empty(0)
        if plan.most_taught:
            told = cohort.mesh.gather_peers(torch.stack(
                [torch.stack([logits[slot].detach() for slot in plan.taught[peer.index]])
                 for peer, logits in zip(peers, known, strict=True)]))
        opinions = AllLogits(told, plan.position)
        for peer, logits in zip(peers, known, strict=True):
            peer.loss(plan.peers[peer.index].learned, logits, opinions, y_B).backward()
            peer.clip()
        cohort.update(number)
        self.number += 1


class Limit:
    """The bare passes of a step: as many forwards and backwards of the same models, and nothing else.

    The attack's passes run on the same folded and cast weights, the others on the model in train mode. No loss, no
    projection, no exchange, no optimizer.
    """

    def __init__(self, subject: Subject) -> None:
        self._cohort, self._steps = subject.cohort, [spec.attack.steps for spec in subject.config.peers]
        x_BCHW, _ = subject.batch()
        self._x = subject.cohort.peers[0].arrange(x_BCHW)
        self._models = [copy.deepcopy(peer.model) for peer in subject.cohort.peers]
        self._called: list[AttackCopy | nn.Module] = []
        dtype = torch.bfloat16 if subject.config.step.precision == "bf16" else None
        for model in self._models:
            made = AttackCopy(model, self._x[:2], dtype) if subject.config.step.attack_copy else model
            self._called.append(made)

    def __call__(self) -> None:
        for peer, model, called in zip(self._cohort.peers, self._models, self._called, strict=True):
            with frozen(model), peer.precision():
                for _ in range(self._steps[peer.index]):
                    x_BCHW = self._x.detach().requires_grad_()
                    torch.autograd.grad(called(x_BCHW).sum(), x_BCHW)
            graphs = []
            for _ in self._cohort.plan.peers[peer.index].learned:
                with peer.precision():
                    graphs.append(model(self._x).sum())
            torch.stack(graphs).sum().backward()
            for parameter in model.parameters():
                parameter.grad = None


class PhaseClock(Clock):
    """Names the waits and exchanges of a step after their place, and waits for the device at each lap."""

    PLACES = ("AEs", "logits", "vote")

    def __init__(self, device: torch.device) -> None:
        self._device, self._seen = device, {"wait": 0, "exchange": 0}
        synchronise(device)
        super().__init__()

    def lap(self, phase: str) -> None:
        synchronise(self._device)
        if phase in self._seen:
            place = self.PLACES[min(self._seen[phase], len(self.PLACES) - 1)]
            self._seen[phase] += 1
            phase = place if place == "vote" else f"{place}, {'header' if phase == 'wait' else 'exchange'}"
        super().lap(phase)
