"""A peer: one classifier with its own weights, optimizer, threat, attack, hooks and random streams."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.norms import Region
from mat_dist.attacks.training_attack import Found, Plan, TrainingAttack, autocast
from mat_dist.config.methods import methods
from mat_dist.config.schema import PeerConfig, StepConfig
from mat_dist.core.graph import PeerGraph, View
from mat_dist.core.losses import accuracy
from mat_dist.core.objective import Teaching, own_loss, partial_loss
from mat_dist.core.optim import average, build_optimizer, ema_decay_at
from mat_dist.models.modes import batch_stats_only, bn_buffers, frozen, set_bn_forwards

if TYPE_CHECKING:
    from mat_dist.core.hooks import Hook, Views
    from mat_dist.core.step import Batch


class Peer:
    """One classifier of the cohort.

    Args:
        index: position in the cohort.
        spec: complete settings (`config.load_config` fills them).
        model: images in [0, 1] -> logits, on its device, in its precision.
        row: what it learns from.
        seed: the run's seed; with `spec.stream` it keys every draw of this peer.
        step: precision and memory.

    Attributes:
        hooks: of its methods, in the order of their names.
        steps_per_epoch, total_steps, batch_size: of the training; rows: of the batch that live on this rank.
        fresh_model: makes another model of its architecture, without norm layers that wait for replicas.
        notes: what the run should tell its user, e.g. that memory ran out once; who tells it empties the list.
    """

    def __init__(self, index: int, spec: PeerConfig, model: nn.Module, row: PeerGraph, *, seed: int,
                 step: StepConfig) -> None:
        assert spec.stream is not None
        self.index, self.spec, self.model, self.seed, self.step = index, spec, model, seed, step
        self.name = spec.name or f"peer{index}"
        self.threats, self.threat = row.me.threats, row.me.threats[0]
        model.requires_grad_(not spec.frozen)
        self.optimizer = build_optimizer(model, spec.optim, f"peers.{index}")
        self.ema: dict[str, Tensor] | None = None
        if spec.averages and not spec.frozen:
            self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.notes: list[str] = []
        self.attack_of_training = TrainingAttack(model, self.threats, spec.attack, step,
                                                 lambda text: self.notes.append(f"{self.name}: {text}"))
        self._stochastic = any(_draws(m) for m in model.modules())
        self.steps_per_epoch = self.total_steps = self.batch_size = 1
        self.rows = slice(0, 1)
        self.fresh_model: Callable[[], nn.Module] = lambda: copy.deepcopy(model)
        self.row = row
        self.hooks: list[Hook] = [method.hook(self) for _, method in sorted(methods().items())
                                  if method.uses(spec) and method.hook is not None]
        self.follow(row)

    def follow(self, row: PeerGraph) -> None:
        """Learn by this graph from now on; running statistics of norm layers keep their pace."""
        self.row = row
        set_bn_forwards(self.model, max(1, len(row.learned) * self.step.microbatches))

    # ---------------------------------------------------------------- making adversarial examples

    def attack(self, part: Batch, views: Sequence[View], guide_BK: Tensor | None = None) -> dict[View, Tensor]:
        """This peer's AEs of a clean batch for each of `views`, each (B, C, H, W) in [0, 1].

        The model is left as it was. Raises torch.OutOfMemoryError if half a batch does not fit into memory.

        Args:
            guide_BK: log-probabilities of teachers on the clean images, where its attack asks for them.
        """
        part = part.of(self.arrange(part.x_BCHW))
        return {view: self._first(part, guide_BK) if view.threat == 0 else
                self._found(part, view.threat, None).adv_BCHW for view in views}

    def _first(self, part: Batch, guide_BK: Tensor | None) -> Tensor:
        """The first view, which hooks may choose the threat of, make, or begin."""
        for hook in self.hooks:
            if (crafted := hook.craft(self.attack_of_training, part)) is not None:
                return crafted
        threat = sum(hook.choose(part.step) for hook in self.hooks)  # at most one chooses
        found = self._found(part, threat, guide_BK)
        for hook in self.hooks:
            hook.attacked(part, threat, found)
        return found.adv_BCHW

    def _found(self, part: Batch, threat: int, guide_BK: Tensor | None) -> Found:
        def start(point: Tensor, region: Region, first_row: int) -> Tensor:
            for hook in self.hooks:
                point = hook.start(point, region, first_row)
            return point

        stream = self.stream("attack", part.step, *([threat] if threat else []))
        return self.attack_of_training(part.x_BCHW, part.y_B, Plan(threat, stream, part.first_row, start, guide_BK))

    # ---------------------------------------------------------------- forwards

    def learn(self, x_BCHW: Tensor, draw: Sequence[int]) -> Tensor:
        """Train-mode logits (B, K) with a graph; running BN statistics move.

        Args:
            draw: indices that key dropout and the like: step, number of the view, first row.
        """
        with torch.enable_grad(), self.precision(), self.drawing(draw):
            return self.logits(x_BCHW)

    def teach(self, x_BCHW: Tensor, draw: Sequence[int]) -> Tensor:
        """The same logits as `learn`, without a graph and without a trace in the BN buffers; of a frozen peer in eval
        mode."""
        mode = frozen if self.spec.frozen else batch_stats_only
        with torch.no_grad(), self.precision(), self.drawing(draw), mode(self.model):
            return self.logits(x_BCHW)

    def teach_averaged(self, x_BCHW: Tensor) -> Tensor:
        """Eval-mode logits of the averaged weights (B, K), without a graph; of a frozen peer those of its weights."""
        state = self.ema if self.ema is not None else self.model.state_dict()
        with torch.no_grad(), self.precision(), frozen(self.model):
            logits: Tensor = torch.func.functional_call(self.model, state, (self.arrange(x_BCHW),))
        return logits.to(x_BCHW.dtype)

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Of the model as it is, in x's type."""
        logits: Tensor = self.model(self.arrange(x_BCHW))
        return logits.to(x_BCHW.dtype)

    def forward(self, part: Batch, views: Views, taught: Sequence[View]) -> dict[View, Tensor]:
        """Logits by view: with graph where the peer learns (memory: keep), without where it only teaches."""
        known: dict[View, Tensor] = {}
        if self.step.memory == "keep":
            known = self._learned(part, views, self.row.learned)
        if self.step.teachers == "raw":
            known.update((view, self._told(part, views, view)) for view in taught if view not in known)
        return known

    def _learned(self, part: Batch, views: Views, wanted: Sequence[View]) -> dict[View, Tensor]:
        return {view: self.learn(views[view], part.draw(self.row.number(view))) for view in wanted}

    def _told(self, part: Batch, views: Views, view: View) -> Tensor:
        return self.teach(views[view], part.draw(self.row.number(view)))

    def opinions(self, views: Views, known: Views, taught: Sequence[View]) -> list[Tensor]:
        """What the peer teaches: its logits (B, K) on each of `taught`, detached."""
        if self.step.teachers == "ema":
            return [self.teach_averaged(views[view]) for view in taught]
        return [known[view].detach() for view in taught]

    def counts(self, part: Batch, views: Views, known: Views) -> list[Tensor | None]:
        """What each hook counts on this replica's rows; what is not forwarded yet is, without a trace."""
        def logits(view: View) -> Tensor:
            return known[view].detach() if view in known else self._told(part, views, view)

        return [hook.count(self.row, logits, part.y_B) for hook in self.hooks]

    def transfer(self, part: Batch, views: Views, known: Views, columns: Sequence[View]) -> Tensor:
        """Accuracy on each of `columns` -> (S,); views that were not forwarded are, without a trace."""
        logits = (known[view].detach() if view in known else self._told(part, views, view) for view in columns)
        return torch.stack([accuracy(one, part.y_B) for one in logits])

    # ---------------------------------------------------------------- learning

    def climb(self, part: Batch, views: Views) -> list[Sequence[Tensor]]:
        """What replicas average before the forwards, by hook."""
        return [hook.climb(part, views) for hook in self.hooks]

    def begin_learning(self, climbs: Sequence[Sequence[Tensor]], views: Views) -> Views:
        """After that: the views as this peer's model gets them."""
        for hook, climb in zip(self.hooks, climbs, strict=True):
            hook.before_forward(climb)
            views = hook.inputs(views)
        return views

    def alone(self, part: Batch, views: Views, draw: int) -> Tensor:
        """The loss that the peer would have without the others, with graph; batch-norm statistics stay.

        Args:
            draw: negative number that keys what these forwards draw.
        """
        with torch.enable_grad(), self.precision(), self.drawing(part.draw(draw)), batch_stats_only(self.model):
            return own_loss(self.row, {view: self.logits(views[view]) for view in self.row.alone}, part.y_B, self.hooks)

    def backward(self, part: Batch, views: Views, known: Mapping[View, Tensor], teaching: Teaching,
                 counts: Sequence[Tensor | None]) -> Tensor:
        """Add the gradient of the loss, its share of `part.parts` micro-batches -> the loss, detached."""
        total = torch.zeros((), dtype=part.x_BCHW.dtype, device=part.y_B.device)
        recomputes = self.step.memory == "recompute"
        for group in self.row.groups() if recomputes else [self.row.learned]:
            if not group:
                continue
            logits = self._learned(part, views, group) if recomputes else known
            loss = partial_loss(self.row, group, logits, teaching, part.y_B,
                                list(zip(self.hooks, counts, strict=True)))
            (loss / part.parts).backward()
            total += loss.detach()
        for hook in self.hooks:
            hook.after_backward(part, views)
        return total

    def gradients(self) -> list[Tensor]:
        """Gradients of the trainable parameters, in order; zeros where a parameter took no part."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in parameters if p.grad is not None]

    def reduced(self) -> Tensor:
        """Let hooks change the averaged gradient, clip it if the settings say so -> its norm before the clipping
        (scalar, not finite if a part is not)."""
        for hook in self.hooks:
            hook.after_reduce()
        gradients = self.gradients()
        if not gradients:  # a frozen peer
            return torch.zeros((), device=next(self.model.parameters()).device)
        norm: Tensor = torch.nn.utils.get_total_norm(gradients)
        if self.spec.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.spec.optim.clip_norm, norm)
        return norm

    def update(self, step: int, lr: float, gather: Callable[[Tensor], Tensor]) -> None:
        """One optimizer step at rate `lr`; gradients are dropped. The averaged weights follow in `average`."""
        for hook in self.hooks:
            hook.commit(step, gather)
        if self.spec.frozen:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def average(self, step: int) -> None:
        """Let the averaged weights follow those after the update of `step`."""
        if self.ema is None:
            return
        decay = self.spec.optim.ema_decay
        kept = next((hook.kept_share(step) for hook in self.hooks if hook.averages), 1.0)
        if (share := kept if decay is None else ema_decay_at(step, decay)) < 1:
            average(self.ema, self.model.state_dict(), share)

    def forget(self) -> None:
        """After a refused step: weights, gradients and counts as before it."""
        for hook in self.hooks:
            hook.abort()
        self.optimizer.zero_grad()

    def buffers(self) -> list[Tensor]:
        """The running statistics of the norm layers, live."""
        return bn_buffers(self.model)

    # ---------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs of this peer: tensors and plain numbers."""
        told = {hook.name: state for hook in self.hooks if (state := hook.state_dict())}
        return {"name": self.name, "model": self.model.state_dict(), "ema": self.ema,
                "optimizer": self.optimizer.state_dict(), "methods": told}

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take over the weights of another model of this architecture. Raises RuntimeError if they do not fit."""
        self.model.load_state_dict(weights)
        if self.ema is not None:
            self.ema = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same architecture, optimizer and methods."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for hook in self.hooks:
            hook.load_state_dict(state["methods"].get(hook.name, {}))
        if self.ema is not None:
            torch._foreach_copy_(list(self.ema.values()), [state["ema"][k].to(v.device) for k, v in self.ema.items()])

    # ---------------------------------------------------------------- inside

    def stream(self, purpose: str, *indices: int) -> int:
        """Key of one of this peer's random streams."""
        return rng.key(self.seed, purpose, *indices, self.spec.stream or 0)

    def arrange(self, x_BCHW: Tensor) -> Tensor:
        """Images in the layout of a run, channels last; the same on every path, since layout changes rounding."""
        return x_BCHW.contiguous(memory_format=torch.channels_last)

    def precision(self) -> AbstractContextManager[Any]:
        """The scope in which this run calls models: autocast with bf16."""
        return autocast(self.step.precision, next(self.model.parameters()).device)

    @contextmanager
    def drawing(self, draw: Sequence[int]) -> Iterator[None]:
        """Key the global generator for models that draw from it; others do not pay for it."""
        with rng.keyed_rng(self.stream("forward", *draw)) if self._stochastic else nullcontext():
            yield


def _draws(module: nn.Module) -> bool:
    """Whether a module uses the global generator in training: dropout, stochastic depth, drop path."""
    kind = type(module).__name__.lower()
    return isinstance(module, nn.modules.dropout._DropoutNd) or "stochasticdepth" in kind or "droppath" in kind
