"""Layers of a configuration, overrides, complete peers, and the way to YAML and back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from mat_dist.config import (
    config_differences,
    config_name,
    dump_config,
    load_config,
    recipe_notes,
    resume_conflicts,
    trains_longer,
)
from mat_dist.config.schema import Config, LossConfig
from mat_dist.errors import ConfigError, some

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read_yaml(text: str) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(text)


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def load(folder: Path, text: str, *overrides: str) -> Config:
    return load_config(write(folder, "x.yaml", text), overrides)


def refused(folder: Path, text: str, *overrides: str) -> str:
    """The text of all problems."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    assert caught.value.code == 2
    return "\n".join(str(problem) for problem in caught.value.problems)


def test_no_path_is_the_content_of_digits() -> None:
    assert load_config(None) == load_config(str(CONFIGS / "digits.yaml")) == load_config("digits")
    assert config_name(None) == "digits"
    assert len(load_config(None).peers) == 4
    assert load_config(None).data.name == "digits"


def test_a_file_in_the_working_directory_comes_before_the_projects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "digits.yaml", "{train: {epochs: 77}}")
    monkeypatch.chdir(tmp_path)
    assert load_config("digits").train.epochs == load_config("digits.yaml").train.epochs == 77
    assert load_config(None).train.epochs != 77


def test_config_name_is_a_stem_fit_for_a_run_name() -> None:
    assert config_name("a/b/cifar10_at.yaml") == "cifar10_at"
    assert config_name("../my run $(id).yml") == "my-run-id-"
    assert config_name("...yaml") == "config"


@pytest.mark.parametrize(("path", "words", "name", "made"), [
    (None, [], "digits", None), (None, ["data.name=folder", "data.root=/x/my pets.v2/"], "my-pets.v2", "digits"),
    (None, ["data.name=npz", "data.root=a/b.npz"], "b", "digits"),
    (None, ["data.name=cifar10", "data.root=x"], "cifar10", "digits"), ("own_images", [], "own_images", None),
    ("own_images", ["data.root=pets"], "own_images-pets", None),
    ("own_images", ["data.name=npz", "data.root=a/b.npz"], "own_images-b", None),
    ("own_images", ["data.name=of_a_plugin"], "own_images-of_a_plugin", None),
    ("cifar10_resnet18", ["data.root=/scratch"], "cifar10_resnet18", None),
    ("cifar10_resnet18", ["data.name=folder", "data.root=pets"], "cifar10_resnet18-pets", "cifar10"),
    ("base", ["data.name=cifar10", "data.root=x"], "base", None)])
def test_a_run_is_named_after_its_data_and_told_for_which_the_recipe_was_made(path: str | None, words: list[str],
                                                                              name: str, made: str | None) -> None:
    config = load_config(path, words)
    notes = recipe_notes(path, config)
    assert config_name(path, config) == name and len(notes) == (made is not None)
    for note in notes:
        assert f"made for {made}, and the data are {config.data.name}" in note and ("no --config" in note) is (not path)


@pytest.mark.parametrize("name", NAMES)
def test_dump_and_load_give_an_equal_configuration(name: str, tmp_path: Path) -> None:
    config = load_config(name, ["run.name=some-run"])
    text = dump_config(config, with_name=True)
    assert load(tmp_path, text) == config
    assert load(tmp_path, dump_config(config)).run.name is None
    values = read_yaml(text)
    assert not {"model", "threat", "attack", "loss", "optim", "defaults"} & set(values)
    assert read_yaml(dump_config(config))["run"].get("name") is None


def test_dump_keeps_every_float_exactly(tmp_path: Path) -> None:
    rng = random.Random(3)
    for _ in range(10):
        values = [rng.uniform(0.1, 1) * 10.0 ** rng.randint(-4, 0) for _ in range(6)]
        keys = ("threat.eps", "loss.kd_weight", "loss.kd_own", "loss.temperature", "optim.lr", "attack.step_size")
        config = load(tmp_path, "{}", "peers=2", *(f"{key}={value!r}" for key, value in zip(keys, values, strict=True)))
        peer = config.peers[0]
        found = [
            peer.threat.eps, peer.loss.kd_weight, peer.loss.kd_own, peer.loss.temperature, peer.optim.lr,
            peer.attack.step_size,
        ]
        assert found == values
        assert load(tmp_path, dump_config(config)) == config


