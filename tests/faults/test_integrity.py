"""Damaged checkpoints and malformed settings: nothing passes in silence."""

from __future__ import annotations

import io
import random
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

from mat_dist import checkpoints, train
from mat_dist.checkpoints import Meta, save_peer
from mat_dist.checkpoints.store import verify
from mat_dist.config import load_config
from mat_dist.errors import CheckpointError, ConfigError
from mat_dist.runs.folder import RunFolder
from tests.faults.cases.checkpoints import count_silent
from tests.unit.test_config_hostile import mutated


def saved(path: Path) -> Path:
    """A checkpoint of two peers with some kilobytes each -> its folder."""
    folder = RunFolder(path)
    directory = checkpoints.begin(folder, 10, 1)
    draw = torch.Generator().manual_seed(0)
    entries = [save_peer(directory, index, {"model": {"w": torch.randn(40, 30, generator=draw)}, "step": 10})
               for index in range(2)]
    return checkpoints.commit(folder, 10, 1, entries, Meta(1, ("a", "b"), "c", "d", {"muted": {}})).directory


def test_300_flipped_bits_and_100_truncations_are_all_found(tmp_path: Path) -> None:
    assert count_silent(saved(tmp_path), flips=300, cuts=100, seed=1) == []


def test_each_bit_of_the_manifest_is_protected(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    manifest = directory / "manifest.json"
    whole, passed = manifest.read_bytes(), []
    for bit in range(0, 8 * len(whole), 7):  # 7 has no common factor with 8: every position of a byte is met
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(data)
        try:
            verify(checkpoints.load_manifest(RunFolder(tmp_path), 10))
            passed.append(bit)
        except CheckpointError:
            pass
    assert passed == []


@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.thorough)])
def test_malformed_configurations_end_with_code_2_and_no_traceback(count: int, tmp_path: Path) -> None:
    draw, path = random.Random(5), tmp_path / "x.yaml"
    refused = named = 0
    while refused < count:
        data, overrides = mutated(draw)
        path.write_bytes(data)
        try:
            load_config(str(path), overrides)
            continue  # the edits left a sound configuration
        except ConfigError:
            refused += 1
        screen = io.StringIO()
        with redirect_stderr(screen):
            code = train.main(["--config", str(path), f"run.root={tmp_path}/runs", *overrides])
        lines = screen.getvalue().splitlines()
        assert code == 2 and lines and all(line.startswith("mat_dist: error: ") for line in lines), (data, overrides)
        named += any(str(path) in line or "command line" in line for line in lines)
    assert named >= 0.95 * count
    assert not (tmp_path / "runs").exists()
