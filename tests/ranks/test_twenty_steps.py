"""Every preset, strategy, attack and strengthening option in a real run of 20 steps on the embedded digits.

The cases come from the settings themselves: each value of each choice, each switch, and for each number a value of
VALUES, which a new number must be given. A tenth of the cases, chosen by the content of the commit, is part of every
test run; the others are thorough ones (launch/test.sh --all).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import torch

from mat_dist import load
from mat_dist.config import load_config
from mat_dist.config.fields import Section
from mat_dist.config.methods import Registered, methods_model, strategies
from mat_dist.config.schema import (
    AttackConfig,
    AugmentConfig,
    LossConfig,
    OptimConfig,
    PeerConfig,
    ThreatConfig,
    UnionConfig,
)
from mat_dist.core.state_hash import state_hash
from tests.small_runs import SMALL, Finished, run_small

PARTS, STEPS = 10, 20
TRAINED = (*SMALL, "train.epochs=5", "checkpoint.every=5", "log.every=1")  # 64 images, 16 in a batch
SECTIONS: dict[str, type[Section]] = {"loss": LossConfig, "attack": AttackConfig, "optim": OptimConfig,
                                      "union": UnionConfig, "threat": ThreatConfig, "data.augment": AugmentConfig,
                                      **{f"methods.{name}": field.annotation  # type: ignore[dict-item]
                                         for name, field in methods_model().model_fields.items()}}
AT, MAT = ("loss=at",), ("loss=mat",)
TEACHER = ("peers.1.frozen=true", "peers.1.init_from=TEACHER")
THREE = ("peers=1", "loss=at", "union.threats=linf:0.1,l2:0.5,l1:2")
COHORT = ("peers=3", "loss=mat", "peers.0.role=specialist", "peers.1.role=specialist",
          "peers.1.threat={norm: l2, eps: 0.5}", "peers.2.role=generalist")
OWN_VIEWS = ("peers.2.union.strategy=avg", "peers.2.union.threats=linf:0.1,l2:0.5", "peers.2.loss.hard_own=1",
             "peers.2.loss.kd_own=1", "peers.2.loss.teacher_set=all")
RAMP = (*THREE, "union.strategy=ramp")
# What a setting, or one value of it, needs beside it. Alone, this is the control that it must differ from.
CONTEXT: dict[str, tuple[str, ...]] = {
    "loss": MAT, "loss.preset": AT, "loss.preset=ard": (*AT, *TEACHER), "loss.preset=rslad": (*AT, *TEACHER),
    "loss.hard_weight": AT, "loss.clean_weight": AT, "loss.teacher_input": ("loss=mat_kd",),
    "loss.preset=mat_union": ("peers=3", *AT, *COHORT[2:], "peers.2.union.strategy=max",
                              "peers.2.union.threats=linf:0.1,l2:0.5"),
    "loss.teacher_set=owner": (*MAT, "loss.kd_own=0", "peers=3"),
    "loss.teacher_set=expert": (*MAT, "peers=4", *(f"peers.{i}.threat={{norm: l2, eps: 0.5}}" for i in (0, 1))),
    "loss.teacher_set=frozen": (*MAT, *TEACHER, "peers=3"),
    "attack.loss=kl_teacher": MAT, "attack.steps": (*AT, "attack.step_size=0.05"),
    "optim.milestones": (*AT, "optim.schedule=piecewise"),
    "union.strategy": ("peers=1", "loss=at"), "union.threats": (*THREE, "union.strategy=max"),
    "methods.ramp": RAMP, "methods.mart": ("loss=mart",),
}
MORE: dict[str, tuple[str, ...]] = {  # what a value needs that its control may not have
    **{f"union.strategy={name}": (THREE[2],) for name in ("avg", "max", "random", "msd", "ramp")},
    "union.strategy=eat": ("union.threats=linf:0.1,l1:2",), "attack.method=n_fgsm": ("attack.steps=1",),
    "attack.method=free": ("attack.steps=1", "train.replays=2", "train.batch_size=32"),
    "threat.norm=l2": ("attack.eps=0.5",), "threat.norm=l1": ("attack.eps=2",), "optim.name=adamw": ("optim.lr=0.01",),
}
# Of every number and text: a value that is not the default.
VALUES: dict[str, Any] = {
    "loss.hard_weight": 0.5, "loss.hard_own": 0.5, "loss.clean_weight": 0.5, "loss.kd_weight": 0.8, "loss.kd_own": 1,
    "loss.kd_clean": 0.3, "loss.temperature": 3, "loss.pair_kl": 2, "loss.pair_mse": 0.5, "loss.label_smoothing": 0.2,
    "loss.warmup_epochs": 2, "attack.steps": 3, "attack.step_size": 0.03,
    "optim.name": "adamw", "optim.args": "{momentum: 0.5, nesterov: true}", "optim.lr": 0.05,
    "optim.weight_decay": 0.01, "optim.milestones": "[0.2, 0.4]", "optim.warmup_epochs": 1, "optim.clip_norm": 0.5,
    "optim.ema_decay": 0.9, "union.threats": "linf:0.1,l1:2", "threat.eps": 0.05,
    "methods.awp.gamma": 0.02, "methods.mart.beta": 2, "methods.ramp.projection": 0.5, "methods.ramp.weight": 1,
    "methods.swa.start": 0.5, "methods.warm_start.reset_epochs": 2,
    "data.augment.pad": 1, "data.augment.random_resized_crop": 0.5, "data.augment.cutmix": 1,
}
# What is no single setting.
COHORTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # name -> control, settings beside it
    "generalist": (("peers=3", "loss=at"), COHORT[1:]),
    "generalist avg": (("peers=3", "loss=at"), (*COHORT[1:], "peers.2.union.strategy=avg")),
    **{f"generalist {name}": (COHORT, (f"peers.2.union.strategy={name}",)) for name in ("max", "ramp")},
    **{f"generalist {name}": (COHORT, (f"peers.2.union.strategy={name}", "peers.2.union.threats=linf:0.1,l2:0.5"))
       for name in ("random", "msd")},
    "generalist eat": (COHORT, ("peers.1.threat={norm: l1, eps: 2}", "peers.2.union.strategy=eat",
                                "peers.2.union.threats=linf:0.1,l1:2")),
    "experts on the views of a generalist": ((*COHORT, *OWN_VIEWS), ("peers.2.loss.teacher_set=expert",)),
    "fine-tuned": (AT, ("peers.0.init_from=TEACHER",)),
    "averaged teachers": ((*MAT, "optim.ema_decay=0.9"), ("step.teachers=ema",)),
    "one of each optimizer": (MAT, ("peers.1.optim={name: adamw, lr: 0.01}",)),
}


@dataclass(frozen=True)
class Case:
    """Settings, and those of the run without what is tested."""

    settings: tuple[str, ...]
    control: tuple[str, ...]


def choices(annotation: Any, metadata: Sequence[Any] = ()) -> tuple[Any, ...] | None:
    """The values of a choice (True and False of a switch), None for a number or a text."""
    for mark in metadata:
        if isinstance(mark, Registered):
            return tuple(mark.known())
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if annotation is bool:
        return (True, False)
    if get_origin(annotation) is Annotated:
        return choices(get_args(annotation)[0], annotation.__metadata__)
    if get_origin(annotation) in (Union, UnionType):
        return choices(next(one for one in get_args(annotation) if one is not NoneType))
    return None


def case_of(key: str, value: Any) -> Case:
    """A value of a setting in its context."""
    text = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
    word = f"{key}={text}"
    section = key.rpartition(".")[0]
    control = next((CONTEXT[name] for name in (word, key, section) if name in CONTEXT), AT)
    return Case((*control, *MORE.get(word, ()), word), control)


def all_cases() -> dict[str, Case]:
    """Of every setting of SECTIONS, and COHORTS."""
    found: dict[str, Case] = {}
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            key = f"{section}.{name}"
            values = choices(field.annotation, field.metadata) or ((VALUES[key],) if key in VALUES else ())
            found |= {f"{key}={value}".lower(): case_of(key, value) for value in values}
    return found | {name: Case((*control, *more), control) for name, (control, more) in COHORTS.items()}


@cache
def part_of_today() -> int:
    """A number of PARTS that is a function of the commit's content, the same for all processes; 0 without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD^{tree}"], cwd=Path(__file__).parent, capture_output=True,
                              text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(done.stdout, 16) % PARTS


