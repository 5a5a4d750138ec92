"""What all sections of the configuration are made of: numbers that accept fractions, their base class, and the
sections that methods bring."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, create_model

from mat_dist.errors import ConfigError


def parse_number(value: Any) -> Any:
    """Accept 0.5, "8/255", "1e-3"; leave anything else to pydantic's own message."""
    if isinstance(value, bool):
        raise ValueError("expected a number, found a truth value")
    if isinstance(value, str):
        try:
            return float(Fraction(value.strip())) if "/" in value else float(value)
        except (ValueError, ZeroDivisionError, OverflowError):  # overflow: a fraction of thousands of digits
            raise ValueError('expected a number such as 0.1, 1e-3 or "8/255"') from None
    return value


def parse_integer(value: Any) -> Any:
    """Accept 10 and "10", refuse 2.5 and truth values."""
    if isinstance(value, bool):
        raise ValueError("expected a whole number, found a truth value")
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise ValueError("expected a whole number") from None
    return value


Number = Annotated[float, BeforeValidator(parse_number)]
Integer = Annotated[int, BeforeValidator(parse_integer)]


class Section(BaseModel):
    """A group of settings: immutable, no unknown keys, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_METHODS: dict[str, tuple[type[Section], str]] = {}  # section and description by name, in the order of registration


def register_section(name: str, section: type[Section], description: str) -> None:
    """Make the fields of `section` known as `methods.<name>.<field>`, at the top level and for each peer.

    A peer whose configuration names the section has an instance of it as `peer.methods[name]`. Settings without a
    default must be given by whoever names it.

    Raises:
        ConfigError: the name is not a word in lower case, or another section has it.
    """
    where = f"{section.__module__}.{section.__qualname__}"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"{name!a} cannot name a section of settings", where,
                          "use lower-case letters, digits and _, a letter first")
    taken = _METHODS.get(name, (section, ""))[0]
    if f"{taken.__module__}.{taken.__qualname__}" != where:  # the same plug-in may be loaded twice in one process
        raise ConfigError(f"the section methods.{name} is registered twice", where, "choose another name")
    _METHODS[name] = (section, description)


@cache
def _methods_model(known: tuple[tuple[str, tuple[type[Section], str]], ...]) -> type[Section]:
    fields: dict[str, Any] = {name: (section, Field(None, description=description))
                              for name, (section, description) in known}
    return create_model("MethodsConfig", __base__=Section, __doc__="Settings of methods, a section for each.", **fields)


def methods_model() -> type[Section]:
    """A section whose fields are the registered sections; the same class until another one is registered."""
    return _methods_model(tuple(_METHODS.items()))


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


NORMS = ("linf", "l2", "l1")
SMALLEST_EPS, LARGEST_EPS = 1e-6, 1e4


def parse_threats(text: str) -> list[tuple[str, float]]:
    """Norms and radii of "linf:8/255,l2:1/2,l1:12". Raises ValueError, naming the part that cannot be read."""
    found = []
    for part in text.split(","):
        norm, colon, eps = (piece.strip() for piece in part.partition(":"))
        try:
            value = float(Fraction(eps))
        except (ValueError, ZeroDivisionError, OverflowError):
            value = 0.0
        if norm not in NORMS or not colon or not SMALLEST_EPS <= value <= LARGEST_EPS:
            raise ValueError(f"{ascii(part.strip())[1:-1][:80]!r} is not a threat")
        found.append((norm, value))
    return found


def real_images(batch_size: int, generated_share: float) -> int:
    """Images of a batch that are not generated."""
    return batch_size - round(generated_share * batch_size)
