"""The cohort: the peers that live on this rank, the graph of all peers, and the mesh that joins them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mat_dist.attacks import compression
from mat_dist.config.methods import methods
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.core.graph import CLEAN, CohortGraph, View
from mat_dist.core.guard import Guard
from mat_dist.core.hooks import Views
from mat_dist.core.losses import accuracy
from mat_dist.core.objective import endless_warmups, steps_alone
from mat_dist.core.optim import lr_at
from mat_dist.core.peer import Peer
from mat_dist.data.augment import AugmentedView
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.errors import ConfigError, EnvironmentFault, MatError, NonFinite
from mat_dist.models.modes import replica_buffers, saved_buffers
from mat_dist.models.registry import Images, make_model
from mat_dist.models.synchronised import SynchronisedNorms

if TYPE_CHECKING:
    from mat_dist.core.step import Batch

def replica_rows(place: Placement, batch_size: int, parts: int) -> slice:
    """This replica's rows of a batch. Raises EnvironmentFault unless replicas and micro-batches divide it evenly."""
    rows = place.shard(batch_size)
    local = rows.stop - rows.start
    if local % parts:
        raise EnvironmentFault(f"{local} images per replica cannot be split into {parts} micro-batches",
                               "train.accumulate", "use a divisor of train.batch_size / replicas")
    return rows


