"""Networks by name, and the finished classifier: normalisation, then the network with its initial weights."""

from __future__ import annotations

import difflib
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.config.plugins import origins, raised
from mat_dist.config.schema import ModelConfig, PeerConfig, StepConfig
from mat_dist.errors import ConfigError, MatError
from mat_dist.models.library import PREFIXES, in_libraries, library_builder
from mat_dist.models.modes import frozen

Shape = tuple[int, int, int]
Size = Annotated[int, Field(ge=1, le=1 << 16, strict=True)]  # of what a file tells
Builder = Callable[[ModelConfig, Shape, int], nn.Module]
AnyBuilder = TypeVar("AnyBuilder", bound=Builder)
_BUILDERS: dict[str, Builder] = {}
# By the pattern of their names: what makes a builder of its groups, and names that are shown.
_FAMILIES: dict[str, tuple[Callable[..., Builder], tuple[str, ...]]] = {
    f"((?:{'|'.join(PREFIXES)}).*)": (library_builder, ())}
BUILDER = "correct it; a builder takes (config, shape, classes) and returns a module"
ROUNDING = 1e-5  # of probabilities that sum up to 1
DTYPES = {"fp64": torch.float64,  # of images, losses
          **dict.fromkeys(("fp32", "tf32", "ieee", "bf16", "fp16"), torch.float32)}


def register_model(name: str) -> Callable[[AnyBuilder], AnyBuilder]:
    """Decorator that makes a builder known as `model.name=<name>`; also for files given with --plugin.

    The builder gets (config, shape, classes), with shape (C, H, W), and returns a module that turns normalised images
    (B, C, H, W) into raw logits (B, classes). It draws its weights from torch's global generator, which the caller has
    seeded, and may read `config.width`, `config.activation` and `config.norm`.

    Raises ConfigError: another builder has the name, or the name starts with torchvision/ or timm/.
    """

    def register(builder: AnyBuilder) -> AnyBuilder:
        where = _origin(builder)
        if name.startswith(PREFIXES):
            raise ConfigError(f"model name {name!r} is taken by a library", where,
                              f"do not start with {' or '.join(PREFIXES)}")
        # The same plug-in may be loaded twice in one process.
        if name in model_names() and not (name in _BUILDERS and _origin(_BUILDERS[name]) == where):
            raise ConfigError(f"model name {name!r} is registered twice", where, "choose another name")
        _BUILDERS[name] = builder
        return builder

    return register


def register_family(pattern: str, *shown: str) -> Callable[[Callable[..., Builder]], Callable[..., Builder]]:
    """Decorator for a function from the groups of a name that matches `pattern` to its builder; some names to show."""
    def register(make: Callable[..., Builder]) -> Callable[..., Builder]:
        _FAMILIES[pattern] = (make, shown)
        return make

    return register


def _origin(builder: Builder) -> str:
    return f"{builder.__module__}.{getattr(builder, '__qualname__', repr(builder))}"


def model_names() -> tuple[str, ...]:
    """Names of the built-in networks and of those that plug-ins have registered, sorted; of families the usual ones."""
    return tuple(sorted([*_BUILDERS, *(name for _, shown in _FAMILIES.values() for name in shown)]))


