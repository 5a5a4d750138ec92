"""An evaluation on 1, 2 and 4 ranks: the same chunks, each attacked once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mat_dist.config import load_config
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.placement import Placement
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import DataError
from mat_dist.evaluation import chunks, soundness
from mat_dist.evaluation.chunks import Work, run_chunks
from mat_dist.evaluation.command import prepare
from mat_dist.evaluation.settings import Request
from mat_dist.runs.console import Screen
from mat_dist.runs.folder import RunFolder
from tests.small_runs import run_small

pytestmark = pytest.mark.slow  # small trainings and attacks


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    done = run_small(tmp_path_factory.mktemp("runs"), "small", "train.max_steps=4")
    assert done.code == 0
    folder = RunFolder(done.folder.path)
    config = load_config(str(folder.config), ["eval.chunk=6"])
    mesh = Mesh(Placement.place(1, 1, 0), torch.device("cpu"))
    request = Request(attacks=("pgd",), steps=2, checks=6, targets=("peer0", "ensemble"))
    return prepare(folder, config, request, mesh, Launch(), StopFlag())[0]


def test_ranks_share_the_chunks_and_do_not_change_them(work: Work, run_ranks: Any, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundness, "SEARCH_QUERIES", 10)
    attacked: Counter[int] = Counter()
    original = chunks.attack_chunk

    def counted(work: Work, chunk: int, device: torch.device, tell: Any) -> dict[str, Any]:
        attacked[chunk] += 1
        return original(work, chunk, device, tell)

    monkeypatch.setattr(chunks, "attack_chunk", counted)
    found = {}
    for world in (1, 2, 4):
        attacked.clear()
        mine = replace(work, folder=tmp_path / str(world))
        found[world], *others = run_ranks(lambda mesh, mine=mine: run_chunks(mine, mesh, StopFlag(), Screen()), world,
                                          world)
        assert attacked == dict.fromkeys(range(7), 1) and others == [[]] * (world - 1)
        files = {p.name: p.read_bytes() for p in (tmp_path / str(world)).iterdir()}
        assert files == {p.name: p.read_bytes() for p in (tmp_path / "1").iterdir()} and len(files) == 7
    assert found[1] == found[2] == found[4]


def test_an_error_of_one_rank_reaches_all_and_the_others_chunks_are_kept(work: Work, run_ranks: Any, tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    original = chunks.attack_chunk

    def failing(work: Work, chunk: int, device: torch.device, tell: Any) -> dict[str, Any]:
        if chunk == 1:
            raise DataError("a broken image", "chunk 1", "look at it")
        return original(work, chunk, device, tell)

    mine = replace(work, folder=tmp_path / "chunks")
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "attack_chunk", failing)
        errors = run_ranks(lambda mesh: run_chunks(mine, mesh, StopFlag(), Screen()), 2, 2, errors="return")
    assert [str(error) for error in errors] == ["a broken image (chunk 1): look at it"] * 2
    assert sorted(p.name for p in (tmp_path / "chunks").iterdir()) == [f"chunk_0000{k}.json" for k in (0, 2, 4, 6)]
    (found,) = run_ranks(lambda mesh: run_chunks(mine, mesh, StopFlag(), Screen()), 1, 1)
    assert len(found) == 7
