"""Every setting is read, and the settings that matter do what they say.

Two questions, since neither answers the other. The trace asks at run time who reads which field of which section,
so neither a field of the same name in another section nor code that never runs can pass for a reader. The tables
below ask what a run does differently: a value that is read and then dropped fails there.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mat_dist import checkpoints, train
from mat_dist.config import schema
from mat_dist.config.fields import Section
from mat_dist.config.methods import methods
from mat_dist.config.presets import LossWeights
from mat_dist.config.schema import Config
from mat_dist.core.peer import Peer
from mat_dist.distributed import groups
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import EnvironmentFault
from mat_dist.training import trainer
from tests.small_runs import SMALL, Finished, run_small

pytestmark = pytest.mark.slow  # 50 small trainings

Run = Callable[..., Finished]
Patch = pytest.MonkeyPatch
SHORT = ("train.max_steps=2",)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two steps with some overrides, done once."""
    @functools.cache
    def run(*overrides: str) -> Finished:
        done = run_small(tmp_path_factory.mktemp("runs"), "run", *SHORT, *overrides)
        assert done.code == 0
        return done

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1200 training images of 6 x 6 pixels (one broken file is below 0.1 %) and 40 for tests, in two classes."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for number in range(1240):
        split = "test" if number % 31 == 0 else "train"
        path = root / split / f"class{number % 2}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (6, 6), dtype=np.uint8)).save(path)
    return root


# ------------------------------------------------------------------------------------------------ the trace


def leaves() -> set[tuple[str, str]]:
    """(section class, field) of every setting that holds a value."""
    found = set()
    for cls in (*vars(schema).values(), *(method.section for method in methods().values())):
        if isinstance(cls, type) and issubclass(cls, Section) and cls not in (Section, Config):
            for name, field in cls.model_fields.items():
                if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
                    found.add((cls.__name__, name))
    return found


def meet_nobody(config: Config) -> None:
    """Try to form a process group of two ranks, where there is no second one."""
    device = torch.device("cpu")
    with pytest.raises(EnvironmentFault), groups.open_mesh(2, config.comm, device, Launch(0, 2), stop=StopFlag()):
        pass


def spoil_step_2(monkeypatch: Patch) -> None:
    """Peer 1's logits of that step are infinite."""
    learn = Peer.learn
    monkeypatch.setattr(Peer, "learn", lambda peer, x, draw: learn(peer, x, draw) * (
        float("inf") if draw[0] == 2 and peer.index == 1 else 1.0))


