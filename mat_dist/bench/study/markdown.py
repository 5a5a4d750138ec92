"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]], *, text_columns: int) -> list[str]:
    """A Markdown table; the first `text_columns` columns to the left, the others to the right."""
    rule = ["---" if number < text_columns else "---:" for number in range(len(columns))]
    rows = [columns, rule, *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return [f"| {' | '.join(row)} |" for row in rows]
