"""The cohort: the peers that live on this rank, the plan of all peers, and the mesh that joins them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist.attacks.norms import Threat
from mat_dist.config.schema import Config, PeerConfig, StepConfig
from mat_dist.core.drawing import Drawing
from mat_dist.core.graph import CohortPlan
from mat_dist.core.peer import Peer
from mat_dist.core.pulling import pull_together
from mat_dist.core.schedules import lr_at
from mat_dist.data.shown import AugmentedView
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.errors import ConfigError, EnvironmentFault
from mat_dist.models.classifier import Images, make_model


def replica_rows(place: Placement, batch_size: int, microbatches: int, makers: int = 1) -> slice:
    """This replica's rows of a batch. Raises EnvironmentFault unless replicas, micro-batches and the peers that split
    it (`makers`) divide it evenly."""
    rows = place.shard(batch_size)
    local = rows.stop - rows.start
    if local % microbatches:
        raise EnvironmentFault(f"{local} images per replica cannot be split into {microbatches} micro-batches",
                               "step.microbatches", "use a divisor of train.batch_size / replicas")
    if local // microbatches % makers:
        raise EnvironmentFault(f"{makers} peers cannot split {local // microbatches} images per replica and "
                               "micro-batch evenly", "attack.split_batch", "use another train.batch_size, fewer ranks "
                               "or fewer step.microbatches")
    return rows


@dataclass
class Cohort:
    """This rank's share of the cohort.

    Attributes:
        peers: local peers, in peer order.
        plan: losses and exchanges of all peers.
        mesh: the other ranks.
        step: precision, memory, micro-batches.
        threats: of all peers, in peer order.
        batch_size: images of the global batch.
        total_steps, steps_per_epoch: for the schedules.
        perturbs: some peer of the cohort trains with AWP.
        draws: from whose AEs peers with the strategies `random` and `eat` learn.
    """

    peers: list[Peer]
    plan: CohortPlan
    mesh: Mesh
    step: StepConfig
    threats: tuple[Threat, ...]
    batch_size: int
    total_steps: int
    steps_per_epoch: int
    perturbs: bool
    draws: Drawing
    rows: slice = field(init=False)
    muted: dict[int, int] = field(default_factory=dict)  # peer -> first step at which others listen to it again
    alone: set[int] = field(default_factory=set)  # peers that still warm up
    turn: int = 0  # the step, where whose AEs are learnt changes with it
    listening: tuple[set[int], set[int], int] = field(default_factory=lambda: (set(), set(), 0))  # of the plan
    period: int = field(init=False)  # of the sources, when nobody is muted
    _before: dict[int, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = replica_rows(self.mesh.placement, self.batch_size, self.step.microbatches, self.plan.makers)
        self.period = self.plan.period
        self._tell_peers()

    def _tell_peers(self) -> None:
        for peer in self.peers:
            learned = len(self.plan.peers[peer.index].learned)
            peer.follow(self.plan.peers[peer.index], steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps,
                        forwards=(1 if self.step.bn == "joint" else learned) * self.step.microbatches)

    @classmethod
    def build(cls, config: Config, mesh: Mesh, images: Images, *, steps_per_epoch: int,
              models: Sequence[nn.Module] | None = None) -> Cohort:
        """The local peers of a configuration with fresh weights.

        Args:
            models: ready models of the local peers instead of fresh ones (tests, fine-tuning).
        """
        plan = CohortPlan.of(config.peers)
        peers = []
        for n, index in enumerate(mesh.placement.local_peers):
            spec = config.peers[index]
            model = models[n] if models is not None else make_model(
                spec, images, seed=config.run.seed, step=config.step, device=mesh.device)
            peers.append(Peer(index, spec, mesh.synchronise_norms(model), seed=config.run.seed, step=config.step))
        total = config.train.epochs * steps_per_epoch
        if config.train.max_steps is not None:
            total = min(total, config.train.max_steps)
        if total < 1:
            raise ConfigError("the training has no step", "train.epochs, train.max_steps", "allow at least one")
        threats = tuple(Threat(spec.threat.norm, spec.threat.eps) for spec in config.peers)
        return cls(peers, plan, mesh, config.step, threats, config.train.batch_size, total, steps_per_epoch,
                   any(spec.optim.awp_gamma for spec in config.peers), Drawing(config.peers, plan, config.run.seed))

    def lr(self, spec: PeerConfig, step: int) -> float:
        """A peer's learning rate at a step."""
        return lr_at(step, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch, optim=spec.optim)

    @contextmanager
    def kept_if_refused(self) -> Iterator[None]:
        """Undo what a step does before its vote, should it be refused: BN buffers, gradients, weights, counts."""
        self._before = {peer.index: [b.clone() for b in peer.buffers()] for peer in self.peers}
        try:
            yield
        except Exception:
            for peer in self.peers:
                self.give_back(peer)
                peer.forget()
            raise
        finally:
            self._before = {}

    @torch.no_grad()
    def give_back(self, peer: Peer) -> None:
        """Put a peer where it was before it began to learn in the step that is under way: BN buffers, no gradient."""
        for buffer, value in zip(peer.buffers(), self._before[peer.index], strict=True):
            buffer.copy_(value)
        peer.optimizer.zero_grad(set_to_none=True)

    def mute(self, peers: Sequence[int], until: int) -> None:
        """Let nobody learn from `peers` before step `until`."""
        self.muted.update(dict.fromkeys(peers, until))
        self._replan()

    def begin(self, step: int, shown: Callable[[int], AugmentedView] | None = None) -> None:
        """Before each step: listen again to peers whose quarantine has ended, let warm-ups end and sources
        change, recall perturbations.

        Args:
            shown: step -> what this rank's rows of its batch show, for attacks that start from the epoch before.
        """
        self._recall(step, shown)
        self.muted = {peer: until for peer, until in self.muted.items() if until > step}
        alone = {row.index for row in self.plan.peers if step < row.loss.warmup_epochs * self.steps_per_epoch}
        turn = step if self.period > 1 else 0
        if self.listening != (set(self.muted), alone, turn):
            self.alone, self.turn = alone, turn
            self._replan()
        drawn = self.draws.at(self.plan, step)
        if drawn != {row.index: row.drawn for row in self.plan.peers if row.drawn is not None}:
            self.plan = self.plan.drawing(drawn)
            self._tell_peers()

    def state(self) -> dict[str, Any]:
        """What all ranks know alike and a resumed run needs: plain numbers."""
        return {"muted": {str(peer): until for peer, until in self.muted.items()}, "drawn": self.draws.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a state of this cohort."""
        for peer, until in state.get("muted", {}).items():
            self.mute([int(peer)], int(until))
        self.draws.load(state.get("drawn", {}))

    def _recall(self, step: int, shown: Callable[[int], AugmentedView] | None) -> None:
        """Tell the attacks that carry perturbations on whose these are: of images, or (free: all peers) of rows."""
        carrying = [peer.crafter for peer in self.peers if peer.crafter.carried is not None]
        if not carrying or (shown is None and not carrying[0].free):
            return
        if carrying[0].free:
            rows = torch.arange(self.rows.start, self.rows.stop, device=self.mesh.device)
            told = AugmentedView.plain(rows, self.batch_size)
        else:
            assert shown is not None
            told = shown(step)
        for crafter in carrying:
            crafter.begin(step, told, self.rows.start)

    def _replan(self) -> None:
        self.listening = set(self.muted), self.alone, self.turn
        self.plan = self.plan.listening(*self.listening)
        self._tell_peers()

    def update(self, step: int) -> None:
        """Apply the gradients of a committed step; pull the peers together where that is due; average their weights."""
        self._count()
        for peer in self.peers:
            if self.mesh.placement.replicas > 1 and peer.crafter.carried is not None:
                peer.crafter.carried.share(self.mesh.gather_replicas)
            peer.update(step, self.lr(peer.spec, step))
        if self.mesh.device.type == "cpu":  # SyncBatchNorm does this on CUDA and has no CPU path
            self.mesh.average_replicas([b for p in self.peers for b in p.buffers() if b.is_floating_point()])
        if self.step.pull and (step + 1) % self.step.pull_every == 0:
            self.mesh.where = f"step {step}, pull"
            pull_together([peer.model for peer in self.peers], self.mesh, self.step.pull, self.muted)
        for peer in self.peers:
            peer.average(step)

    def _count(self) -> None:
        """Share what E-AT counted in this step, so that all choose alike: on own AEs over replicas, else over ranks."""
        rows = self.plan.peers
        if self.draws.counts:
            held = self.mesh.sum_world(self._held())
            for row in rows:
                if row.drawn in row.learned:
                    self.draws.update(row.index, row.drawn, int(held[row.index]), self.batch_size)
        if self.mesh.placement.replicas == 1 or not any(row.me.strategy == "eat" for row in rows):
            return
        counted = torch.zeros(len(rows), max(len(row.me.union) for row in rows), 2, dtype=torch.int64)
        for peer in self.peers:
            for place, counts in enumerate(peer.crafter.counted):
                counted[peer.index, place] = torch.tensor(counts)
        counted = self.mesh.sum_world(counted)
        for peer in self.peers:
            peer.crafter.counted = counted[peer.index, :len(peer.crafter.counted)].tolist()

    def _held(self) -> Tensor:
        """On how many of the AEs that it received each local peer was right in this step -> (P,), on the CPU."""
        held = torch.zeros(len(self.plan.peers), dtype=torch.int64)
        for peer in self.peers:
            held[peer.index] = sum(map(int, peer.right))
        return held


def state_hash(state: Any) -> str:
    """SHA-256 over the tensors and numbers of a nested state, with their keys."""
    digest = hashlib.sha256()

    def feed(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for k in value:
                feed(f"{path}.{k}", value[k])
        elif isinstance(value, (list, tuple)):
            for n, item in enumerate(value):
                feed(f"{path}.{n}", item)
        elif isinstance(value, Tensor):
            digest.update(f"{path} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{path} {value!r}".encode())

    feed("", state)
    return digest.hexdigest()
