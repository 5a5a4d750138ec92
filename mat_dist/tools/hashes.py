"""Print the SHA-256 of every peer's state in a checkpoint, to compare runs bit by bit.

The newest checkpoint of each run, one line per peer.
"""

from __future__ import annotations

from collections.abc import Sequence

from mat_dist.cli import as_main
from mat_dist.config import Options
from mat_dist.errors import CheckpointError
from mat_dist.evaluation.settings import find_runs
from mat_dist.screens import arrived


def print_hashes(words: Sequence[str]) -> None:
    """A line per run and peer; with several runs, whether they are equal. Raises CheckpointError where they
    differ, or a checkpoint cannot be read."""
    runs = Options("hashes", __doc__, "RUN [RUN ...]").read(words).words
    folders = find_runs(runs)

    from mat_dist import checkpoints
    from mat_dist.core.state_hash import state_hash

    found = []
    for word, folder in zip(runs, folders, strict=True):
        manifest = checkpoints.load_manifest(folder)
        hashes = [state_hash(checkpoints.load_peer(manifest, i)) for i in range(len(manifest.meta.peers))]
        found.append(hashes)
        for name, value in zip(manifest.meta.peers, hashes, strict=True):
            print(f"{word}  step {manifest.step}  {name}  {value}")
    if len(found) > 1:
        if any(hashes != found[0] for hashes in found):
            raise CheckpointError("the runs differ", ", ".join(runs), "compare the lines above")
        print(f"all {len(found)} runs are bitwise equal")
    arrived()


main = as_main(print_hashes)
