"""A kill or a disk error at every file operation of a save: an intact checkpoint is always found, a retry works."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from mat_dist import checkpoints
from mat_dist.checkpoints import Meta, find_newest, load_peer, mark_best, prune, save_peer
from mat_dist.errors import OutputError
from mat_dist.runs.folder import RunFolder

META = Meta(epoch=0, peers=("a", "b"), config_digest="", data_digest="")
OPERATIONS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "link")


class Killed(BaseException):
    """Stands for a kill: from then on no file operation of the dead process happens."""


@dataclass
class Fault:
    """Counts file operations; number `at` fails: a kill (before it, or in the middle of a write), or an OSError."""

    at: int
    kind: str
    count: int = 0
    trace: list[tuple[str, str]] = field(default_factory=list)

    def wrap(self, name: str, real: Callable) -> Callable:
        def operation(*args, **kwargs):
            self.count += 1
            self.trace.append((name, str(args[0])))
            if self.kind == "error" and self.count == self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.kind != "error" and self.count >= self.at:
                if self.kind == "torn" and self.count == self.at and name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                raise Killed
            return real(*args, **kwargs)
        return operation


def save(folder: RunFolder, step: int, salt: int, attempt: int) -> None:
    try:
        directory = checkpoints.begin(folder, step, attempt)
        entries = [save_peer(directory, index, {"salt": salt, "w": torch.full((300,), salt + index)})
                   for index in range(2)]
    except OutputError:
        checkpoints.abandon(folder, step, attempt)
        raise
    checkpoints.commit(folder, step, attempt, entries, META)
    mark_best(folder, step, float(step))
    prune(folder, 2)


def found(folder: RunFolder) -> tuple[int, int] | None:
    """(step, salt) of the newest intact checkpoint; its peers must belong together."""
    newest = find_newest(folder)
    if newest is None:
        return None
    peers = [load_peer(newest[0], index) for index in range(2)]
    assert all(torch.equal(peer["w"], torch.full((300,), peer["salt"] + i)) for i, peer in enumerate(peers))
    assert peers[0]["salt"] == peers[1]["salt"]
    return newest[0].step, peers[0]["salt"]


def damage(folder: RunFolder, step: int) -> None:
    file = folder.checkpoints / checkpoints.step_name(step) / "peer_0.safetensors"
    file.write_bytes(file.read_bytes()[::-1])


# name: ((step, salt) saved before, damaged step, (step, salt) whose save is disturbed, what may be found after)
SCENARIOS = {
    "first": ([], None, (10, 1), {None, (10, 1)}),
    "third": ([(10, 1), (20, 2)], None, (30, 3), {(20, 2), (30, 3)}),
    "same again": ([(10, 1)], None, (10, 1), {(10, 1)}),
    "replaces the only one": ([(10, 1)], None, (10, 2), {(10, 1), (10, 2)}),
    "replaces a damaged one": ([(10, 1), (20, 2)], 20, (20, 3), {(10, 1), (20, 3)}),
}


def prepare(path: Path, name: str) -> RunFolder:
    before, damaged, _, _ = SCENARIOS[name]
    folder = RunFolder(path)
    path.mkdir()
    for step, salt in before:
        save(folder, step, salt, attempt=1)
    if damaged is not None:
        damage(folder, damaged)
    return folder


def disturbed(folder: RunFolder, name: str, fault: Fault, monkeypatch) -> str:
    """Run the scenario's save under `fault`; how it ended: done, killed or error."""
    with monkeypatch.context() as patch:
        for operation in OPERATIONS:
            patch.setattr(os, operation, fault.wrap(operation, getattr(os, operation)))
        try:
            save(folder, *SCENARIOS[name][2], attempt=2)
        except Killed:
            return "killed"
        except OutputError as error:
            assert "No space left" in error.what and "bytes free" in error.what
            return "error"
    return "done"


@pytest.fixture(autouse=True)
def _no_real_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # takes milliseconds, and no power is cut here


@pytest.mark.parametrize("kind", ["kill", "torn", "error"])
@pytest.mark.parametrize("name", ["third", "replaces the only one", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("first", "same again", "replaces a damaged one"))])
def test_a_fault_at_any_file_operation_leaves_an_intact_checkpoint(tmp_path, monkeypatch, name, kind):
    original = prepare(tmp_path / "original", name)
    _, _, wanted, allowed = SCENARIOS[name]
    rehearsal = Fault(10**9, kind)
    shutil.copytree(original.path, tmp_path / "rehearsal")
    assert disturbed(RunFolder(tmp_path / "rehearsal"), name, rehearsal, monkeypatch) == "done"
    numbers = [number for number, (operation, _) in enumerate(rehearsal.trace, 1)
               if kind != "torn" or operation == "write"]
    assert len(numbers) >= (4 if kind == "torn" else 25)
    for number in numbers:
        folder = RunFolder(tmp_path / str(number))
        shutil.copytree(original.path, folder.path)
        fault = Fault(number, kind)
        end = disturbed(folder, name, fault, monkeypatch)
        assert end == "killed" if kind != "error" else end in ("error", "done"), fault.trace[-3:]
        assert found(folder) in allowed, fault.trace[-3:]
        if end == "error":
            assert not [file for file in folder.checkpoints.glob(".*") if file.suffix in (".tmp", ".partial")]
        if newest := find_newest(folder):
            checkpoints.adopt(folder, newest[0])
            assert checkpoints.load_manifest(folder).step == newest[0].step
        save(folder, *wanted, attempt=3)
        assert found(folder) == wanted
        assert checkpoints.load_manifest(folder).step == wanted[0] == checkpoints.load_manifest(folder, "best").step
        assert not [file for file in folder.checkpoints.iterdir()
                    if file.name.startswith(".") or file.suffix == ".replaced"], fault.trace[-3:]


def test_everything_reaches_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    fault = Fault(10**9, "kill")
    folder = prepare(tmp_path / "run", "first")
    disturbed(folder, "first", fault, monkeypatch)
    names = [name for name, _ in fault.trace]
    publish = next(i for i, (name, path) in enumerate(fault.trace) if name == "rename" and path.endswith(".partial"))
    # two peers' files and the manifest: each is fsynced before its replace, and the folder after it
    told = [name for name in names[:publish] if name in ("write", "replace", "fsync")]
    assert [name for name, _ in itertools.groupby(told)] == [
        "fsync", *["write", "fsync", "replace", "fsync"] * 3]
    after = [name for name in names[publish:] if name in ("rename", "fsync", "replace")]
    assert after[:4] == ["rename", "fsync", "fsync", "replace"]  # the folder, then `latest`
