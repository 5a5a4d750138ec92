"""Hostile input: YAML bombs, broken bytes, names that reach for the shell or the file system, random edits."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest

from mat_dist.config import load_config, tree
from mat_dist.config.schema import Config
from mat_dist.errors import ConfigError
from tests.unit.test_config_errors import problems, refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing at the top level"),
        ("- 1\n", "found a list at the top level"),
        ("hello", "found a single value at the top level"),
        ("a: [", "not YAML"),
        ("\tx: 1", "not YAML"),
        ("a: 1\n---\nb: 1", "not YAML: expected a single document in the stream, but found another document"),
        ("a: \0", "not YAML"),
        ("train: {epochs: 1}\ntrain: {epochs: 2}", "the key train stands twice"),
        ("train: {epochs: 1, epochs: 1}", "the key epochs stands twice"),
        ("x: " + "[" * 30 + "]" * 30, "nested deeper than 20 levels"),
        ("- " * 5000, "nested deeper than 20 levels"),
        ("x: [" + "1," * 601 + "]", "more than 600 values"),
        ("x: &a [1, *a]", "nested deeper than 20 levels"),
        ("x: *a", "not YAML: found undefined alias 'a'"),
        ("x: " + "[" * 1500, "nested deeper than 20 levels"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
            "more than 600 values",
        ),
        ("a: &a [[[[[[[[[[[[x]]]]]]]]]]]]\nb: [[[[[[[[[*a]]]]]]]]]", "nested deeper than 20 levels"),
        ("x: &a {b: 1}\ny: {<<: *a}", "merge keys (<<) are not read"),
        ("x: !!python/object/apply:os.system [ls]", "the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("x: !env HOME", "the tag !env"),
        ("1: x", "a key that is not text"),
        ("? [a, b]\n: x", "a key that is not text"),
        (b"x: \xff\xfe", "not UTF-8 text"),
        (b"# ok\n# ok\nx: '\xc3'\n", "not UTF-8 text (%s:3)"),
        (b"x: 1 #" + b"a" * (1 << 20), "larger than 1 MiB"),
        ("x\x1b[31m: 1", "not YAML"),
        ('"x\\e[31m": 1', "there is no setting x\\x1b[31m"),
        ("x" * 900 + "y: 1", "there is no setting xxx"),
    ],
    ids=range(28),
)
def test_yaml_that_is_no_configuration_is_refused(
    text: str | bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "MAX_VALUES", 600)
    found = refused(tmp_path, text)
    assert any(message.replace("%s", str(tmp_path / "x.yaml")) in line for line in found), found


def test_a_lone_surrogate_is_refused(tmp_path: Path) -> None:
    assert len(refused(tmp_path, 'data: {root: "\\uD83D"}')) == 1
    assert len(problems("digits", "data.root=\ud83d")) == 1


@pytest.mark.parametrize("text, line", [("a: 1\nb: [\n", 3), ("a: 1\n---\nb: 1", 2), ("a: 1\n\nb: \0", 3),
                                        ("a: 1\nb: !env x", 2), ("a: 1\nb: *c", 2), ('a: 1\nb: "\\U99999999"', 1),
                                        ("a:\n- &b\n  - 1\n  - *b", 3)])
def test_what_is_refused_is_told_with_its_line(text: str, line: int, tmp_path: Path) -> None:
    (found,) = refused(tmp_path, text)
    assert f"({tmp_path / 'x.yaml'}:{line}" in found


def hostile_names() -> list[str]:
    rng = random.Random(0)
    names = [
        "..", ".", "../x", "a/b", "/etc/passwd", "-rf", "--help", "a\nb", "a\n", "\n", "a\0b", "$(id)", "`id`", "a;b",
        "a b", "a|b", "a&b", "a'b", 'a"b', "~", "~root", "a" * 65, "a" * 300, ".hidden", "_x", "\u00e9", "\u202ea",
        "a\u2028", "%s", "a*b", "{a,b}", "a\\b", "a:b", "#a", "\ta", "\x1b[31m", "\ud800", "a\r", "<a>", "a=b", "a,b",
        "a@b", "!a", "[a]", "\x7f",
    ]
    bad = [c for c in string.printable if c not in string.ascii_letters + string.digits + "._-"]
    while len(names) < 200:
        word = [rng.choice(string.ascii_letters) for _ in range(8)]
        word.insert(rng.randrange(9), rng.choice(bad))
        names.append("".join(word))
    return names


@pytest.mark.parametrize("key", ["run.name", "peers.1.name"])
def test_hostile_names_are_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("peers: 2")
    for name in hostile_names():
        quoted = '"' + "".join(f"\\U{ord(c):08x}" for c in name) + '"' if name != "\ud800" else '"\\uD800"'
        assert any("name" in line for line in problems(path, f"{key}={quoted}")), name
        with pytest.raises(ConfigError):
            load_config(str(path), [f"{key}={name}"])


VALID = """
run: {name: a, seed: 3}
data: {name: cifar10, root: data, augment: {pad: 4, flip: true}}
model: resnet18
threat: {norm: linf, eps: 8/255}
attack: {steps: 10, step_size: 2/255}
loss: {preset: mat, kd_weight: 0.5, teacher_set: all}
optim: {lr: 1e-1, schedule: piecewise, milestones: [100/110, 0.95]}
peers:
  - {name: a, threat: l2, loss: trades}
  - {stream: 5, optim: {lr: 0.2}}
