"""What a case works with: launches in a folder of its own, what is expected of their end, and the row of the result."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mat_dist import checkpoints
from mat_dist.core.state_hash import state_hash
from mat_dist.errors import MatError
from mat_dist.runs.folder import RunFolder
from tests.faults import victim
from tests.faults.inject import Fault, marked
from tests.faults.launching import POLL, Group, fork_one, fork_ranks, start_torchrun

LIMIT = 150.0  # seconds after which a launch is ended from outside; an idle machine needs a fifth
TIMEOUT = 5  # comm.timeout of all cases
INTERVAL = 5  # steps between checkpoints: an epoch of 200 images in batches of 40
TOTAL = 4 * INTERVAL
LINE = re.compile(r"mat_dist: (?:error: (.*)|(stopped .*))")  # how a launch ended: by an error, or as it was asked to

# Two peers on 8 x 8 digits; a step takes some 20 ms.
WORDS = ("run.device=cpu", "peers=2", "data.train_size=200", "train.batch_size=40", "train.epochs=4",
         "attack.steps=2", "eval.every=0", "eval.test_steps=0", "eval.size=40", "eval.chunk=20", "eval.steps=2",
         f"comm.timeout={TIMEOUT}", "log.every=5", "log.console=plain")
EVALUATED = ("eval.every=1",)


@dataclass
class End:
    """How a launch ended.

    Attributes:
        code: of exit.json; where there is none, of the process (the highest one).
        codes: of each process that the runner started.
        seconds: from the fault to the end of the last process; None if it never ended or nothing happened.
        text: what all processes printed.
        last: the newest record of exit.json, or None.
        marks: what the faults said.
        orphans: processes that were still there.
    """

    folder: Path
    code: int | None
    codes: dict[str, int]
    seconds: float | None
    text: str
    last: dict[str, Any] | None
    marks: list[dict[str, Any]]
    orphans: list[int]
    timed_out: bool

    @property
    def message(self) -> str:
        """The one line that the user saw, without its beginning."""
        return self.messages[0] if self.messages else ""

    @property
    def messages(self) -> list[str]:
        """Every such line."""
        return [error or stopped for error, stopped in LINE.findall(self.text)]

    def rank_errors(self) -> dict[str, str]:
        """The last error in each rank's log."""
        found = {}
        for log in sorted(self.folder.glob("rank_*.log")):
            errors = re.findall(r"^mat_dist\.errors\.\w+: (.*)$", log.read_text(), re.MULTILINE)
            if errors:
                found[log.stem] = errors[-1]
        return found


