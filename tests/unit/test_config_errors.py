"""What is wrong in a configuration is reported all at once, with its place and the nearest known key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mat_dist.config import load_config
from mat_dist.errors import ConfigError


def problems(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), overrides)
    assert caught.value.code == 2
    for problem in caught.value.problems:
        assert isinstance(problem, ConfigError) and problem.what and problem.where and problem.how
        assert "\n" not in str(problem) and str(problem).isprintable()
    return [str(problem) for problem in caught.value.problems]


def refused(tmp_path: Path, text: str | bytes, *overrides: str) -> list[str]:
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return problems(path, *overrides)


def test_all_problems_are_reported_at_once_with_file_line_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "low.yaml").write_text("optim:\n  lr: fast\n")
    found = refused(
        tmp_path,
        """defaults: [low]
train:
  epochs: 2.5
  epochs: 3
  epoch: 7
threat:
  eps: 8
loss: mt
peers:
  - {name: a, model: {widht: 2}}
  - {name: a}
lr: 1
""",
        "eval.stepz=3", "trian.epochs=2", "nonsense", "comm.backend=mpi",
    )
    expected = [
        ("nonsense is not a setting", "(command line)", "key=value"),
        ("the key epochs stands twice", "(x.yaml:4, train.epochs)", "delete one"),
        ("'fast' cannot be used for optim.lr", "(low.yaml:2, optim.lr)", 'such as 0.1, 1e-3 or "8/255"'),
        ("2.5 cannot be used for train.epochs", "(x.yaml:3, train.epochs)", "whole number, >= 1, <= 100000"),
        ("there is no setting train.epoch", "(x.yaml:5, train.epoch)", "did you mean train.epochs?"),
        ("'mt' cannot be used for loss", "(x.yaml:8, loss)", "did you mean mat?"),
        (
            "there is no setting peers.0.model.widht", "(x.yaml:10, peers.0.model.widht)",
            "did you mean peers.0.model.width?",
        ),
        ("there is no setting lr", "(x.yaml:12, lr)", "did you mean optim.lr?"),
        ("there is no setting eval.stepz", "(command line, eval.stepz)", "did you mean eval.steps?"),
        ("there is no setting trian.epochs", "(command line, trian.epochs)", "did you mean train.epochs?"),
        ("'mpi' cannot be used for comm.backend", "(command line, comm.backend)", "auto, gloo, nccl"),
        ("a linf radius of 8", "(x.yaml:7, threat.eps)", "write eps: 8/255"),
        ("peers.0 and peers.1 have the same name a", "(x.yaml:11, peers.1.name)", "own name"),
    ]
    for parts in expected:
        assert sum(all(part in line for part in parts) for line in found) == 1, (parts, found)
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    "value",
    [
        ".nan", ".inf", "nan", "inf", "-.inf", "1e400", "1e999999", "true", "8/0", "0/0", "/", "8/", "-8/255", "0",
        "-1", "1" * 4200 + "/3", "1" * 5000, "[1]", "{a: 1}", "null", "0x10", "8;5",
    ],
)
def test_numbers_that_are_none_are_refused(value: str, tmp_path: Path) -> None:
    (line,) = refused(tmp_path, f"threat: {{eps: {value}}}")
    assert "cannot be used for threat.eps" in line and "x.yaml:1, threat.eps" in line and "8/255" in line
    (line,) = refused(tmp_path, "{}", f"threat.eps={value}")
    assert "threat.eps" in line and "command line" in line


@pytest.mark.parametrize(
    ("key", "value", "how"),
    [
        ("train.epochs", "2.5", "whole number"),
        ("train.epochs", "true", "whole number"),
        ("train.epochs", "0", ">= 1"),
        ("train.epochs", "null", "whole number"),
        ("run.seed", "-1", ">= 0, < 2**63"),
        ("data.augment.flip", "2", "true or false"),
        ("run.device", "gpu", "auto, cpu, cuda"),
        ("run.resume", "{}", "auto, must, never"),
        ("optim.milestones", "0.5", "[0.5, 0.75]"),
        ("model", "[a]", "name, width, activation, norm (or name alone)"),
        ("optim", "sgd", "write its settings below it: name, lr"),
        ("train.epochs.more", "3", "whole number"),
        ("peers.0", "resnet18", "write its settings below it: name, stream, role"),
        ("threat.norm", "linff", "did you mean linf?"),
        ("data.name", "''", "not empty"),
        ("optim.clip_norm", "maybe", "8/255\", > 0, or null"),
        ("union.threats", "linf:0.1,lol:1", "write text like linf:8/255,l2:1/2,l1:12"),
        ("union.threats", "linf:0", "write text like linf:8/255"),
        ("log.trackers", "mlflow", "write text like tensorboard,wandb:PROJECT"),
        ("log.trackers", "tensorboard,tensorboard", "write text like"),
        ("log.trackers", "trackio:", "write text like"), ("log.trackers", "mlflow:a,mlflow:b", "write text like"),
        ("log.trackers", "wandb", "write text like"),
        ("optim.args", "3", "such as {momentum: 0.8, nesterov: true}"),
        ("optim.args.momentum", "1e999", "such as {momentum: 0.8"),
        ("optim.args.a.b", "3", "such as {momentum: 0.8"),
        ("data.augment", "4", "pad, flip"),
    ],
)
def test_a_wrong_value_says_what_is_allowed(key: str, value: str, how: str, tmp_path: Path) -> None:
    (line,) = refused(tmp_path, "{}", f"{key}={value}")
    assert f"(command line, {key}" in line and how in line


@pytest.mark.parametrize("item", [
    "attack.eps=-1", "attack.eps=abc", "attack.eps=nan", "attack.eps=[1]", "attack.norm=l7", "threat.eps=-1",
    "attack.steps=-1", "optim.lr=-1", "peers.all.attack.eps=-1", "peers.all.threat.eps=abc", "peers.all.optim.lr=-1",
    "peers.1.attack.eps=-1", "loss.preset=x", "attack.eps=8"])
def test_one_wrong_value_is_one_problem(item: str) -> None:
    found = problems("digits", item)
    assert len(found) == 1 and item.partition("=")[0] in found[0]


@pytest.mark.parametrize("items", [("data=folder", "data.root=x"), ("threat=[l2]", "attack.eps=0.2"),
                                   ("peers.0.attack=3", "peers.0.attack.steps=1"),
                                   ("data.augment=yes", "data.augment.pad=1")])
def test_a_value_in_the_place_of_a_section_is_refused_also_before_settings_below_it(items: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"cannot be used for the section {items[0].partition('=')[0]} "):
        load_config("digits", ["peers=1", "loss=at", *items])


@pytest.mark.parametrize("item", ["threat=l2", "attack.norm=l1", "threat={norm: l2, eps: 1}", "attack.eps=0.3",
                                  "threat.eps=16/255"])
def test_a_threat_beside_a_union_is_refused_and_not_passed_over(item: str) -> None:
    with pytest.raises(ConfigError, match=r"has no effect beside union\.threats"):
        load_config("union_baseline", [item])
    assert load_config("union_baseline", ["attack.steps=3"]).peers[0].attack.steps == 3


def test_a_radius_beside_a_union_is_taken_where_it_says_the_same_or_where_other_peers_have_none() -> None:
    same = ["loss=at", "union.strategy=max", "union.threats=linf:8/255,l2:1/2", "attack.eps=8/255"]
    assert load_config("digits", ["peers=1", *same]).peers[0].threat.eps == 8 / 255
    mixed = load_config("digits", ["peers=2", "peers.1.union={strategy: max, threats: 'linf:0.1,l2:1'}", "loss=at",
                                   "attack.eps=0.3"])
    assert [peer.threat.eps for peer in mixed.peers] == [0.3, 0.1]


def test_text_settings_in_a_file_want_quotes_around_numbers(tmp_path: Path) -> None:
    (line,) = refused(tmp_path, "data: {root: 5}")
    assert "5 cannot be used for data.root" in line and "in quotes" in line


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.epochz", "train.epochs"),
        ("epochs", "train.epochs"),
        ("attack.epsilon", "attack.eps"),
        ("trian.epochs", "train.epochs"),
        ("trian.epoch", "train"),
        ("batch_size", "train.batch_size"),
        ("bachsize", "train.batch_size"),
        ("threat.stepz", "attack.steps"),
        ("peers.1.modle", "peers.1.model"),
        ("peers.1.optim.zzzzz", "known here: name, lr"),
        ("peers.1.lr", "optim.lr"),
        ("data.augment.fliip", "data.augment.flip"),
        ("defalts", "defaults"),
        ("zzzz", "known here: run, comm"),
    ],
)
def test_the_nearest_known_key_is_named(key: str, near: str) -> None:
    (line,) = problems("digits", f"{key}=3")
    assert f"there is no setting {key} (command line, {key})" in line and near in line


@pytest.mark.parametrize(
    "item",
    [
        "", "=", "=3", "a", ".a=1", "a..b=1", "a.=1", "a b=1", "a-b=1", "\0=1", "\ud800=1", "a[0]=1", "$(id)=1",
        "peers.-1.model=a", "train.epochs", "defaults=digits", "train.epochs=", "train.epochs= ",
    ],
)
def test_words_that_are_no_settings_are_refused(item: str) -> None:
    (line,) = problems("digits", item)
    assert "command line" in line and ("is not a setting" in line or "has no value" in line or "is for files" in line)


def test_missing_and_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "did you mean cifar10_resnet18?" in problems("cifar10_resnet")[0]
    assert "digits" in problems("zzz")[0]
    for name in ("\0", "x" * 5000, str(tmp_path), "", "a\nb", "/dev/null/x", "\ud800"):
        assert "no such configuration file" in problems(name)[0]
    (tmp_path / "gone.yaml").symlink_to(tmp_path / "nowhere")
    assert "no such configuration file" in problems(tmp_path / "gone.yaml")[0]
    path = tmp_path / "x.yaml"
    path.write_text("{}")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    assert "cannot read the file: Permission denied" in problems(path)[0]


def test_of_many_unknown_keys_the_first_ones_are_told(tmp_path: Path) -> None:
    assert len(refused(tmp_path, "".join(f"key{n}: 1\n" for n in range(2000)))) == 100


def test_configuration_does_not_import_torch_numpy_or_ruamel() -> None:
    code = (
        "import mat_dist.config, sys; from mat_dist.config import *\n"
        "try: TrainingOptions('x', 'y').read(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'ruamel.yaml'} & set(sys.modules); "
        "load_config(None); assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
