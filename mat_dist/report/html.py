"""Markup from values: every text that is not markup already is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Sequence
from typing import TypeAlias

# Not allowed in XML, in which the SVG files are written: control characters, lone surrogates, two non-characters.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"br", "hr", "img", "meta"})


class Markup(str):
    """Text that is markup and goes into the page as it is; only functions of this package make it."""

    __slots__ = ()


Child: TypeAlias = "str | int | float | Iterable[Child] | None"
Attribute: TypeAlias = "str | int | float | bool | None"


def escape(text: object) -> str:
    """`text` for content and for quoted attributes."""
    return html.escape(_UNFIT.sub("�", str(text)))


def join(*children: Child) -> Markup:
    """Children one after another: markup as it is, everything else escaped, None left out."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, (str, int, float)):
            parts.append(escape(child))
        elif child is not None:
            parts.append(join(*child))
    return Markup("".join(parts))


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """An element. In names of attributes `_` stands for `-`, a last one falls away (`class_`); None: no attribute."""
    written = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written.append(f'{key}=""')
        elif value is not None and value is not False:
            written.append(f'{key}="{escape(value)}"')
    opening = " ".join(written)
    return Markup(f"<{opening}>" if name in _VOID else f"<{opening}>{join(*children)}</{name}>")


def table(caption: Child, head: Sequence[Child], rows: Iterable[Sequence[Child]], *,
          texts: Collection[int] = (0,)) -> Markup:
    """A table that scrolls by itself where it is too wide; the first column names the row. `texts` are the columns that
    hold no numbers."""
    def cells(row: Sequence[Child]) -> Iterable[Markup]:
        for column, cell in enumerate(row):
            style = None if column in texts else "number"
            yield tag("th", cell, scope="row") if column == 0 else tag("td", cell, class_=style)

    headings = (tag("th", cell, scope="col", class_=None if column in texts else "number")
                for column, cell in enumerate(head))
    body = tag("table", tag("caption", caption), tag("thead", tag("tr", headings)),
               tag("tbody", [tag("tr", cells(row)) for row in rows]))
    return tag("div", body, class_="scroll", tabindex=0, role="region", aria_label="table, scrolls sideways")


def folded(title: Child, *children: Child) -> Markup:
    """Content that is shown on a click, without a script."""
    return tag("details", tag("summary", title), *children)


def section(name: str, title: str, *children: Child) -> Markup:
    """A part of the page with a heading, that links lead to as #name."""
    return tag("section", tag("h2", title, id=f"{name}-title"), *children, id=name, aria_labelledby=f"{name}-title")
