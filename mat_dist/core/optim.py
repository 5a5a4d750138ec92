"""The optimizer of a peer, its learning rate, and its averaged weights: pure functions of settings and step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist.config.schema import Config, OptimConfig
from mat_dist.config.tree import joined
from mat_dist.errors import ConfigError
from mat_dist.models.modes import copy_all, split_norm_bias

SHORT_NAMES = {"sgd": "SGD", "adamw": "AdamW"}
OWN = {"params", "lr", "weight_decay"}  # arguments that other settings give
UNFIT = {"capturable", "differentiable"}  # for steps inside CUDA graphs, and for gradients through them
# Arguments that are ours: a layer learns at so much of the next one's rate; norm layers and biases are decayed too.
LAYER_DECAY, DECAYS_ALL = "layer_decay", "decay_norm_bias"
WAITS = {"ASGD", "Adafactor"}  # they read numbers of the device in each update
DEFAULTS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}}  # as nearly all recipes of adversarial training
ONECYCLE_RISE = 0.3  # share of the training before the peak (torch.optim.lr_scheduler.OneCycleLR's default)
DECAY_FACTOR = 0.1  # of `piecewise` at each milestone


def optimizer_class(optim: OptimConfig, where: str) -> type[torch.optim.Optimizer]:
    """The class that settings name, all of whose arguments are known.

    Raises:
        ConfigError: there is no such class, it needs a closure, or it does not take an argument.
    """
    name = SHORT_NAMES.get(optim.name, optim.name)
    known = sorted(key for key, value in vars(torch.optim).items() if inspect.isclass(value)
                   and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
                   and key not in ("LBFGS", "SparseAdam"))  # they need a closure, or sparse gradients
    if name not in known:
        raise ConfigError(f"there is no optimizer {optim.name}", f"{where}.optim.name",
                          f"use sgd, adamw, or a class of torch.optim: {', '.join(known)}")
    kind: type[torch.optim.Optimizer] = getattr(torch.optim, name)
    takes = set(inspect.signature(kind).parameters) - OWN - UNFIT | {LAYER_DECAY, DECAYS_ALL}
    decay = optim.args.get(LAYER_DECAY, 1.0)
    if not isinstance(decay, int | float) or not 0 < decay <= 1:
        raise ConfigError(f"{LAYER_DECAY}={decay}", f"{where}.optim.args", "write a number in (0, 1], such as 0.75")
    if not isinstance(optim.args.get(DECAYS_ALL, True), bool):
        raise ConfigError(f"{DECAYS_ALL}={optim.args[DECAYS_ALL]}", f"{where}.optim.args", "write true or false")
    if given := sorted(set(optim.args) & OWN):
        raise ConfigError(f"{', '.join(given)} among the arguments of {name}", f"{where}.optim.args",
                          "write optim.lr and optim.weight_decay")
    if unknown := sorted(set(optim.args) - takes):
        raise ConfigError(f"{name} has no argument {', '.join(unknown)}", f"{where}.optim.args",
                          f"it takes {', '.join(sorted(takes))}")
    if optim.weight_decay and "weight_decay" not in inspect.signature(kind).parameters:
        raise ConfigError(f"{name} has no weight decay", f"{where}.optim.weight_decay", "write 0")
    return kind


def build_optimizer(model: nn.Module, optim: OptimConfig, where: str = "peers.0") -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters; norm layers and biases are spared weight decay when the settings say
    so. Raises ConfigError for a name, an argument or a value that its class refuses."""
    kind = optimizer_class(optim, where)
    given = {**DEFAULTS.get(kind.__name__, {}), **optim.args}
    groups = _groups(model, optim, given.pop(LAYER_DECAY, None), given.pop(DECAYS_ALL, True), where)
    takes, on_gpu = set(inspect.signature(kind).parameters), next(model.parameters()).is_cuda
    if not {"foreach", "fused"} & set(given):  # one call for all parameters, on CPUs too
        given.update({name: True for name in ["fused" if on_gpu and "fused" in takes else "foreach"] if name in takes})
    if on_gpu and "capturable" in takes:
        given["capturable"] = True  # its counts of steps lie on the GPU, so that its steps can be captured
    if "weight_decay" in takes:
        given["weight_decay"] = optim.weight_decay
    try:
        # YAML has no tuples, and classes ask for them (betas).
        named: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        made = kind([g for g in groups if g["params"]], lr=optim.lr, **named)  # type: ignore[call-arg]
    except (ValueError, TypeError, RuntimeError, IndexError) as refused:  # (0.9,) as betas; foreach beside fused
        raise ConfigError(f"{kind.__name__} refuses its settings: {refused}", f"{where}.optim",
                          "see the class in the documentation of torch.optim") from refused
    for group in made.param_groups:  # where a captured step reads it too; kernels take fp32 alone
        if group.get("fused") and group["params"][0].dtype == torch.float32:
            group["lr"] = torch.full((), optim.lr, device=group["params"][0].device)
    return made


