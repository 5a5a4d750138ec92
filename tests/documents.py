"""What README.md, CONTRIBUTING.md and docs/ hold, for the tests that compare it with the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODEL, DATA = "docs/examples/my_model.py", "docs/examples/my_data.py"
METHOD, NORM, POISONED = (f"docs/examples/{name}.py" for name in ("my_method", "my_norm", "poisoned_data"))


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(document:line, text) of every fenced block of a language."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for found in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            yield f"{document.relative_to(ROOT)}:{text.count(chr(10), 0, found.start()) + 1}", found[1]


def _rows(document: str, heading: str) -> list[list[str]]:
    text = (ROOT / document).read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert rows, f"no table below {heading}"
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[0].splitlines()]


def heads(document: str, heading: str) -> list[str]:
    """The heads of the first table below a heading."""
    return _rows(document, heading)[0]


def table(document: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its two head lines."""
    return _rows(document, heading)[2:]