class Normalize(nn.Module):
    """(x - mean) / std per channel, for images in [0, 1].

    mean and std are buffers of shape (1, C, 1, 1) and part of the state dict, so a checkpoint is complete.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            # float: whole numbers such as std 1 would otherwise become integer buffers.
            self.register_buffer(name, torch.tensor([float(v) for v in values]).reshape(1, -1, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (x_BCHW - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"channels={self.mean.shape[1]}"


def build_model(config: ModelConfig, *, shape: Shape, classes: int, mean: Sequence[float],
                std: Sequence[float]) -> nn.Module:
    """A classifier over float images (B, C, H, W) in [0, 1] that returns raw logits (B, classes).

    A Sequential of `normalize` and `net` on torch's default device. Weights are drawn from torch's global generator:
    wrap the call in `rng.keyed_rng`. One image is passed through before the model is returned.

    Args:
        shape: (C, H, W) of an image.
        mean, std: per channel, in [0, 1] units; std above 0. Those of a net with an attribute `normalisation` count.

    Raises ConfigError: unknown name, a setting that the architecture does not support, or images that it cannot take;
    EnvironmentFault: timm/<name> without timm.
    """
    check_moments(shape[0], mean, std)
    if classes < 2:
        raise ConfigError(f"{classes} classes", "data", "a classifier needs at least 2")
    builder = find_builder(config.name)
    try:
        net = builder(config, shape, classes)
        if not isinstance(net, nn.Module):
            raise ConfigError(f"its builder returned {type(net).__name__}", f"model.name={config.name}", BUILDER)
        mean, std = getattr(net, "normalisation", (mean, std))
        model = nn.Sequential(OrderedDict(normalize=Normalize(mean, std), net=net))
        grey = torch.full_like(model.get_submodule("normalize").get_buffer("mean"), 0.5).expand(1, *shape).contiguous()
        logits_BK = try_images(model, grey, f"model.name={config.name}", classes)
        if not logits_BK.is_meta and not logits_BK.isfinite().all():
            raise ConfigError("a fresh model returns logits that are not finite", f"model.name={config.name}",
                              "check its initial weights")
    except (Exception, SystemExit) as error:
        ours = builder.__module__.startswith("mat_dist.") and not isinstance(error, SystemExit)
        if ours or isinstance(error, (MatError, MemoryError)):
            raise
        raise ConfigError(f"its builder {raised(error)}", f"model.name={config.name}", BUILDER) from error
    return model


def parameter_count(model: nn.Module) -> int:
    """Number of trained values; buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_moments(channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises ConfigError for a mean and deviation per channel that cannot normalise."""
    if not len(mean) == len(std) == channels:
        raise ConfigError(f"mean has {len(mean)} and std {len(std)} values for {channels} channels", "data",
                          "give one mean and one std per channel")
    if not all(math.isfinite(m) for m in mean) or not all(math.isfinite(s) and s > 0 for s in std):
        raise ConfigError(f"mean {tuple(mean)} or std {tuple(std)} cannot normalise", "data",
                          "means must be finite, deviations finite and above 0")


def find_builder(name: str) -> Builder:
    """The builder of a name. Raises ConfigError for an unknown one."""
    made, arguments = made_by(name)
    return made if arguments is None else made(*arguments)


def made_by(name: str) -> tuple[Callable[..., Any], tuple[str, ...] | None]:
    """The builder of a name; or what makes it, and of which arguments. Raises ConfigError for an unknown one."""
    if (found := _match(name)) is None:
        near = [name.lower()] if is_known(name.lower()) else in_libraries(name) or difflib.get_close_matches(
            name.lower(), model_names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        known = ", ".join((*model_names(), *(f"{prefix}<name>" for prefix in PREFIXES)))
        raise ConfigError(f"unknown model {name!r}", "model.name", f"{hint}Known: {known}, or a name from --plugin")
    return found


def of_plugins(specs: Iterable[PeerConfig], *others: Any) -> dict[str, list[str]]:
    """{"plugins": the modules of plug-ins that define the networks of these peers, or other classes}; empty where there
    is none. Their names tell the files' content."""
    found = origins([*(made_by(spec.model.name)[0] for spec in specs), *others])
    return {"plugins": found} if found else {}


def is_known(name: str) -> bool:
    """Whether a builder has this name, or it is spelt like those of a family or a library."""
    return _match(name) is not None


def _match(name: str) -> tuple[Callable[..., Any], tuple[str, ...] | None] | None:
    if name in _BUILDERS:
        return _BUILDERS[name], None
    return next(((make, match.groups()) for pattern, (make, _) in _FAMILIES.items()
                 if (match := re.fullmatch(pattern, name))), None)


def try_images(model: nn.Module, x_BCHW: Tensor, where: str, classes: int | None = None) -> Tensor:
    """Pass images through in eval mode, so that a misfit shows before anything begins -> logits (B, K). Raises
    ConfigError unless they are raw logits, of so many classes where that is known."""
    count, shape = len(x_BCHW), tuple(x_BCHW.shape[1:])
    try:
        with frozen(model), torch.no_grad():
            logits_BK = model(x_BCHW)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"the model cannot take images of shape {shape}: it {raised(error)}", where,
                          "choose another model, or another image size") from error
    found = tuple(logits_BK.shape) if isinstance(logits_BK, Tensor) else type(logits_BK).__name__
    if not isinstance(logits_BK, Tensor) or found[:-1] != (count,) or found[-1] != (classes or max(found[-1], 2)):
        raise ConfigError(f"the model returns {found} for {count} image{'s' * (count > 1)} of shape {shape}", where,
                          f"return raw logits of shape (B, {classes or 'classes'})")
    if not logits_BK.is_meta and ((logits_BK >= 0).all(1) & ((logits_BK.sum(1) - 1).abs() < ROUNDING)).all():
        raise ConfigError("the model returns probabilities, behind which gradients hide", where,
                          "return raw logits: leave its softmax out")
    return logits_BK


@dataclass(frozen=True)
class Images:
    """What the models must fit: image shape (C, H, W), number of classes, mean and deviation of each channel."""

    shape: tuple[Size, Size, Size]
    classes: Size
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]


def make_model(spec: PeerConfig, images: Images, *, seed: int, step: StepConfig, device: torch.device) -> nn.Module:
    """A peer's model with its keyed initial weights, in the precision and layout of the run."""
    with rng.keyed_rng(rng.key(seed, "init", spec.stream or 0)):
        model = build_model(spec.model, shape=images.shape, classes=images.classes, mean=images.mean, std=images.std)
    return model.to(device=device, dtype=DTYPES[step.precision]).to(memory_format=torch.channels_last)