@pytest.mark.parametrize(
    "text",
    [
        "1e5", "010", "yes", "null", "2020-01-01", "~", "'", "a: b", "#x", " x ", "\u00e9\u4e00", "- a", "1:30", "0x1f",
        "*a", "true", ".5", "1_000", "=", "<<", "!x", "%", "@a", "`b",
    ],
)
def test_text_that_looks_like_something_else_survives_the_dump(text: str, tmp_path: Path) -> None:
    config = load(tmp_path, "{}")
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": text})})
    assert load(tmp_path, dump_config(config)) == config


def test_later_layers_win_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "train: {epochs: 3, batch_size: 10}\noptim: {lr: 0.5}\n")
    write(tmp_path, "b.yaml", "defaults: a\ntrain: {epochs: 4}\n")
    write(tmp_path, "c.yaml", "optim: {lr: 0.25, args: {momentum: 0.5}}\n")
    config = load(tmp_path, "defaults: [b, c.yaml]\ntrain: {max_steps: 9}\n", "optim.args.momentum=0.75")
    assert (config.train.epochs, config.train.batch_size, config.train.max_steps) == (4, 10, 9)
    assert (config.peers[0].optim.lr, config.peers[0].optim.args) == (0.25, {"momentum": 0.75})


def test_an_empty_section_keeps_what_lower_layers_gave(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "optim: {lr: 0.5}\npeers: 2\ndata: {augment: {pad: 3}}\n")
    config = load(tmp_path, "defaults: [a]\noptim:\npeers:\ndata:\n  augment:\n")
    assert (config.peers[1].optim.lr, len(config.peers), config.data.augment.pad) == (0.5, 2, 3)
    assert load(tmp_path, "defaults: [a]", "optim=null").peers[0].optim.lr == 0.1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", 8 / 255),
        ("'8/255'", 8 / 255),
        ("1e-3", 1e-3),
        ('"1e-3"', 1e-3),
        (".5", 0.5),
        ("5E-1", 0.5),
        ("1", 1.0),
        ("0.1", 0.1),
    ],
)
def test_numbers_are_read_in_files_and_on_the_command_line(text: str, value: float, tmp_path: Path) -> None:
    assert load(tmp_path, f"threat: {{eps: {text}}}").peers[3].threat.eps == value
    assert load(tmp_path, "{}", f"threat.eps={text}").peers[3].threat.eps == value


def test_short_forms_and_other_names(tmp_path: Path) -> None:
    peer = load(tmp_path, "model: resnet18\nthreat: l2\nloss: at\nattack: {eps: 0.5}\n").peers[0]
    assert (peer.model.name, peer.threat.norm, peer.threat.eps, peer.loss.preset) == ("resnet18", "l2", 0.5, "at")
    peer = load(
        tmp_path, "{}", "model=resnet18", "model.width=2", "attack.norm=l2", "attack.eps=128/255", "loss=trades"
    ).peers[0]
    assert (peer.model.name, peer.model.width, peer.threat.norm, peer.threat.eps) == ("resnet18", 2, "l2", 128 / 255)
    assert peer.loss.pair_kl == 6
    config = load(tmp_path, "peers: [{attack: {eps: 2/255, norm: l2}, model: a}, {threat: l2, loss: at}]",
                  "data.name=cifar10", "data.root=data")
    assert [p.threat.eps for p in config.peers] == [2 / 255, 0.5]
    assert [p.threat.norm for p in config.peers] == ["l2", "l2"]
    assert [p.loss.preset for p in config.peers] == ["mat", "at"]


@pytest.mark.parametrize(("text", "words", "found"), [  # norm, radius and step length of each peer
    ("{}", ["threat=l2"], [("l2", 0.5, 0.125)] * 2),
    ("{}", ["threat.norm=l1"], [("l1", 12.0, 3.0)] * 2),
    ("{}", ["attack.eps=1", "attack.step_size=0.1", "attack.norm=l2"], [("l2", 1.0, 0.1)] * 2),  # in any order
    ("{}", ["threat=linf"], [("linf", 8 / 255, 2 / 255)] * 2),  # no other norm: nothing changes
    ("{}", ["peers.1.threat=l2"], [("linf", 8 / 255, 2 / 255), ("l2", 0.5, 0.125)]),
    ("{}", ["attack.eps=4/255", "peers.1.threat=l2"], [("linf", 4 / 255, 2 / 255), ("l2", 0.5, 0.125)]),
    ("threat: l2", [], [("l2", 0.5, 0.125)] * 2),
    ("peers: [{threat: l2}, {threat: {norm: l1, eps: 5}}]", [], [("l2", 0.5, 0.125), ("l1", 5.0, 1.25)]),
    ("data: {name: svhn}", ["peers.all.threat=l2"], [("l2", 128 / 255, 32 / 255)] * 2)])
