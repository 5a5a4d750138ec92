"""Checkpoints: one file per peer, a manifest with digests, atomic commit, fallback, retention. docs/checkpoint.md."""

from __future__ import annotations

from mat_dist.checkpoints.peers import Snapshot, identity, load_peer, migrated, save_peer, snapshot, write_peer
from mat_dist.checkpoints.store import (
    FORMAT,
    Best,
    FileEntry,
    Manifest,
    Meta,
    TooNew,
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
    read_manifest,
    step_name,
    verify,
)

__all__ = [
    "FORMAT", "Best", "FileEntry", "Manifest", "Meta", "Snapshot", "TooNew", "abandon", "adopt", "begin", "commit",
    "find_newest", "identity", "json_digest", "load_manifest", "load_peer", "mark_best", "migrated",
    "partial_directory", "prune", "read_best", "read_manifest", "save_peer", "snapshot", "step_name",
    "verify", "write_peer",
]
