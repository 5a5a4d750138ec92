"""What a report consists of while it is made: the page's figures, and the files that lie beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

from mat_dist.report.html import Child, Markup, tag
from mat_dist.report.style import CHART


@dataclass
class Book:
    """Files of the report by name, besides the page."""

    files: dict[str, bytes] = field(default_factory=dict)

    def figure(self, name: str, chart: Markup, *caption: Child) -> Markup:
        """A chart in the page, and the same as `<name>.svg` with its own style sheet."""
        style = f"<style>{CHART}svg{{background:var(--ground)}}</style>"
        self.files[f"{name}.svg"] = chart.replace("<title>", f"{style}<title>", 1).encode()
        return tag("figure", chart, tag("figcaption", *caption) if caption else None)


def pair(*parts: Child) -> Markup:
    """A chart and a table side by side, where there is room."""
    return tag("div", *parts, class_="pair")


def charts(*figures: Child) -> Markup:
    """Figures side by side, where there is room."""
    return tag("div", *figures, class_="charts")
