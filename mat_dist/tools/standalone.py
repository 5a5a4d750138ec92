"""The source of a network in one file without the package: of its files the definitions that a builder reaches."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from mat_dist.config.schema import ModelConfig
from mat_dist.errors import ConfigError
from mat_dist.models.registry import made_by
from mat_dist.models.robustbench import robustbench

# Names that check settings and speak to users of the package are others in the file.
_INSTEAD = {"ModelConfig": "from types import SimpleNamespace as ModelConfig"}
_ERRORS = ("ConfigError", "EnvironmentFault")


def definitions(networks: Sequence[ModelConfig], ensemble: bool) -> dict[str, Any]:
    """What the template of `model.py` needs of these networks. Raises ConfigError for one of a plug-in."""
    source, builders = _Source(), []
    for name in dict.fromkeys(config.name for config in networks):
        made, arguments = made_by(name)
        if not made.__module__.startswith("mat_dist.") or made is robustbench:
            whose = "the package robustbench" if made is robustbench else "a plug-in, which needs this package"
            raise ConfigError(f"the network {name} is that of {whose}", "--to",
                              "write --to torch_export or --to onnx, whose files hold the network itself")
        source.want(made.__module__, made.__name__)
        builders.append(f"{name!r}: {made.__name__}" + ("" if arguments is None else f"(*{arguments})"))
    for name in ("Normalize", "Ensemble") if ensemble else ("Normalize",):
        source.want("mat_dist.models", name)
    imports = sorted(source.imports, key=lambda line: ("torch" in line, line))
    return {"networks": [config.model_dump() for config in networks], "builders": builders,
            "imports": "\n".join(imports), "definitions": "\n\n\n".join(dict.fromkeys(source.texts))}


class _Source:
    """Definitions of the package, gathered with all that they use."""

    def __init__(self) -> None:
        self.imports = {"import json", "import torch", "from torch import nn", "from torch import Tensor",
                        "from pathlib import Path", "from collections import OrderedDict"}
        self.texts: list[str] = []
        self._done: set[tuple[str, str]] = set()
        self._files: dict[str, tuple[list[str], dict[str, Any]]] = {}

    def want(self, module: str, name: str) -> None:
        """Gather a name of a module of the package, behind all that its definition uses."""
        if module not in self._files:
            text = inspect.getsource(importlib.import_module(module))
            self._files[module] = text.splitlines(), dict(_names(ast.parse(text)))
        lines, known = self._files[module]
        if (module, name) in self._done or name not in known:  # not known: a builtin, an argument, a local name
            return
        self._done.add((module, name))
        found = known[name]
        if not isinstance(found, tuple):
            for node in ast.walk(found):
                if isinstance(node, ast.Name):
                    self.want(module, node.id)
            first = min([found.lineno, *(one.lineno for one in getattr(found, "decorator_list", ()))])
            self.texts.append("\n".join(lines[first - 1:found.end_lineno]))
        elif name in _ERRORS:
            self.texts.append(f'class {name}(ValueError):\n    """A network that cannot be built here."""')
        elif found[0].split(".")[0] == "mat_dist" and name not in _INSTEAD:
            self.want(found[0], name)  # where the package has it from
        else:
            self.imports.add(_INSTEAD.get(name) or found[1])


def _names(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """The global names of a module, each with its definition's syntax, or with whence and how it is imported."""
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            origin = getattr(node, "module", None)
            for alias in node.names:
                statement = f"from {origin} import {ast.unparse(alias)}" if origin else f"import {ast.unparse(alias)}"
                yield (alias.asname or alias.name).split(".")[0], (origin or alias.name, statement)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):  # registration stays in the package
            node.decorator_list = [one for one in node.decorator_list if "register" not in ast.unparse(one)]
            yield node.name, node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            yield from ((one.id, node) for target in getattr(node, "targets", None) or [getattr(node, "target", None)]
                        for one in ast.walk(target) if isinstance(one, ast.Name))
