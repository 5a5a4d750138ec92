"""A peer: one classifier with its own weights, optimizer, threat, attack and random streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.crafter import Crafter
from mat_dist.attacks.norms import Threat
from mat_dist.attacks.training_attack import autocast
from mat_dist.config.schema import PeerConfig, StepConfig
from mat_dist.core.graph import PeerPlan
from mat_dist.core.losses import cross_entropy
from mat_dist.core.objective import own_loss, own_slots, partial_loss
from mat_dist.core.opinions import Opinions
from mat_dist.core.schedules import ema_decay_at, swa_count, swa_decay_at
from mat_dist.core.sgd import SGD, average
from mat_dist.methods.awp import WeightPerturbation
from mat_dist.methods.ramp import NaturalGradient
from mat_dist.models.modes import batch_stats_only, bn_buffers, frozen, set_bn_forwards, split_norm_bias


class Peer:
    """One classifier of the cohort.

    Args:
        index: position in the cohort.
        spec: complete settings (`config.load_config` fills them).
        model: images in [0, 1] -> logits, on its device, in its precision.
        seed: the run's seed; with `spec.stream` it keys every draw of this peer.
        step: precision and layout.

    Attributes:
        notes: what the run should tell its user, e.g. that memory ran out once; who tells it empties the list.
    """

    def __init__(self, index: int, spec: PeerConfig, model: nn.Module, *, seed: int, step: StepConfig) -> None:
        assert spec.stream is not None
        self.index, self.spec, self.model, self.seed = index, spec, model, seed
        self.name = spec.name or f"peer{index}"
        self.threat = Threat(spec.threat.norm, spec.threat.eps)
        model.requires_grad_(not spec.frozen)
        self.optimizer = build_optimizer(model, spec)
        self.ema: dict[str, Tensor] | None = None
        if spec.optim.averages and not spec.frozen:
            self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self._precision = step.precision
        self._layout = torch.channels_last if step.channels_last else torch.contiguous_format
        self.recomputes = step.memory == "recompute"  # also set when `keep` ran out of memory once
        self.notes: list[str] = []
        self.plan: PeerPlan | None = None
        self._steps_per_epoch = self._total_steps = 1
        self._weights = WeightPerturbation(model, spec.optim.awp_gamma)
        self.right: list[Tensor] = []  # on how many of the AEs that it drew it was right, by micro-batch
        self.natural = NaturalGradient(model, spec.union.projection_beta)
        self.crafter = Crafter(self.name, spec, model, step, self.stream, self.notes)
        self._stochastic = any(_draws(m) for m in model.modules())

    # ---------------------------------------------------------------- making adversarial examples

    def attack(self, x_BCHW: Tensor, y_B: Tensor, step: int, first_row: int = 0,
               teacher_BK: Tensor | None = None) -> Tensor:
        """This peer's AEs of a clean batch -> (B, C, H, W) in [0, 1].

        The model is left as it was. Raises torch.OutOfMemoryError if half a batch does not fit into memory.

        Args:
            step: training step, keys the start noise.
            first_row: row of the global batch at which x_BCHW starts.
            teacher_BK: logits of a teacher on x_BCHW, for `attack.loss: kl_teacher`.
        """
        return self.crafter(self.arrange(x_BCHW), y_B, step, first_row, teacher_BK)

    def attack_others(self, x_BCHW: Tensor, y_B: Tensor, step: int, first_row: int = 0) -> list[Tensor]:
        """AEs for the other threats of a union that is learnt as a whole, in order; none for other peers."""
        assert self.plan is not None
        return self.crafter.others(self.arrange(x_BCHW), y_B, step, first_row) if len(self.plan.own) > 1 else []

    def sees(self, inputs_S: list[Tensor]) -> list[Tensor]:
        """The images of each slot for this peer: with attack.method free its own AEs as a leaf, whose gradient `climb`
        reads."""
        if not self.crafter.free:
            return inputs_S
        own = inputs_S[self.index].detach().requires_grad_()
        return [*inputs_S[:self.index], own, *inputs_S[self.index + 1:]]

    def climb(self, inputs_S: list[Tensor], step: int, first_row: int) -> None:
        """After the backward pass, with attack.method free: where the next AEs begin."""
        own = inputs_S[self.index]
        if self.crafter.free and own.grad is not None:
            assert self.plan is not None
            self.crafter.climb(own, own.grad, inputs_S[self.plan.clean], step, first_row)

    def uphill(self, adv_BCHW: Tensor, x_BCHW: Tensor, y_B: Tensor, step: int, first_row: int = 0) -> list[Tensor]:
        """AWP's gradients of the peer's own loss; batch-norm statistics stay.

        None without `optim.awp_gamma`, before its warm-up has ended, and where the peer learns from others alone:
        alike on all replicas.
        """
        assert self.plan is not None
        optim, slots = self.spec.optim, own_slots(self.plan)
        if not (optim.awp_gamma and slots) or step < optim.awp_warmup_epochs * self._steps_per_epoch:
            return []
        inputs = {self.plan.index: adv_BCHW, self.plan.clean: x_BCHW}
        with torch.enable_grad(), self.precision(), self._drawing((step, -2, first_row)), batch_stats_only(self.model):
            loss = own_loss(self.plan, {slot: self._logits(inputs[slot]) for slot in slots}, y_B)
        return self._weights.gradients(loss)

    def perturb(self, gradients: Sequence[Tensor]) -> None:
        """AWP: move the weights along what `uphill` gave, averaged over replicas, until `restore`."""
        if gradients:
            self._weights.perturb(gradients)

    def restore(self) -> None:
        """Undo `perturb`, bit by bit."""
        self._weights.restore()

    def forget(self) -> None:
        """After a refused step: weights, gradients and counts as before it."""
        self._weights.restore()
        self.crafter.forget()
        self.natural.parts, self.right = [], []
        self.optimizer.zero_grad(set_to_none=True)

    # ---------------------------------------------------------------- forwards

    def learn(self, x_BCHW: Tensor, draw: Sequence[int]) -> Tensor:
        """Train-mode logits (B, K) with a graph; running BN statistics move.

        Args:
            draw: indices that key dropout and the like: step, slot, first row.
        """
        with torch.enable_grad(), self.precision(), self._drawing(draw):
            return self._logits(x_BCHW)

    def teach(self, x_BCHW: Tensor, draw: Sequence[int]) -> Tensor:
        """The same logits as `learn`, without a graph and without a trace in the BN buffers; of a frozen peer in eval
        mode."""
        mode = frozen if self.spec.frozen else batch_stats_only
        with torch.no_grad(), self.precision(), self._drawing(draw), mode(self.model):
            return self._logits(x_BCHW)

    def teach_averaged(self, x_BCHW: Tensor) -> Tensor:
        """Eval-mode logits of the averaged weights (B, K), without a graph; of a frozen peer those of its weights."""
        state = self.ema if self.ema is not None else self.model.state_dict()
        with torch.no_grad(), self.precision(), frozen(self.model):
            logits: Tensor = torch.func.functional_call(self.model, state, (self.arrange(x_BCHW),))
        return logits.to(x_BCHW.dtype)

    def _logits(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.model(self.arrange(x_BCHW))
        return logits.to(x_BCHW.dtype)

    # ---------------------------------------------------------------- learning

    def loss(self, slots: Sequence[int], logits: Mapping[int, Tensor], opinions: Opinions, y_B: Tensor,
             right: Tensor | None = None) -> Tensor:
        """The terms of the mutual loss that belong to `slots`; see `objective.partial_loss`."""
        assert self.plan is not None
        return partial_loss(self.plan, slots, logits, opinions, y_B, right)

    def learn_naturally(self, x_BCHW: Tensor, y_B: Tensor, step: int, first_row: int = 0, share: float = 1.0) -> None:
        """RAMP's projection: add `share` of the gradient on clean images to `natural`; batch-norm statistics stay."""
        if not self.spec.union.projection_beta or self.spec.frozen:
            return
        with torch.enable_grad(), self.precision(), self._drawing((step, -3, first_row)), batch_stats_only(self.model):
            loss = share * cross_entropy(self._logits(x_BCHW), y_B, self.spec.loss.label_smoothing or 0.0)
        self.natural.add(loss)

    def gradients(self) -> list[Tensor]:
        """Gradients of the trainable parameters, in order; zeros where a parameter took no part."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in parameters if p.grad is not None]

    def clip(self) -> Tensor:
        """Clip the gradient if the settings say so -> its norm before that (scalar, not finite if a part is not)."""
        gradients = self.gradients()
        if not gradients:  # a frozen peer
            return torch.zeros((), device=next(self.model.parameters()).device)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.spec.optim.clip_norm is not None:
            torch._foreach_mul_(gradients, (self.spec.optim.clip_norm / (norm + 1e-6)).clamp(max=1))
        return norm

    def update(self, step: int, lr: float) -> None:
        """One optimizer step at rate `lr`; gradients are dropped. The averaged weights follow in `average`."""
        self._weights.restore()
        self.crafter.commit()
        self.right = []
        if self.spec.frozen:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def average(self, step: int) -> None:
        """Let the averaged weights follow those after the update of `step`."""
        if self.ema is not None and (decay := self._kept_share(step)) < 1:
            average(self.ema, self.model.state_dict(), decay)

    def _kept_share(self, step: int) -> float:
        """How much of the averaged weights stays at this update."""
        optim = self.spec.optim
        if optim.ema_decay is not None:
            return ema_decay_at(step, optim.ema_decay)
        assert optim.swa_start is not None
        return swa_decay_at(step, optim.swa_start, total_steps=self._total_steps, steps_per_epoch=self._steps_per_epoch)

    def averaged_epochs(self, done: int) -> int:
        """How many epochs the SWA weights average after `done` steps; 0 without SWA."""
        start = self.spec.optim.swa_start
        if self.ema is None or start is None:
            return 0
        return swa_count(done, start, total_steps=self._total_steps, steps_per_epoch=self._steps_per_epoch)

    def follow(self, plan: PeerPlan, *, forwards: int, steps_per_epoch: int, total_steps: int = 1) -> None:
        """Learn by this plan from now on.

        Args:
            forwards: learning forwards that make one step; running statistics of norm layers keep their pace.
            total_steps: of the training; a share of them starts SWA.
        """
        self.plan, self._steps_per_epoch, self._total_steps = plan, steps_per_epoch, total_steps
        self.crafter.steps_per_epoch = steps_per_epoch
        set_bn_forwards(self.model, max(1, forwards))

    def buffers(self) -> list[Tensor]:
        """The running statistics of the norm layers, live."""
        return bn_buffers(self.model)

    # ---------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs of this peer: tensors and plain numbers."""
        return {"name": self.name, "model": self.model.state_dict(), "ema": self.ema,
                "optimizer": self.optimizer.state_dict(), **self.crafter.state()}

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take over the weights of another model of this architecture. Raises RuntimeError if they do not fit."""
        self.model.load_state_dict(weights)
        if self.ema is not None:
            self.ema = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state of the same architecture and optimizer."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.crafter.load(state)
        if self.ema is not None:
            torch._foreach_copy_(list(self.ema.values()), [state["ema"][k].to(v.device) for k, v in self.ema.items()])

    # ---------------------------------------------------------------- inside

    def stream(self, purpose: str, *indices: int) -> int:
        """Key of one of this peer's random streams."""
        return rng.key(self.seed, purpose, *indices, self.spec.stream or 0)

    def arrange(self, x_BCHW: Tensor) -> Tensor:
        """Images in the memory layout of this run; the same on every path, since layout changes rounding."""
        return x_BCHW.contiguous(memory_format=self._layout)

    def precision(self) -> AbstractContextManager[Any]:
        """The scope in which this run calls models: autocast with bf16."""
        return autocast(self._precision, next(self.model.parameters()).device)

    @contextmanager
    def _drawing(self, draw: Sequence[int]) -> Iterator[None]:
        """Key the global generator for models that draw from it; others do not pay for it."""
        with rng.keyed_rng(self.stream("forward", *draw)) if self._stochastic else nullcontext():
            yield


def _draws(module: nn.Module) -> bool:
    """Whether a module uses the global generator in training: dropout, stochastic depth, drop path."""
    kind = type(module).__name__.lower()
    return isinstance(module, nn.modules.dropout._DropoutNd) or "stochasticdepth" in kind or "droppath" in kind


def build_optimizer(model: nn.Module, spec: PeerConfig) -> SGD:
    """SGD over the trainable parameters; norm layers and biases are spared weight decay when the settings say so."""
    optim = spec.optim
    if optim.decay_norm_bias:
        groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    else:
        decayed, spared = split_norm_bias(model)
        groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return SGD([g for g in groups if g["params"]], lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov,
               weight_decay=optim.weight_decay)
