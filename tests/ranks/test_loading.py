"""`mat_dist.load` gives the module that the run's own table speaks of."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import mat_dist
from mat_dist.checkpoints.load import candidates
from mat_dist.config import load_config
from mat_dist.data import as_float, load_data
from mat_dist.errors import CheckpointError
from mat_dist.train import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny finished run of two peers."""
    root = tmp_path_factory.mktemp("runs")
    words = [f"run.root={root}", "run.name=tiny", "peers=2", "data.train_size=200", "data.val_size=60",
             "data.test_size=40", "train.epochs=2", "train.batch_size=50", "eval.every=1", "eval.steps=2",
             "eval.test_steps=2", "log.console=off"]
    assert main(words) == 0
    return root / "tiny"


def test_a_loaded_peer_gives_the_clean_answers_of_the_result_file(run: Path) -> None:
    config = load_config(str(run / "config.yaml"))
    data = load_data(config.data, seed=config.run.seed, batch_size=config.train.batch_size).test
    images, y_B = data.batch(torch.arange(len(data)))
    (file,) = run.glob("eval/test_best_*.csv")
    rows = list(csv.DictReader(file.open()))
    for target in ("peer0", "peer1", "ensemble"):
        for weights in ("raw", "ema"):
            model = mat_dist.load(run, target, weights=weights)
            correct = (model(as_float(images)).argmax(1) == y_B).int().tolist()
            told = [int(r["clean_prediction"] == r["label"]) for r in rows
                    if (r["target"], r["weights"]) == (target, weights)]
            assert correct == told


def test_best_is_the_peer_that_withstood_most_on_the_validation_split(run: Path) -> None:
    best = mat_dist.load(run)
    assert not any(p.requires_grad for p in best.parameters()) and not best.training
    states = [mat_dist.load(run, i).state_dict() for i in range(2)]
    assert any(all(torch.equal(best.state_dict()[k], s[k]) for k in s) for s in states)


@pytest.mark.parametrize("peer,which", [("nobody", "best"), (7, "best"), ("peer0", "step_99"), (-1, "best")])
def test_what_is_not_there_is_a_checkpoint_error(run: Path, peer: str | int, which: str) -> None:
    with pytest.raises(CheckpointError):
        mat_dist.load(run, peer, which=which)


def test_a_folder_that_is_no_run_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        mat_dist.load(tmp_path)


def test_the_best_peer_is_a_generalist_or_else_one_that_learns_adversarial_examples() -> None:
    """The first net of LBGAT learns clean images alone; MART's terms on AEs are those of a method."""
    def names(*words: str) -> list[str]:
        return candidates(load_config("digits", words).peers)

    assert names("peers=2", "loss=lbgat") == ["peer1"] and names("peers=2") == ["peer0", "peer1"]
    assert names("peers=2", "peers.0.loss=mart", "peers.1.loss=at") == ["peer0", "peer1"]
    assert names("peers=2", "peers.0.role=specialist", "peers.1.role=generalist") == ["peer1"]
    assert names("peers=2", "loss=at", "loss.hard_weight=0", "loss.clean_weight=1") == ["peer0", "peer1"]
