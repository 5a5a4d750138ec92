"""What methods add to the settings: presets, strategies of unions, attacks, a section, rules and hooks.

A published method is one file of `mat_dist/methods/`; a plug-in may hold more. The file calls `register_method`, and
nothing else names it: without the file the method is gone, and whoever asks for it is told what there is. Nothing of
torch is imported here: `--help` reads this.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, create_model
from pydantic_core import PydanticCustomError, core_schema

from mat_dist.config.fields import Section
from mat_dist.errors import ConfigError

if TYPE_CHECKING:
    from mat_dist.config.rules import Rule
    from mat_dist.config.schema import Config, PeerConfig

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """A named set of coefficients of the mutual loss, and what belongs to it.

    Attributes:
        parts: coefficients that differ from `BASE` (config/presets.py); the peer at index i takes `parts[i % len]`.
        attack: `attack.loss` and `attack.start`, by index as above; default: cross-entropy from a uniform start.
        methods: settings of method sections that it needs, by index, e.g. ({"mart": {"beta": 6}},).
        roles: coefficients that replace those of `parts` in a cohort with roles.
        strategy: `union.strategy` of peers that are no specialists, where the settings say nothing of it.
        ema_decay: decay of the averaged weights, where the settings say nothing of them.
        warmup: share of the training in which peers learn alone, where nothing is said of `loss.warmup_epochs`.
    """

    parts: tuple[Values, ...] = ({},)
    attack: tuple[Values, ...] = ({},)
    methods: tuple[Values, ...] = ({},)
    roles: Mapping[str, Values] = field(default_factory=dict)
    strategy: str | None = None
    ema_decay: float | None = None
    warmup: float = 0.0


@dataclass(frozen=True)
class Strategy:
    """How a peer trains against several threats at once.

    Attributes:
        says: one line for `--help`.
        each: it makes AEs for each threat, and its loss combines them; else one batch of AEs.
        worst: of each image only the AE with the highest cross-entropy counts.
    """

    says: str
    each: bool = False
    worst: bool = False


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        name: of the method and of its section of settings, `methods.<name>`.
        says: one line for `--help`.
        section: its settings; a peer that has the section uses the method.
        presets, strategies: by name.
        attack_methods, attack_losses: values of `attack.method` and `attack.loss` that it adds, each with a line.
        attack_defaults: `attack.loss` and `attack.start` of these attack methods, in place of the preset's.
        pairs: its loss couples the logits on clean images and own AEs.
        guided: its attack losses need the teachers' opinion of the clean images.
        rules: what is wrong with a complete configuration, as in `config.rules`, with the sections that they read.
        one_label: whether it asks if predictions of a peer are right, which images with mixed labels do not tell; the
            setting that asks; what to use instead.
        hook: peer -> its hook (`core.hooks.Hook`).
        when: whether a peer with these settings has the hook; default: it has the section.
        kept_bytes: (config, peer, training images, their shape) -> bytes that the hook keeps on the device.
        learning: (peer, its graph) -> passes (forward and backward) that it adds to the learning of a step.
        attack_passes: (peer, steps) -> gradient passes of a first view's attack with so many steps, and forwards alone.
        climbs, counts: its hook has tensors that replicas average before the forwards, or before the loss.
    """

    name: str
    says: str
    section: type[Section] | None = None
    presets: Mapping[str, Preset] = field(default_factory=dict)
    strategies: Mapping[str, Strategy] = field(default_factory=dict)
    attack_methods: Values = field(default_factory=dict)
    attack_losses: Values = field(default_factory=dict)
    attack_defaults: Mapping[str, Values] = field(default_factory=dict)
    pairs: bool = False
    guided: bool = False
    rules: Sequence[tuple[Rule, frozenset[str]]] = ()
    one_label: tuple[Callable[[PeerConfig], bool], str, str] | None = None
    hook: Callable[[Any], Any] | None = None
    when: Callable[[PeerConfig], bool] | None = None
    climbs: bool = False
    counts: bool = False
    kept_bytes: Callable[[Config, PeerConfig, int, tuple[int, ...]], int] | None = None
    learning: Callable[[PeerConfig, Any], int] | None = None
    attack_passes: Callable[[PeerConfig, Fraction], tuple[Fraction, Fraction]] | None = None

    def uses(self, spec: PeerConfig) -> bool:
        """Whether a peer with these settings has the hook."""
        return self.hook is not None and (self.when(spec) if self.when else self.name in spec.methods)

    def guides(self, spec: PeerConfig) -> bool:
        """Whether the attack of a peer with these settings asks its teachers."""
        return self.guided and spec.attack.loss in self.attack_losses


_METHODS: dict[str, Method] = {}
_FILES: dict[str, str] = {}  # name -> the file that registered it
# What needs no method.
ATTACK_METHODS = {"pgd": "equal steps, the last point counts",
                  "apgd": "Auto-PGD sets its own steps, the best point counts",
                  "n_fgsm": "one step from noise of 2 eps, not cut to the ball (linf, steps: 1)"}
ATTACK_LOSSES = {"ce": "cross-entropy", "kl_clean": "KL to the own clean prediction (TRADES)",
                 "margin": "the CW margin"}


