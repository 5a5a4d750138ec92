"""Units that no image moves are counted where a network's last linear layer gets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.study.__main__ import main
from benchmarks.study.units import unused_units
from mat_dist import load
from mat_dist.config import load_config
from mat_dist.data import load_data
from tests.small_runs import run_small


def test_units_are_unused_until_an_image_moves_them() -> None:
    """Of three units one has no positive weight, and one sees the second image alone."""
    hidden, last = nn.Linear(2, 3, bias=False), nn.Linear(3, 2)
    hidden.weight = nn.Parameter(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0]]))
    net = nn.Sequential(hidden, nn.ReLU(), last)
    with torch.no_grad(), unused_units(net) as share:
        net(torch.tensor([[1.0, 0.0]]))
        assert share() == pytest.approx(2 / 3, abs=1e-6)
        net(torch.tensor([[0.0, 1.0]]))
        assert share() == pytest.approx(1 / 3, abs=1e-6)
    net(torch.tensor([[-1.0, 0.0]]))  # not watched any more
    assert share() == pytest.approx(1 / 3, abs=1e-6)


def test_a_network_without_a_linear_layer_has_no_share() -> None:
    with unused_units(nn.Sequential(nn.Flatten())) as share:
        assert share() is None


def test_the_command_measures_every_peer_on_the_validation_split(tmp_path: Path) -> None:
    """The last block is cut open by hand: the maxima over images of what its ReLU gives."""
    run = run_small(tmp_path, "lost", "model=tiny_cnn", "loss=at", "optim.schedule=constant", "peers.1.optim.lr=10",
                    "optim.weight_decay=0.005")
    file = tmp_path / "units.json"
    assert main(["units", str(run.folder.path), "images=40", "--json", str(file)]) == 0
    (found,) = json.loads(file.read_text())["runs"].values()
    config = load_config(str(run.folder.config))
    data = load_data(config.data, seed=0, batch_size=16).val
    assert (found["images"], found["step"], found["weights"]) == (40, 4, "raw")
    images, _ = data.batch(torch.arange(40))
    for peer, share in found["unused"].items():
        features: list[torch.Tensor] = []
        model = load(run.folder.path, peer=peer, which="latest")
        last = [one for one in model.modules() if isinstance(one, nn.ReLU)][-1]
        last.register_forward_hook(lambda _, __, out, features=features: features.append(out))
        model(images.float() / 255)
        assert share == pytest.approx((features[0].amax(0) == 0).double().mean().item(), abs=1e-6), peer
    assert found["unused"]["peer1"] > found["unused"]["peer0"]


@pytest.mark.parametrize(("words", "line"), [
    ([], "no run is named"), (["nowhere"], "there is no run folder 'nowhere'"),
    (["{run}", "attacks=pgd"], "attacks cannot be chosen here"), (["{run}", "{run}"], "two runs are called one")])
def test_what_cannot_be_measured_is_refused_in_one_line(words: list[str], line: str, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    run = run_small(tmp_path, "one", "peers=1", "loss=at") if words else None
    capsys.readouterr()
    assert main(["units", *(word.format(run=run.folder.path if run else "") for word in words)]) == 2
    assert line in capsys.readouterr().err
