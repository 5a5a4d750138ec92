"""Python files of the user that register models, losses or data. They come from the command line only."""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from types import CodeType
from typing import Any

from mat_dist.errors import ConfigError


class _Source(importlib.abc.ExecutionLoader):
    """Runs bytes that were read before, so that what is recorded is what ran (and no stale bytecode)."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path, self.data = path, data

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.data)

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
        _run(path, data, f"mat_dist_plugin_{digests[path][:16]}")
    return digests


def _run(path: str, data: bytes, name: str) -> None:
    """Import `data` as the module `name`, unless this process has it."""
    if name in sys.modules:
        return
    spec: Any = importlib.util.spec_from_loader(name, _Source(path, data))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f"--plugin {ascii(path)[1:-1]}" + (f", line {line}" if line else "")
        raise ConfigError(f"the plug-in raised {type(error).__name__}: {error}", place,
                          "correct the file; it must import without error") from error
