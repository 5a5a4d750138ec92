"""Stochastic weight averaging: what is averaged, and the batch-norm statistics that belong to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mat_dist import checkpoints
from mat_dist.config import load_config
from mat_dist.data import as_float, load_data, training_batches
from mat_dist.methods import swa
from mat_dist.models.registry import Images, make_model
from tests.cohorts import cohort_config, make_peer, nets
from tests.small_runs import SMALL, Finished, run_small

SWA = ("train.epochs=4", "methods.swa.start=0.5")  # 4 epochs of 4 steps: the averages of steps 8, 12 and 16


def test_the_average_begins_at_the_end_of_the_first_epoch_from_its_share_on() -> None:
    def counts(start: float) -> list[int]:
        return [swa.averaged_epochs(done, start, total_steps=20, steps_per_epoch=4) for done in range(4, 21, 4)]
    assert counts(0.0) == [1, 2, 3, 4, 5] == counts(0.2)
    assert counts(0.21) == counts(0.4) == [0, 1, 2, 3, 4]
    assert counts(0.99) == [0, 0, 0, 0, 1]
    assert swa.averaged_epochs(100, 0.55, total_steps=100, steps_per_epoch=5) == 10  # 0.55 * 100 is a little above 55
    assert [swa.averaged_epochs(done, 0.5, total_steps=8, steps_per_epoch=4) for done in (3, 4, 7, 8)] == [0, 1, 1, 2]


def test_the_recursion_is_the_equal_mean_of_the_epochs_ends() -> None:
    peer = make_peer(nets(1)[0], cohort_config("at", 1, entry={"methods": {"swa": {"start": 0.4}}}))
    peer.total_steps, peer.steps_per_epoch = 20, 4
    (hook,) = peer.hooks
    values, average = [float(3 * t % 11) for t in range(20)], 0.0
    for step, value in enumerate(values):
        decay = hook.kept_share(step)
        average = decay * average + (1 - decay) * value
        last = [values[t] for t in (7, 11, 15, 19) if t <= step]
        assert average == pytest.approx(sum(last) / len(last) if last else value)


@pytest.mark.parametrize("left_out,kept", [((), (7, 11, 15, 19, 23)), ((11,), (7, 15, 19, 23)),
                                           ((7,), (11, 15, 19, 23))])
def test_the_mean_stays_equal_when_a_training_gets_longer_and_steps_are_left_out(left_out: tuple[int, ...],
                                                                                 kept: tuple[int, ...]) -> None:
    """4 epochs of 4 steps, then 6: the average began in the second one, where that of the longer training would not."""
    peer = make_peer(nets(1)[0], cohort_config("at", 1, entry={"methods": {"swa": {"start": 0.5}}}))
    (hook,) = peer.hooks
    average = 0.0
    for step in (step for step in range(24) if step not in left_out):
        peer.total_steps, peer.steps_per_epoch = (16 if step < 16 else 24), 4
        if step == 16:
            (resumed,) = make_peer(nets(1)[0], cohort_config("at", 1, entry={"methods": {"swa": {"start": 0.5}}})).hooks
            resumed.load_state_dict(hook.state_dict())
            resumed.peer, hook = peer, resumed
        decay = hook.kept_share(step)
        average = decay * average + (1 - decay) * float(3 * step % 11)
    assert average == pytest.approx(sum(float(3 * step % 11) for step in kept) / len(kept))


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run_small(tmp_path_factory.mktemp("runs"), "a", *SWA, "eval.every=2", "eval.test_steps=1")


def parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() for k, v in state.items() if "running" not in k and "tracked" not in k}


def test_a_run_averages_the_weights_at_the_end_of_each_epoch(averaged: Finished) -> None:
    ends = [averaged.peers(step) for step in (8, 12, 16)]
    for index, peer in enumerate(averaged.peers()):
        for name, value in parameters(peer["ema"]).items():
            mean = torch.stack([end[index]["model"][name].double() for end in ends]).mean(0)
            assert torch.allclose(value, mean, rtol=0, atol=1e-6)
    early = averaged.peers(4)[0]
    assert all(torch.equal(v, early["model"][k]) for k, v in early["ema"].items())  # not begun: the weights themselves
    weights = {t["weights"] for t in averaged.result("test_last_step_00000016")["targets"]}
    assert weights == {"raw", "ema"}


def test_norm_statistics_are_the_mean_over_the_training_batches(averaged: Finished) -> None:
    config = load_config(None, [*SMALL, *SWA])
    data = load_data(config.data, seed=config.run.seed, batch_size=config.train.batch_size)
    manifest = checkpoints.load_manifest(averaged.folder)
    images = Images(**manifest.meta.extra["images"])
    state = averaged.peers()[1]["ema"]
    model = make_model(config.peers[1], images, seed=0, step=config.step, device=torch.device("cpu"))
    model.load_state_dict(state)
    order = training_batches(config, data, "cpu", torch.float32)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            flat = given[0].double().transpose(0, 1).flatten(1)
            seen.setdefault(name, []).append((flat.mean(1), flat.var(1)))
        return hook

    norms = {k: m for k, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(note(name))
    model.train()
    with torch.no_grad():
        for step in range(4):  # all 64 images
            model(as_float(data.train.batch(order.indices(step))[0]))
    assert norms
    for name, values in seen.items():
        for place, key in enumerate(("running_mean", "running_var")):
            mean = torch.stack([pair[place] for pair in values]).mean(0)
            assert torch.allclose(state[f"{name}.{key}"].double(), mean, rtol=1e-4, atol=1e-5)
        assert int(state[f"{name}.num_batches_tracked"]) == 4


def test_a_pass_is_bounded_by_the_stated_number_of_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(swa, "NORM_IMAGES", 17)
    done = run_small(tmp_path, "a", "methods.swa.start=0")
    counts = [int(v) for k, v in done.peers()[0]["ema"].items() if k.endswith("tracked")]
    assert counts and set(counts) == {2}  # 17 images are two batches of 16


def test_a_batch_that_is_used_twice_counts_once(tmp_path: Path) -> None:
    done = run_small(tmp_path, "a", "methods.swa.start=0", "loss=at", "attack.method=free", "train.replays=2")
    assert done.steps() == [8] and {int(v) for k, v in done.peers()[0]["ema"].items() if k.endswith("tracked")} == {4}


def test_averaging_does_not_change_the_training_nor_do_more_checkpoints_change_the_average(averaged: Finished,
                                                                                           tmp_path: Path) -> None:
    plain = run_small(tmp_path, "plain", "train.epochs=4")
    often = run_small(tmp_path, "often", *SWA, "checkpoint.every_steps=1")
    assert plain.hashes(key="model") == averaged.hashes(key="model")
    assert often.hashes() == averaged.hashes()
    assert plain.peers()[0]["ema"] is None


def test_a_preset_with_ema_takes_swa_instead_where_it_is_asked_for() -> None:
    config = load_config(None, ["peers=1", "loss=at_wa", "optim.ema_decay=null", "methods.swa.start=0.5"])
    assert config.peers[0].optim.ema_decay is None
    assert load_config(None, ["peers=1", "loss=at_wa"]).peers[0].optim.ema_decay is not None
