"""Published methods, one file each: presets, strategies, settings, rules, a hook. Without its file a method is gone.

`config.methods` finds the files and imports them, for `--help` too, which must not wait for torch: so they take heavy
modules with `lazy`.
"""

from __future__ import annotations

import importlib
from typing import Any


class lazy:
    """The module of this name, imported when something of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, item: str) -> Any:
        return getattr(importlib.import_module(self._name), item)
