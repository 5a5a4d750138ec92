"""What a program registers under the public names trains; the names lead to what plug-ins have always used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import mat_dist
from mat_dist.attacks import Linf, register_norm
from mat_dist.config import load_config
from mat_dist.config import methods as config_methods
from mat_dist.config.methods import methods
from mat_dist.core import losses
from mat_dist.errors import ConfigError
from tests.small_runs import Finished, RunFolder, run_small


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Methods that a test registers are forgotten after it."""
    monkeypatch.setattr(config_methods, "_METHODS", methods())
    monkeypatch.setattr(config_methods, "_FILES", dict(config_methods._FILES))
    yield


def test_a_loss_of_a_program_trains_as_the_built_in_one_of_that_formula(tmp_path):
    """TRADES: cross-entropy on clean images and six times KL(clean || own AE)."""
    @mat_dist.register_loss("my_trades")
    def my_trades(adv, clean, y):
        return nn.functional.cross_entropy(clean, y) + 6 * losses.softened_kl(clean, adv)

    words = ["train.max_steps=2", "attack.loss=kl_clean", "attack.start=gaussian"]
    ours = run_small(tmp_path, "ours", "loss=my_trades", *words)
    theirs = run_small(tmp_path, "theirs", "loss=trades", *words)
    assert ours.code == theirs.code == 0
    pairs = zip(ours.peers(), theirs.peers(), strict=True)
    assert all(torch.allclose(one["model"][key].double(), other["model"][key].double(), atol=1e-5)
               for one, other in pairs for key in one["model"])


def test_a_loss_that_fails_names_itself_and_distillation_can_be_added(tmp_path):
    @mat_dist.register_loss("broken")
    def broken(adv, clean, y):
        raise KeyError("mine")

    assert load_config("digits", ["loss=broken", "loss.kd_weight=0.5"]).peers[0].loss.kd_weight == 0.5
    assert run_small(tmp_path, "a", "loss=broken", "train.max_steps=1").code == 13
    assert "KeyError: 'mine'" in (tmp_path / "a" / "rank_0.log").read_text()


def test_a_name_that_is_taken_or_is_none_is_refused():
    for name in ("trades", "Mine", "my loss", ""):
        with pytest.raises(ConfigError):
            mat_dist.register_loss(name)(lambda adv, clean, y: adv.sum())
    mat_dist.register_loss("twice")(test_a_name_that_is_taken_or_is_none_is_refused)
    with pytest.raises(ConfigError, match="registered twice"):
        mat_dist.register_loss("twice")(forgotten)
    mat_dist.register_loss("twice")(test_a_name_that_is_taken_or_is_none_is_refused)  # the same plug-in again


def test_the_public_names_are_those_of_plug_ins():
    assert mat_dist.register_threat is register_norm and mat_dist.losses is losses
    assert mat_dist.norms.Linf is Linf and mat_dist.Threat("linf", 0.1).label == "linf 1/10"
    assert all(callable(getattr(mat_dist, name)) for name in mat_dist.__all__ if name.startswith("register_"))


def test_a_run_with_a_loss_of_a_program_is_loaded_by_whoever_registers_it(tmp_path):
    mat_dist.register_loss("mine")(lambda adv, clean, y: nn.functional.cross_entropy(adv, y))
    run = run_small(tmp_path, "a", "loss=mine", "train.max_steps=1")
    assert isinstance(run, Finished) and isinstance(run.folder, RunFolder)
    assert mat_dist.load(run.folder.path, 0)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
