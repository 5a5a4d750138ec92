"""A norm of the user's own, a class in a plug-in, in everything that knows norms."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mat_dist import rng
from mat_dist.attacks import norms
from mat_dist.attacks.norms import Linf, Threat, register_norm
from mat_dist.config import load_config, load_plugins
from mat_dist.config import norms as names
from mat_dist.errors import ConfigError
from mat_dist.evaluation import soundness
from mat_dist.evaluation.__main__ import main as evaluate
from mat_dist.report import measure
from mat_dist.report.__main__ import main as report
from mat_dist.tools.check.__main__ import main as check
from tests.small_runs import run_small

RED = '''
"""linf on the first channel; the others stay as they are."""

import torch

from mat_dist.attacks import Linf, register_norm


@register_norm("red")
class Red(Linf):
    def __init__(self, x_BCHW, eps, share=None):
        super().__init__(x_BCHW, eps)
        self.low[:, 1:] = self.high[:, 1:] = x_BCHW[:, 1:]

    @staticmethod
    def length(change_BCHW):
        stays = (change_BCHW[:, 1:] == 0).flatten(1).all(1)
        return torch.where(stays, change_BCHW[:, 0].flatten(1).abs().amax(1), torch.inf)

    def step(self, adv_BCHW, grad_BCHW, size, top=None):
        red = torch.zeros_like(grad_BCHW)
        red[:, 0] = grad_BCHW[:, 0]
        return super().step(adv_BCHW, red, size)
'''
EPS = 0.2


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file; what it registers is forgotten after the test."""
    monkeypatch.setattr(norms, "_REGIONS", dict(norms._REGIONS))
    monkeypatch.setattr(names, "_NORMS", dict(names._NORMS))
    before = set(sys.modules)
    path = tmp_path / "red.py"
    path.write_text(RED)
    yield path
    for name in set(sys.modules) - before:
        if name.startswith("mat_dist_plugin_"):
            del sys.modules[name]


@pytest.fixture
def red(plugin: Path) -> Threat:
    load_plugins([str(plugin)])
    return Threat("red", EPS)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """8x8 images of three channels: class 1 is redder in the upper half, class 2 in the lower; the rest is noise."""
    draw = np.random.default_rng(0)

    def some(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 3
        x = draw.integers(20, 150, (count, 8, 8, 3))
        x[labels == 1, :4, :, 0] += 90
        x[labels == 2, 4:, :, 0] += 90
        return x.astype(np.uint8), labels

    (x_train, y_train), (x_test, y_test) = some(300), some(60)
    path = tmp_path / "images.npz"
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def test_what_a_norm_does_not_say_follows_from_its_class(red: Threat) -> None:
    x = rng.uniform(1, (6, 3, 8, 8))
    region = red.region(x)
    points = [region.start(kind, stream=2) for kind in ("uniform", "gaussian", "zero")]
    points.append(region.inside(x + rng.normal(3, x.shape)))
    for adv in points:
        assert torch.equal(adv[:, 1:], x[:, 1:]) and adv.min() >= 0 and adv.max() <= 1
        assert (adv.double() - x.double()).abs().max() <= EPS
    assert torch.equal(red.distance(points[-1], x), (points[-1].double() - x.double()).flatten(1).abs().amax(1))
    assert red.distance(x + 0.01, x).isinf().all()
    assert red.kind.span(torch.ones(3, 8, 8)) == 1
    assert (red.label, red.info.autoattack, red.info.radii) == ("red 1/5", None, {})  # nothing of linf is inherited


def test_rounding_inward_by_the_length_alone_ends_inside_the_ball() -> None:
    """A weighted l2 norm that says how long a change is and no more."""
    class Half(norms.L2):
        @staticmethod
        def length(change_BCHW: torch.Tensor) -> torch.Tensor:
            return (change_BCHW.flatten(1) * 0.5).norm(dim=1)

    x = rng.uniform(1, (50, 3, 8, 8))
    region = Half(x, 0.3)
    for seed in range(5):
        assert (region.distance(region.inside(x + rng.normal(seed, x.shape)), x) <= 0.3 * (1 + 1e-9)).all()


@pytest.mark.parametrize(("name", "what"), [
    ("linf", "registered twice"), ("L 3", "cannot name a norm")])
def test_a_name_that_is_taken_or_no_word_is_refused(name: str, what: str) -> None:
    class Other(Linf):
        pass

    with pytest.raises(ConfigError, match=what):
        register_norm(name)(Other)


def test_a_norm_that_nobody_registered_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'red' cannot be used for threat ") as found:
        load_config(None, ["threat=red"])
    assert found.value.how.startswith("choose one of linf, l2, l1, or a name from --plugin")
    with pytest.raises(ConfigError, match="unknown norm 'red'"):
        Threat("red", 0.1)


@pytest.mark.parametrize(("settings", "what"), [
    ("union.strategy=eat union.threats=linf:0.1,l1:2,red:0.1 peers=1 loss=at", "strategy eat with red"),
    ("attack.method=n_fgsm attack.steps=1 threat=red attack.eps=0.1", "n_fgsm with threat.norm red")])
def test_a_method_that_needs_certain_norms_refuses_others_by_name(settings: str, what: str, red: Threat) -> None:
    with pytest.raises(ConfigError, match=what):
        load_config(None, settings.split())
    config = load_config(None, ["attack.method=apgd", "threat=red", "attack.eps=0.1"])
    assert config.peers[0].attack.step_size == pytest.approx(0.2)


@pytest.fixture
def short_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundness, "SEARCH_QUERIES", 20)
    monkeypatch.setattr(measure, "STEPS", (1, 5))
    monkeypatch.setattr(measure, "SURFACE_PLACES", 3)


