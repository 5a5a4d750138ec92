"""Studies without processes of their own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks.study.runs import Enough, Runner
from mat_dist.errors import StopRequested


def run_here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Let studies run commands in this process, which saves the start of Python -> the commands: module, log, words."""
    begun: list[tuple[str, ...]] = []

    def run(self: Runner, module: str, words: Sequence[str], log: Path) -> int:
        if self.over:
            raise Enough
        begun.append((module, log.stem, *words))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        name = f"{module}.__main__" if module == "benchmarks.study" else module
        start: Callable[[list[str]], int] = importlib.import_module(name).main
        code = start(list(words))
        if code == StopRequested.code:
            raise Enough
        return code

    monkeypatch.setattr(Runner, "run", run)
    return begun
