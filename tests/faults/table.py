"""The results file as a table in docs/reliability.md, between two marker lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
_HEAD = ("| # | fault | passed | taken in | code | seconds (most allowed) | steps lost | message of one variant |",
         "|---|---|---|---|---|---|---|---|")


def update_table(results: Path) -> int:
    """Write the newest row of each case into the document -> exit code."""
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{render(latest(results))}\n{END}{after}")
    print(f"wrote the table into {DOCUMENT}")
    return 0


def latest(results: Path) -> list[dict[str, Any]]:
    """The newest row of each case."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for line in results.read_text().splitlines():
        row = json.loads(line)
        rows[row["row"], row["variant"]] = row
    return list(rows.values())


def render(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line per row of the fault table."""
    lines = list(_HEAD)
    for number in sorted({row["row"] for row in rows}):
        lines.append(_line(number, [row for row in rows if row["row"] == number]))
    passed, total = sum(row["passed"] for row in rows), len(rows)
    whole = sum(all(row["passed"] for row in rows if row["row"] == n) for n in {row["row"] for row in rows})
    late = [f"{row['row']} {row['variant']}".strip() for row in rows if row["in_time"] is False]
    seconds = sum(row["wall_s"] for row in rows)
    summary = (f"{whole} of {len({row['row'] for row in rows})} faults as specified ({passed} of {total} cases), in "
               f"{seconds / 60:.0f} minutes. Beyond its time: {', '.join(late) or 'none'}.")
    return "\n".join([summary, "", *lines])


def _line(number: int, rows: list[dict[str, Any]]) -> str:
    timed = [row for row in rows if row["seconds"] is not None and row["bound"] is not None]
    slowest = max(timed, key=lambda row: row["seconds"] / row["bound"], default=None)
    seconds = f"{slowest['seconds']:.1f} ({slowest['bound']:g})" if slowest else "-"
    lost = [row["lost_steps"] for row in rows if row["lost_steps"] is not None]
    kinds = " / ".join(sorted({kind for row in rows for kind in row["kind"].split(" + ")}))
    message = next((row["message"] for row in rows if row["message"]), "").replace("|", "\\|")
    cells = [str(number), rows[0]["title"], f"{sum(row['passed'] for row in rows)} of {len(rows)}", kinds,
             ", ".join(str(code) for code in sorted({row["expected"] for row in rows})), seconds,
             str(max(lost)) if lost else "-", message if len(message) < 160 else f"{message[:157]}..."]
    return f"| {' | '.join(cells)} |"