def test_a_radius_does_not_go_into_another_norm(tmp_path: Path, text: str, words: list[str],
                                                found: list[tuple[str, float, float]]) -> None:
    """It has that norm's standard radius, and steps of a share of it."""
    write(tmp_path, "low.yaml", "data: {name: cifar10, root: data}\npeers: 2\nthreat: linf\n"
                                "attack: {eps: 8/255, steps: 10, step_size: 2/255}\n")
    config = load(tmp_path, f"defaults: [low]\n{text}" if text != "{}" else "defaults: [low]", *words)
    assert [(p.threat.norm, p.threat.eps, p.attack.step_size) for p in config.peers] == [
        (norm, pytest.approx(eps), pytest.approx(step)) for norm, eps, step in found]


def test_both_names_of_a_setting_are_refused_within_a_layer_only(tmp_path: Path) -> None:
    assert "both are given" in refused(tmp_path, "threat: {eps: 0.1}\nattack: {eps: 0.2}\n")
    assert "both are given" in refused(tmp_path, "peers: [{threat: {norm: l2}, attack: {norm: l2}}, {}]")
    assert "both are given" in refused(tmp_path, "{}", "threat.eps=0.1", "attack.eps=0.2")
    assert "both are given" in refused(tmp_path, "{}", "peers.1.threat.eps=0.1", "peers.1.attack.eps=0.2")
    assert load(tmp_path, "threat: {eps: 0.1}", "attack.eps=0.2").peers[0].threat.eps == 0.2


