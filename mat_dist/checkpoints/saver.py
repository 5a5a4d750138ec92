"""Saving the cohort: owners write their peers in the background, rank 0 adds the manifest last.

Training waits only for the copy of the weights. The checkpoint appears when all ranks have said, with the vote of
a later step, that their files are on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from typing import Any

from mat_dist import checkpoints
from mat_dist.distributed.agreement import Agreement
from mat_dist.distributed.waiting import begun
from mat_dist.runs.session import Run

LAST_MOMENT = 1.0  # seconds that a rank which leaves waits for a write
PeerStates = Mapping[int, Callable[[], dict[str, Any]]]


@dataclass
class _Pending:
    """A save under way."""

    done: int
    meta: checkpoints.Meta
    writing: Future[list[checkpoints.FileEntry]]


class Saver:
    """Writes the checkpoints of a run, and keeps the newest `keep`. All verbs but `ready` are called by all ranks
    together; `note` tells the user, and `tell` a program, with the folder of each checkpoint."""

    def __init__(self, run: Run, *, keep: int, note: Callable[[str], None],
                 tell: Callable[[str, Any], None] = lambda event, what: None) -> None:
        self.run, self.keep, self.note, self.tell = run, keep, note, tell
        self.newest: checkpoints.Manifest | None = None
        self._pending: _Pending | None = None

    @property
    def pending(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None

    @property
    def ready(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._pending is None or self._pending.writing.done()

    def save(self, done: int, meta: checkpoints.Meta, states: PeerStates) -> bool:
        """Save now and wait -> whether there is a checkpoint of step `done`. Arguments as those of `start`."""
        return self.start(done, meta, states) and self.finish()

    def start(self, done: int, meta: checkpoints.Meta, states: PeerStates) -> bool:
        """Copy the local peers and begin to write them -> False if the disk refused already.

        Args:
            done: steps that the peers have done.
            meta: for the manifest.
            states: for each local peer (by index) a function that makes its state, a nested dictionary. Called on all
                ranks that host the peer, though only one of them writes it.
        """
        self.finish()
        mesh = self.run.mesh
        agree = Agreement(mesh, f"checkpoint after step {done}", done)
        agree.run("begin", self.run.check_owner)
        if mesh.placement.is_lead:
            agree.run("begin", checkpoints.begin, self.run.folder, done, self.run.attempt)
        if not self._passes(agree, "begin", done):
            return False
        copies = {}
        for index, state in states.items():
            made = agree.run(f"state of {meta.peers[index]}", state)
            if mesh.placement.owns_files:
                copies[index] = agree.run(f"copy of {meta.peers[index]}", checkpoints.snapshot, made,
                                          checkpoints.identity(meta, done, index))
        agree.header("copies")
        directory = checkpoints.partial_directory(self.run.folder, done, self.run.attempt)
        self._pending = _Pending(done, meta, begun(
            lambda: [checkpoints.write_peer(directory, i, copy) for i, copy in copies.items()], "checkpoint"))
        return True

    def finish(self) -> bool:
        """Wait for all files, add the manifest, forget old checkpoints -> whether the checkpoint is there. Raises
        OutputError after three failed saves in a row, and whatever else a rank met."""
        pending, self._pending = self._pending, None
        if pending is None:
            return False
        mesh = self.run.mesh
        agree = Agreement(mesh, f"checkpoint after step {pending.done}", pending.done)
        entries = agree.run("writing", pending.writing.result)
        if not self._passes(agree, "files", pending.done):
            return False
        told = mesh.gather_json([asdict(e) for e in entries])
        agree.run("manifest", self.run.check_owner)
        if mesh.placement.is_lead:
            listed = [checkpoints.FileEntry(**e) for rank in told for e in rank]
            agree.run("manifest", checkpoints.commit, self.run.folder, pending.done, self.run.attempt, listed,
                      pending.meta)
            for problem in (agree.run("retention", checkpoints.prune, self.run.folder, self.keep) or ((), ()))[1]:
                self.note(problem)
        if not self._passes(agree, "manifest", pending.done):
            return False
        self.run.refusals = 0
        self.newest = agree.run("manifest", checkpoints.load_manifest, self.run.folder, pending.done)
        agree.header("saved")
        self.tell("checkpoint", self.run.folder.checkpoints / checkpoints.step_name(pending.done))
        return True

    def close(self) -> None:
        """Give a write under way a moment to end; without a manifest it never becomes a checkpoint."""
        if self._pending is not None:
            wait([self._pending.writing], timeout=LAST_MOMENT)

    def _passes(self, agree: Agreement, point: str, done: int) -> bool:
        """Meet all ranks; a disk that refuses is survived a few times."""
        def abandon() -> None:
            if self.run.mesh.placement.is_lead:
                checkpoints.abandon(self.run.folder, done, self.run.attempt)

        return self.run.outlives(agree, point, f"no checkpoint after step {done}", self.note, abandon)
