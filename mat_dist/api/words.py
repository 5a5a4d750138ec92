"""Settings of a program as the words of a command line, which has all checks already. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def setting_words(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`key=value` for each setting: sections may be nested, keys may have dots, text is as on the command line."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from setting_words(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}={value}"
        else:
            yield f"{prefix}{key}={json.dumps(value, default=_plain)}"


def _plain(value: Any) -> Any:
    """Numbers and lists of numpy and torch; paths and fractions as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
