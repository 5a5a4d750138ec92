"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> list[str]:
    """The lines of a table; the first `text_columns` columns to the left, the others to the right."""
    rule = ["---" if number < text_columns else "---:" for number in range(len(columns))]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return [f"| {' | '.join(line)} |" for line in (columns, rule, *escaped)]
