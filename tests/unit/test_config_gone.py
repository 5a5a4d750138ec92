"""Settings that this version no longer has: at the command line, in files, in runs of the version before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mat_dist.config import config_differences, load_config
from mat_dist.config.gone import MOVED, WENT
from mat_dist.config.help import settings
from mat_dist.config.schema import Config
from mat_dist.errors import CheckpointError, ConfigError

# `config.yaml` as version 0.1 wrote it, of a run with one peer and preset mart.
TOP = """\
run:
  root: runs
  seed: 0
  device: cpu
  threads: 1
  resume: auto
  deterministic: false
comm:
  backend: auto
  timeout: 600.0
data:
  name: digits
  root: null
  download: false
  image_size: null
  train_size: 120
  val_size: 60
  test_size: 30
  residency: auto
  cache: null
  on_bad: stop
  generated: null
  generated_share: 0.0
  poison: null
  augment:
    pad: 0
    flip: false
    random_resized_crop: 0.0
    cutout: 0
    idbh: 'off'
    cutmix: 0.0
peers:
"""
PEER = """\
- name: peer0
  stream: 0
  init_stream: null
  role: peer
  frozen: false
  init_from: null
  union:
    strategy: null
    threats: null
    ramp_weight: 5.0
    projection_beta: 0.0
  model:
    name: tiny_cnn
    width: 0.25
    activation: null
    norm: null
  threat:
    norm: linf
    eps: 0.1
  attack:
    method: pgd
    steps: 7
    step_size: 0.03571428571428571
    l1_share: 0.01
    eps_warmup_epochs: 0.0
    steps_warmup_epochs: 0.0
    split_batch: false
    start: gaussian
    reset_epochs: 0
    loss: ce
  loss:
    preset: mart
    hard_weight: 1.0
    hard_own: 1.0
    hard_loss: bce
    clean_weight: 0.0
    kd_weight: 0.0
    kd_own: 1.0
    kd_clean: 0.0
    kd_loss: kl
    kd_where: all
    gate: 0.0
    attackers: all
    temperature: 1.0
    t2_scale: true
    teacher_input: same_ae
    teacher_agg: mean_kl
    teacher_set: all
    trades_beta: 0.0
    trades_temperature: 1.0
    mart_beta: 6.0
    pair_weight: 0.0
    base_scale: 1.0
    label_smoothing: 0.0
    warmup_epochs: 0.0
  optim:
    lr: 0.2
    momentum: 0.9
    nesterov: false
    weight_decay: 0.0005
    decay_norm_bias: true
    schedule: onecycle
    milestones:
    - 0.5
    - 0.75
    gamma: 0.1
    warmup_epochs: 0.0
    clip_norm: null
    awp_gamma: 0.0
    awp_warmup_epochs: 0.0
    ema_decay: 0.99
    swa_start: null
"""
BOTTOM = """\
step:
  precision: fp32
  memory: keep
  microbatches: 1
  bn: separate
  channels_last: true
  attack_copy: true
  attack_engine: eager
  wire: full
  opinions: all
  teachers: raw
  pull: 0.0
  pull_every: 10
  on_nonfinite: abort
train:
  epochs: 1
  batch_size: 12
  replays: 1
  max_steps: 1
eval:
  every: 0
  steps: 10
  test_steps: 20
  step_size: null
  restarts: 1
  size: null
  test_size: null
  chunk: 48
  ensemble: prob
  test: false
checkpoint:
  every: 1
  every_steps: null
  background: true
  keep: 3
log:
  every: 11
  console: 'off'
  tensorboard: false
  wandb: null
