"""Checkpoints: one file per peer, a manifest with digests, atomic commit, fallback, retention. docs/checkpoint.md."""

from __future__ import annotations

from mat_dist.checkpoints.peers import identity, load_peer, save_peer, snapshot, write_peer
from mat_dist.checkpoints.store import (
    Best,
    FileEntry,
    Manifest,
    Meta,
    abandon,
    adopt,
    begin,
    commit,
    find_newest,
    json_digest,
    load_manifest,
    mark_best,
    partial_directory,
    prune,
    read_best,
    step_name,
)

__all__ = [
    "Best", "FileEntry", "Manifest", "Meta", "abandon", "adopt", "begin", "commit", "find_newest", "identity",
    "json_digest", "load_manifest", "load_peer", "mark_best", "partial_directory", "prune", "read_best", "save_peer",
    "snapshot", "step_name", "write_peer",
]
