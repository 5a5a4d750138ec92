"""A state dict that is read on several ranks: one folder, and errors with one text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mat_dist.attacks.norms import Threat
from mat_dist.config import load_config
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import CheckpointError
from mat_dist.evaluation import foreign
from mat_dist.evaluation.foreign import import_files
from mat_dist.evaluation.settings import FileOptions, Importing

WORDS = ("model=tiny_cnn", "data.name=digits")


@pytest.fixture
def importing(monkeypatch: pytest.MonkeyPatch) -> Importing:
    """Threads share torch's global generator, so the model draws nothing from it."""
    def plain(*args: Any, **kwargs: Any) -> torch.nn.Module:
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.utils.skip_init(torch.nn.Linear, 64, 10))
        model = torch.nn.Sequential()
        model.add_module("normalize", torch.nn.Identity())
        model.add_module("net", net)
        return model

    monkeypatch.setattr(foreign, "make_model", plain)
    return Importing(None, FileOptions(normalise="none"), WORDS)


def test_ranks_get_one_folder_and_one_error(importing: Importing, run_ranks: Any, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save({"weight": torch.ones(10, 64), "bias": torch.zeros(10)}, good)
    torch.save({"weight": torch.ones(10, 63), "bias": torch.zeros(10)}, bad)
    config = load_config("base", ["peers=1", "loss=at", *WORDS, f"run.root={tmp_path / 'runs'}"])

    def read(*files: Path) -> Any:
        return lambda mesh: [f.path for f in import_files(
            list(files), config, importing, (Threat("linf", 0.1),), "test", ["command"], mesh,
            Launch(mesh.placement.rank, mesh.placement.world), StopFlag())]

    first, second = run_ranks(read(good), 2, 2)
    assert first == second == [next((tmp_path / "runs").iterdir())]
    assert run_ranks(read(good), 1, 1) == [first]
    errors = run_ranks(read(good, bad), 2, 2, errors="return")
    assert len({str(one) for one in errors}) == 1 and all(type(one) is CheckpointError for one in errors)
    assert "the weights are for images of another size (weight (10, 63)" in str(errors[0])
