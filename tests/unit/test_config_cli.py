"""Options of commands, the help, plug-ins, and the JSON schema for editors."""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import pydantic
import pytest

from mat_dist.api import training
from mat_dist.config import Options, TrainingOptions, count, load_config, load_plugins, schema_json
from mat_dist.config.help import settings
from mat_dist.config.schema import Config
from mat_dist.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
same_words = pytest.mark.skipif(
    tuple(map(int, pydantic.VERSION.split(".")[:2])) < (2, 9),
    reason="older pydantic writes the same schema in other words",
)


def parse(*argv: str) -> Namespace:
    options = TrainingOptions("train", "Train.")
    options.add_argument("--dry-run", action="store_true")
    return options.read(argv)


def test_options_and_settings_may_be_mixed() -> None:
    none = parse()
    assert (none.config, none.words, none.plugin, none.dry_run) == (None, (), [], False)
    asked = parse("a.b=1", "--config", "x.yaml", "c=2=3", "--plugin", "p.py", "--dry-run", "--plugin=q.py", "d=4")
    assert (asked.config, asked.words) == ("x.yaml", ("a.b=1", "c=2=3", "d=4"))
    assert (asked.plugin, asked.dry_run) == (["p.py", "q.py"], True)
    assert parse("-c", "x").config == parse("--config=x").config == "x"


@pytest.mark.parametrize(
    ("argv", "how"),
    [
        (["--confg", "x=1"], "did you mean --config?"),
        (["--plugins=x"], "did you mean --plugin?"),
        (["-n"], "options are --help, --config"),
        (["--train.epochs=3"], "did you mean train.epochs=3? Settings have no dashes"),
        (["--epochs"], "did you mean"),
        (["x.yaml"], "did you mean --config x.yaml?"),
        (["dry-run"], "did you mean --dry-run?"),
        (["train.epochs"], "did you mean train.epochs=VALUE?"),
        (["zzz"], "key=value"),
        (["--config"], "write --config FILE"),
        (["--config="], "write --config FILE"),
        (["--plugin", "--dry-run"], "write --plugin FILE"),
        (["-c", "a", "-c", "b"], "give it once"),
        ([""], "key=value"),
        (["-=1"], "options are"),
        (["--dry-run=1"], "write --dry-run alone"),
        (["\x1b[31m"], "key=value"),
    ],
)
def test_anything_else_is_a_config_error_with_the_nearest_option(argv: list[str], how: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert caught.value.code == 2 and str(caught.value).isprintable()
    assert how in str(caught.value.problems[0])


def test_all_wrong_words_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("--confg", "zzz", "a=1", "-x")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "", "x", "²", "10000000", "00000001"])
def test_what_is_no_count_is_refused(value: str) -> None:
    options = Options("x", "X.", "RUN")
    options.add_argument("--ranks", metavar="N", type=count, default=1)
    with pytest.raises(ConfigError, match=r"--ranks.*is not a whole number from 1.*write --ranks N"):
        options.read(["--ranks", value])
    assert options.read(["a", "--ranks=9999999", "b"]) == Namespace(ranks=9_999_999, words=("a", "b"))


def test_a_command_that_needs_words_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    """A script whose variable is empty must not take the help for success."""
    with pytest.raises(ConfigError, match=r"^nothing is given.*: write python -m mat_dist\.x RUN; --help tells more"):
        Options("x", "What it does.", "RUN").read([])
    with pytest.raises(SystemExit) as caught:
        Options("x", "What it does.", "RUN").read(["-h"])
    assert caught.value.code == 0 and "What it does." in capsys.readouterr().out


