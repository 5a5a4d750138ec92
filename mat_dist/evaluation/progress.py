"""How far an evaluation is: told to a screen between two passes, where a request to stop is obeyed too.

A pass is that of one image through one network. How many an attack needs is an estimate: which images are broken early
is not known beforehand. It sets the pace of what is shown, and no result depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

from torch import nn

from mat_dist.distributed.stopping import StopFlag
from mat_dist.evaluation.attacks import NOISE_DRAWS, Job
from mat_dist.evaluation.results import CLEAN
from mat_dist.evaluation.settings import AUTOATTACK, MENU, made_by
from mat_dist.evaluation.soundness import CHECKING, OWN_STEPS, SEARCH_QUERIES
from mat_dist.runs.console import Screen, duration
from mat_dist.runs.metrics import Reporter

if TYPE_CHECKING:
    from mat_dist.evaluation.chunks import Work

PACKAGE, PACKAGE_ALL = 1000, 4000  # passes of an image under one attack of AutoAttack, and under all of them
REFRESH_S = 0.25
SURE_AFTER_S, LONG_S = 5.0, 120.0  # when the pace is known, and what is worth a warning
Display = Screen | Reporter


class Interrupted(Exception):
    """A chunk is left unfinished, since this process was asked to stop."""


def passes(name: str, job: Job) -> int:
    """About so many passes of an image under one attack, or in the checks."""
    if name == CHECKING:
        steps = max((plan.steps for plan in job.plans.values()), default=OWN_STEPS)
        return 2 * NOISE_DRAWS + SEARCH_QUERIES + 7 * steps
    if (plan := job.plans.get(name)) is not None:
        return plan.steps * max(map(plan.starts, job.threats)) * max(plan.targets, 1)
    package = PACKAGE_ALL if name == AUTOATTACK else PACKAGE
    return {"noise": NOISE_DRAWS, "search": job.queries, "relaxation": 110}.get(MENU[name].maker, package)


class Progress:
    """What one rank does of an evaluation.

    Args:
        work: the evaluation.
        chunks: those of this rank.
        stop: set by a signal.
        display: told now and then, between two passes.
    """

    def __init__(self, work: Work, chunks: Sequence[int], stop: StopFlag, display: Display) -> None:
        self._work, self._chunks, self._stop, self._display = work, chunks, stop, display
        attacked = {t.name: t for target in (*work.same.values(), *work.sources) for t in (target, *target.members)}
        self._modules = {id(model): model for t in attacked.values() for model in (t.model, *t.attacked)}
        self._networks = {name: len(t.attacked) * sum(id(part) in self._modules for part in t.model.modules())
                          for name, t in attacked.items()}
        self._total = sum(self._cost(chunk) for chunk in chunks)
        self._began = self._shown = monotonic()
        self._number = self._images = 0  # chunks begun; images of the newest
        self._done = 0  # passes of all chunks and attacks that are over
        self._unit = self._within = 0  # passes of what goes on, estimated and made
        # (target, threat) -> survivors and images: of whole chunks, and after each attack.
        self._held: dict[tuple[str, str], tuple[int, int]] = {}
        self._tally: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
        self._before = CLEAN  # what the images withstood last
        self._text = ""
        self._slow = made_by(work.job.attacks, "package")  # of which a warning is due

    def __deepcopy__(self, memo: dict[int, Any]) -> Progress:
        return self  # a copy of a network, made for attacks, is watched with it

    def _cost(self, chunk: int) -> int:
        work = self._work
        names = [*work.job.attacks, *([CHECKING] if chunk < work.checked else [])]
        each = len(work.job.threats) * sum(passes(name, work.job) for name in names)
        return len(work.rows(chunk)) * each * sum(self._networks.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at each pass of every network."""
        hooks = [model.register_forward_pre_hook(self._passed) for model in self._modules.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._display.status("")

    def chunk(self) -> None:
        """The next chunk begins."""
        self._done = sum(map(self._cost, self._chunks[:self._number]))
        self._images, self._unit = len(self._work.rows(self._chunks[self._number])), 0
        self._number += 1

    def attack(self, target: str, threat: str, name: str, held: int, of: int) -> None:
        """An attack on a target begins; so many of the chunk's images are right until now. No name: it was the last;
        no images: it is none of the attacks that count."""
        self._done += self._unit
        survivors, images = _sum(self._held.get((target, threat), (0, 0)), (held, of))
        if of:
            row = self._tally.setdefault((target, threat), {})
            row[self._before] = _sum(row.get(self._before, (0, 0)), (held, of))
            self._before = name or CLEAN
        self._within = 0
        self._unit = passes(name, self._work.job) * self._images * self._networks[target] if name else 0
        if not name:
            self._held[target, threat] = survivors, images
            return
        self._text = (f"{self._work.what}: {target}, {threat}, {name}: {survivors} of {images} hold, chunk "
                      f"{self._number} of {len(self._chunks)}")
        self._tell()

    def _passed(self, model: nn.Module, given: Any) -> None:
        if self._stop.requested:
            raise Interrupted
        self._within += len(given[0])
        if monotonic() - self._shown >= REFRESH_S:
            self._tell()

    def _tell(self) -> None:
        self._shown = now = monotonic()
        share = (self._done + min(self._within, self._unit)) / self._total
        elapsed = now - self._began
        left = elapsed * (1 - share) / share if share > 0 else None
        self._display.status(self._text, elapsed, left, self._tally)
        if self._slow and left is not None and elapsed >= SURE_AFTER_S:
            if left >= LONG_S:
                rest = sum(passes(name, self._work.job) for name in self._work.job.attacks if name not in self._slow)
                whole = rest + sum(passes(name, self._work.job) for name in self._slow)
                self._display.note(f"about {duration(left)} more; without {', '.join(self._slow)} about "
                                   f"{duration(left * rest / whole)}: attacks=pgd,cw, or images=N for a part")
            self._slow = []


def _sum(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]