@pytest.mark.thorough  # ten seconds of training and attacks
@pytest.mark.usefixtures("short_attacks")
def test_a_norm_of_the_users_own_goes_from_training_to_the_report(plugin: Path, images: Path, tmp_path: Path,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    plug = ("--plugin", str(plugin))
    words = (*plug, "data.name=npz", f"data.root={images}", "data.train_size=240", "data.test_size=60",
             "train.epochs=2", "attack.steps=2", "eval.test_steps=3", "peers.0.threat.norm=linf",
             "peers.0.threat.eps=0.1", "peers.1.threat.norm=red", f"peers.1.threat.eps={EPS}")
    assert check(["run.device=cpu", "peers=2", *words]) == 0
    done = run_small(tmp_path / "runs", "red", *words)
    assert done.code == 0
    (file,) = done.folder.eval.glob("test_last_*.json")
    assert [one["norm"] for one in json.loads(file.read_text())["threats"]] == ["linf", "red"]

    capsys.readouterr()
    assert evaluate([str(done.folder.path), *plug]) == 2  # the default asks for AutoAttack
    assert "AutoAttack and its parts know linf, l2, l1, not the norm red" in capsys.readouterr().err
    assert evaluate([str(done.folder.path), *plug, "attacks=pgd,search", "queries=50", "steps=10", "save=true"]) == 0
    (file,) = done.folder.eval.glob("evaluate_*.json")
    result = json.loads(file.read_text())
    assert [one["norm"] for one in result["threats"]] == ["linf", "red"]
    peer = next(one for one in result["targets"] if one["target"] == "peer1")
    assert 0 < peer["accuracy"]["red 1/5"] < peer["accuracy"]["clean"]
    checks = {one["check"] for one in peer["checks"] if one["threat"] == "red 1/5"}
    assert {"inside ball and box", "noise", "gradient-free", "monotone"} <= checks
    assert "large eps" not in checks  # what stays as it is may tell the class

    x_test = torch.from_numpy(np.load(images)["x_test"]).movedim(-1, 1).float() / 255
    moved = 0.0
    for chunk in file.with_suffix(".chunks").glob("*.pt"):
        saved = torch.load(chunk, weights_only=True)
        change = saved["aes"]["peer1"]["red 1/5"]["float32"].double() - x_test[saved["samples"]].double()
        assert (change[:, 1:] == 0).all()
        moved = max(moved, change[:, 0].abs().max().item())
    assert EPS / 2 < moved <= EPS * (1 + 1e-6)

    assert report([str(done.folder.path), *plug, "--images", "20", "--device", "cpu"]) == 0
    assert "red 1/5" in (done.folder.report / "index.html").read_text()