def parameters() -> list[Any]:
    found = []
    for number, (name, case) in enumerate(all_cases().items()):
        part = number % PARTS
        marks = [] if part == part_of_today() else [pytest.mark.thorough]
        found.append(pytest.param(case, id=f"{name}, part {part} of {PARTS}", marks=[pytest.mark.slow, *marks]))
    return found


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Finished]:
    """The run of some settings; those that were trained already are not trained again."""
    root = tmp_path_factory.mktemp("runs")
    done: dict[tuple[str, ...], Finished] = {}

    def run(settings: tuple[str, ...]) -> Finished:
        if "TEACHER" in "".join(settings):
            teacher = run(("peers=1", "loss=at", "run.seed=1"))
            settings = tuple(word.replace("TEACHER", f"{teacher.folder.path}:peer0") for word in settings)
        if settings not in done:
            done[settings] = run_small(root, f"run{len(done)}", *TRAINED[len(SMALL):], *settings)
        return done[settings]

    return run


def weights(run: Finished) -> list[str]:
    """Of each peer, raw and averaged."""
    return [state_hash([state["model"], state["ema"]]) for state in run.peers()]


@pytest.mark.parametrize("case", parameters())
def test_twenty_steps_train(case: Case, trained: Callable[[tuple[str, ...]], Finished]) -> None:
    """The loss falls, the weights are finite, and unlike those of the run without it unless that is the same run."""
    run, control = trained(case.settings), trained(case.control)
    assert run.code == 0 and run.steps()[-1] == STEPS
    config, theirs = load_config(str(run.folder.config)), load_config(str(control.folder.config))
    training = [number for number, peer in enumerate(config.peers) if not peer.frozen]
    records = run.records("step")
    assert len(records) == STEPS
    for peer in training:
        # Divergence from a peer that knows nothing yet begins near 0: then more labels must be right.
        loss = config.peers[peer].loss
        labels = loss.hard_weight or loss.clean_weight or any(one.frozen for one in config.peers)
        values = [record["loss"][peer] if labels else -record["train_clean_acc"][peer] for record in records]
        assert sum(values[-4:]) < sum(values[:4]), (peer, values)
    for state in run.peers():
        assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())
    same = config.model_dump(exclude={"run"}) == theirs.model_dump(exclude={"run"})
    mine, others = weights(run), weights(control)
    assert (mine == others) if same else any(mine[peer] != others[peer] for peer in training if peer < len(others))
    for peer in training:
        logits = load(run.folder.path, peer, which="latest")(torch.rand(4, 1, 8, 8))
        assert logits.shape == (4, 10) and logits.isfinite().all()


# ------------------------------------------------------------------------------------------------ nothing is forgotten


def test_every_setting_has_a_case() -> None:
    """A new number needs an entry in VALUES, a new section or role one here."""
    named = all_cases()
    keys = {f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields}
    assert sorted(keys - {case.partition("=")[0] for case in named}) == []
    assert sorted(key for key in VALUES if key not in keys) == []
    assert sorted(name for name in (*CONTEXT, *MORE) if name.partition("=")[0] not in {*keys, *SECTIONS}) == []
    known = {"name", "stream", "role", "frozen", "init_from", "model", "methods",
             *(s for s in SECTIONS if "." not in s)}
    assert set(PeerConfig.model_fields) == known
    roles = set(get_args(PeerConfig.model_fields["role"].annotation))
    assert roles == {"peer", "specialist", "generalist"}  # all in COHORTS
    assert {f"generalist {name}" for name in strategies()} <= set(COHORTS)


def test_the_parts_are_all_the_cases_and_today_has_one() -> None:
    chosen = [one for one in parameters() if pytest.mark.thorough not in one.marks]
    assert len(all_cases()) // PARTS <= len(chosen) <= -(-len(all_cases()) // PARTS)
    assert part_of_today() in range(PARTS)
