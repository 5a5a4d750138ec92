"""A peer: one classifier with its own weights, optimizer, threat, attack, hooks and random streams."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.compiled import compiled
from mat_dist.attacks.training_attack import Found, Plan, TrainingAttack, autocast
from mat_dist.config.methods import methods
from mat_dist.config.schema import PeerConfig, StepConfig
from mat_dist.core import optim
from mat_dist.core.graph import PeerGraph, View
from mat_dist.core.hooks import Hook, Views
from mat_dist.core.objective import Teaching, couples, partial_loss
from mat_dist.models.modes import batch_stats_only, frozen, set_bn_forwards

if TYPE_CHECKING:
    from mat_dist.core.step import Batch

LAYOUT = torch.channels_last  # the same on every path, since the layout of images changes rounding
ATTACK = -1  # keys what the forwards of an attack draw, as the numbers of views key those of learning


class Peer:
    """One classifier of the cohort.

    Args:
        spec: complete settings (`config.load_config` fills them).
        model: images in [0, 1] -> logits, on its device, in its precision.
        row: what it learns from.
        seed: the run's; with `spec.stream` it keys every draw of this peer.
        parts: how many micro-batches make a step.

    Attributes:
        hooks: of its methods, in the order of their names.
        steps_per_epoch, total_steps, batch_size: of the training; rows: of the batch that live on this rank.
        norms: the scope in which batch norm sees the batch of all replicas; all of them enter it alike.
        drawn: the scope in which what a model draws is keyed; called: the model as learning calls it.
        fresh_model: makes another model of its architecture.
        notes: what the run should tell its user; who tells it empties the list.
    """

    def __init__(self, index: int, spec: PeerConfig, model: nn.Module, row: PeerGraph, *, seed: int,
                 step: StepConfig, parts: int = 1) -> None:
        self.index, self.spec, self.model, self.seed, self.step, self.parts = index, spec, model, seed, step, parts
        self.name = spec.name or f"peer{index}"
        self.threats, self.threat = row.me.threats, row.me.threats[0]
        if spec.frozen:  # else layers that a network keeps fixed stay so
            model.requires_grad_(False)
        self.optimizer = optim.build_optimizer(model, spec.optim, f"peers.{index}")
        self.ema = optim.copied_state(model) if spec.averages and not spec.frozen else None
        self.scale = optim.LossScale(next(model.parameters()).device, step.precision == "fp16")
        self.notes = [f"{self.name}: {note}" for note in optim.optimizer_notes(spec.optim, model)]
        self.attack_of_training = TrainingAttack(model, self.threats, spec.attack, step, self._tell)
        self.steps_per_epoch, self.total_steps, self.batch_size, self.rows = 1, 1, 1, slice(0, 1)
        self.norms: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.drawn: Callable[[int], AbstractContextManager[Any]] = rng.keyed_rng
        self.called = compiled(model, self._tell) if step.engine == "compile" else model
        self.fresh_model: Callable[[], nn.Module] = lambda: copy.deepcopy(model)
        self.follow(row)
        self.hooks: list[Hook] = [method.hook(self) for method in methods().values()
                                  if method.uses(spec) and method.hook is not None]

    def follow(self, row: PeerGraph) -> None:
        """Learn by this graph from now on; running statistics of norm layers keep their pace."""
        self.row = row
        set_bn_forwards(self.model, max(1, len(row.learned) * self.parts))

    def attack(self, part: Batch, views: Sequence[View], guide_BK: Tensor | None = None) -> dict[View, Tensor]:
        """Its AEs (B, C, H, W) of a clean batch for each view; the model stays as it was. `guide_BK`: as in hooks."""
        part, found = replace(part, x_BCHW=self.arrange(part.x_BCHW)), dict[View, Found]()
        for view in views:
            with self.drawing((*part.draw(ATTACK), view.threat)):
                found[view] = self._found(part, view.threat, guide_BK) if view.threat else self._first(part, guide_BK)
        return {view: one.adv_BCHW for view, one in found.items()}

    def _first(self, part: Batch, guide_BK: Tensor | None) -> Found:
        """The first view, which hooks may choose the threat of, make, or begin."""
        for hook in self.hooks:
            if (crafted := hook.craft(self.attack_of_training, part, guide_BK)) is not None:
                return Found(crafted)
        threat = sum(hook.choose(part.step) for hook in self.hooks)  # at most one chooses
        found = self._found(part, threat, guide_BK)
        for hook in self.hooks:
            hook.attacked(part, threat, found)
        return found

    def _found(self, part: Batch, threat: int, guide_BK: Tensor | None) -> Found:
        stream = part.key(lambda step: self.stream("attack", step, *([threat] if threat else [])))
        return self.attack_of_training(part.x_BCHW, part.y_B, Plan(
            threat, stream, part.first_row, [hook.start for hook in self.hooks], guide_BK))

    def learn(self, x_BCHW: Tensor, draw: Sequence[int]) -> Tensor:
        """Train-mode logits (B, K) with a graph; buffers move. `draw` keys what the model draws (`Batch.draw`)."""
        with torch.enable_grad(), self.training(draw):
            return self.called(x_BCHW.contiguous(memory_format=LAYOUT)).to(x_BCHW.dtype)

    def teach(self, x_BCHW: Tensor, draw: Sequence[int]) -> Tensor:
        """The same logits without a graph or a trace in the buffers; of a frozen peer in eval mode."""
        with torch.no_grad(), self.training(draw), (frozen if self.spec.frozen else batch_stats_only)(self.model):
            return self.logits(x_BCHW)

    def teach_averaged(self, x_BCHW: Tensor, draw: Sequence[int]) -> Tensor:
        """Eval-mode logits of the averaged weights (B, K), without a graph; of a frozen peer those of its weights."""
        state = self.ema if self.ema is not None else self.model.state_dict()
        with torch.no_grad(), self.precision(), self.drawing(draw), frozen(self.model):
            return torch.func.functional_call(self.model, state, (self.arrange(x_BCHW),)).to(x_BCHW.dtype)

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Of the model as it is, in x's type."""
        return self.model(self.arrange(x_BCHW)).to(x_BCHW.dtype)

    def forward(self, part: Batch, views: Views, taught: Sequence[View]) -> dict[View, Tensor]:
        """Logits by view: with graph where the peer learns (memory: keep), without where it only teaches."""
        known: dict[View, Tensor] = {}
        if self.step.memory == "keep":
            known = {view: self.learn(views[view], part.draw(self.row.number(view))) for view in self.row.learned}
        if self.step.teachers == "raw":
            known.update((view, self.constant(part, views, known, view)) for view in taught if view not in known)
        return known

    def opinions(self, part: Batch, views: Views, known: Views, taught: Sequence[View]) -> list[Tensor]:
        """What the peer teaches: its logits (B, K) on each of `taught`, detached."""
        if self.step.teachers == "ema":
            return [self.teach_averaged(views[view], part.draw(self.row.number(view))) for view in taught]
        return [known[view].detach() for view in taught]

    def constant(self, part: Batch, views: Views, known: Views, view: View) -> Tensor:
        """Its logits on a view, without graph; those that are not known yet are made, without a trace."""
        return known[view].detach() if view in known else self.teach(views[view], part.draw(self.row.number(view)))

    def begin_learning(self, climbs: Sequence[Sequence[Tensor]], views: Views) -> Views:
        """After `Hook.climb`, by hook: the views as this peer's model gets them."""
        for hook, climb in zip(self.hooks, climbs, strict=True):
            hook.before_forward(climb)
            views = hook.inputs(views)
        return views

    def backward(self, part: Batch, views: Views, known: Mapping[View, Tensor], teaching: Teaching,
                 counts: Sequence[Tensor | None]) -> Tensor:
        """Add the gradient of the loss, its share of `part.parts` micro-batches -> the loss, detached."""
        total = torch.zeros((), dtype=part.x_BCHW.dtype, device=part.y_B.device)
        recomputes, extras = self.step.memory == "recompute", list(zip(self.hooks, counts, strict=True))
        groups = self.row.groups(couples(self.row, hook) for hook in self.hooks) if recomputes else [self.row.learned]
        for group in filter(None, groups):
            logits = known if not recomputes else {
                view: self.learn(views[view], part.draw(self.row.number(view))) for view in group}
            loss = partial_loss(self.row, group, logits, teaching, part.y_B, extras)
            (self.scale.up(loss) / part.parts).backward()
            total += loss.detach()
        for hook in self.hooks:
            hook.after_backward(part, views)
        return total

    def gradients(self) -> list[Tensor]:
        """Gradients of the trainable parameters, in order; zeros where a parameter took no part."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return [p.grad for p in parameters if p.grad is not None]

    def reduced(self) -> Tensor:
        """Let hooks change the averaged gradient, clip it if the settings say so -> its norm before that (scalar)."""
        self.scale.down(self.gradients())
        for hook in self.hooks:
            hook.after_reduce()
        return optim.clipped(self.model, self.gradients(), self.spec.optim.clip_norm)

    def descend(self, lr: float) -> None:
        """One optimizer step."""
        optim.pace(self.optimizer, lr)
        self.optimizer.step()

    def update(self, step: int, lr: float, shared: Sequence[Sequence[Tensor]],
               descend: Callable[[float], None] | None = None) -> None:
        """`descend` at rate `lr`, and gradients are dropped. `shared`: for each hook what `Hook.commit` gets."""
        for hook, rows in zip(self.hooks, shared, strict=True):
            hook.commit(step, rows)
        if not self.spec.frozen:
            (descend or self.descend)(lr)
            self.optimizer.zero_grad()
        self.scale.after(overflow=False)

    def average(self, step: int) -> None:
        """Let the averaged weights follow those after the update of `step`."""
        if self.ema is not None:
            decay = self.spec.optim.ema_decay
            kept = next((hook.kept_share(step) for hook in self.hooks if hook.averages), 1.0)
            optim.average(self.ema, self.model.state_dict(), kept if decay is None else optim.ema_decay_at(step, decay))

    def forget(self) -> None:
        """After a refused step: all as before it."""
        for hook in self.hooks:
            hook.abort()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs of this peer: tensors and plain numbers."""
        return {"name": self.name, "model": self.model.state_dict(), "ema": self.ema,
                "optimizer": self.optimizer.state_dict(),
                **self.scale.state(),
                "methods": {hook.name: state for hook in self.hooks if (state := hook.state_dict())}}

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take over the weights of another model of this architecture. Raises RuntimeError if they do not fit."""
        self.model.load_state_dict(weights)
        self.ema = optim.copied_state(self.model) if self.ema is not None else None

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same architecture, optimizer and methods."""
        self.model.load_state_dict(state["model"])
        optim.resume(self.optimizer, state["optimizer"])
        self.scale.load(state)
        for hook in self.hooks:
            hook.load_state_dict(state["methods"].get(hook.name, {}))
        if self.ema is not None:
            torch._foreach_copy_(list(self.ema.values()), [state["ema"][k].to(v.device) for k, v in self.ema.items()])

    def stream(self, purpose: str, *indices: int) -> int:
        """Key of one of this peer's random streams."""
        return rng.key(self.seed, purpose, *indices, self.spec.stream or 0)

    def arrange(self, x_BCHW: Tensor) -> Tensor:
        """Images in the layout of a run."""
        return x_BCHW.contiguous(memory_format=LAYOUT)

    def precision(self) -> AbstractContextManager[Any]:
        """The scope in which this run calls models: autocast with bf16."""
        return autocast(self.step.precision, next(self.model.parameters()).device)

    def drawing(self, draw: Sequence[int]) -> AbstractContextManager[Any]:
        """The scope of every forward: whatever a model draws from a global generator is keyed."""
        return self.drawn(self.stream("forward", *draw))

    def _tell(self, text: str) -> None:
        self.notes.append(f"{self.name}: {text}")

    @contextmanager
    def training(self, draw: Sequence[int]) -> Iterator[None]:
        """The scope of a forward in train mode. `draw` keys what the model draws."""
        with self.precision(), self.drawing(draw), self.norms():
            yield
