"""The part of the documentation site that is not in docs/: the documents at the top, and the files that are linked to.

A hook of mkdocs (.mkdocs.yml). Links lead from a document to files of the repository; those outside docs/ become pages
or downloads of the site, so that none is broken there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LINK = re.compile(r"""(\]\(|src=")([^)#\s:"]+)(#[^)\s"]*)?([)"])""")


def place(file: str) -> str:
    """Where a file of the repository is on the site."""
    if (ROOT / file).is_dir():
        file += "/index.md"
    return PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else f"repository/{file}")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    seen, waiting = set(), [*PAGES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    while waiting:
        file = waiting.pop()
        path = ROOT / file
        if file in seen or file.startswith("..") or not path.exists():
            continue
        seen.add(file)
        if path.is_dir():
            inside = sorted(one.name for one in path.iterdir() if one.is_file())
            waiting += [f"{file}/{name}" for name in inside]
            files.append(File.generated(config, place(file), content="\n".join(f"- [{one}]({one})" for one in inside)))
        elif not file.startswith("docs/"):
            files.append(File.generated(config, place(file), abs_src_path=str(path)))
        if path.suffix == ".md":
            links = LINK.findall(path.read_text(encoding="utf-8"))
            waiting += [os.path.relpath(path.parent / link, ROOT) for _, link, _, _ in links]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    if here.startswith("repository/"):  # it lies as in the repository
        return markdown
    source = {there: top for top, there in PAGES.items()}.get(here, f"docs/{here}")
    folder = (ROOT / source).parent

    def moved(link: re.Match[str]) -> str:
        target = place(os.path.relpath(folder / link[2], ROOT))
        return f"{link[1]}{os.path.relpath(target, os.path.dirname(here) or '.')}{link[3] or ''}{link[4]}"

    return LINK.sub(moved, markdown)
