"""Checkpoints: one file per peer, a manifest with digests, atomic commit, fallback, retention. docs/checkpoint.md."""

from __future__ import annotations

from mat_dist.checkpoints.find import adopt, find_newest, load_manifest
from mat_dist.checkpoints.layout import partial_directory, step_name
from mat_dist.checkpoints.manifest import FORMAT, FileEntry, Manifest, Meta, TooNew, json_digest, read_manifest, verify
from mat_dist.checkpoints.peers import load_peer, save_peer, snapshot, write_peer
from mat_dist.checkpoints.retention import Best, mark_best, prune, read_best
from mat_dist.checkpoints.save import abandon, begin, commit

__all__ = [
    "FORMAT", "Best", "FileEntry", "Manifest", "Meta", "TooNew", "abandon", "adopt", "begin", "commit",
    "find_newest", "json_digest", "load_manifest", "load_peer", "mark_best", "partial_directory", "prune", "read_best",
    "read_manifest", "save_peer", "snapshot", "step_name", "verify", "write_peer",
]