"""

PLAIN = {"preset": "at", "start": "uniform", "hard_loss": "ce", "mart_beta": "0.0"}  # beside PEER
SMALL = ("run.device=cpu", "data.train_size=120", "data.val_size=60", "data.test_size=30", "train.batch_size=12",
         "train.max_steps=1", "train.epochs=1", "optim.warmup_epochs=0", "model.width=0.25", "eval.every=0",
         "eval.test_steps=0", "log.console=off")


def written(text: str, **changed: Any) -> str:
    """`text` with other values of some settings, each of which stands there once."""
    for name, value in changed.items():
        before, mark, after = text.partition(f" {name}: ")
        assert mark and f" {name}: " not in after, name
        text = before + mark + str(value) + after[after.index("\n"):]
    return text


def old_run(folder: Path, *peers: dict[str, Any], **changed: Any) -> str:
    """The `config.yaml` of a run of version 0.1: PEER with changes for each peer, the rest with `changed`."""
    top = {name: value for name, value in changed.items() if f" {name}: " in TOP}
    bottom = {name: value for name, value in changed.items() if name not in top}
    entries = [written(PEER.replace("peer0", f"peer{n}").replace("stream: 0", f"stream: {n}", 1), **one)
               for n, one in enumerate(peers)]
    folder.mkdir()
    (folder / "config.yaml").write_text(written(TOP, **top) + "".join(entries) + written(BOTTOM, **bottom))
    (folder / "environment.json").write_text("{}")
    return str(folder / "config.yaml")


def told(path: str, *words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, words)
    assert caught.value.code == 2
    return [str(problem) for problem in caught.value.problems]


def small(*words: str) -> Config:
    return load_config("digits", [*SMALL, *words])


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize("word,what,how", [
    ("loss.attackers=one", "loss.attackers went in version 0.2", "version 0.1 of mat_dist"),
    ("loss.attackers=all", "loss.attackers went in version 0.2", "leave it out"),
    ("loss={attackers: one}", "loss.attackers went in version 0.2", "leave it out"),
    ("peers.1.loss.gate=1", "peers.1.loss.gate went in version 0.2", "loss.kd_where"),
    ("peers.all.loss.gate=1", "peers.all.loss.gate went in version 0.2", "loss.kd_where"),
    ("peers.2.init_stream=3", "peers.2.init_stream went in version 0.2", "use stream"),
    ("step.on_nonfinite=quarantine", "'quarantine' cannot be used for step.on_nonfinite", "abort, skip"),
    ("attack.start=previous", "'previous' cannot be used for attack.start", "uniform, gaussian, zero"),
    ("eval.test=false", "eval.test went in version 0.2", "use eval.test_steps, 0 for no test"),
    ("log.wandb=mine", "log.wandb went in version 0.2", "wandb:PROJECT"),
    ("step.pull_every=3", "step.pull_every went in version 0.2", "together with step.pull"),
    ("eval.restarts=3", "eval.restarts went in version 0.2", "mat_dist.evaluate takes restarts="),
    ("data.poison=x", "data.poison went in version 0.2", "docs/examples/poisoned_data.py"),
])
def test_on_the_command_line_it_is_one_line_with_the_way_out(word: str, what: str, how: str) -> None:
    (line,) = told("digits", word)
    assert line.startswith(f"{what} (command line, ") and how in line.rpartition("): ")[2]


def test_it_is_told_beside_all_other_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("step:\n  pull: 1\nloss: {gate: 0}\npeers:\n- {loss: {attackers: one}}\n- {init_stream: 2}\n"
                    "train: {epoch: 3}\n")
    lines = told(str(file), "step.bn=joint", "eval.stepz=3")
    for number, key in ((2, "step.pull"), (3, "loss.gate"), (5, "peers.0.loss.attackers"), (6, "peers.1.init_stream"),
                        (7, "train.epoch")):
        assert sum(f"{file}:{number}, {key}" in line for line in lines) == 1
    assert sum("(command line, step.bn)" in line or "(command line, eval.stepz)" in line for line in lines) == 2
    assert len(lines) == 7


@pytest.mark.parametrize("key", WENT)
def test_each_setting_that_went_is_told_at_the_command_line_and_in_a_file(key: str, tmp_path: Path) -> None:
    name = key.replace(".N.", ".1.")
    lines = told("digits", f"{name}=3")
    if not key.startswith("peers"):
        file = tmp_path / "a.yaml"
        section, _, last = key.rpartition(".")
        file.write_text(f"{section}: {{{last}: 3}}\n" if "." not in section else f"data: {{augment: {{{last}: 3}}}}\n")
        lines += told(str(file))
        assert f"{file}:1, {key}" in lines[1]
    for line in lines:
        assert line.startswith(f"{name} went in version 0.2 (") and line.endswith(f": {WENT[key]}")


def test_the_table_names_the_way_out_and_nothing_that_is_still_there() -> None:
    assert not {*WENT, *MOVED} & set(settings())
    assert all(new in settings() or new.startswith("optim.args.") for new in MOVED.values())
    for how in WENT.values():  # settings that a message names are there
        for word in how.replace(",", " ").replace(":", " ").split():
            if "." in word.strip(".") and word.split(".")[0] in Config.model_fields:
                assert word in {**settings(), **WENT}, word


# ------------------------------------------------------------------------------------------------ what moved

VALUES = {"loss.trades_beta": "3", "loss.pair_weight": "2", "union.ramp_weight": "2",
          "union.projection_beta": "0.5", "optim.momentum": "0.8", "optim.nesterov": "true",
          "optim.decay_norm_bias": "false", "optim.awp_gamma": "0.005", "optim.swa_start": "0.6",
          "step.microbatches": "2"}


@pytest.mark.parametrize("old", MOVED)
def test_what_moved_is_understood_under_its_old_name(old: str, tmp_path: Path) -> None:
    for peer in ("", "peers.1.", "peers.all.") if not old.startswith("step") else ("",):
        word, new = f"{peer}{old}={VALUES[old]}", f"{peer}{MOVED[old]}={VALUES[old]}"
        assert config_differences(small("loss=at", new), small("loss=at", word)) == []
        assert config_differences(small("loss=at"), small("loss=at", word))
    section, _, name = old.partition(".")
    (tmp_path / "a.yaml").write_text(f"defaults: [digits]\n{section}: {{{name}: {VALUES[old]}}}\n")
    assert load_config(str(tmp_path / "a.yaml")) == load_config("digits", [f"{MOVED[old]}={VALUES[old]}"])


def test_of_an_old_name_in_a_file_and_a_new_one_at_the_command_line_the_command_line_counts(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("defaults: [digits]\noptim: {momentum: 0.8}\npeers:\n- {}\n- optim: {momentum: 0.5}\n")
    assert load_config(str(file), ["optim.args.momentum=0.7"]) == load_config(
        "digits", ["peers=2", "optim.args.momentum=0.7", "peers.1.optim.args.momentum=0.5"])
    assert load_config(str(file), ["peers.all.optim.momentum=0.7"]) == load_config(
        "digits", ["peers=2", "peers.all.optim.args.momentum=0.7", "optim.args.momentum=0.7"])


@pytest.mark.parametrize("more", ["args: {momentum: 0.7}", "args: {}"])
def test_both_names_of_what_moved_are_refused(more: str, tmp_path: Path) -> None:
    (line,) = told("digits", "optim.momentum=0.8", "optim.args.momentum=0.7")
    assert "optim.momentum is another name for optim.args.momentum, and both are given" in line
    file = tmp_path / "a.yaml"
    file.write_text(f"optim: {{momentum: 0.8, {more}}}\n")
    assert "both are given" in told(str(file))[0]


def test_a_bad_value_of_what_moved_is_told_under_its_old_name(tmp_path: Path) -> None:
    (line,) = told("digits", "optim.swa_start=2")
    assert "2 cannot be used for optim.swa_start (command line, optim.swa_start): write a number" in line


# ------------------------------------------------------------------------------------------------ old runs

MAT = {"preset": "mat", "start": "uniform", "hard_loss": "ce", "mart_beta": "0.0", "hard_weight": 0.5, "kd_weight": 0.5,
       "kd_own": 0.25}
AWP = {**MAT, "preset": "mat_trades", "start": "gaussian", "hard_weight": "0.0", "clean_weight": "1.0", "kd_own": 0.5,
       "trades_beta": "6.0", "awp_gamma": 0.005}
AWP_ATTACK = ("loss: ce\n  loss:\n    preset: mat_trades", "loss: kl_clean\n  loss:\n    preset: mat_trades")


@pytest.mark.parametrize("peers,words", [
    ([MAT] * 4, []), ([AWP] * 2, ["peers=2", "loss=mat_trades", "methods.awp.gamma=0.005"]),
    ([{**PLAIN, "strategy": "ramp", "threats": "linf:0.1,l2:1", "projection_beta": 0.5}],
     ["peers=1", "loss=at", "union.strategy=ramp", "union.threats=linf:0.1,l2:1", "methods.ramp.projection=0.5"]),
    ([{**PLAIN, "ema_decay": "null", "swa_start": 0.5}], ["peers=1", "loss=at", "methods.swa.start=0.5"]),
    ([{**PLAIN, "momentum": 0.8, "nesterov": "true"}],
     ["peers=1", "loss=at", "optim.args.momentum=0.8", "optim.args.nesterov=true"]),
], ids=["mat", "mat_trades with awp", "ramp", "swa", "nesterov"])
def test_the_settings_of_a_run_of_version_01_are_the_same_here(peers: list[dict[str, Any]], words: list[str],
                                                               tmp_path: Path) -> None:
    path = old_run(tmp_path / "run", *peers)
    Path(path).write_text(Path(path).read_text().replace(*AWP_ATTACK))
    here = small(*words, "eval.test_steps=20")
    assert config_differences(here, load_config(path)) == []
    assert load_config(path) == here.model_copy(update={"run": here.run.model_copy(update={"root": "runs"})})


def test_settings_of_the_whole_run_that_change_no_weights_are_passed_over(tmp_path: Path) -> None:
    path = old_run(tmp_path / "run", PLAIN, test="true", tensorboard="true", wandb="mine", attack_copy="false")
    config = load_config(path, ["run.device=cpu"])
    assert (config.eval.test_steps, config.log.trackers, config.step.engine) == (20, None, "auto")


LOST = [({**PLAIN, "attackers": "one"}, {}, "peers.0.loss.attackers=one"),
        ({**PLAIN, "init_stream": 5}, {}, "peers.0.init_stream=5"),
        ({**PLAIN, "l1_share": 0.3}, {}, "peers.0.attack.l1_share=0.3"),
        ({**PLAIN, "trades_temperature": "2.0", "trades_beta": "1.0"}, {}, "peers.0.loss.trades_temperature=2.0"),
        ({}, {}, "peers.0.loss.hard_loss=bce"), ({**PLAIN, "start": "previous"}, {}, "peers.0.attack.start=previous"),
        ({**PLAIN, "awp_warmup_epochs": "2.0", "awp_gamma": 0.01}, {}, "peers.0.optim.awp_warmup_epochs=2.0"),
        (PLAIN, {"pull": 0.5}, "step.pull=0.5"), (PLAIN, {"bn": "joint"}, "step.bn=joint"),
        (PLAIN, {"on_nonfinite": "quarantine"}, "step.on_nonfinite=quarantine"),
        (PLAIN, {"restarts": 4}, "eval.restarts=4"), (PLAIN, {"poison": "x"}, "data.poison=x")]


@pytest.mark.parametrize("peer,changed,names", LOST, ids=[names for _, _, names in LOST])
def test_a_run_that_was_trained_with_what_went_ends_with_4_and_names_the_version(
        peer: dict[str, Any], changed: dict[str, Any], names: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_config(old_run(tmp_path / "run", peer, **changed), ["run.device=cpu"])
    assert caught.value.code == 4 and names in str(caught.value) and "version 0.1" in caught.value.how
    assert caught.value.where == str(tmp_path / "run" / "config.yaml")


@pytest.mark.parametrize("peer,changed", [
    ({**PLAIN, "method": "apgd", "l1_share": 0.05}, {}),
    (PLAIN, {"pull_every": 3, "background": "false"})])
def test_what_had_no_effect_is_dropped_in_silence(
        peer: dict[str, Any], changed: dict[str, Any], tmp_path: Path) -> None:
    assert load_config(old_run(tmp_path / "run", peer, **changed)).peers[0].loss.preset == "at"


def test_the_command_line_is_told_of_it_also_with_a_run(tmp_path: Path) -> None:
    (line,) = told(old_run(tmp_path / "run", PLAIN), "step.pull=0")
    assert "step.pull went in version 0.2 (command line, step.pull)" in line
