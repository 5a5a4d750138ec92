"""The page: sections in order, the head, and what is written where."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import mat_dist
from mat_dist.report.about import facts, notices, settings_section
from mat_dist.report.attacked import gallery_section, loss_section, strength_section, transfer_section
from mat_dist.report.book import Book
from mat_dist.report.evaluations import Outcome
from mat_dist.report.files import RunFiles
from mat_dist.report.html import Child, Markup, join, tag
from mat_dist.report.measure import Measured
from mat_dist.report.results import class_section, result_section
from mat_dist.report.style import PAGE, policy
from mat_dist.report.subject import Subject
from mat_dist.report.training import last_transfer, time_section, training_section
from mat_dist.runs.files import reported, write_bytes, write_text


def document(title: str, lead: Child, parts: Sequence[tuple[str, Markup]]) -> str:
    """A whole HTML document of sections (name in the list of links, section)."""
    links = []
    for name, part in parts:
        anchor = part.split(' id="', 1)[1].split('"', 1)[0]
        links.append(tag("a", name, href=f"#{anchor}"))
    made = f"Made by mat_dist {mat_dist.__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. No scripts, no network."
    head = join(tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=policy()),
                tag("meta", name="viewport", content="width=device-width, initial-scale=1"), tag("title", title),
                # The style sheet is ours and must stand there unescaped: its digest is part of the policy.
                tag("style", Markup(PAGE)))
    body = join(tag("header", tag("h1", title), lead, tag("nav", *links, aria_label="sections")),
                tag("main", *(part for _, part in parts)), tag("footer", made))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def run_page(run: RunFiles, subject: Subject | None, measured: Measured | None, notes: Sequence[str]
             ) -> tuple[str, Book]:
    """The report of one run; without a subject only what its files tell, `notes` say why."""
    book = Book()
    parts: list[tuple[str, Markup | None]] = [("Result", result_section(run, book))]
    if subject is not None and measured is not None:
        parts += [("Gallery", gallery_section(subject, measured, book)),
                  ("Attack strength", strength_section(subject, measured, book))]
    parts += [("Transfer", transfer_section(subject, measured, last_transfer(run), book)),
              ("Classes", _classes(run, subject, measured, book)), ("Training", training_section(run, book))]
    if subject is not None and measured is not None:
        parts.append(("Loss surface", loss_section(subject, measured, book)))
    parts += [("Time", time_section(run, book)), ("Settings", settings_section(run))]
    title = f"Run {run.name}"
    lead = join(facts(run), notices([*run.notes, *notes]))
    return document(title, lead, [(name, part) for name, part in parts if part is not None]), book


def _classes(run: RunFiles, subject: Subject | None, measured: Measured | None, book: Book) -> Markup | None:
    """From the evaluation's table of images, else from the images that the report attacked."""
    weights = "ema" if run.averaged else "raw"
    names = subject.classes if subject is not None else ()
    one = next((e for e in run.evaluations if e.outcomes), None)
    found: dict[str, list[Outcome]] = {}
    if one is not None:
        found = {target: rows for (target, kind), rows in one.outcomes.items() if kind == weights}
        source = f"{one.attacks}, step {one.step}, all {len(next(iter(found.values()), []))} images of {one.file}"
    if not found and measured is not None:
        found, source = measured.outcomes, f"{measured.n} test images, attacked for this report"
    return class_section(found, names, source, book) if any(found.values()) else None


def write_report(folder: Path, page: str, book: Book, name: str = "index.html") -> Path:
    """Write page and files into `folder`; charts and pictures of an earlier report that are no longer made are removed.

    Raises OutputError.
    """
    with reported(folder):
        folder.mkdir(exist_ok=True)
        if name == "index.html":
            for old in [*folder.glob("*.svg"), *folder.glob("gallery_*.png")]:
                if old.name not in book.files and not old.name.startswith("comparison_"):
                    old.unlink()
    for file, content in book.files.items():
        write_bytes(folder / file, content)
    write_text(folder / name, page)
    return folder / name