def register_method(method: Method) -> Method:
    """Add a method, or replace the one of that name and file.

    A section of settings becomes known as `methods.<name>.<field>`, at the top level and for each peer; a peer whose
    configuration names it has an instance as `peer.methods[name]`. Settings without a default must be given then.

    Raises:
        ConfigError: the name is not a word in lower case, or another method has it, or one of the presets,
            strategies, attack methods or attack losses.
    """
    where = f"{method.section.__module__}.{method.section.__qualname__}" if method.section else method.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", method.name):
        raise ConfigError(f"{method.name!a} cannot name a method", where,
                          "use lower-case letters, digits and _, a letter first")
    before, file = _METHODS.get(method.name, method).section, sys._getframe(1).f_code.co_filename
    # The same plug-in may be loaded twice in one process.
    same = (_FILES.get(method.name, file) == file if before is None or method.section is None else
            f"{before.__module__}.{before.__qualname__}" == where)
    if method.name in _METHODS and not same:
        raise ConfigError(f"the method {method.name} is registered twice", where, "choose another name")
    for other in (one for one in _METHODS.values() if one.name != method.name):
        for kind in ("presets", "strategies", "attack_methods", "attack_losses"):
            if twice := sorted(set(getattr(other, kind)) & set(getattr(method, kind))):
                raise ConfigError(f"{', '.join(twice)} is already among the {kind.replace('_', ' ')} of the method "
                                  f"{other.name}", where, "choose another name")
    _METHODS[method.name], _FILES[method.name] = method, file
    return method


@cache
def _import_methods() -> None:
    """Import every file of `mat_dist/methods/`, in the order of their names; each registers itself."""
    package = importlib.import_module("mat_dist.methods")
    for one in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"mat_dist.methods.{one}")


def methods() -> dict[str, Method]:
    """All methods, in the order of their names, which does not depend on who imported what first."""
    _import_methods()
    return dict(sorted(_METHODS.items()))


@cache
def _methods_model(known: tuple[tuple[str, type[Section], str], ...]) -> type[Section]:
    fields: dict[str, Any] = {name: (section, Field(None, description=says)) for name, section, says in known}
    return create_model("MethodsConfig", __base__=Section, __doc__="Settings of methods, a section for each.", **fields)


def methods_model() -> type[Section]:
    """A section whose fields are the registered sections; the same class until another one is registered."""
    return _methods_model(tuple((name, method.section, method.says) for name, method in methods().items()
                                if method.section is not None))


def _read_methods(value: Any) -> Any:
    """The sections that are there by name, each as its class. Problems keep their place: pydantic adds ours."""
    if not isinstance(value, Mapping):
        return value
    given = methods_model().model_validate({name: section for name, section in value.items() if section is not None})
    return {name: getattr(given, name) for name in type(given).model_fields if name in given.model_fields_set}


class _MethodsSchema:
    """In the JSON schema, `methods` is `methods_model`; it and its sections may be empty."""

    @classmethod
    def __get_pydantic_json_schema__(cls, _: Any, handler: Any) -> Any:
        schema = handler(methods_model().__pydantic_core_schema__)
        sections = {name: {"description": given["description"], "anyOf": [{"$ref": given["$ref"]}, {"type": "null"}]}
                    for name, given in schema["properties"].items()}
        return {"anyOf": [{**schema, "properties": sections}, {"type": "null"}]}


# Type of a field `methods`: the sections of the methods that are used, by name.
Methods = Annotated[dict[str, SerializeAsAny[Section]], BeforeValidator(_read_methods), _MethodsSchema]


def presets() -> dict[str, Preset]:
    """All presets by name, but those whose attack or union needs a method that is not there."""
    losses, known = attack_losses(), (None, *strategies())
    return {name: preset for method in methods().values() for name, preset in method.presets.items()
            if preset.strategy in known and all(part.get("loss", "ce") in losses for part in preset.attack)}


def kept_bytes(config: Config, spec: PeerConfig, images: int, shape: tuple[int, ...]) -> int:
    """What the methods of a peer keep on its device of `images` training images of `shape` (C, H, W)."""
    return sum(method.kept_bytes(config, spec, images, shape) for method in methods().values()
               if method.kept_bytes is not None and method.uses(spec))


def strategies() -> dict[str, Strategy]:
    """All strategies of unions by name."""
    return {name: one for method in methods().values() for name, one in method.strategies.items()}


def attack_methods() -> dict[str, str]:
    """Values of `attack.method`, each with a line."""
    return {**ATTACK_METHODS, **{k: v for method in methods().values() for k, v in method.attack_methods.items()}}


def attack_losses() -> dict[str, str]:
    """Values of `attack.loss`, each with a line."""
    return {**ATTACK_LOSSES, **{k: v for method in methods().values() for k, v in method.attack_losses.items()}}


@dataclass(frozen=True)
class Registered:
    """Marks a setting of text whose values are registered: unknown ones are refused as those of a `Literal` are."""

    known: Callable[[], Mapping[str, Any]]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return {**handler(schema), "enum": list(self.known())}

    def _check(self, value: str) -> str:
        if value not in self.known():
            raise PydanticCustomError("literal_error", "is not registered")
        return value
