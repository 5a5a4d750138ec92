"""The table of final results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mat_dist.runs.rates import percent

PLAIN_WIDTH = 100  # columns of a table that goes to a file or pipe


@dataclass(frozen=True, kw_only=True)
class Result:
    """One evaluated target.

    Attributes:
        target: name of a peer, or `ensemble`.
        weights: `raw` or `EMA`.
        checkpoint: `best` or `last`.
        clean_acc: share of images classified correctly, in [0, 1].
        robust_acc: share still correct under PGD; None where it was not attacked.
        pgd_steps: gradient steps of the PGD attack.
        images: number of images behind the shares.
    """

    target: str
    weights: str
    checkpoint: str
    clean_acc: float
    robust_acc: float | None
    pgd_steps: int
    images: int


def results_table(rows: Sequence[Result]) -> Table:
    """A row per result: target, weights, checkpoint, clean %, PGD-<steps> %, number of images.

    Raises:
        ValueError: the rows were attacked with different numbers of steps, so one column cannot hold them.
    """
    steps = sorted({row.pgd_steps for row in rows})
    if len(steps) > 1:
        raise ValueError(f"one table for PGD with {steps} steps")
    table = Table(title="Accuracy on the test set")
    for name in ("target", "weights", "checkpoint"):
        table.add_column(name, no_wrap=True)
    for name in ("clean %", f"PGD-{steps[0]} %" if steps else "PGD %", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.target, row.weights, row.checkpoint, percent(row.clean_acc, 2),
                      percent(row.robust_acc, 2), str(row.images))
    return table


def print_table(table: Table, screen: Console) -> None:
    """Print on `screen`; where that is no terminal, without ANSI codes and at least 100 columns wide."""
    if not screen.is_terminal:
        screen = Console(file=screen.file, width=max(PLAIN_WIDTH, screen.width), color_system=None,
                         force_terminal=False, force_interactive=False)
    screen.print(table)