def _groups(model: nn.Module, optim: OptimConfig, layer_decay: float | None, decays_all: bool,
            where: str) -> list[dict[str, Any]]:
    """Parameters with their weight decay, and the share of the rate that they learn at (`lr_scale`), if any."""
    decayed, spared = split_norm_bias(model)
    plain: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    if decays_all:
        plain = [{"params": list(model.parameters())}]
    if layer_decay is None:
        return plain
    # BEiT (Bao et al., ICLR 2022); timm knows the order of the layers of its models.
    known = next((module for module in model.modules() if hasattr(module, "group_matcher")), None)
    if known is None:
        raise ConfigError("only models of timm tell the order of their layers", f"{where}.optim.args.{LAYER_DECAY}",
                          "leave it out, or choose model=timm/NAME")
    from timm.optim import param_groups_layer_decay

    layers = list(param_groups_layer_decay(known, optim.weight_decay, layer_decay=layer_decay,
                                           weight_decay_exclude_1d=not decays_all))
    taken = {parameter for group in layers for parameter in group["params"]}
    return layers + [{**group, "params": [p for p in group["params"] if p not in taken]} for group in plain]


def pace(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let `lr` be the rate of an optimizer; layers with a share of it learn at that."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate


def resume(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over what an optimizer kept. How it works (fused, capturable) follows this run's device, not that one's."""
    own = optimizer.state_dict()["param_groups"]
    groups = [{**group, "params": kept["params"]} for group, kept in zip(own, state["param_groups"], strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    # Files know no layout, and fused kernels read memory in its order; torch gives numbers the type of the weights.
    for (parameter, kept), saved in zip(optimizer.state.items(), state["state"].values(), strict=True):
        kept.update({key: torch.empty_like(parameter, dtype=value.dtype).copy_(value) if value.shape == parameter.shape
                     else value.to(saved[key].dtype) for key, value in kept.items() if isinstance(value, Tensor)})


def optimizer_notes(optim: OptimConfig, model: nn.Module) -> list[str]:
    """What the user should know of an optimizer for this model."""
    waits = optim.name in WAITS and next(model.parameters()).device.type != "cpu"
    return [f"optim.name={optim.name} waits for the GPU in each update"] if waits else []


class LossScale:
    """What losses are multiplied by in fp16, whose numbers end at 6e-8 and 65,504 (Micikevicius et al., ICLR 2018). The
    numbers are those of torch.amp.GradScaler, which knows of no vote.

    Args:
        used: otherwise nothing is scaled.
    """

    START, PATIENCE = 2.0**16, 2000  # doubled after so many updates without an overflow

    def __init__(self, device: torch.device, used: bool) -> None:
        self._value = torch.full((), self.START, device=device) if used else None  # a captured step reads it there
        self._calm = 0

    def up(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        return loss if self._value is None else loss * self._value

    def down(self, gradients: list[Tensor]) -> None:
        """Make gradients of it those of the loss."""
        if self._value is not None and gradients:
            torch._foreach_div_(gradients, self._value)

    def after(self, overflow: bool) -> None:
        """A step was left out for an overflow, or made."""
        self._calm = 0 if overflow else self._calm + 1
        if self._value is not None and (overflow or self._calm == self.PATIENCE):
            self._value.mul_(0.5 if overflow else 2.0)
            self._calm = 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint; empty where nothing is scaled."""
        return {} if self._value is None else {"scale": {"value": self._value, "calm": self._calm}}

    def load(self, state: Mapping[str, Any]) -> None:
        """From a state that holds `state`."""
        if self._value is not None and "scale" in state:
            self._value.copy_(state["scale"]["value"])
            self._calm = int(state["scale"]["calm"])


def clipped(model: nn.Module, gradients: list[Tensor], limit: float | None) -> Tensor:
    """Clip the gradients of a model together to an L2 norm, in place -> their norm before that (scalar, not finite if a
    part is not; 0 where nothing trains)."""
    if not gradients:
        return torch.zeros((), device=next(model.parameters()).device)
    norm: Tensor = torch.nn.utils.get_total_norm(gradients)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


def check_optimizers(config: Config) -> None:
    """Raises ConfigError with all that is wrong with the optimizers of the peers: before models are built."""
    problems: list[ConfigError] = []
    for optim in {spec.optim.model_dump_json(): spec.optim for spec in config.peers}.values():
        users = [str(index) for index, spec in enumerate(config.peers) if spec.optim == optim]
        try:
            optimizer_class(optim, f"peers.{','.join(users)}")
            plain = {key: value for key, value in optim.args.items() if key != LAYER_DECAY}  # this layer has no order
            build_optimizer(nn.utils.skip_init(nn.Linear, 2, 2), optim.model_copy(update={"args": plain}),
                            f"peers.{','.join(users)}")
        except ConfigError as problem:
            problems.append(problem)
    if problems:
        raise joined(problems, "optim")


def lr_at(step: int, *, total_steps: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """Learning rate of step `step` (0-based) of `total_steps`.

    constant and piecewise hold the rate (piecewise divides it by 10 at each milestone's share of the training);
    cosine falls to 0 along half a cosine (Loshchilov and Hutter, ICLR 2017); onecycle rises linearly to the peak and
    falls linearly to 0 (Smith and Topin, 2018; linear as in fast_adversarial). A warm-up rises linearly from
    lr / warm-up steps; cosine then runs over the remaining steps, and milestones stay where they are.
    """
    warmup = round(optim.warmup_epochs * steps_per_epoch)
    if optim.schedule == "onecycle":
        rise = warmup or max(1, round(ONECYCLE_RISE * total_steps))
        if step < rise:
            return optim.lr * (step + 1) / rise
        return optim.lr * (total_steps - step) / max(1, total_steps - rise)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, total_steps - warmup)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * share))
    if optim.schedule == "piecewise":
        return optim.lr * DECAY_FACTOR ** sum(step / total_steps >= m for m in optim.milestones)
    return optim.lr


def ema_decay_at(step: int, decay: float) -> float:
    """Decay of the averaged weights after update number `step` (0-based): min(decay, (1 + t) / (10 + t)).

    The warm-up of TensorFlow's ExponentialMovingAverage, so that a short run does not average its random start.
    """
    return min(decay, (1 + step) / (10 + step))


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers as they are now."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def average(ema: dict[str, Tensor], state: dict[str, Tensor], decay: float) -> None:
    """ema <- decay ema + (1 - decay) state for floating tensors (BN statistics too); integers are copied.

    torch's AveragedModel would copy the model, start from its first update and refuse counters.
    """
    if decay == 1:
        return
    floating = [k for k, v in ema.items() if v.is_floating_point()]
    torch._foreach_lerp_([ema[k] for k in floating], [state[k] for k in floating], 1 - decay)
    counters = [k for k, v in ema.items() if not v.is_floating_point()]
    copy_all([ema[k] for k in counters], [state[k] for k in counters])
