"""Published methods, one file each: presets, strategies, settings, rules, a hook. Without its file a method is gone.

`config.methods` finds the files and imports them, for `--help` too, which must not wait for torch: so they take heavy
modules with `lazy`.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType


def lazy(name: str) -> ModuleType:
    """The module of this name, imported when something of it is first asked for; the packages that it lies in are
    imported at once."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
