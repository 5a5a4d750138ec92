"""A slice of a study, for a machine that is lent for minutes: what an earlier slice brought back is taken up, the study
goes on within its budget, and what it leaves is small enough to bring back. docs/studies.md.

A state is a tar of the folder of the runs, in parts. Runs that are finished, evaluated and needed by no other are in it
without their weights: the study knows them as done all the same. Other runs are in it whole where they fit.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import shutil
import tarfile
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study import evidence
from benchmarks.study.plan import Suite
from benchmarks.study.runs import Job
from benchmarks.study.tables import Entry
from mat_dist.cli import tell
from mat_dist.config.tree import COMMAND_LINE
from mat_dist.errors import CheckpointError, ConfigError, OutputError
from mat_dist.runs.files import reported, write_bytes

RESULTS = "results"  # in the folder of the runs: the page with its pictures and the numbers
MIB = 1 << 20
SPARE = MIB // 4  # for the frame of a tar
WEIGHTS = (".safetensors", ".pt")
PART = re.compile(r"(?P<suite>[a-z0-9_]+)\.(?P<slice>\d{4})\.(?P<part>\d+)of(?P<parts>\d+)\.(?P<digest>[0-9a-f]{12})"
                  r"\.part")


def main(options: Namespace) -> None:
    """The command, by the options of `__main__.py`.

    Raises what `evidence` raises, when the state is written. Before: ConfigError, CheckpointError (of a state).
    """
    options.command = "evidence"
    suite, entries = evidence.planned(options)
    if options.dry_run:
        evidence.conduct(options, suite, entries)
        return
    number = take_up(options.state, options.root, options.suite) if options.state else 0
    try:
        evidence.conduct(Namespace(**{**vars(options), "out": options.root / RESULTS}), suite, entries)
    finally:
        leave(options, suite, entries, number + 1)


# ------------------------------------------------------------------------------------------------ taking up


def take_up(state: Path, root: Path, suite: str) -> int:
    """Unpack the newest state of a suite; runs that are here already stay as they are -> number of its slice.

    Raises ConfigError where there is none, CheckpointError where it is not whole, OutputError.
    """
    number, data = read_state(state, suite)
    with reported(root):
        root.mkdir(parents=True, exist_ok=True)
        here = {one.name for one in root.iterdir()}
        with tarfile.open(fileobj=io.BytesIO(data)) as tar, tempfile.TemporaryDirectory(dir=root) as folder:
            tar.extractall(folder, filter="data")
            found = sorted(one.name for one in Path(folder).iterdir())
            for name in found:
                if name not in here:
                    (Path(folder) / name).rename(root / name)
    runs = [name for name in found if (root / name / "config.yaml").is_file()]
    tell(f"slice {number} of suite {suite}: {len(set(runs) - here)} runs taken up, {len(here.intersection(runs))} were "
         "here already")
    return number


def read_state(state: Path, suite: str) -> tuple[int, bytes]:
    """Number and content of the newest state of a suite in a folder. Raises ConfigError, CheckpointError."""
    found = [(match, file) for file in (state.iterdir() if state.is_dir() else ())
             if (match := PART.fullmatch(file.name)) and match["suite"] == suite]
    if not found:
        raise ConfigError(f"there is no state of suite {suite} in {state}", COMMAND_LINE,
                          "give the folder that an earlier slice left, or - for the first slice")
    number = max(int(match["slice"]) for match, _ in found)
    newest = {(match["digest"], int(match["parts"])) for match, _ in found if int(match["slice"]) == number}
    parts = {int(match["part"]): file for match, file in found if int(match["slice"]) == number}
    if len(newest) > 1:
        raise CheckpointError(f"there are two states of slice {number}", str(state), "keep the parts of one of them")
    ((digest, count),) = newest
    if absent := [str(part) for part in range(1, count + 1) if part not in parts]:
        raise CheckpointError(f"part {', '.join(absent)} of {count} of slice {number} is missing", str(state),
                              "bring all parts back, or take the state of an earlier slice")
    with reported(state):
        data = b"".join(parts[part].read_bytes() for part in range(1, count + 1))
    if hashlib.sha256(data).hexdigest()[:12] != digest:
        raise CheckpointError(f"the state of slice {number} differs from what was left", str(state),
                              "bring its parts back again, or take the state of an earlier slice")
    return number, data


# ------------------------------------------------------------------------------------------------ leaving


@dataclass(frozen=True)
class Kept:
    """A run for the state: with its weights, where `whole`."""

    name: str
    files: Sequence[Path]
    whole: bool

    @property
    def size(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def leave(options: Namespace, suite: Suite, entries: Sequence[Entry], number: int) -> None:
    """The page, the numbers and the state in `options.out`, within `options.most` MiB. Raises OutputError."""
    root, out = options.root, options.out
    results = [root / RESULTS / f"{options.suite}{ending}" for ending in (".md", ".json")]
    shown = [file for file in results if file.is_file()]
    room = options.most * MIB - sum(file.stat().st_size for file in shown)
    with reported(out):
        out.mkdir(parents=True, exist_ok=True)
        found = list(kept(suite, entries))
        small = [one for one in found if not one.whole]
        data = packed(root, small)
        for one in (one for one in found if one.whole):
            left = room - len(data) - SPARE - sum(other.size for other in small if other.whole)
            if one.size <= left:
                small.append(one)
            else:
                tell(f"{one.name} starts anew in the next slice: what it needs to go on has {one.size / MIB:.1f} MiB, "
                     f"and {max(left, 0) / MIB:.1f} are left (--most); on this machine it goes on in {root}")
        if any(one.whole for one in small):
            data = packed(root, small)
    if len(data) > room:
        raise OutputError(f"the state has {len(data) / MIB:.1f} MiB, {room / MIB:.1f} are left", str(out),
                          f"give --most more MiB; the runs are in {root}")
    for file in shown:
        shutil.copyfile(file, out / file.name)
    for name, part in parts_of(options.suite, number, data, int(options.part * MIB)):
        write_bytes(out / name, part)
    tell(f"slice {number} of suite {options.suite}: {len(small)} runs, {sum(one.whole for one in small)} of them with "
         f"weights, in {len(data) / MIB:.1f} MiB: {out}")


def kept(suite: Suite, entries: Sequence[Entry]) -> Iterator[Kept]:
    """Every run that is there: without weights where nothing will ask for them again."""
    for seed in suite.seeds:
        begun = [entry for entry in entries if seed in entry.jobs and entry.jobs[seed].folder.config.is_file()]
        needed = {one.name for entry in entries if seed in entry.jobs and not entry.jobs[seed].done
                  for one in entry.sources()}
        for entry in begun:
            job = entry.jobs[seed]
            over = job.done and not entry.missing(suite.tables[entry.table], seed) and entry.name not in needed
            yield Kept(job.folder.name, list(_files(job, weights=not over)), whole=not over)


def _files(job: Job, weights: bool) -> Iterator[Path]:
    """Files of a run, and what its commands printed; of its checkpoints the newest and the best one."""
    folder = job.folder
    pointers = [folder.checkpoints / name for name in ("latest", "best")]
    ours = {pointer.name for pointer in pointers} | {one.read_text().strip() for one in pointers if one.is_file()}
    for file in sorted(folder.path.rglob("*")):
        inside = file.relative_to(folder.path).parts
        hidden = file == folder.lock or any(part.startswith(".") for part in inside)
        surplus = inside[0] == folder.checkpoints.name and (
            (len(inside) > 1 and inside[1] not in ours) or (file.suffix in WEIGHTS and not weights))
        if file.is_file() and not file.is_symlink() and not hidden and not surplus:
            yield file
    if job.log.is_file():
        yield job.log


def packed(root: Path, runs: Sequence[Kept]) -> bytes:
    """The results and these runs as a compressed tar."""
    stream = io.BytesIO()
    results = [file for file in sorted((root / RESULTS).rglob("*")) if file.is_file()]
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=6) as tar:
        for file in [*results, *(file for one in runs for file in one.files)]:
            tar.add(file, file.relative_to(root))
    return stream.getvalue()


def parts_of(suite: str, number: int, data: bytes, most: int) -> Iterator[tuple[str, bytes]]:
    """Name and content of each part, at most so many bytes each; PART reads the names."""
    digest, count = hashlib.sha256(data).hexdigest()[:12], max(math.ceil(len(data) / most), 1)
    for part in range(count):
        yield f"{suite}.{number:04}.{part + 1}of{count}.{digest}.part", data[part * most:(part + 1) * most]
