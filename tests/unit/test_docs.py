"""README.md and docs/ against the code: links, names of settings and files, examples, tables of numbers."""

from __future__ import annotations

import ast
import re

import numpy as np
import pytest
import torch

from mat_dist import errors
from mat_dist.config import load_config, load_plugins, resume
from mat_dist.config.help import settings
from mat_dist.config.presets import fill_loss
from mat_dist.config.schema import Config, DataConfig, LossConfig, ModelConfig
from mat_dist.config.tree import ALIASES, SHARED
from mat_dist.data import load_data
from mat_dist.distributed.placement import Placement
from mat_dist.models import build_model
from tests.documents import DATA, DOCUMENTS, MODEL, POISONED, ROOT, blocks, table


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# ------------------------------------------------------------------ examples


def test_the_model_example_is_the_file_and_builds_for_any_image():
    assert (ROOT / MODEL).read_text() in [text for _, text in blocks("python")]
    load_plugins([MODEL])
    for shape, classes, width in (((1, 8, 8), 10, 1.0), ((3, 32, 32), 100, 0.5), ((3, 64, 48), 2, 2.0)):
        model = build_model(ModelConfig(name="my_model", width=width), shape=shape, classes=classes,
                            mean=(0.5,) * shape[0], std=(0.25,) * shape[0])
        assert model(torch.rand(2, *shape)).shape == (2, classes)


def test_the_example_of_poisoned_data_is_the_file():
    assert (ROOT / POISONED).read_text() in [text for _, text in blocks("python")]


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


def test_relative_links_and_paths_lead_to_files():
    dead = []
    for document in DOCUMENTS:
        text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not re.match(r"\w+:", link)]
        dead += [f"{document.name}: {link}" for link in links if not (document.parent / link).exists()]
        paths = re.findall(r"`((?:mat_dist|configs|launch|docs|tests)/[\w./-]*)`", text)
        dead += [f"{document.name}: {path}" for path in paths if not (ROOT / path).exists()]
    assert not dead


def is_setting(key: str) -> bool:
    """Whether a dotted key is a setting or a section, in a form that files and the command line accept."""
    parts = key.split(".")
    if parts[0] == "peers":
        parts = parts[2:]
        if not parts or parts[0] in ("name", "stream", "init_stream") or (parts[0] in SHARED and len(parts) == 1):
            return True
    if parts[0] == "attack" and parts[1:] and parts[1] in ALIASES:
        return True
    name = ".".join(part for part in parts if not part.isdigit())
    return name in settings() or any(known.startswith(f"{name}.") for known in settings())


def test_the_documents_name_only_settings_that_exist():
    sections = "|".join(Config.model_fields)
    unknown = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for token in re.findall(r"`([^`\n]+)`", text):
            for key in re.findall(rf"(?<![\w./])(?:{sections})(?:\.\w+)+", token):
                meant = key.endswith((".py", ".yaml", ".json", ".md")) or f"there is no setting {key} " in text
                if not is_setting(key) and not meant:
                    unknown.append(f"{document.name}: {key}")
    assert not unknown


def test_every_coefficient_and_every_preset_is_explained():
    presets = {re.findall(r"`(\w+)`", row[0])[0] for row in table("docs/method.md", "## Presets")}
    assert presets == set(LossConfig.model_fields["preset"].annotation.__args__)
    explained = {re.findall(r"`loss\.(\w+)`", row[0])[0] for row in table("docs/method.md", "## The loss of peer k")}
    assert explained == set(LossConfig.model_fields)


def test_the_weights_of_the_presets_are_those_in_the_table():
    """0.5 CE(z_k(x_k), y) + 0.5 mean_i KL(...): the numbers in the table against the coefficients."""
    peers = 4
    for row in table("docs/method.md", "## Presets"):
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
    assert (trades.clean_weight, trades.trades_beta, trades.hard_weight) == (1, 6, 0)
    assert (cat.base_scale, cat.kd_weight, cat.kd_own) == (1 / 20, 19 / 20, 1)


def test_the_exit_codes_are_those_of_the_code():
    rows = {int(row[0]): row[3] for row in table("docs/architecture.md", "## Exit codes")}
    assert set(rows) == {errors.DONE, errors.BUG, *(kind.code for kind in errors.MatError.__subclasses__())}
    again = re.search(r"^\s+([\d|]+)\)", (ROOT / "launch" / "slurm_job.sh").read_text(), re.MULTILINE)[1]
    assert {code for code, requeues in rows.items() if requeues} == set(map(int, again.split("|")))


def test_what_a_resume_may_change_is_listed():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.search(r"Free to change on resume: (.*?);", text, re.DOTALL)[1]
    assert {key.rstrip("*") for key in re.findall(r"`([^`]+)`", listed)} == set(resume._MAY_CHANGE)


def test_every_configuration_is_listed():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    linked = re.findall(r"\(\.\./configs/(\w+)\.yaml\)", text)
    assert sorted(linked) == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_the_placement_table_is_the_arithmetic():
    rows = [row for row in table("README.md", "## Three ways to start") if row[1].isdigit()]
    for _, ranks, per_rank, replicas in rows:
        place = Placement.place(4, int(ranks), 0)
        assert (place.peers_per_rank, place.replicas) == (int(per_rank), int(replicas.split(",")[0]))
    assert len(rows) == 4
