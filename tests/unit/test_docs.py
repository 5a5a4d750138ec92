"""README.md, CONTRIBUTING.md and docs/ against the code: links, names of settings and files, examples, tables."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from mat_dist import errors
from mat_dist.config import load, load_config, load_plugins
from mat_dist.config import methods as config_methods
from mat_dist.config.gone import MOVED, WENT
from mat_dist.config.help import settings
from mat_dist.config.methods import methods
from mat_dist.config.presets import fill_loss
from mat_dist.config.schema import Config, DataConfig, LossConfig, ModelConfig
from mat_dist.config.tree import ALIASES, SHARED
from mat_dist.core.graph import View
from mat_dist.core.hooks import Hook
from mat_dist.core.step import Batch, train_step
from mat_dist.data import load_data
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.methods import unions
from mat_dist.models import build_model
from tests import cohorts
from tests.documents import DATA, DOCUMENTS, METHOD, MODEL, NORM, POISONED, ROOT, blocks, table

ARCHITECTURE = "docs/architecture.md"
CALLS = "## From peer 2's AE to peer 0's loss"
# They get the AE too, and hand it to nothing that is on its way to peer 0's loss.
BYSTANDERS = {"Agreement.header", "Agreement.run", "Guard.each", "Guard._header", "Peer.climb", "Peer.opinions",
              "Cohort.told", "Cohort.transfer", "all_finite", "cross_entropy"}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# ------------------------------------------------------------------ examples


@pytest.mark.parametrize("file", [MODEL, METHOD, POISONED])
def test_an_example_in_the_documents_is_the_file(file):
    assert (ROOT / file).read_text() in [text for _, text in blocks("python")]


def test_the_model_example_builds_for_any_image():
    load_plugins([MODEL])
    for shape, classes, width in (((1, 8, 8), 10, 1.0), ((3, 32, 32), 100, 0.5), ((3, 64, 48), 2, 2.0)):
        model = build_model(ModelConfig(name="my_model", width=width), shape=shape, classes=classes,
                            mean=(0.5,) * shape[0], std=(0.25,) * shape[0])
        assert model(torch.rand(2, *shape)).shape == (2, classes)


@pytest.fixture
def with_method(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example's method is registered, and forgotten after the test."""
    monkeypatch.setattr(config_methods, "_METHODS", methods())  # a copy, with those of the package in it
    before = set(sys.modules)
    load_plugins([METHOD])
    yield
    for name in set(sys.modules) - before:
        if name.startswith("mat_dist_plugin_"):
            del sys.modules[name]