def test_help_lists_every_setting_with_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("x=1", "--help", "--nonsense")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    count = 0
    for model in _sections(Config):
        for name, field in model.model_fields.items():
            if field.description and not _is_section(field.annotation) and name not in ("peers", "methods"):
                assert field.description.replace("  ", " ") in flat, name
                count += 1
    in_methods = [key for key in settings() if key.startswith("methods.")]
    assert 80 < count == len(settings()) - len(in_methods) and len(settings()) <= 100
    for key, setting in settings().items():
        assert f"{key}={setting.default_text} " in flat.replace("\n", " ")
        assert setting.type_text in flat and setting.description in flat
    assert max(map(len, text.splitlines())) <= 100 and "Undefined" not in text
    assert "optim.args={} " in flat and "[NAME: VALUE, ...]" in flat
    assert "attack.eps=4/255" in text and "torchrun" in text and "--plugin" in text


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and hasattr(annotation, "model_fields")


def _sections(model: type) -> list[type]:
    found = [model]
    for field in model.model_fields.values():  # type: ignore[attr-defined]
        if _is_section(field.annotation):
            found += _sections(field.annotation)
    if model is Config:
        from mat_dist.config.schema import PeerConfig

        found.append(PeerConfig)
    return found


def test_the_help_of_the_training_fits_100_columns_and_shows_both_launches() -> None:
    top = TrainingOptions("train", training.__doc__).format_help().split("options:")[0].splitlines()
    assert max(map(len, top)) <= 100
    assert [line.split()[0] for line in top if line.startswith("  ")] == ["torchrun", "python"]


def test_the_examples_in_the_help_are_valid() -> None:
    lines = TrainingOptions("train", "Train.").format_help().split("Examples\n")[1].splitlines()
    for line in lines:
        given = line.split("#")[0].split("mat_dist.train")[1].split()
        arguments = parse(*given)
        if arguments.config != "my.yaml":
            load_config(arguments.config, arguments.words)


