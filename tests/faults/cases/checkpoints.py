"""Rows 30 to 37: checkpoints that are damaged, mixed, hostile, of another version or run; other rank counts."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mat_dist import checkpoints
from mat_dist.checkpoints import Meta, find_newest, save_peer
from mat_dist.checkpoints.store import verify
from mat_dist.errors import CheckpointError
from mat_dist.runs.folder import RunFolder
from tests.faults.inject import Fault
from tests.faults.lab import INTERVAL, TOTAL, End, Lab
from tests.faults.launching import fork
from tests.faults.registry import case
from tests.small_runs import as_format_1, vouch

CHECKPOINT = 4
STOP_AT = 2 * INTERVAL
NEWEST, OLDER = (f"step_{step:08d}" for step in (STOP_AT, INTERVAL))


def stopped_run(lab: Lab, *more: str) -> Path:
    """A run that was asked to stop after two checkpoints -> the folder of its checkpoints."""
    end = lab.run([Fault("term", "batch", rank=None, at=STOP_AT - 1)], *more, ranks=1)
    lab.expect(end.code == 75, f"preparation: {end.code} {end.message}")
    names = sorted(path.name for path in (end.folder / "checkpoints").glob("step_*"))
    lab.expect(names == [OLDER, NEWEST], f"preparation: {names}")
    return end.folder / "checkpoints"


def restart(lab: Lab, *more: str) -> End:
    """Start the run again, timed from its start."""
    group = lab.start((), lab.words(*more), ranks=1)
    return lab.end(group, since=group.send(0))  # type: ignore[arg-type]


def cut(share: float, less: int = 0) -> Callable[[Path], None]:
    """Keep a share of a file, less some bytes."""
    return lambda file: os.truncate(file, int(file.stat().st_size * share) - less)


def flip(file: Path, bit: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


SPOILS: dict[str, Callable[[Path], Any]] = {
    "empty": cut(0), "half": cut(0.5), "a byte short": cut(1, 1),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)), "missing": Path.unlink,
    "one bit": lambda file: flip(file, 8 * 1000 + 3)}


@case(30, "newest checkpoint truncated", "empty", code=0, bound=10, spoil="empty")
@case(30, "newest checkpoint truncated", "half", code=0, bound=10, spoil="half", ci=True)
@case(30, "newest checkpoint truncated", "a byte short", code=0, bound=10, spoil="a byte short")
@case(30, "newest checkpoint truncated", "zeros", code=0, bound=10, spoil="zeros")
@case(30, "newest checkpoint truncated", "missing", code=0, bound=10, spoil="missing")
@case(30, "newest checkpoint truncated", "manifest", code=0, bound=10, spoil="half", name="manifest.json")
@case(31, "one bit flipped in the newest checkpoint", "peer file", code=0, bound=10, spoil="one bit")
def damaged(lab: Lab, code: int, spoil: str, name: str = "peer_1.safetensors") -> None:
    """The restart falls back to the checkpoint before, says how many steps are redone, and ends bit-equal."""
    SPOILS[spoil](stopped_run(lab) / NEWEST / name)
    end = restart(lab)
    lab.expect_end(end, code)
    told = f"{NEWEST} is damaged" in end.text and f"{INTERVAL} steps are redone" in end.text
    lab.expect(told, "the fallback is not told")
    lab.expect(lab.hashes() == lab.reference(), "other weights than the undisturbed run")
    lab.notes["lost_steps"] = INTERVAL


@case(30, "newest checkpoint truncated", "all of them", code=CHECKPOINT, bound=10, spoil="half")
@case(31, "one bit flipped in the newest checkpoint", "in all of them", code=CHECKPOINT, bound=10, spoil="one bit")
def all_damaged(lab: Lab, code: int, spoil: str) -> None:
    """None is left: the run stops and touches nothing."""
    files = list(stopped_run(lab).glob("step_*/peer_0.safetensors"))
    for file in files:
        SPOILS[spoil](file)
    end = restart(lab)
    lab.expect_end(end, code, says=["all 2 checkpoints are damaged", NEWEST])
    lab.expect(all(file.exists() for file in files), "a damaged checkpoint was removed")


@case(31, "one bit flipped in the newest checkpoint", "300 bits 100 cuts", code=0)
def every_bit(lab: Lab, code: int) -> None:
    """Random bits of all files, and random lengths: each one is found."""
    newest = stopped_run(lab) / NEWEST
    silent = count_silent(newest, flips=300, cuts=100, seed=0)
    lab.expect(not silent, f"not found: {silent}")
    lab.notes["code"] = code


def count_silent(directory: Path, *, flips: int, cuts: int, seed: int) -> list[str]:
    """Damage the files of a checkpoint, one bit or length at a time -> what was not noticed."""
    folder = RunFolder(directory.parents[1])
    draw, files, silent = random.Random(seed), sorted(directory.iterdir()), []
    sizes = [file.stat().st_size for file in files]
    for number in range(flips + cuts):
        # By turns a file drawn evenly, or by size, so that the small manifest is hit too.
        file = draw.choice(files) if number % 2 else draw.choices(files, sizes)[0]
        whole, step = file.read_bytes(), int(directory.name.removeprefix("step_"))
        if number < flips:
            flip(file, draw.randrange(8 * len(whole)))
        else:
            file.write_bytes(whole[: draw.randrange(len(whole))])
        if _reads(folder, step):
            silent.append(f"{file.name}, trial {number}")
        file.write_bytes(whole)
    if not _reads(folder, int(directory.name.removeprefix("step_"))):
        silent.append("the whole checkpoint was refused")
    return silent


def _reads(folder: RunFolder, step: int) -> bool:
    """Whether the checkpoint of `step` counts as intact, for the search and for the reader of a peer."""
    try:
        manifest = checkpoints.load_manifest(folder, step)
        verify(manifest)
        for index in range(len(manifest.meta.peers)):
            checkpoints.load_peer(manifest, index)
    except CheckpointError:
        return False
    return True


OPERATIONS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "link")


@case(32, "kill -9 at every file operation of a save", code=0)
def killed_in_save(lab: Lab, code: int) -> None:
    """A process per operation saves a third time and kills itself before it; a complete one is always found."""
    original = lab.folder / "original"
    original.mkdir()
    for step in (10, 20):
        _save(RunFolder(original), step)
    number, ended = 0, False
    while not ended:
        folder = RunFolder(lab.folder / f"kill_{number}")
        shutil.copytree(original, folder.path)
        pid = fork(lambda folder=folder, number=number: _save_until(folder, number), lab.folder / "out_1")
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL
        newest = find_newest(folder)
        lab.expect(newest is not None and newest[0].step in (20, 30), f"operation {number}: nothing found")
        if newest is not None:
            values = {float(checkpoints.load_peer(newest[0], index)["w"][0]) - index for index in range(2)}
            lab.expect(values == {newest[0].step}, f"operation {number}: peers of different steps {values}")
        _save(folder, 30)  # the restart can save again
        newest = find_newest(folder)
        lab.expect(newest is not None and newest[0].step == 30, f"operation {number}: the next save is not found")
        shutil.rmtree(folder.path)
        number += 1
    lab.expect(number > 20, f"only {number} operations")
    lab.notes.update(code=code, message=f"killed at {number - 1} operations")
    lab.kinds.append("process")


def _save(folder: RunFolder, step: int) -> None:
    directory = checkpoints.begin(folder, step, 1)
    entries = [save_peer(directory, index, {"w": torch.full((300,), float(step + index))}) for index in range(2)]
    checkpoints.commit(folder, step, 1, entries, Meta(0, ("a", "b"), "", ""))
    checkpoints.mark_best(folder, step, 0.5)
    checkpoints.prune(folder, 2)


def _save_until(folder: RunFolder, number: int) -> int:
    """Save; before file operation `number` this process kills itself."""
    count = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*args, **kwargs)
        return operation

    for name in OPERATIONS:
        setattr(os, name, wrap(getattr(os, name)))
    _save(folder, 30)
    return 0


@case(33, "peer files of different steps mixed", "in the newest", code=0, bound=10, everywhere=False)
@case(33, "peer files of different steps mixed", "in all", code=CHECKPOINT, bound=10, everywhere=True)
def mixed(lab: Lab, code: int, everywhere: bool) -> None:
    """The digests in the manifest differ: refused, with the fallback of row 30."""
    found = stopped_run(lab)
    newer, older = ((found / name / "peer_0.safetensors") for name in (NEWEST, OLDER))
    data = newer.read_bytes()
    newer.write_bytes(older.read_bytes())
    if everywhere:
        older.write_bytes(data)
    end = restart(lab)
    lab.expect_end(end, code, says=["damaged", "peer_0.safetensors"] if code else [])
    if not code:
        lab.expect(f"{NEWEST} is damaged" in end.text, "the fallback is not told")
        lab.expect(lab.hashes() == lab.reference(), "other weights than the undisturbed run")


@case(34, "checkpoint with foreign objects", code=CHECKPOINT, bound=5)
def foreign(lab: Lab, code: int) -> None:
    """A pickle that would run something, in a checkpoint whose digests are all in order: refused, and nothing runs."""
    from tests.unit.test_checkpoint_hostile import HOSTILE, Touch

    found, sentinel = stopped_run(lab), lab.folder / "executed"
    as_format_1(found / NEWEST)
    for kind, make in HOSTILE.items():
        (found / NEWEST / "peer_1.pt").write_bytes(make(Touch(sentinel)))
        vouch(found / NEWEST)
        manifest = checkpoints.load_manifest(RunFolder(found.parent), STOP_AT)
        try:
            checkpoints.load_peer(manifest, 1)
            lab.problems.append(f"{kind} was read")
        except CheckpointError:
            pass
    (found / NEWEST / "peer_1.pt").write_bytes(HOSTILE["reduce"](Touch(sentinel)))
    vouch(found / NEWEST)
    end = restart(lab)
    lab.expect_end(end, code, says=["peer_1.pt", "not a file of tensors"])
    lab.expect(not sentinel.exists(), "it ran")


@case(35, "checkpoint of another version", "newer", code=CHECKPOINT, bound=5)
def newer(lab: Lab, code: int) -> None:
    """Says which version it needs; an older checkpoint is not taken in its place."""
    found = stopped_run(lab)
    vouch(found / NEWEST, format=99, versions={"mat_dist": "9.9"})
    end = restart(lab)
    lab.expect_end(end, code, says=["needs mat_dist >= 9.9"])
    lab.expect(sorted(path.name for path in found.glob("step_*")) == [OLDER, NEWEST], "a checkpoint was moved")


@case(35, "checkpoint of another version", "older", code=0, bound=5)
def migrated(lab: Lab, code: int) -> None:
    """A run that an older mat_dist began is continued to the same end."""
    found = stopped_run(lab)
    for name in (OLDER, NEWEST):
        as_format_1(found / name)
    end = restart(lab)
    lab.expect_end(end, code)
    lab.expect(f"continuing after step {STOP_AT}" in end.text, "it did not continue")
    lab.expect(lab.hashes() == lab.reference(), "other weights than the undisturbed run")


@case(36, "resume with other settings", "model", code=CHECKPOINT, bound=5, words=("model=small_cnn",), key="model")
@case(36, "resume with other settings", "peers", code=CHECKPOINT, bound=5, words=("peers=3",), key="peers")
@case(36, "resume with other settings", "seed", code=CHECKPOINT, bound=5, words=("run.seed=7",), key="run.seed")
@case(36, "resume with other settings", "data", code=CHECKPOINT, bound=5, words=("data.val_size=50",), key="val_size")
def other_settings(lab: Lab, code: int, words: tuple[str, ...], key: str) -> None:
    """The keys that differ are listed, and how to start a run with other settings."""
    stopped_run(lab)
    end = restart(lab, *words)
    lab.expect_end(end, code, says=[key, "run.name"])


@case(37, "resume on 4, 2, 1 and 4 ranks", code=0)
def replaced(lab: Lab, code: int) -> None:
    """A quarter of the run each: the weights are those of an undisturbed run on one rank."""
    for number, ranks in enumerate((4, 2, 1, 4), 1):
        last = number * INTERVAL == TOTAL
        faults = [] if last else [Fault("term", "batch", rank=0, at=number * INTERVAL - 1)]
        end = lab.run(faults, "peers=4", ranks=ranks)
        lab.expect(end.code == (0 if last else 75), f"{ranks} ranks: {end.code} {end.message}")
    lab.expect_end(end, code, timed=False)
    lab.expect(lab.hashes() == lab.reference("peers=4"), "other weights than the undisturbed run")
