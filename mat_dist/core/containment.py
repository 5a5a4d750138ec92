"""What a run does after a non-finite step: stop, leave the step out, or also put the guilty peer in quarantine."""

from __future__ import annotations

from collections.abc import Callable

from mat_dist import checkpoints
from mat_dist.checkpoints.saver import Saver
from mat_dist.core.cohort import Cohort
from mat_dist.distributed.agreement import Agreement
from mat_dist.errors import NonFinite

MOST_REFUSED, WINDOW = 3, 100  # refused steps that are borne within so many steps
QUARANTINE_STEPS = 20


class Containment:
    """Decides, equally on all ranks, how to go on after a step that the vote refused.

    Args:
        policy: `step.on_nonfinite`.
        cohort, saver: of this rank.
        note: tells the user.
    """

    def __init__(self, policy: str, cohort: Cohort, saver: Saver, note: Callable[[str], None]) -> None:
        self.policy, self.cohort, self.saver, self.note = policy, cohort, saver, note
        self._refused: list[int] = []

    def handle(self, error: NonFinite, step: int) -> None:
        """Go on after `error` in `step`, or raise it.

        It is raised under the policy abort, after too many refused steps, or when there is no checkpoint to reload.
        """
        self._refused = [s for s in self._refused if s > step - WINDOW] + [step]
        if self.policy == "abort" or len(self._refused) > MOST_REFUSED:
            raise error
        if self.policy == "quarantine":
            self._reload(error, step)
        count = f"{len(self._refused)} of at most {MOST_REFUSED} in {WINDOW}"
        self.note(f"warning: step {step} left out ({count}): {error.what}")

    def _reload(self, error: NonFinite, step: int) -> None:
        """Put the guilty peers back to the newest checkpoint; nobody learns from them for a while."""
        if self.saver.pending:
            self.saver.finish()
        manifest = self.saver.newest
        if manifest is None:
            raise error
        agree = Agreement(self.cohort.mesh, f"quarantine after step {step}", step)
        for peer in self.cohort.peers:
            if peer.index in error.peers:
                agree.run(f"reloading {peer.name}", lambda p=peer: p.load(checkpoints.load_peer(manifest, p.index)))
        agree.settle("reloaded")
        self.cohort.mute(error.peers, step + 1 + QUARANTINE_STEPS)
