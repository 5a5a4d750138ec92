"""The list of cases: functions that a decorator registers, one per row of the fault table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.faults.lab import Lab

CASES: list[Case] = []


@dataclass(frozen=True)
class Case:
    """A row of the fault table under one variant.

    Attributes:
        row: number in the table.
        title: the fault in a few words.
        variant: what tells this case from others of the row.
        code: the exit code that is demanded.
        bound: seconds from the fault to the end of all processes; None: the row sets none.
        body: does it.
        arguments: of this variant.
        ci: belongs to the short subset.
        needs_root: skipped elsewhere.
    """

    row: int
    title: str
    variant: str
    code: int
    bound: float | None
    body: Callable[..., None]
    arguments: dict[str, Any]
    ci: bool = False
    needs_root: bool = False

    @property
    def key(self) -> str:
        return f"{self.row}.{self.variant}" if self.variant else str(self.row)


def case(row: int, title: str, variant: str = "", *, code: int, bound: float | None = None, ci: bool = False,
         needs_root: bool = False, **arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `body(lab, code, **arguments)`; put several above one function for its variants."""
    def register(body: Callable[..., None]) -> Callable[..., None]:
        CASES.append(Case(row, title, variant, code, bound, body, arguments, ci, needs_root))
        return body
    return register


def run_case(case: Case, lab: Lab) -> None:
    """Run a case; problems gather in the lab."""
    case.body(lab, case.code, **case.arguments)