def test_plugins_run_once_and_their_digest_is_recorded(tmp_path: Path) -> None:
    good = tmp_path / "mine.py"
    good.write_text(
        "import sys\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n"
        "sys.ran_plugin = getattr(sys, 'ran_plugin', 0) + 1\n"
    )
    try:
        for _ in range(2):
            assert load_plugins([str(good)]) == {str(good): hashlib.sha256(good.read_bytes()).hexdigest()}
        assert sys.ran_plugin == 1  # type: ignore[attr-defined]
    finally:
        del sys.ran_plugin  # type: ignore[attr-defined]
    assert load_plugins([]) == {}
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("import math\nx = 1 / 0\n", "ZeroDivisionError", ", line 2"),
        ("def f(:\n", "SyntaxError", ", line 1"),
        ("import nowhere_at_all", "nowhere_at_all", ", line 1"),
        ("raise SystemExit(0)", "SystemExit", ", line 1"),
        ("x = '\\ud800'\nraise ValueError(1)", "ValueError", ", line 2"),
        (None, "No such file", ""),
        ("from mat_dist.threats import Threat", "No module named 'mat_dist.threats'", ", line 1"),
        ("\0", "null bytes", ""),  # a SyntaxError, or a ValueError before Python 3.11.4
    ],
)
def test_a_plugin_that_cannot_be_imported_is_a_config_error(
    text: str | None, what: str, line: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    before = set(sys.modules)
    with pytest.raises(ConfigError) as caught:
        load_plugins([str(path)])
    assert what in caught.value.what and f"--plugin {path}{line}" in caught.value.where
    assert not any(name.startswith("mat_dist_plugin") for name in set(sys.modules) - before)


@pytest.mark.parametrize(("text", "how"), [
    ("from mat_dist.threats import Threat", "plug-ins import from mat_dist.models, mat_dist.data"),
    ("from mat_dist import streams", "plug-ins import from mat_dist.models, mat_dist.data"),
    ("import mat_dist.no_such_thing", "plug-ins import from mat_dist.models, mat_dist.data"),
    ("from mat_dist.errors import NoSuchThing", "plug-ins import from mat_dist.models, mat_dist.data"),
    ("from math import threats", "correct the file"),
])
def test_a_plugin_that_imports_what_is_not_there_is_told_where_it_is(text: str, how: str, tmp_path: Path) -> None:
    path = tmp_path / "old.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_plugins([str(path)])
    assert how in caught.value.how and caught.value.where == f"--plugin {path}, line 1"


@same_words
def test_the_json_schema_is_current() -> None:
    assert json.loads((CONFIGS / "schema.json").read_text()) == json.loads(schema_json()), (
        "run: python -c \"from mat_dist.config import schema_json; print(schema_json(), end='')\" > configs/schema.json"
    )


@same_words
def test_the_json_schema_allows_the_short_forms() -> None:
    schema = json.loads(schema_json())
    top, sections = schema["properties"], schema["$defs"]
    assert [form.get("type") for form in top["peers"]["anyOf"]] == ["integer", "array"]
    assert "defaults" in top and schema["additionalProperties"] is False
    for name in ("model", "threat", "loss"):
        for properties in (top, sections["PeerConfig"]["properties"]):
            assert {"type": "string"} in properties[name]["anyOf"]
    assert {"type": "string"} not in top["train"]["anyOf"]
    eps = sections["ThreatConfig"]["properties"]["eps"]
    assert [form["type"] for form in eps["anyOf"]] == ["number", "string"]
    assert {"eps", "norm"} <= set(sections["AttackConfig"]["properties"])
    described = [field for section in sections.values() for field in section["properties"].values()]
    assert all("description" in field for field in described)


def test_every_config_names_the_schema_and_loads() -> None:
    files = sorted(CONFIGS.glob("*.yaml"))
    assert {
        "base", "digits", "fashion_mnist", "cifar10_cpu", "cifar10_resnet18", "cifar10_at", "cifar10_trades",
        "cifar10_cat", "cifar100_resnet18", "imagenet_folder",
    } <= {path.stem for path in files}
    for path in files:
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
        config = load_config(str(path))
        assert config.run.name is None


def test_the_recipes_are_what_their_sources_say() -> None:
    r18 = load_config("cifar10_resnet18")
    assert (
        len(r18.peers) == 4 and r18.train.epochs == 110 and r18.train.batch_size == 128 and r18.step.precision == "bf16"
    )
    for peer in r18.peers:
        assert (peer.model.name, peer.threat.norm, peer.threat.eps) == ("preact_resnet18", "linf", 8 / 255)
        assert (peer.attack.steps, peer.attack.step_size, peer.attack.start) == (10, 2 / 255, "uniform")
        assert (peer.optim.lr, peer.optim.weight_decay, peer.optim.ema_decay) == (0.1, 5e-4, 0.999)
        assert peer.optim.milestones == (100 / 110, 105 / 110) and peer.loss.preset == "mat"
    cat = load_config("cifar10_cat")
    assert [peer.attack.loss for peer in cat.peers] == ["kl_clean", "ce"]
    assert cat.train.epochs == 200 and cat.peers[0].optim.ema_decay is None
    assert {p.loss.preset for p in load_config("cifar10_at").peers} == {"at"}
    free = load_config("cifar10_free")
    assert {(p.attack.method, p.attack.start, p.attack.step_size) for p in free.peers} == {("free", "zero", 8 / 255)}
    assert free.train.replays * free.train.epochs == 112
    fast = load_config("cifar10_fast")
    assert {(p.attack.method, p.attack.steps, p.attack.start, p.attack.step_size) for p in fast.peers} == {
        ("pgd", 1, "uniform", 10 / 255)}
    assert {p.optim.schedule for p in fast.peers} == {"onecycle"} and fast.eval.every == 1
    assert {p.loss.pair_kl for p in load_config("cifar10_trades").peers} == {6}
    imagenet = load_config("imagenet_folder")
    assert (
        imagenet.peers[0].threat.eps == 4 / 255
        and imagenet.step.memory == "recompute"
        and imagenet.data.residency == "mmap"
    )
    assert imagenet.peers[0].attack.step_size == pytest.approx(2 / 3 * 4 / 255)
