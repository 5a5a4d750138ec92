"""All commands of mat_dist: python -m mat_dist COMMAND ..., or mat-dist COMMAND ... where it is installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from mat_dist.cli import run_entry
from mat_dist.errors import ConfigError, nearest
from mat_dist.screens import arrived

COMMANDS = {  # name: module in mat_dist, what it does
    "train": ("train", "train a cohort of peers; also under torchrun"),
    "evaluate": ("evaluation.__main__", "attack a trained run, or a checkpoint of somebody else; also under torchrun"),
    "report": ("report.__main__", "a page of a run, to look at"),
    "check": ("tools.check.__main__", "look for everything that would stop a run, without starting it"),
    "table": ("tools.table", "mean and deviation of accuracies over seeds"),
    "hashes": ("tools.hashes", "compare runs bit by bit"),
    "export": ("tools.export", "write a trained model for others: safetensors, hf, robustbench, torch_export, onnx"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return int(importlib.import_module(f"mat_dist.{COMMANDS[words[0]][0]}").main(words[1:]))
    return run_entry(lambda: _other(words[:1]))


def _other(words: list[str]) -> None:
    """The list of the commands. Raises ConfigError for a word that is none of them."""
    if words and words[0] not in ("-h", "--help"):
        near = nearest(words[0], COMMANDS)
        raise ConfigError(f"there is no command {words[0][:40]!a}", "command line",
                          f"did you mean {near}?" if near else f"commands are {', '.join(COMMANDS)}")
    print("usage: python -m mat_dist COMMAND ...\n")
    print("\n".join(f"  {name:<10} {meaning}" for name, (_, meaning) in COMMANDS.items()))
    print("\nCOMMAND --help tells more.")
    arrived()


if __name__ == "__main__":
    sys.exit(main())