@pytest.mark.parametrize("linear", [False, True])
def test_the_method_example_keeps_the_mean_of_each_filter(linear, with_method):
    """A gradient without its mean moves no mean; without decay and momentum nothing else does. Without it, all move."""
    def means(entry: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        config = cohorts.cohort_config("at", 1, optim={"weight_decay": 0.0, "args": {"momentum": 0.0}}, entry=entry)
        mesh = Mesh(Placement.place(1, 1, 0), torch.device("cpu"))
        found = []
        for steps in (0, 3):
            cohort = cohorts.build(config, mesh, cohorts.nets(1))
            for step in range(steps):
                train_step(cohort, Batch(*cohorts.batch(step), step))
            found.append([p.detach().flatten(1).mean(1) for p in cohort.peers[0].model.parameters() if p.ndim > 1])
        return found[0], found[1]

    for before, after in zip(*means({}), strict=True):
        assert (before - after).abs().max() > 1e-4
    *filters, last = zip(*means({"methods": {"centralise": {"linear": linear}}}), strict=True)
    assert all((before - after).abs().max() < 1e-6 for before, after in filters)
    assert ((last[0] - last[1]).abs().max() < 1e-6) == linear


def test_the_data_example_is_a_sound_balanced_data_set():
    load_plugins([DATA])
    data = load_data(DataConfig(name="stripes"), seed=0, batch_size=16)
    assert data.classes == ("horizontal", "vertical") and data.test.shape == (1, 8, 8)
    assert 0.4 < np.mean(data.test.labels.tolist()) < 0.6


@pytest.mark.parametrize(("where", "text"), [pytest.param(*found, id=found[0]) for found in blocks("yaml")])
def test_a_configuration_in_the_documents_is_valid(where, text, tmp_path):
    (tmp_path / "shown.yaml").write_text(text)
    load_config(str(tmp_path / "shown.yaml"))


def test_python_in_the_documents_is_valid_syntax():
    for where, text in blocks("python"):
        ast.parse(text, where)


# ------------------------------------------------------------------ links and names


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """What `#...` may name in a document: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_and_paths_lead_to_files_and_headings():
    dead = []
    for document in [*DOCUMENTS, ROOT / "CHANGELOG.md"]:
        text = prose(document)
        for link, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
            target = document.parent / link if link else document
            if re.match(r"\w+:", link):
                continue
            if not target.exists() or (heading and heading not in anchors(target)):
                dead.append(f"{document.name}: {link}#{heading}")
        paths = re.findall(r"`((?:mat_dist|configs|launch|docs|tests|benchmarks)/[\w./-]*)`", text)
        dead += [f"{document.name}: {path}" for path in paths if not (ROOT / path).exists()]
        folders = "attacks|checkpoints|config|core|data|distributed|evaluation|methods|models|report|runs|tools"
        short = re.findall(rf"`((?:{folders})/\w+\.py)`", text)
        dead += [f"{document.name}: {path}" for path in short if not (ROOT / "mat_dist" / path).exists()]
    assert not dead


def test_every_table_is_whole():
    """A blank line or a missing cell would end a table, and what follows would be shown as text with bars."""
    broken = []
    for document in [*DOCUMENTS, ROOT / "CHANGELOG.md"]:
        for rows in re.findall(r"(?:^\|.*\n)+", prose(document), re.MULTILINE):
            lines = rows.splitlines()
            cells = {len(re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) for line in lines}
            if len(lines) < 3 or len(cells) > 1 or not re.fullmatch(r"\|[-:| ]+\|", lines[1]):
                broken.append(f"{document.name}: {lines[0]}")
    assert not broken


def test_the_readme_fits_on_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def is_setting(key: str) -> bool:
    """Whether a dotted key is a setting or a section, in a form that files and the command line accept."""
    parts = key.split(".")
    if parts[0] == "peers":
        parts = parts[2:]
        if not parts or parts[0] in ("name", "stream") or (parts[0] in SHARED and len(parts) == 1):
            return True
    if parts[0] == "attack" and parts[1:] and parts[1] in ALIASES:
        return True
    name = ".".join(part for part in parts if not part.isdigit())
    return name in settings() or any(known.startswith(f"{name}.") for known in settings())


def test_the_documents_name_only_settings_that_exist():
    """But a method that an example brings."""
    sections = "|".join(Config.model_fields)
    unknown = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for token in re.findall(r"`([^`\n]+)`", text):
            for key in re.findall(rf"(?<![\w./])(?:{sections})(?:\.\w+)+", token):
                meant = (key.endswith((".py", ".yaml", ".json", ".md", ".safetensors", ".pt2", ".onnx"))
                         or f"there is no setting {key} " in text or key.startswith("methods.centralise"))
                if not is_setting(key) and not meant:
                    unknown.append(f"{document.name}: {key}")
    assert not unknown


def test_the_changelog_names_every_setting_that_went_or_moved():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert not [key for key in (*MOVED, *WENT) if f"`{key}" not in text]


# ------------------------------------------------------------------ the loss


def test_every_coefficient_and_every_preset_is_explained():
    presets = {re.findall(r"`(\w+)`", row[0])[0] for row in table("docs/loss.md", "## Presets")}
    assert presets == {name for method in methods().values() for name in method.presets}
    explained = {re.findall(r"`loss\.(\w+)`", row[0])[0] for row in table("docs/loss.md", "## The loss of peer k")}
    assert explained == set(LossConfig.model_fields)


def test_the_weights_of_the_presets_are_those_in_the_table():
    """0.5 CE(z_k(x_k), y) + 0.5 mean_i KL(...): the numbers in the table against the coefficients."""
    peers = 4
    for row in table("docs/loss.md", "## Presets"):
        preset, formula = row[0].strip("`"), row[1]
        loss = fill_loss(LossConfig(preset=preset), 0, peers)
        assert (loss.kd_weight > 0) == ("mean_i" in formula or "distillation" in formula), preset
        hard = re.match(r"([\d.]*) ?(?:\(1/P\) sum_j )?CE\(z_k\(x_[kj]\), y\)", formula)
        if hard:
            assert loss.hard_weight == float(hard[1] or 1), preset
            assert loss.hard_own == (1 if "CE(z_k(x_k)" in formula else 1 / peers), preset
        if preset in ("mat_kd", "dml_at", "mat"):
            assert loss.kd_weight == float(re.search(r"\+ ([\d.]+) (?:\(1/P\) sum_j )?mean_i", formula)[1])
            assert loss.kd_own == (1 / peers if "(1/P) sum_j" in formula else 1), preset
            assert loss.teacher_input == ("own_ae" if "z_i(x_i)" in formula else "same_ae"), preset
    trades, cat = fill_loss(LossConfig(preset="trades"), 0, 2), fill_loss(LossConfig(preset="cat"), 0, 2)
    assert (trades.clean_weight, trades.pair_kl, trades.hard_weight) == (1, 6, 0)
    # a twentieth of TRADES' own loss, beside 19 twentieths of distillation on own AEs
    assert (cat.clean_weight, cat.pair_kl, cat.kd_weight, cat.kd_own) == (1 / 20, 6 * (1 / 20), 19 / 20, 1)


# ------------------------------------------------------------------ the architecture


def the_calls() -> list[tuple[str, str]]:
    """File and function of each call that the table lists."""
    return [(row[1].strip("`"), row[2].strip("`")) for row in table(ARCHITECTURE, CALLS)]


def test_every_call_of_the_list_exists():
    for file, name in the_calls():
        body: Any = ast.parse((ROOT / "mat_dist" / file).read_text()).body
        for part in name.split("."):
            (found,) = [node for node in body if getattr(node, "name", "") == part]
            body = found.body


class Follower:
    """Notes which functions of the package are handed peer 2's AE, or what is made of it, and which are called."""

    def __init__(self) -> None:
        self.called: list[tuple[str, str]] = []
        self.handed: set[tuple[str, str]] = set()
        self._marked: dict[int, Any] = {}

    def _mark(self, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor):
            self._marked.update({one.data_ptr(): tensor for one in (tensor, *tensor)} if tensor.ndim > 1 else
                                {tensor.data_ptr(): tensor})

    def _holds(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.numel() > 1 and value.data_ptr() in self._marked
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return any(map(self._holds, inside))

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        code, me = frame.f_code, frame.f_locals.get("self")
        if not code.co_filename.startswith(str(ROOT / "mat_dist")) or "<" in code.co_qualname:
            return
        here = (str(Path(code.co_filename).relative_to(ROOT / "mat_dist")), code.co_qualname)
        if event == "return" and code.co_qualname == "Peer.attack" and me.index == 2:
            self._mark(result[View(2)])
        if not self._marked or (code.co_qualname.startswith("Peer.") and me.index != 0):
            return
        held = any(map(self._holds, frame.f_locals.values()))
        if event == "call":
            self.called.append(here)
            self.handed |= {here} if held else set()
        elif held and event == "return":
            self._mark(result)


def test_the_calls_of_the_list_are_those_that_carry_an_ae_to_a_loss():
    cohort = cohorts.build(cohorts.cohort_config("mat", 3), Mesh(Placement.place(3, 1, 0), torch.device("cpu")),
                           cohorts.nets(3))
    follower = Follower()
    sys.setprofile(follower)
    try:
        train_step(cohort, Batch(*cohorts.batch(0), 0))
    finally:
        sys.setprofile(None)
    listed = the_calls()
    assert not {(file, name) for file, name in follower.handed if name not in BYSTANDERS} - set(listed)
    rest = iter(follower.called)
    assert all(call in rest for call in listed), "some call of the list is not made, or not in this order"
    said = re.search(r"(\d+) calls in (\d+) files", (ROOT / ARCHITECTURE).read_text())
    assert said and (int(said[1]), int(said[2])) == (len(listed), len({file for file, _ in listed}))


def test_every_verb_of_a_hook_is_listed_and_every_method_with_those_that_it_has():
    verbs = {name for name, value in vars(Hook).items() if callable(value) and not name.startswith("_")}
    text = (ROOT / ARCHITECTURE).read_text(encoding="utf-8").split("\n## Hooks\n")[1].split("\n## ")[0]
    first, second = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", first)) == verbs
    kinds = {**unions.HOOKS, **{name: one.hook for name, one in methods().items() if isinstance(one.hook, type)}}
    rows = [re.findall(r"`(\w+)`", row) for row in second.splitlines()[2:]]
    assert {name for name, *_ in rows} == set(kinds)
    for name, *used in rows:
        kind = kinds[name]
        assert set(used) == {verb for verb in verbs if getattr(kind, verb) is not getattr(Hook, verb)}, name


def test_the_exit_codes_are_those_of_the_code():
    rows = {int(row[0]): row[3] for row in table(ARCHITECTURE, "## Exit codes")}
    assert set(rows) == {errors.DONE, errors.BUG, *(kind.code for kind in errors.MatError.__subclasses__())}
    again = re.search(r"^\s+([\d|]+)\)", (ROOT / "launch" / "slurm_job.sh").read_text(), re.MULTILINE)[1]
    assert {code for code, requeues in rows.items() if requeues} == set(map(int, again.split("|")))
    told = {row[0].strip("`"): int(row[1]) for row in table("docs/api.md", "## Errors")}
    assert told == {kind.__name__: kind.code for kind in errors.MatError.__subclasses__()}


def test_what_a_resume_may_change_is_listed():
    text = (ROOT / ARCHITECTURE).read_text(encoding="utf-8")
    listed = re.search(r"Free to change on resume: (.*?);", text, re.DOTALL)[1]
    assert {key.rstrip("*") for key in re.findall(r"`([^`]+)`", listed)} == set(load._MAY_CHANGE)


def test_every_configuration_is_listed():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    linked = re.findall(r"\(\.\./configs/(\w+)\.yaml\)", text)
    assert sorted(linked) == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_the_placement_table_is_the_arithmetic():
    rows = table(ARCHITECTURE, "## Placement")
    for _, ranks, per_rank, replicas in rows:
        place = Placement.place(4, int(ranks), 0)
        assert (place.peers_per_rank, place.replicas) == (int(per_rank), int(replicas.split(",")[0]))
    assert len(rows) == 4


def test_the_folders_of_the_list_are_the_rows_of_the_import_test():
    from tests.test_architecture import ROWS
    for row, (_, folders, _) in zip(ROWS, table(ARCHITECTURE, "## The folders"), strict=False):
        assert set(re.findall(r"`(\w+)/?`", folders)) == set(row) - {"__init__"}


@pytest.mark.parametrize("file", [METHOD, NORM])
def test_contributing_shows_the_way_to_the_examples(file):
    assert f"({file})" in (ROOT / "CONTRIBUTING.md").read_text()