def test_every_setting_is_read_outside_the_configuration(folder: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    read: set[tuple[str, str]] = set()

    def recording(plain: Callable[[Any, str], Any], owner: str | None = None) -> Callable[[Any, str], Any]:
        def get(section: Any, name: str) -> Any:
            reader = sys._getframe(1).f_globals["__name__"]
            if reader.startswith("mat_dist.") and not reader.startswith("mat_dist.config"):
                read.add((owner or type(section).__name__, name))
            return plain(section, name)
        return get

    monkeypatch.setattr(Section, "__getattribute__", recording(Section.__getattribute__), raising=False)
    monkeypatch.setattr(LossWeights, "__getattribute__", recording(LossWeights.__getattribute__, "LossConfig"))
    everything = ("optim.schedule=piecewise", "optim.clip_norm=1", "optim.ema_decay=0.9", "eval.every=1",
                  "methods.awp.gamma=0.01", "eval.test_steps=1", "checkpoint.every_steps=1",
                  "methods.warm_start.reset_epochs=1",
                  "peers.0.loss=mart", "peers.1.optim.ema_decay=null", "peers.1.methods.swa.start=0.5")
    assert run_small(tmp_path, "digits", *SHORT, *everything).code == 0
    ramp = (*UNION.replace("avg", "ramp").split(), "methods.ramp.weight=1", "methods.ramp.projection=0.5")
    assert run_small(tmp_path, "ramp", *SHORT, *ramp).code == 0
    assert train.main([*SMALL, "--dry-run"]) == 0
    images = ("data.name=folder", f"data.root={folder}", "data.image_size=8", "data.residency=mmap",
              f"data.cache={tmp_path / 'cache'}")
    assert run_small(tmp_path, "images", *SHORT, *images).code == 0
    assert run_small(tmp_path, "cifar", "data.name=cifar10", f"data.root={tmp_path}").code == 3
    meet_nobody(Config())
    spoil_step_2(monkeypatch)
    assert run_small(tmp_path, "spoiled").code == 15
    assert leaves() - read == set()
    assert len(leaves()) > 80 and {("LossConfig", "temperature"), ("AwpConfig", "gamma")} <= leaves()
    assert ("DataConfig", "augment") not in leaves()


# ------------------------------------------------------------------------------------------------ weights

ALONE = """
    run.seed=1 data.train_size=48 data.val_size=50 data.augment.pad=2 data.augment.flip=true
    data.augment.random_resized_crop=0.3 data.augment.idbh=weak data.augment.cutmix=1
    model.name=small_cnn model.width=0.5 model.activation=silu model.norm=group
    threat.eps=0.05 attack.method=apgd
    attack.steps=2 attack.step_size=0.01 attack.start=zero attack.start=gaussian attack.loss=margin
    attack.loss=kl_clean attack.loss=kl_teacher loss.preset=trades loss.preset=mart loss.preset=at_wa
    loss.kd_clean=0.2 loss.kd_loss=mse loss.kd_where=teacher_right loss.kd_where=student_wrong
    loss.warmup_epochs=0.25 methods.awp.gamma=0.01 loss.hard_own=0.5 loss.clean_weight=0.5
    loss.kd_weight=0.9 loss.kd_own=1 loss.temperature=4 loss.teacher_input=own_ae loss.teacher_input=clean
    loss.pair_kl=6 loss.pair_mse=1 loss.label_smoothing=0.1 methods.mart.beta=6 optim.lr=0.05
    optim.name=adamw optim.name=RMSprop optim.args.momentum=0.5 optim.args.nesterov=true
    optim.weight_decay=0.05 optim.schedule=cosine optim.clip_norm=0.01 peers.0.stream=9 peers.1.optim.lr=0.01
    step.precision=bf16 step.precision=fp16 step.precision=fp64 step.wire=fp16 step.wire=int8 train.accumulate=2
    train.batch_size=8 train.max_steps=3"""
UNION = "loss=at union.strategy=avg union.threats=linf:0.1,l2:1,l1:2"
WITH_OTHERS = {  # setting: what else is set on both sides
    "threat.norm=l2": "attack.eps=0.1", "threat.norm=l1": "attack.eps=0.1",
    "loss.teacher_set=owner": "peers=3", "loss.teacher_set=expert":
    "peers=4 peers.1.threat=l2 peers.1.attack.eps=0.1 peers.3.threat=l2 peers.3.attack.eps=0.1",
    "step.teachers=ema": "optim.ema_decay=0.5", "peers.0.role=generalist": "peers.1.role=specialist",
    "peers.0.role=specialist": "peers=3", "union.threats=linf:0.1,l2:1": UNION,
    **{f"union.strategy={strategy}": UNION for strategy in ("max", "random", "eat", "msd", "ramp")},
    "methods.ramp.weight=1": UNION.replace("avg", "ramp").replace("linf:0.1", "linf:0.001"),  # some images are right
    "methods.ramp.projection=0.5": UNION.replace("avg", "ramp"), "methods.mart.beta=1": "loss=mart",
    "loss.hard_weight=0.9": "loss=at", "optim.args.betas=[0.5, 0.6]": "optim.name=adamw",
    "train.replays=3": "loss=at attack.method=free train.replays=2 train.max_steps=3",
    "methods.warm_start.reset_epochs=0": "train.epochs=2 train.max_steps=7",
    "methods.warm_start.reset_epochs=1": "methods.warm_start.reset_epochs=0 train.epochs=2 train.max_steps=7",
    "optim.milestones=[0.9]": "optim.schedule=piecewise",
    "optim.warmup_epochs=0.5": "optim.schedule=constant", "optim.args.decay_norm_bias=false": "optim.weight_decay=0.5",
    "optim.schedule=constant": "train.max_steps=4",
    "train.epochs=2": "train.max_steps=null"}
CHANGES_WEIGHTS = [*((one, ()) for one in ALONE.split()), *((one, tuple(base.split()))
                                                            for one, base in WITH_OTHERS.items())]


@pytest.mark.parametrize("setting,base", CHANGES_WEIGHTS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_setting_of_the_algorithm_changes_the_weights(setting: str, base: tuple[str, ...], cached: Run) -> None:
    before, after = cached(*base).hashes(key="model"), cached(*base, setting).hashes(key="model")
    which = 1 if setting.startswith("peers.1") else 0
    assert before[which] != after[which]


@pytest.mark.parametrize("settings", [
    "log.every=1", "log.console=plain", "eval.every=1 eval.steps=2 eval.size=20",
    "eval.test_steps=2 eval.test_size=10 eval.ensemble=logit eval.chunk=8", "data.test_size=30", "eval.attack=cr",
    "checkpoint.every_steps=1 checkpoint.keep=2", "data.residency=host", "comm.timeout=9", "run.resume=never",
    "peers.0.name=first", "optim.ema_decay=0.5", "methods.swa.start=0.5", "step.on_nonfinite=skip"])
def test_a_setting_beside_the_algorithm_does_not_change_a_bit(settings: str, cached: Run) -> None:
    assert cached(*settings.split()).hashes(key="model") == cached().hashes(key="model")


def test_evaluations_of_a_training_may_be_constraint_relaxation(cached: Run) -> None:
    """At most as many images withstand it as PGD-1, and all records say what was done."""
    evaluated = "eval.every=1", "eval.steps=1", "eval.size=40", "eval.test_steps=1", "eval.test_size=20"
    looked, plain = cached(*evaluated, "eval.attack=cr"), cached(*evaluated)
    (mine, *_), (theirs, *_) = looked.records("epoch"), plain.records("epoch")
    assert (mine["attack"], theirs["attack"]) == ("cr", "PGD-1")
    assert sum(mine["robust_acc"]) <= sum(theirs["robust_acc"])
    results = [json.loads(file.read_text()) for file in looked.folder.eval.glob("*.json")]
    assert results and all(one["attacks"] == ["cr"] and one["plans"] == {} for one in results)


def test_memory_settings_change_rounding_only(cached: Run) -> None:
    base = ("step.precision=fp64",)
    for mine, theirs in zip(cached(*base).peers(), cached(*base, "step.memory=recompute").peers(), strict=True):
        assert all(torch.allclose(v, theirs["model"][k], rtol=0, atol=1e-9) for k, v in mine["model"].items())


def asked_of_torch(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """What a function of torch is called with; a run puts torch's settings back at its end."""
    calls: list[Any] = []
    plain = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda value: (calls.append(value), plain(value)))
    return calls


def test_deterministic_kernels_are_asked_for_and_change_nothing_on_the_cpu(
        cached: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = cached().hashes(), asked_of_torch(monkeypatch, "use_deterministic_algorithms")
    assert cached("run.deterministic=true").hashes() == before and asked == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")  # without it torch refuses products on a GPU


def test_threads_are_those_of_the_setting(cached: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, asked = torch.get_num_threads(), asked_of_torch(monkeypatch, "set_num_threads")
    cached("run.threads=2")
    assert asked == [2, threads] and torch.get_num_threads() == threads


# ------------------------------------------------------------------------------------------------ the run


def test_length_of_a_run(tmp_path: Path) -> None:
    assert run_small(tmp_path, "a").steps() == [4]
    assert run_small(tmp_path, "b", "train.epochs=2").steps() == [4, 8]
    assert run_small(tmp_path, "c", "train.epochs=2", "train.max_steps=5").steps() == [4, 5]
    assert run_small(tmp_path, "d", "train.batch_size=32").steps() == [2]


def test_checkpoints_are_made_and_kept_as_asked(tmp_path: Path) -> None:
    two = "train.epochs=2"
    assert run_small(tmp_path, "a", two, "checkpoint.every=2").steps() == [8]
    assert run_small(tmp_path, "b", two, "checkpoint.every_steps=3").steps() == [3, 4, 6, 8]
    assert run_small(tmp_path, "c", two, "checkpoint.every_steps=1", "checkpoint.keep=2").steps() == [7, 8]


def test_training_does_not_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: Patch) -> None:
    slow, write, step = threading.Event(), checkpoints.write_peer, trainer.train_step
    began: list[bool] = []

    def waiting(*args: Any) -> Any:
        slow.wait(20)
        return write(*args)

    def noting(cohort: Any, batch: Any, **kwargs: Any) -> Any:
        began.append((tmp_path / "run" / "checkpoints" / "step_00000002").exists())
        if batch.step == 3:
            slow.set()
        return step(cohort, batch, **kwargs)

    monkeypatch.setattr(checkpoints, "write_peer", waiting)
    monkeypatch.setattr(trainer, "train_step", noting)
    run = run_small(tmp_path, "run", "checkpoint.every_steps=2")
    assert run.steps() == [2, 4] and began == [False] * 4


def test_evaluations_take_place_as_often_as_asked(tmp_path: Path) -> None:
    def validated(name: str, every: int) -> list[str]:
        run = run_small(tmp_path, name, "train.epochs=3", "data.train_size=16", f"eval.every={every}", "eval.size=10")
        return sorted(p.stem[-1] for p in run.folder.eval.glob("validation_*.json")) if run.folder.eval.exists() else []

    assert [validated("a", 0), validated("b", 1), validated("c", 2)] == [[], ["1", "2", "3"], ["2", "3"]]


def test_the_evaluator_measures_what_the_settings_say(cached: Run) -> None:
    run = cached("eval.every=1", "eval.steps=2", "eval.test_steps=3",
                 "eval.size=12", "eval.test_size=11", "eval.ensemble=logit", "eval.chunk=5")
    validation, test = run.result("validation_step_00000002"), run.result("test_last_step_00000002")
    assert [d["plans"]["pgd"]["steps"] for d in (validation, test)] == [2, 3] and test["ensemble"] == "logit"
    assert [t["n"] for d in (validation, test) for t in d["targets"]] == [12] * 3 + [11] * 3
    assert test["chunk"] == 5


TRAINED = ("train.epochs=4", "train.max_steps=null", "eval.test_steps=1", "threat.eps=0.2")


@pytest.mark.parametrize("setting", ["eval.test_steps=9", "eval.chunk=7", "eval.ensemble=logit"])
def test_an_evaluation_setting_changes_the_outcome_per_image(setting: str, cached: Run) -> None:
    def outcomes(run: Finished) -> list[tuple[str, ...]]:
        with next(run.folder.eval.glob("test_last_*.csv")).open(newline="") as file:
            return [tuple(row.values()) for row in csv.DictReader(file)]

    before, after = outcomes(cached(*TRAINED)), outcomes(cached(*TRAINED, setting))
    assert len(before) == len(after) == 3 * 40 and before != after


def test_log_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = run_small(tmp_path, "silent", "log.every=2")
    assert capsys.readouterr().out == ""
    plain = run_small(tmp_path, "plain", "log.every=1", "log.console=plain")
    assert "step 3/4" in capsys.readouterr().out
    assert [r["step"] for r in silent.records("step")] == [2, 4] and len(plain.records("step")) == 4


def test_resume_says_what_an_existing_or_missing_run_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_small(tmp_path, "new", "run.resume=must").code == 4 and not (tmp_path / "new").exists()
    assert run_small(tmp_path, "run", "run.resume=never").code == 0
    assert run_small(tmp_path, "run", "run.resume=never", "train.epochs=2").code == 5
    longer = run_small(tmp_path, "run", "run.resume=must", "train.epochs=2")
    assert longer.code == 0 and longer.steps() == [4, 8]
    assert capsys.readouterr().err.count("mat_dist: error: ") == 2


def test_device_and_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_small(tmp_path, "a", "comm.backend=nccl").code == 2
    if not torch.cuda.is_available():
        assert run_small(tmp_path, "b", "run.device=cuda").code == 6
    assert not any(tmp_path.iterdir()) and capsys.readouterr().err.count("mat_dist: error: ") == 2


def test_the_timeout_is_that_of_the_first_meeting(monkeypatch: Patch) -> None:
    seen: dict[str, Any] = {}

    def refuse(launch: Launch, timeout: float, stop: StopFlag) -> None:
        seen["timeout"] = timeout
        raise EnvironmentFault("enough", "here", "none")

    monkeypatch.setattr(groups, "Rendezvous", refuse)
    meet_nobody(Config.model_validate({"comm": {"timeout": 17}}))
    assert seen == {"timeout": 17}


@pytest.mark.parametrize("policy,code", [("abort", 15), ("skip", 0)])
def test_what_follows_a_non_finite_step(policy: str, code: int, tmp_path: Path, monkeypatch: Patch) -> None:
    spoil_step_2(monkeypatch)
    run = run_small(tmp_path, "run", f"step.on_nonfinite={policy}", "checkpoint.every_steps=2")
    assert run.code == code
    assert run.steps() == ([2] if code else [2, 4])


# ------------------------------------------------------------------------------------------------ peers and data


def test_peers_have_their_own_settings_and_names(cached: Run) -> None:
    run = cached("peers.1.model.width=0.5", "peers.1.name=wide", "peers.1.optim.ema_decay=0.5")
    narrow, wide = run.peers()
    assert (narrow["name"], wide["name"]) == ("peer0", "wide") and narrow["ema"] is None and wide["ema"] is not None
    sizes = [sum(v.numel() for v in p["model"].values()) for p in (narrow, wide)]
    assert sizes[1] > 2 * sizes[0]
    assert len(cached("peers=3").peers()) == 3


def test_the_rate_follows_the_schedule(cached: Run) -> None:
    def rates(*settings: str) -> list[float]:
        run = cached("train.max_steps=4", "log.every=1", "optim.lr=0.1", *settings)
        return [record["lr"][0] for record in run.records("step")]

    assert rates("optim.schedule=constant") == pytest.approx([0.1] * 4)
    piecewise = ("optim.schedule=piecewise", "optim.milestones=[0.5, 0.75]")
    assert rates(*piecewise) == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert rates("optim.schedule=cosine") == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-5)
    assert rates("optim.schedule=constant", "optim.warmup_epochs=0.75") == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1])


