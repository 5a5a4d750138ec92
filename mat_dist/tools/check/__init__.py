"""The preflight: everything that can be known to be wrong before a run, and how it is shown."""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Literal, TypeVar

from mat_dist.cli import tell
from mat_dist.errors import BUG, ConfigError, MatError

T = TypeVar("T")
Status = Literal["ok", "warning", "error", "skipped"]
STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "error": "bold red", "skipped": "dim"}


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What a check returns where nothing must be mended.

    Attributes:
        value: for the checks that come after it.
        found: what was found, one line.
        warning: what to do about it; empty where all is well.
        details: numbers for --json.
    """

    value: T
    found: str
    warning: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One line of the result; `code` is the exit code of an error, else 0."""

    check: str
    status: Status
    found: str
    how: str = ""
    code: int = 0
    details: dict[str, Any] = field(default_factory=dict)


class Report:
    """Collects findings; the first error decides the exit code."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.errors: list[BaseException] = []

    @property
    def code(self) -> int:
        """Exit code: 0, or that of the first error."""
        return next((one.code for one in self.findings if one.status == "error"), 0)

    def ask(self, check: str, work: Callable[..., Answer[T]], *needs: Any) -> T | None:
        """`work(*needs)` -> its value, None where it failed. Skipped where one of `needs` is None, since it failed."""
        if any(need is None for need in needs):
            self.findings.append(Finding(check, "skipped", "needs a check that failed"))
            return None
        try:
            answer = work(*needs)
        except MatError as error:
            problems: list[MatError] = error.problems if isinstance(error, ConfigError) else [error]
            self.errors += problems
            self.findings += [Finding(check, "error", f"{one.what} ({one.where})", one.how, one.code)
                              for one in problems]
            return None
        except Exception as error:  # the other checks are still worth their answers
            self.errors.append(error)
            line = " ".join(f"{type(error).__name__}: {error}".split())
            self.findings.append(Finding(check, "error", line, "please report it with the traceback above", BUG))
            traceback.print_exc()
            return None
        status: Status = "warning" if answer.warning else "ok"
        self.findings.append(Finding(check, status, answer.found, answer.warning, 0, answer.details))
        return answer.value

    def summary(self) -> str:
        """`1 error, 2 warnings, 9 ok`."""
        counts: Counter[str] = Counter(one.status for one in self.findings)
        words = (("error", "errors"), ("warning", "warnings"), ("skipped", "skipped"), ("ok", "ok"))
        return ", ".join(f"{counts[one]} {one if counts[one] == 1 else many}" for one, many in words if counts[one])

    def as_json(self) -> str:
        """Exit code and findings."""
        return json.dumps({"code": self.code, "checks": [asdict(one) for one in self.findings]}, indent=1)

    def show(self) -> None:
        """A table on a terminal, plain lines elsewhere."""
        if sys.stdout.isatty():
            self._table()
        else:
            for one in self.findings:
                print(f"{one.status:<8} {one.check:<14} {one.found}" + (f": {one.how}" if one.how else ""))
        tell(f"check: {self.summary()}")

    def _table(self) -> None:
        from rich.table import Table
        from rich.text import Text

        from mat_dist.runs.console import show_table

        table = Table()
        for name in ("check", "", "found", "how to fix"):
            table.add_column(name, overflow="fold")
        for one in self.findings:
            # Text: brackets in what was found are no markup.
            table.add_row(Text(one.check), Text(one.status, STYLES[one.status]), Text(one.found), Text(one.how))
        show_table(table)