@dataclass
class Lab:
    """One case at work.

    Args:
        folder: an empty folder of this case.
        references: hashes of undisturbed runs by their settings, shared by all cases.
    """

    folder: Path
    references: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    _launches: int = 0
    _last: dict[Path, dict[str, Any] | None] = field(default_factory=dict)

    # ---------------------------------------------------------------- launching

    def words(self, *more: str, name: str = "run") -> list[str]:
        """The words of the train command for a run of this case."""
        return [*WORDS, f"run.root={self.folder}", f"run.name={name}", *more]

    def start(self, faults: Sequence[Fault], words: Sequence[str], *, ranks: int = 2, torchrun: bool = False,
              restarts: int = 0, env: dict[str, str] | None = None) -> Group:
        """Start a launch with faults. One rank without torchrun is a process without a launcher."""
        self._launches += 1
        out, mark = self.folder / f"out_{self._launches}", self.folder / f"mark_{self._launches}"
        told = json.dumps([marked(fault, mark).dump() for fault in faults])
        if torchrun:
            group = start_torchrun(ranks, ["tests.faults.victim", told, *words], out, restarts=restarts, env=env)
        elif ranks > 1:
            group = fork_ranks(ranks, lambda rank: victim.main([told, *words]), out, run_id=str(self._launches))
        else:
            group = fork_one(lambda: victim.main([told, *words]), out, env)
        self.kinds.append(group.kind)
        return group

    def end(self, group: Group, *, name: str = "run", since: float | None = None, limit: float = LIMIT) -> End:
        """Wait for a launch -> how it ended. `since`: when the runner itself did the damage."""
        gone = group.wait(limit)
        orphans = group.close()
        number = group.out.name.partition("_")[2]
        marks = read_marks(self.folder / f"mark_{number}")
        began = since if since is not None else min((mark["time"] for mark in marks), default=None)
        seconds = gone - began if gone is not None and began is not None else None
        folder = self.folder / name
        last = read_last(folder)
        if last == self._last.get(folder):  # of an earlier launch: this one was refused and wrote nothing
            last = None
        else:
            self._last[folder] = last
        codes = {label: code for label, code in group.codes.items() if label != "store"}
        code = last["code"] if last else max(codes.values(), default=None)
        text = group.out.read_text(errors="replace") if group.out.exists() else ""
        return End(folder, code, codes, seconds, text, last, marks, orphans, gone is None)

    def run(self, faults: Sequence[Fault] = (), *more: str, name: str = "run", **how: Any) -> End:
        """Start a launch and wait for its end."""
        return self.end(self.start(faults, self.words(*more, name=name), **how), name=name)

    def marked(self, group: Group, count: int = 1, limit: float = LIMIT) -> list[dict[str, Any]]:
        """Wait until `count` faults have happened -> what they said."""
        file, latest = self.folder / f"mark_{group.out.name.partition('_')[2]}", time.monotonic() + limit
        while len(marks := read_marks(file)) < count and group.alive() and time.monotonic() < latest:
            time.sleep(POLL)
        if len(marks) < count:
            self.problems.append(f"{len(marks)} of {count} faults happened")
        return marks

    # ---------------------------------------------------------------- what must hold

    def expect(self, holds: bool, otherwise: str) -> bool:
        """Note a problem unless `holds`."""
        if not holds:
            self.problems.append(otherwise)
        return holds

    def expect_end(self, end: End, code: int, *, names: str = "", says: Iterable[str] = (), printed: bool = True,
                   survivors: Iterable[int] | None = None, timed: bool = True) -> None:
        """A launch that ended as its row demands.

        Args:
            code: exit code.
            names: the text that names the culprit, in the message and in exit.json.
            says: other texts of the message.
            printed: the message stands on the screen once, without a traceback.
            survivors: ranks whose logs must end with the same error.
            timed: its seconds count for the bound.
        """
        told = {"code": end.code, "message": end.message, "names": names}
        self.notes = {**told, **{key: value for key, value in self.notes.items() if value not in (None, "")}}
        self.expect(not end.timed_out, f"still running after {LIMIT:.0f} s")
        self.expect(not end.orphans or end.timed_out, f"orphans {end.orphans}")
        self.expect(end.code == code, f"code {end.code} instead of {code}: {end.message or end.text[-300:]}")
        for text in [*([names] if names else []), *says]:
            self.expect(text in end.message, f"{text!r} is not in {end.message!r}")
        if end.last is not None and code:
            recorded = f"{end.last['what']} {end.last['where']}"
            self.expect(names in recorded, f"exit.json does not name {names!r}: {recorded}")
            self.expect(bool(end.last["where"] and end.last["how"]), "exit.json lacks where or how")
        if printed and code:
            count = len(end.messages)
            self.expect(count == 1, f"{count} error lines on the screen")
            own = "\n".join(line for line in end.text.splitlines() if "torch/distributed" not in line)
            self.expect("torchrun" in self.kinds or "Traceback" not in own, "a traceback on the screen")
        if survivors is not None:
            errors = end.rank_errors()
            texts = {errors.get(f"rank_{rank}") for rank in survivors}
            self.expect(len(texts) == 1 and None not in texts, f"survivors differ: {errors}")
        if timed and end.seconds is not None:
            self.seconds.append(end.seconds)

    def expect_lost(self, end: End, most: int = INTERVAL) -> None:
        """At most `most` steps are lost, and the newest checkpoint is whole."""
        try:
            newest = checkpoints.find_newest(RunFolder(end.folder))
        except MatError as error:
            self.problems.append(f"checkpoints: {error}")
            return
        step = newest[0].step if newest else 0
        self.expect(not newest or not newest[1], f"damaged checkpoints: {newest and newest[1]}")
        reached = max((mark["at"] or 0 for mark in end.marks), default=0)
        self.notes["lost_steps"] = max(0, reached - step)
        self.expect(reached - step <= most, f"{reached - step} steps lost")

    def expect_resumed(self, *more: str, name: str = "run", ranks: int = 1) -> End:
        """A restart without faults completes the run, bit-equal to a run that nothing disturbed."""
        end = self.run((), *more, name=name, ranks=ranks)
        self.expect(end.code == 0, f"restart: code {end.code}: {end.message or end.text[-300:]}")
        if end.code == 0:
            self.expect(self.hashes(name) == self.reference(*more), "restart: other weights than the undisturbed run")
        return end

    # ---------------------------------------------------------------- weights

    def hashes(self, name: str = "run") -> list[str]:
        """SHA-256 of each peer's state in the newest checkpoint."""
        manifest = checkpoints.load_manifest(RunFolder(self.folder / name))
        return [state_hash(checkpoints.load_peer(manifest, i)) for i in range(len(manifest.meta.peers))]

    def reference(self, *more: str) -> list[str]:
        """Hashes of the undisturbed run with these settings, on one rank."""
        key = tuple(word for word in more if not word.startswith(("comm.", "run.", "checkpoint.")))
        if key not in self.references:
            end = self.run((), *key, name="reference", ranks=1)
            assert end.code == 0, end.text
            self.references[key] = self.hashes("reference")
            self.kinds.pop()
        return self.references[key]


def read_last(folder: Path) -> dict[str, Any] | None:
    """The newest record of exit.json."""
    with suppress(OSError, ValueError):
        document: dict[str, Any] = json.loads((folder / "exit.json").read_text())["attempts"][-1]
        return document
    return None


def read_marks(file: Path) -> list[dict[str, Any]]:
    """What faults have said so far."""
    with suppress(OSError):
        return [json.loads(line) for line in file.read_text().splitlines()]
    return []