class Cohort:
    """This rank's share of the cohort.

    Args:
        config: resolved settings.
        peers: local peers, in peer order.
        mesh: the other ranks.

    Attributes:
        graph: losses and exchanges of all peers at this step.
        rows: this replica's rows of a batch.
        climbs, counts: some peer of the cohort has a method with such an exchange between replicas.
        shown: step -> what this rank's rows of its batch show, for attacks that start from the epoch before.
        moved: all optimizers have made a step, and so what they keep.
        restorers: give the buffers the values that `keep` found.
        failure: of an update, which follows the last exchange of its step; the next step, or a save, tells all ranks.
    """

    def __init__(self, config: Config, peers: list[Peer], mesh: Mesh, graph: CohortGraph, *, total_steps: int,
                 steps_per_epoch: int) -> None:
        self.peers, self.mesh, self.graph, self.step = peers, mesh, graph, config.step
        self.specs, self.total_steps, self.steps_per_epoch = config.peers, total_steps, steps_per_epoch
        self.accumulate, self.moved = config.train.accumulate, False
        self.rows = replica_rows(mesh.placement, config.train.batch_size, config.train.accumulate)
        used = [method for method in methods().values() for spec in config.peers if method.uses(spec)]
        self.climbs = any(method.climbs for method in used)
        self.counts = mesh.placement.replicas > 1 and any(method.counts for method in used)
        self.warming_up: frozenset[int] = frozenset()
        self.shown: Callable[[int], AugmentedView] | None = None
        self.failure: MatError | None = None
        self.restorers: list[Callable[[], None]] = []
        for peer in peers:
            peer.steps_per_epoch, peer.total_steps = steps_per_epoch, total_steps
            peer.rows, peer.batch_size = self.rows, config.train.batch_size
            peer.notes += [f"{peer.name}: {note}" for note in endless_warmups(
                peer.spec.optim, graph.peers[peer.index].weights, total_steps, steps_per_epoch)]
            if mesh.placement.replicas > 1:
                peer.norms = partial(SynchronisedNorms, mesh.gather_statistics)

    @classmethod
    def build(cls, config: Config, mesh: Mesh, images: Images, *, steps_per_epoch: int,
              models: Sequence[nn.Module] | None = None) -> Cohort:
        """The local peers of a configuration with fresh weights.

        Args:
            models: ready models of the local peers instead of fresh ones (tests, fine-tuning).

        Raises ConfigError for a training without a step, or an optimizer that refuses its settings.
        """
        total = config.train.epochs * steps_per_epoch
        if config.train.max_steps is not None:
            total = min(total, config.train.max_steps)
        if total < 1:
            raise ConfigError("the training has no step", "train.epochs, train.max_steps", "allow at least one")
        graph, peers = CohortGraph.of(config.peers), []
        for n, index in enumerate(mesh.placement.local_peers):
            spec = config.peers[index]
            model = models[n] if models is not None else make_model(
                spec, images, seed=config.run.seed, step=config.step, device=mesh.device)
            if not spec.frozen and not any(parameter.requires_grad for parameter in model.parameters()):
                raise ConfigError("the model has no parameter that takes a gradient", f"peers.{index}.model",
                                  f"let one have requires_grad, or set peers.{index}.frozen=true")
            peers.append(Peer(index, spec, model, graph.peers[index], seed=config.run.seed, step=config.step,
                              parts=config.train.accumulate))
            peers[-1].fresh_model = partial(make_model, spec, images, seed=config.run.seed, step=config.step,
                                            device=mesh.device)
        return cls(config, peers, mesh, graph, total_steps=total, steps_per_epoch=steps_per_epoch)

    def lr(self, spec: PeerConfig, step: int) -> float:
        """A peer's learning rate at a step."""
        return lr_at(step, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch, optim=spec.optim)

    def begin(self, guard: Guard, step: int) -> None:
        """Before each step: let warm-ups end, and hooks recall what they know of the images."""
        warming_up = frozenset(row.index for row in self.graph.peers
                               if step < steps_alone(row.weights, self.total_steps, self.steps_per_epoch))
        if warming_up != self.warming_up:
            self.warming_up, self.graph = warming_up, CohortGraph.of(self.specs, warming_up)
            for peer in self.peers:
                peer.follow(self.graph.peers[peer.index])
        for peer in self.peers:
            for hook in peer.hooks:
                guard.run(f"beginning of {peer.name}", hook.begin, step, self.shown)

    # ---------------------------------------------------------------- what travels

    def guides(self, guard: Guard, part: Batch) -> list[Tensor | None]:
        """For each local peer the log of its guides' mean probability on the clean images, (B, K); None where unused.

        Where some attack asks for it, an exchange of all peers' logits.
        """
        guides = self.graph.guides
        if not any(guides):
            return [None] * len(self.peers)
        told_LBK = guard.each("guidance", lambda peer: peer.teach(
            part.x_BCHW, part.draw(peer.row.number(CLEAN))), self.peers)
        log_PBK = guard.all_gather("guidance", lambda: torch.stack(told_LBK)).log_softmax(-1)
        return [torch.stack([log_PBK[i] for i in guides[peer.index]]).logsumexp(0) if guides[peer.index] else None
                for peer in self.peers]

    def makes(self, peer: Peer, log: bool) -> tuple[View, ...]:
        """The views that a local peer makes in this step; at log steps its first one in any case."""
        made, first = self.graph.crafted(peer.index), View(peer.index)
        return (first, *made) if log and first not in made else made

    def packed(self, made: Sequence[Mapping[View, Tensor]], part: Batch, log: bool) -> Tensor:
        """What this rank sends of its peers' AEs -> (W, B, ...), padded with zeros where others send more views."""
        own = {view: adv for one in made for view, adv in one.items()}
        sent = [own[view] for view in self.graph.sent(self.mesh.placement.local_peers, log)]
        width = self.graph.width(self.mesh.placement.peers_by_rank(), log)
        if width == 0:
            return part.x_BCHW.new_empty(0)
        sent += [torch.zeros_like(part.x_BCHW)] * (width - len(sent))
        if self.step.wire != "full":
            sent = [compression.encode(self.step.wire, adv, part.x_BCHW) for adv in sent]
        return torch.stack(sent)

    def unpacked(self, sent: Tensor, made: Sequence[Mapping[View, Tensor]], part: Batch,
                 log: bool) -> dict[View, Tensor]:
        """The images of every view that this rank has: own ones, those that have travelled, the clean ones."""
        views = {CLEAN: part.x_BCHW} | {view: adv for one in made for view, adv in one.items()}
        ranks = self.mesh.placement.peers_by_rank()
        width = self.graph.width(ranks, log)
        for rank, peers in enumerate(ranks):
            for place, view in enumerate(self.graph.sent(peers, log)):
                # A view that travels for the transfer table alone is learnt as it was made.
                if view not in views or view in self.graph.travelling:
                    views[view] = sent[rank * width + place]
                    if self.step.wire != "full":
                        views[view] = compression.decode(self.step.wire, views[view], part.x_BCHW,
                                                         *self.graph.peers[view.maker].threats_of(view))
        return views

    def told(self, opinions: Sequence[Sequence[Tensor]], known: Sequence[Views], part: Batch) -> Tensor:
        """What the local peers teach -> (L, T, B, K), zeros where a peer teaches on less than T views; empty where
        nobody teaches."""
        most = self.graph.most_taught
        if most == 0:
            return part.x_BCHW.new_empty(0)
        some = next((logits for one in (*opinions, *(views.values() for views in known)) for logits in one), None)
        like = (self.peers[0].teach_averaged(part.x_BCHW, part.draw(0)) if some is None else some).detach()
        return torch.stack([torch.stack([*one, *[torch.zeros_like(like)] * (most - len(one))]) for one in opinions])

    def transfer(self, part: Batch, views: Views, known: Sequence[Views]) -> Tensor:
        """Accuracy of the local peers on the first view of each peer and the clean images -> (L, P + 1)."""
        columns = [*(View(j) for j in range(len(self.specs))), CLEAN]
        return torch.stack([torch.stack([accuracy(peer.constant(part, views, one, view), part.y_B) for view in columns])
                            for peer, one in zip(self.peers, known, strict=True)])

    # ---------------------------------------------------------------- before and after the vote

    def keep(self) -> None:
        """Remember the buffers, for `rollback`."""
        self.restorers = [saved_buffers(peer.model) for peer in self.peers]

    @contextmanager
    def rollback(self) -> Iterator[None]:
        """Undo what a step does before its vote, should it be refused: buffers, gradients, what hooks changed."""
        self.restorers = []
        try:
            yield
        except Exception as error:
            # A device that failed refuses this too, and all ranks end with what the others were told of it.
            with nullcontext() if isinstance(error, NonFinite) else suppress(RuntimeError):
                for restore in self.restorers:
                    restore()
                for peer in self.peers:
                    peer.forget()
            raise

    def gradients(self) -> list[Tensor]:
        """All that replicas average after the backward pass."""
        return [g for peer in self.peers for g in (*peer.gradients(), *(e for h in peer.hooks for e in h.gradients()))]

    def proposed(self) -> list[list[Sequence[Tensor]]]:
        """What each hook of each local peer would keep of the step."""
        return [[hook.proposed() for hook in peer.hooks] for peer in self.peers]

    def update(self, guard: Guard, step: int, proposed: Sequence[Sequence[Sequence[Tensor]]],
               descend: Sequence[Callable[[float], None]]) -> None:
        """Apply the gradients of a committed step; average the weights. The vote told that all ranks are here.

        Args:
            proposed: as from `proposed`.
            descend: each local peer's optimizer step at a rate.
        """
        shared = [[[*map(self.mesh.gather_replicas, rows)] for rows in one] for one in proposed]
        followed = [buffer for peer in self.peers for buffer in replica_buffers(peer.model)]
        means = [buffer.double() for buffer in followed]  # in fp32 the mean of three equal constants may be another
        self.mesh.average_replicas(means)
        for buffer, mean in zip(followed, means, strict=True):
            buffer.copy_(mean)
        for peer, rows, work in zip(self.peers, shared, descend, strict=True):
            guard.run(f"update of {peer.name}", peer.update, step, self.lr(peer.spec, step), rows, work)
            guard.run(f"update of {peer.name}", peer.average, step)
        self.failure, self.moved = guard.kept(), True
