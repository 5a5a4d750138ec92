"""Whole runs that take a fraction of a second: the train command in this process on 64 digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mat_dist import checkpoints, train
from mat_dist.core.state_hash import state_hash
from mat_dist.runs.folder import RunFolder

# 4 steps per epoch; PGD-1 everywhere.
SMALL = (
    "run.device=cpu", "log.console=off", "peers=2", "model.width=0.25", "attack.steps=1", "data.train_size=64",
    "data.val_size=40", "data.test_size=40", "train.batch_size=16", "train.epochs=1", "optim.ema_decay=null",
    "eval.every=0", "eval.test_steps=0", "eval.steps=1", "eval.chunk=20", "checkpoint.keep=20")


@dataclass(frozen=True)
class Finished:
    """A run that has ended: exit code and folder."""

    code: int
    folder: RunFolder

    def peers(self, which: str | int = "latest") -> list[dict[str, Any]]:
        """What a checkpoint holds, by peer."""
        manifest = checkpoints.load_manifest(self.folder, which)
        return [checkpoints.load_peer(manifest, i) for i in range(len(manifest.meta.peers))]

    def hashes(self, which: str | int = "latest", key: str | None = None) -> list[str]:
        """SHA-256 of each peer's state, or of one part of it."""
        return [state_hash(p if key is None else p[key]) for p in self.peers(which)]

    def steps(self) -> list[int]:
        """Steps whose checkpoints are there."""
        return sorted(int(p.name.removeprefix("step_")) for p in self.folder.checkpoints.glob("step_*"))

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Records of metrics.jsonl of a kind: step, epoch."""
        lines = [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]
        return [one for one in lines if one["kind"] == kind]

    def result(self, name: str) -> dict[str, Any]:
        """A result file of eval/."""
        return json.loads((self.folder.eval / f"{name}.json").read_text())

    def codes(self) -> list[int]:
        """Exit codes of all attempts, from exit.json."""
        return [one["code"] for one in json.loads(self.folder.exit.read_text())["attempts"]]


def robust_of(document: dict[str, Any]) -> dict[tuple[str, str], float]:
    """(target, weights) -> robust accuracy over all threats, from a result file's content."""
    return {(t["target"], t["weights"]): t["accuracy"]["union"] for t in document["targets"]}


def run_small(root: Path, name: str, *overrides: str) -> Finished:
    """Train in this process; later overrides win."""
    return Finished(train.main([*SMALL, f"run.root={root}", f"run.name={name}", *overrides]), RunFolder(root / name))


def as_format_1(directory: Path) -> None:
    """Turn a checkpoint into what mat_dist of format 1 wrote: files of torch.save, with that version's keys."""
    manifest = checkpoints.load_manifest(RunFolder(directory.parents[1]), directory.name)
    document = json.loads((directory / "manifest.json").read_text())
    for index, entry in enumerate(document["files"]):
        state = checkpoints.load_peer(manifest, index)
        for parts in state.pop("methods", {}).values():
            state.update(parts)
        (directory / entry["name"]).unlink()
        entry["name"] = f"peer_{index}.pt"
        torch.save(state, directory / entry["name"])
    vouch(directory, format=1, files=document["files"])


def vouch(directory: Path, **changes: Any) -> None:
    """Write the manifest of a checkpoint anew, with digests of the files as they are."""
    file = directory / "manifest.json"
    document = {**json.loads(file.read_text()), **changes}
    for entry in document["files"]:
        data = (directory / entry["name"]).read_bytes()
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    document.pop("digest")
    file.write_text(json.dumps({**document, "digest": checkpoints.json_digest(document)}) + "\n")


def interrupted(monkeypatch: Any, where: tuple[Any, str], at: int, error: Callable[[], BaseException]) -> None:
    """Let the `at`-th call (from 1) of a function raise before it does anything."""
    owner, name = where
    original, calls = getattr(owner, name), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise error()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def tree_hash(folder: Path, *but: str) -> str:
    """SHA-256 over names, kinds and contents of everything below a folder but files of some names."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.name not in but):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes() if path.is_file() else b"folder")
    return digest.hexdigest()