def test_images_come_from_the_folder_in_the_size_asked_for(folder: Path, tmp_path: Path) -> None:
    data = ("data.name=folder", f"data.root={folder}", f"data.cache={tmp_path / 'cache'}", *SHORT)
    run = run_small(tmp_path, "run", *data, "data.image_size=8", "data.residency=mmap")
    extra = checkpoints.load_manifest(run.folder).meta.extra
    assert extra["images"]["shape"] == [3, 8, 8] and extra["classes"] == ["class0", "class1"]
    assert any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("on_bad,code", [("stop", 3), ("skip", 0)])
def test_what_follows_a_broken_image(on_bad: str, code: int, folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for path in folder.rglob("*.png"):
        copy = root / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, copy)
    bad = next((root / "train").rglob("*.png"))
    bad.unlink()
    bad.write_bytes(b"no image")
    data = ("data.name=folder", f"data.root={root}", "data.image_size=8", f"data.cache={tmp_path / 'cache'}")
    assert run_small(tmp_path, "run", *SHORT, *data, f"data.on_bad={on_bad}").code == code


def test_a_run_goes_where_root_and_name_say(tmp_path: Path) -> None:
    run_small(tmp_path / "deep" / "er", "name-1", *SHORT)
    assert (tmp_path / "deep" / "er" / "name-1" / "exit.json").exists()
