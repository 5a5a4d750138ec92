"""Python files of the user that register models, norms, methods or data. They come from the command line only."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from types import CodeType
from typing import Any

from mat_dist.errors import ConfigError

_MODULE = "mat_dist_plugin_"  # begins the names of their modules
_PUBLIC = "mat_dist.models, mat_dist.data, mat_dist.attacks, mat_dist.methods, mat_dist.config and mat_dist.rng"


class _Source(SourceFileLoader):
    """Runs bytes that were read before, so that what is recorded is what ran (and no stale bytecode)."""

    def __init__(self, name: str, path: str, data: bytes) -> None:
        super().__init__(name, path)
        self.data = data

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.data, self.path)


def load_plugins(paths: Sequence[str]) -> dict[str, str]:
    """Import each file as a module of its own; the same content is imported once per process.

    Returns:
        The SHA-256 of each file by its path as given.

    Raises:
        ConfigError: a file is missing, or raises while it is imported.
    """
    digests: dict[str, str] = {}
    for path in paths:
        try:
            with open(path, "rb") as file:
                data = file.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot read the plug-in: {reason}", f"--plugin {ascii(path)[1:-1]}",
                              "give the path of a Python file") from None
        digests[path] = hashlib.sha256(data).hexdigest()
        _run(path, data, module_name(digests[path]))
    return digests


def module_name(digest: str) -> str:
    """Under which name a file with this SHA-256 is imported."""
    return f"{_MODULE}{digest[:16]}"


def origins(made: Iterable[Any]) -> list[str]:
    """The modules of plug-ins that define some of these functions and classes; the names tell the files' content."""
    return sorted({one.__module__ for one in made if str(one.__module__).startswith(_MODULE)})


def other_plugins(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The plug-ins (SHA-256 by path) in which two starts differ, in words; empty where all contents are the same."""
    gone = [f"{path} ({str(digest)[:12]})" for path, digest in before.items() if digest not in now.values()]
    new = [f"{path} ({str(digest)[:12]})" for path, digest in now.items() if digest not in before.values()]
    return f"{', '.join(gone) or 'none'} -> {', '.join(new) or 'none'}" if gone or new else ""


def _run(path: str, data: bytes, name: str) -> None:
    """Import `data` as the module `name`, unless this process has it."""
    if name in sys.modules:
        return
    spec: Any = importlib.util.spec_from_file_location(name, loader=_Source(name, path, data))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f"--plugin {ascii(path)[1:-1]}" + (f", line {line}" if line else "")
        own = isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "mat_dist"
        raise ConfigError(f"the plug-in raised {type(error).__name__}: {error}", place,
                          f"plug-ins import from {_PUBLIC}" if own else
                          "correct the file; it must import without error") from error


def raised(error: BaseException) -> str:
    """What a plug-in's function raised, and the innermost line of a plug-in that it came through; or how it left, which
    would keep other ranks waiting."""
    if isinstance(error, SystemExit):
        return f"left with sys.exit({error.code!r})"
    files = {getattr(module, "__file__", None) for name, module in list(sys.modules.items())
             if name.startswith(_MODULE)}
    lines = [f" ({frame.filename}, line {frame.lineno})" for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename in files]
    return " ".join(f"raised {type(error).__name__}: {error}".split()) + (lines[-1] if lines else "")
