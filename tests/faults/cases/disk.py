"""Rows 38 to 40: the disk is full, the run folder is in the way or gone, or somebody else's."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

from tests.faults.inject import Fault
from tests.faults.lab import INTERVAL, Lab
from tests.faults.registry import case

OUTPUT = 5
AT = INTERVAL + 2


@case(38, "disk full while saving", "once", code=0, ci=True)
def full_once(lab: Lab, code: int) -> None:
    """A warning with path and bytes, no partial file, the earlier checkpoint kept, the next save works."""
    end = lab.run([Fault("no space", "write", times=1, at=_nth_peer_file())])
    lab.expect_end(end, code, timed=False)
    _expect_warned(lab, end.text, 1)
    lab.expect(lab.hashes() == lab.reference(), "other weights than the undisturbed run")


def _nth_peer_file() -> int:
    """Rank 1 writes nothing but its peer's files (and no lock): its second write is the save of step 10."""
    return 1


@case(38, "disk full while saving", "from then on", code=OUTPUT, kind="no space")
@case(38, "disk full while saving", "file size limit", code=OUTPUT, kind="limit")
def full(lab: Lab, code: int, kind: str) -> None:
    """The run goes on twice, and stops at the third failure in a row; the last good checkpoint is whole."""
    fault = Fault("limit", rank=1, size=100_000) if kind == "limit" else Fault("no space", "write", times=None)
    end = lab.run([fault])
    lab.expect_end(end, code, says=["peer_1.safetensors"])
    lab.expect("bytes needed" in end.message and "bytes free" in end.message, f"no bytes in {end.message!r}")
    _expect_warned(lab, end.text, 2)
    left = [path.name for path in (end.folder / "checkpoints").iterdir() if path.name.startswith(".")]
    lab.expect(not left, f"left behind: {left}")
    lab.expect_resumed()


def _expect_warned(lab: Lab, text: str, count: int) -> None:
    warnings = [line for line in text.splitlines() if "no checkpoint after step" in line]
    told = all("peer_1.safetensors" in line and "bytes" in line for line in warnings)
    lab.expect(len(warnings) == count and told, f"warnings: {warnings}")


@case(38, "disk full while saving", "a full tmpfs", code=OUTPUT, needs_root=True)
def full_tmpfs(lab: Lab, code: int) -> None:
    """A real small disk under the run: one checkpoint fits, the next does not, and records may fail too."""
    disk = lab.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(disk)], check=True)
    try:
        end = lab.end(lab.start((), lab.words(f"run.root={disk}")), name="disk/run")
        lab.expect_end(end, code, says=["No space left"])
        _newest(lab, disk / "run")
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        again = lab.end(lab.start((), lab.words(f"run.root={disk}"), ranks=1), name="disk/run")
        lab.expect(again.code == 0, f"restart: {again.code} {again.message}")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _newest(lab: Lab, run: Path) -> None:
    from mat_dist.checkpoints import find_newest
    from mat_dist.runs.folder import RunFolder

    newest = find_newest(RunFolder(run))
    lab.expect(newest is not None and newest[0].step >= INTERVAL and not newest[1], f"newest checkpoint: {newest}")


@case(39, "run folder cannot be used", "a file in its place", code=OUTPUT, bound=5, place="root")
@case(39, "run folder cannot be used", "a file of its name", code=OUTPUT, bound=5, place="name")
@case(39, "run folder cannot be used", "another folder's content", code=OUTPUT, bound=5, place="content")
def unusable(lab: Lab, code: int, place: str) -> None:
    """The start is refused, and what stands there stays."""
    file = lab.folder / {"root": "root", "name": "run", "content": "run/thesis.tex"}[place]
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    root = file if place == "root" else lab.folder
    group = lab.start((), lab.words(f"run.root={root}"))
    end = lab.end(group, since=group.send(0))  # type: ignore[arg-type]
    lab.expect_end(end, code, says=[str(file.parent if place == "content" else file)])
    lab.expect(file.read_text() == "mine", "the file was changed")


@case(39, "run folder cannot be used", "vanishes", code=OUTPUT)
def vanished(lab: Lab, code: int) -> None:
    """As a full disk: the run stops with the folder's path."""
    folder = lab.folder / "run"
    end = lab.run([Fault("vanish", rank=0, at=AT, text=str(folder))])
    lab.expect_end(end, code, says=[str(folder)], timed=False)


@case(40, "second run in the same folder", code=OUTPUT, bound=5)
def in_use(lab: Lab, code: int) -> None:
    """The second is told who holds it since when; the first one completes untouched."""
    first = lab.start([Fault("sleep", rank=None, at=AT, seconds=8)], lab.words())
    lab.marked(first, 2)
    second = lab.start((), lab.words())
    end = lab.end(second, since=second.send(0))  # type: ignore[arg-type]
    end.code = max(end.codes.values())
    lab.expect_end(end, code, says=["in use by pid", str(first.pids["rank 0"]), " since "])
    done = lab.end(first)
    lab.expect(done.code == 0, f"the first run: {done.code} {done.message}")
    lab.expect(lab.hashes() == lab.reference(), "other weights than the undisturbed run")


@case(40, "second run in the same folder", "lock of a dead job", code=0)
def stale(lab: Lab, code: int) -> None:
    """After kill -9 of all ranks the next start takes the lock over, with a note."""
    group = lab.start([Fault("sleep", rank=None, at=AT, seconds=60)], lab.words())
    lab.marked(group, 2)
    group.send(signal.SIGKILL)
    lab.end(group)
    end = lab.expect_resumed()
    lab.expect_end(end, code, timed=False)
    lab.expect("took the lock over from pid" in end.text, "the note is missing")


@case(40, "second run in the same folder", "20 at once", code=OUTPUT)
def race(lab: Lab, code: int) -> None:
    """Exactly one of 20 wins the lock; the processes do not import torch."""
    from mat_dist.runs.folder import RunFolder
    from tests.unit.test_runfolder_lock import race as run_race

    folders = [RunFolder(lab.folder / f"race_{turn}") for turn in range(3)]
    for folder in folders:
        folder.path.mkdir()
    for folder, answers in run_race(folders, 20):
        won = [answer for answer in answers if answer.startswith("won")]
        lost = [answer for answer in answers if "in use by pid" in answer]
        lab.expect((len(won), len(lost)) == (1, 19), f"{len(won)} won, {len(lost)} lost")
        holder = json.loads(folder.lock.read_text())["pid"]
        lab.expect(all(f"pid {holder} " in answer for answer in lost), "another holder is named")
        lab.notes.update(code=code, message=lost[0].removeprefix("lost ") if lost else "")
        shutil.rmtree(folder.path)
    lab.kinds.append("process")