def test_peers_are_laid_over_the_shared_sections(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
model: {name: resnet18, width: 2}
optim: {lr: 0.5, args: {momentum: 0.5}}
peers:
  - {}
  - {model: wrn_28_10, optim: {lr: 0.25}}
  -
""",
        "peers.2.optim.args.momentum=0.25", "peers.0.name=first", "peers.2.stream=9",
    )
    assert [(p.model.name, p.model.width) for p in config.peers] == [("resnet18", 2), ("wrn_28_10", 2), ("resnet18", 2)]
    assert [(p.optim.lr, p.optim.args["momentum"]) for p in config.peers] == [(0.5, 0.5), (0.25, 0.5), (0.5, 0.25)]
    assert [(p.name, p.stream) for p in config.peers] == [("first", 0), ("peer1", 1), ("peer2", 9)]


def test_arguments_of_the_optimizer_are_laid_over_each_other_name_by_name(tmp_path: Path) -> None:
    """In files, at the command line, per peer; they survive the dump, and null forgets them."""
    text = "optim: {name: adamw, args: {betas: [0.9, 0.95], amsgrad: true}}\npeers: [{}, {optim: {args: {eps: 1e-6}}}]"
    config = load(tmp_path, text, "peers.0.optim.args.betas=[0.8, 0.9]")
    assert [peer.optim.args for peer in config.peers] == [
        {"betas": [0.8, 0.9], "amsgrad": True}, {"betas": [0.9, 0.95], "amsgrad": True, "eps": 1e-6}]
    assert load(tmp_path, dump_config(config)) == config
    assert "      betas:\n      - 0.9\n      - 0.95\n      amsgrad: true\n      eps: 1.0e-06\n" in dump_config(config)
    assert config_differences(load(tmp_path, text), config) == [
        "peers.0.optim.args.betas: [0.9, 0.95] -> [0.8, 0.9]"]
    plain = load(tmp_path, text, "optim.args=null", "optim.name=sgd", "optim.args={momentum: 0.8}")
    assert [peer.optim.args for peer in plain.peers] == [{"momentum": 0.8}, {"momentum": 0.8, "eps": 1e-6}]
    assert load(tmp_path, "optim: {args: }").peers[0].optim.args == {}
    assert resume_conflicts(load(tmp_path, "{}"), load(tmp_path, "{}", "optim.args.momentum=0.8"))[0] == (
        "peers.0.optim.args.momentum: null -> 0.8")


def test_a_number_of_peers_is_that_many_equal_ones(tmp_path: Path) -> None:
    config = load(tmp_path, "peers: 3\nmodel: resnet18\n", "peers.2.model=wrn_28_10")
    assert [p.model.name for p in config.peers] == ["resnet18", "resnet18", "wrn_28_10"]
    assert len(load(tmp_path, "peers: [{}, {}]", "peers=5").peers) == 5
    assert len(load(tmp_path, "{}", "peers.3.model=a", "peers=6").peers) == 6
    assert {p.model.name for p in load(tmp_path, "peers: 3", "peers.all.model=a").peers} == {"a"}
    assert len(load(tmp_path, "peers: 2", "peers=null").peers) == 4
    for wrong in ("0", "-1", "257", "true", "1.5", "x", "[]", "{a: 1}", "99999999999"):
        assert "cannot be used for peers" in refused(tmp_path, f"peers: {wrong}")
    assert "there is no peer 3" in refused(tmp_path, "peers: 3", "peers.3.model=a")


def test_a_list_is_set_as_a_whole(tmp_path: Path) -> None:
    assert load(tmp_path, "{}", "peers.1.optim.milestones=[0.1,2/4]").peers[1].optim.milestones == (0.1, 0.5)
    assert "such as [0.5, 0.75]" in refused(tmp_path, "{}", "optim.milestones.0=0.9")
    assert "'x' cannot be used for optim.milestones" in refused(tmp_path, "optim:\n  milestones:\n  - 0.1\n  - x")


def test_text_settings_take_what_is_written(tmp_path: Path) -> None:
    config = load(tmp_path, "{}", "run.name=007", "data.root=1e5", "data.cache='null'", "run.root=[a")
    assert (config.run.name, config.data.root, config.data.cache, config.run.root) == ("007", "1e5", "null", "[a")
    assert load(tmp_path, "{}", "data.root=a: b #c").data.root == "a: b #c"
    assert load(tmp_path, "data: {root: a}", "data.root=null").data.root is None
    assert load(tmp_path, "train: {max_steps: 3}", "train.max_steps=null").train.max_steps is None


def test_a_changed_preset_drops_coefficients_of_the_other_one(tmp_path: Path) -> None:
    text = """
loss: {preset: mat, kd_weight: 0.3, temperature: 2}
peers: [{}, {loss: mat_kd}, {loss: {preset: mat}}, {loss: {kd_weight: 0.2}}]
"""
    losses = [peer.loss for peer in load(tmp_path, text).peers]
    assert [loss.kd_weight for loss in losses] == [0.3, 0.5, 0.3, 0.2]
    assert [loss.temperature for loss in losses] == [2, 1, 2, 2]
    write(tmp_path, "a.yaml", text)
    alone = load(tmp_path, "defaults: [a]", "loss.kd_weight=0.4", "loss.preset=mat_kd", "peers=2").peers[0].loss
    assert (alone.kd_weight, alone.temperature) == (0.4, 1)


def test_coefficients_of_presets_by_hand(tmp_path: Path) -> None:
    def loss(preset: str, index: int = 0, *more: str) -> LossConfig:
        return load(tmp_path, "{}", f"loss={preset}", *more).peers[index].loss

    mat = loss("mat")
    assert (mat.hard_weight, mat.hard_own, mat.kd_weight, mat.kd_own, mat.temperature) == (0.5, 1, 0.5, 0.25, 1)
    assert (loss("mat_share").hard_own, loss("mat_share").kd_weight, loss("mat_share").hard_weight) == (0.25, 0, 1)
    assert (loss("dml_at").teacher_input, loss("dml_at").kd_own) == ("own_ae", 1)
    assert (loss("mat", 0, "loss.kd_weight=0.9").hard_weight, loss("at").hard_weight) == (pytest.approx(0.1), 1)
    cat = [loss("cat", i) for i in range(4)]
    assert [c.pair_kl for c in cat] == [pytest.approx(0.3), 0, pytest.approx(0.3), 0]  # 6 times a share of 1/20
    assert [c.pair_mse for c in cat] == [0, 1 / 20, 0, 1 / 20]
    assert {c.kd_weight for c in cat} == {19 / 20}
    assert loss("mat", 0, "loss.teacher_set=owner").kd_own == 0
    union = load(tmp_path, """{loss: mat_union, peers: [
        {role: specialist}, {role: specialist, threat: {norm: l2, eps: 1}},
        {role: generalist, union: {threats: "linf:0.1,l2:1"}}]}""").peers
    assert [(p.loss.hard_weight, p.loss.kd_weight, p.loss.teacher_set, p.union.strategy) for p in union] == [
        (1, 0, "all", None), (1, 0, "all", None), (0.5, 0.5, "expert", "max")]
    assert (union[2].loss.hard_own, union[2].loss.kd_own) == (1, 1)
    assert all(value is not None for value in mat.model_dump().values())


def test_step_size_follows_the_radius_and_the_steps(tmp_path: Path) -> None:
    def size(*overrides: str) -> float | None:
        return load(tmp_path, "{}", *overrides).peers[0].attack.step_size

    assert size("threat.eps=0.2", "attack.steps=10") == pytest.approx(0.05)
    assert size("threat.eps=8/255", "attack.steps=1") == pytest.approx(10 / 255)  # FGSM-RS
    assert size("attack.step_size=2/255") == 2 / 255
    attack = load(tmp_path, "{}", "loss=trades").peers[0].attack
    assert (attack.start, attack.loss) == ("gaussian", "kl_clean")


def test_an_override_that_no_peer_takes_over_is_an_error(tmp_path: Path) -> None:
    text = dump_config(load(tmp_path, "{}"))
    assert "optim.lr has no effect" in refused(tmp_path, text, "optim.lr=0.01")
    assert "loss has no effect" in refused(tmp_path, text, "loss=at")
    assert "attack.eps has no effect" in refused(tmp_path, text, "attack.eps=8/255")
    assert {p.optim.lr for p in load(tmp_path, text, "peers.all.optim.lr=0.01").peers} == {0.01}
    assert load(tmp_path, "peers: [{optim: {lr: 1}}, {}]", "optim.lr=0.5").peers[1].optim.lr == 0.5


def test_files_that_name_each_other_are_reported(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "defaults: [x]")
    assert "x.yaml -> a.yaml -> x.yaml" in refused(tmp_path, "defaults: [a]")
    assert "x.yaml -> x.yaml" in refused(tmp_path, "defaults: x")
    for depth in range(8):
        write(tmp_path, f"d{depth}.yaml", f"defaults: [d{depth + 1}, d{depth + 1}]")
    write(tmp_path, "d8.yaml", "{}")
    assert "more than 100 files" in refused(tmp_path, "defaults: d0")
    text = refused(tmp_path, "defaults: [digts, 5]")
    assert "defaults is not a list of files" in text
    assert "did you mean digits?" in refused(tmp_path, "defaults: [digts]")


def test_differences_are_flat_lines(tmp_path: Path) -> None:
    old, new = load(tmp_path, "{}"), load(tmp_path, "{}", "optim.lr=0.5", "peers.1.threat={norm: l2, eps: 0.1}",
                                       "train.max_steps=3")
    expected = [
        "peers.0.optim.lr: 0.1 -> 0.5", "peers.1.threat.norm: linf -> l2", "peers.1.optim.lr: 0.1 -> 0.5",
        "peers.2.optim.lr: 0.1 -> 0.5", "peers.3.optim.lr: 0.1 -> 0.5", "train.max_steps: null -> 3",
    ]
    assert config_differences(old, new) == expected
    assert config_differences(read_yaml(dump_config(old)), new) == expected
    assert config_differences(old.model_dump(), old) == []
    assert config_differences(old, load(tmp_path, "peers: 3")) == ["peers: 4 -> 3"]


def test_resume_refuses_what_alters_the_weights(tmp_path: Path) -> None:
    old = load(tmp_path, "train: {epochs: 10}")
    values = read_yaml(dump_config(old))
    allowed = [
        "train.epochs=11", "eval.steps=3", "log.every=7", "checkpoint.every=2", "run.root=elsewhere", "run.name=x",
        "run.resume=must", "run.threads=2", "comm.timeout=5", "comm.backend=gloo", "data.root=y", "data.residency=host",
        "data.cache=z", "step.memory=recompute",
    ]
    assert resume_conflicts(values, load(tmp_path, "{}", *allowed)) == []
    for refusal in (
        "train.epochs=9", "run.seed=1", "run.device=cpu", "optim.lr=0.2", "data.augment.pad=4", "step.precision=bf16",
        "train.batch_size=64", "peers.3.name=other", "train.accumulate=2", "data.train_size=1000", "peers=3",
    ):
        key = refusal.split("=")[0].removeprefix("peers.3.")
        conflicts = resume_conflicts(old.model_dump(mode="json"), load(tmp_path, "train: {epochs: 10}", refusal))
        assert conflicts and all(key in line or key == "peers" for line in conflicts), refusal


@pytest.mark.parametrize(("old", "new", "longer"), [
    ("max_steps: 5", "train.max_steps=6", True), ("max_steps: 5", "train.max_steps=null", True),
    ("max_steps: 5", "train.max_steps=4", False), ("epochs: 5", "train.max_steps=4", False),
    ("epochs: 5", "train.epochs=6", True),
])
def test_only_a_longer_training_may_be_resumed(tmp_path: Path, old: str, new: str, longer: bool) -> None:
    before, after = load(tmp_path, f"train: {{{old}}}"), load(tmp_path, f"train: {{{old}}}", new)
    assert trains_longer(before, after) is longer and (resume_conflicts(before, after) == []) is longer


def test_a_warm_up_that_follows_the_length_grows_with_it_and_one_that_was_written_does_not(tmp_path: Path) -> None:
    old = load(tmp_path, "loss: mat_late\ntrain: {epochs: 30}")
    longer = ["loss=mat_late", "train.epochs=60"]
    assert resume_conflicts(old.model_dump(mode="json"), load(tmp_path, "{}", *longer)) == []
    assert resume_conflicts(old, load(tmp_path, "{}", *longer, "peers.1.loss.warmup_epochs=5")) == [
        "peers.1.loss.warmup_epochs: null -> 5.0"]
    written = load(tmp_path, "loss: {preset: mat_late, warmup_epochs: 5}\ntrain: {epochs: 30}")
    assert len(resume_conflicts(written, load(tmp_path, "{}", *longer))) == len(old.peers)


def test_another_number_of_peers_is_told_as_that_and_a_long_list_says_how_long_it_is(tmp_path: Path) -> None:
    four = load(tmp_path, "peers: 4")
    assert resume_conflicts(load(tmp_path, "peers: 2"), four) == ["peers: 2 -> 4"]
    conflicts = resume_conflicts(load(tmp_path, "peers: 4", "optim.lr=0.3", "attack.eps=0.2", "run.seed=3"), four)
    assert len(conflicts) > 8 and some(conflicts).split("; ") == [*conflicts[:8], f"and {len(conflicts) - 8} more"]
    assert some(conflicts[:8]).split("; ") == conflicts[:8]


def test_a_setting_that_an_old_run_did_not_know_has_its_default(tmp_path: Path) -> None:
    config = load(tmp_path, "{}")
    values = config.model_dump(mode="json")
    del values["step"]["wire"]
    assert resume_conflicts(values, config) == []
    values["step"]["gone"] = 1
    assert resume_conflicts(values, config)[-1] == "step.gone: 1 -> null"


def test_a_run_whose_plug_in_is_not_loaded_says_which_one_it_needs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("methods:\n  of_a_plug_in: {gamma: 1}\n")
    (tmp_path / "environment.json").write_text('{"placement": {"plugins": {"mine.py": "0123456789abcdef00"}}}')
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "config.yaml"))
    assert caught.value.what == "the run needs its plug-ins: mine.py" and "--plugin FILE" in caught.value.how
    assert not getattr(caught.value, "problems", [caught.value])[1:]


@pytest.mark.parametrize("environment", ["", "{", "[]", '{"placement": null}', '{"placement": {"plugins": {"a": 1}}}'])
def test_a_damaged_record_of_plug_ins_leaves_the_message_as_it_is(environment: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optim:\n  lrr: 1\n")
    (tmp_path / "environment.json").write_text(environment)
    with pytest.raises(ConfigError, match=r"there is no setting optim\.lrr"):
        load_config(str(tmp_path / "config.yaml"))
