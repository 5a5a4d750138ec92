"""From whose AEs a peer learns in a step, where its strategy (`random`, `eat`) draws one of those that it hears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mat_dist import rng
from mat_dist.config.schema import PeerConfig
from mat_dist.core.graph import CohortPlan
from mat_dist.methods.unions import EatChoice, random_norm


class Drawing:
    """The draws of all peers of a cohort, alike on all ranks.

    Args:
        specs: complete entries of all peers.
        plan: of the cohort.
        seed: of the run; with a peer's stream and the step it keys a draw.
    """

    def __init__(self, specs: Sequence[PeerConfig], plan: CohortPlan, seed: int) -> None:
        self._seed, self._streams = seed, [spec.stream or 0 for spec in specs]
        self._counts = {row.index: EatChoice.of(len(specs)) for row in plan.peers
                        if row.draws and row.me.strategy == "eat"}

    @property
    def counts(self) -> bool:
        """Whether a peer draws by its accuracy on the AEs of each of the others."""
        return bool(self._counts)

    def at(self, plan: CohortPlan, step: int) -> dict[int, int]:
        """Drawing peer -> the peer from whose AEs it learns at a step, among those that it hears by `plan`."""
        drawn = {}
        for row in plan.peers:
            if not row.draws or not row.heard:
                continue
            if row.index in self._counts:
                known = self._counts[row.index]
                choice = EatChoice([known.held[i] for i in row.heard], [known.seen[i] for i in row.heard])
                place = choice.choose(stream=self._key("eat", step, row.index))
            else:
                place = random_norm(len(row.heard), stream=self._key("norm", step, row.index))
            drawn[row.index] = row.heard[place]
        return drawn

    def update(self, peer: int, source: int, held: int, seen: int) -> None:
        """Count a learned batch: a peer was right on `held` of `seen` AEs of a source."""
        if peer in self._counts:
            self._counts[peer].update(source, held, seen)

    def state(self) -> dict[str, Any]:
        """Plain numbers by peer, for a checkpoint."""
        return {str(peer): choice.state() for peer, choice in self._counts.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same cohort."""
        for peer, choice in self._counts.items():
            choice.load(state[str(peer)])

    def _key(self, purpose: str, step: int, peer: int) -> int:
        return rng.key(self._seed, purpose, step, self._streams[peer])