train: {epochs: 10, batch_size: 128}
"""
TOKENS = [
    "8/0", ".nan", "1e400", "-1", "0", "true", "null", "~", "[]", "{}", "[1, [2]]", "{a: {b: c}}", "*a", "&a", "!!int",
    "<<", "- ", ": ", "\n", "\t", '"', "'", "#", "\0", "\u00e9", "peers", "eps", "256", "1" * 400, "x" * 300, "mat",
    "l2", "defaults: [x]", "---",
]
KEYS = [
    "threat.eps", "attack.steps", "loss", "loss.preset", "peers", "peers.0", "peers.1.loss.kd_own", "peers.all.model",
    "optim.milestones", "optim.milestones.0", "train", "train.batch_size", "data.augment", "train.accumulate",
    "run.name", "zzz", "loss.teacher_set",
]


def mutated(rng: random.Random) -> tuple[bytes, list[str]]:
    """A valid configuration with a few random edits of bytes, tokens, lines and overrides."""
    text = VALID
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        at, kind = rng.randrange(len(text) + 1), rng.randrange(5)
        if kind == 0:
            text = text[:at] + rng.choice(TOKENS) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.randrange(12) :]
        elif kind == 2:
            words = text.split(" ")
            words[rng.randrange(len(words))] = rng.choice(TOKENS)
            text = " ".join(words)
        elif kind == 3:
            lines = text.splitlines(keepends=True) or ["{}"]
            lines.insert(rng.randrange(len(lines)), rng.choice(lines))
            text = "".join(lines)
        else:
            text = text[:at]
    data = bytearray(text.encode(errors="surrogatepass"))
    if data and rng.random() < 0.2:
        data[rng.randrange(len(data))] = rng.randrange(256)
    overrides = [f"{rng.choice(KEYS)}={rng.choice(TOKENS)}" for _ in range(rng.choice([0, 0, 1, 3]))]
    return bytes(data), overrides


@pytest.mark.slow
def test_mutated_configurations_end_in_a_configuration_or_a_config_error(tmp_path: Path) -> None:
    rng = random.Random(20)
    path = tmp_path / "x.yaml"
    good = placed = 0
    for _ in range(1000):
        data, overrides = mutated(rng)
        path.write_bytes(data)
        try:
            config = load_config(str(path), overrides)
        except ConfigError as error:
            assert error.problems and str(error).isprintable()
            placed += all("x.yaml" in p.where or "command line" in p.where for p in error.problems)
        else:
            assert isinstance(config, Config)
            good += 1
    assert good > 50
    assert good + placed == 1000
