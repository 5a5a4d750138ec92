"""`mat_dist.evaluate` against the command on the same weights; what cannot be used is one error of ours."""

from __future__ import annotations

import csv
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mat_dist
from mat_dist.api.evaluation import asked
from mat_dist.data import as_float, load_data
from mat_dist.errors import ConfigError, DataError, EnvironmentFault, NotReportable, OutputError
from mat_dist.evaluation.results import HEADLINE, read_result, read_results
from mat_dist.evaluation.survivors import image_rows
from tests.small_runs import run_small
from tests.unit.test_api_attack import BAD_IMAGES, BAD_LABELS, BAD_MODELS, Wrap, batch, mixed, network, state

QUICK: dict[str, Any] = {"attacks": "pgd", "steps": 1, "checks": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> mat_dist.Run:
    return mat_dist.Run(run_small(tmp_path_factory.mktemp("runs"), "a").folder.path)


@pytest.fixture(scope="module")
def images(run) -> tuple[Tensor, Tensor]:
    test = load_data(run.config.data, seed=0, batch_size=16).test
    return as_float(test.images, torch.float32), test.labels


def test_a_module_has_the_numbers_of_the_command_bit_by_bit(run, images):
    """Accuracies, intervals, every prediction, and every check but those of its training."""
    words = ["attacks=pgd,cw,apgd,uniform", "steps=2", "restarts=2", "threats=linf:0.1,l2:0.3", "seed=5", "checks=1",
             "targets=peer1", "images=9", "eval.chunk=5"]
    assert mat_dist.evaluate.main([str(run.path), *words]) == 0
    (command,) = read_results(run.path / "eval", "evaluate*")
    (theirs,) = command.targets
    found = mat_dist.evaluate(mat_dist.load(run, 1), *images, threats=["linf:0.1", mat_dist.Threat("l2", 0.3)], size=9,
                              attacks=["pgd", "cw", "apgd", "uniform"], steps=2, restarts=2, seed=5, checks=1,
                              eval={"chunk": 5}, name="peer1")
    assert (found.accuracy, found.result.targets[0].attacks) == (theirs.accuracy, theirs.attacks)
    ours = json.loads(found.to_json())["targets"][0]
    assert ours["interval_95"] == command.document["targets"][0]["interval_95"]
    told = [[(check.check, check.threat, check.passed, check.found) for check in one.checks
             if check.check not in HEADLINE] for one in (found.result.targets[0], theirs)]
    assert told[0] == told[1] and len(told[0]) > 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
        assert [*found.to_pandas(images=True)] == list(csv.DictReader(command.file.with_suffix(".csv").open()))


def test_half_precision_around_a_call_does_not_reach_it(run, images):
    model, (x, y) = mat_dist.load(run, 1), images
    given = {"attacks": "pgd", "steps": 3, "threats": "linf:0.1", "checks": 0}
    plain = mat_dist.evaluate(model, x, y, **given), mat_dist.attack(model, x, y, "linf:0.1", steps=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        inside = mat_dist.evaluate(model, x, y, **given), mat_dist.attack(model, x, y, "linf:0.1", steps=3)
    assert inside[0].chunks == plain[0].chunks and torch.equal(inside[1], plain[1])


def test_parts_of_autoattack_may_be_a_list():
    request, *_ = asked("linf:0.1", "autoattack", torch.float32, {"version": "custom", "custom": ["apgd-ce", "fab-t"]})
    assert request.custom == ("apgd-ce", "fab-t")


def test_tensors_batches_and_a_name_are_the_same_images(run, images):
    model, x, y = mat_dist.load(run, 0), *images
    given = mat_dist.evaluate(model, x, y, **QUICK)
    batches = DataLoader(TensorDataset(x, y), batch_size=7)
    for other in (batches, [(x[:30], y[:30].tolist()), (x[30:], y[30:])], "digits"):
        more = {"data": {"test_size": 40}} if other == "digits" else {}
        found = mat_dist.evaluate(model, other, **QUICK, **more)
        assert found.accuracy == given.accuracy
        assert image_rows({"raw": found.chunks}) == image_rows({"raw": given.chunks})
        assert found.result.document["images_digest"] == given.result.document["images_digest"]
    assert mat_dist.evaluate(model, x, y, size=9, **QUICK).result.targets[0].n == 9


def test_the_model_and_the_process_are_left_as_they_were():
    model, threads = mixed(), torch.get_num_threads()
    torch.set_num_threads(2)
    before = state(model)
    mat_dist.evaluate(model, *batch(), attacks="pgd,search", steps=1, queries=3, checks=6)
    assert state(model) == before and torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_results_print_their_tables_and_are_a_result_file(run, images, tmp_path):
    found = mat_dist.evaluate(mat_dist.load(run, 0), *images, threats="linf:0.1,l2:0.2", name="mine", **QUICK)
    text = str(found)
    assert all(word in text for word in ("mine", "linf 1/10", "l2 1/5", "union", "pgd", "not checked"))
    assert found.to_json(tmp_path / "found.json") == (tmp_path / "found.json").read_text()
    again = read_result(tmp_path / "found.json")
    assert again.targets == found.result.targets and found.failed
    for place in (tmp_path / "found.json", tmp_path, tmp_path / "none" / "a.json"):
        before = (tmp_path / "found.json").read_bytes()
        with pytest.raises(OutputError, match="give the path of a new file"):
            found.to_json(place)
        assert (tmp_path / "found.json").read_bytes() == before


def test_the_rows_of_a_data_frame_are_the_accuracies(run, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    found = mat_dist.evaluate(mat_dist.load(run, 0), *images, threats="linf:0.1", **QUICK)
    rows = {(row["threat"], row["attack"]): row["accuracy"] for row in found.to_pandas()}
    accuracy = found.accuracy
    assert rows == {("clean", "none"): accuracy["clean"], ("linf 1/10", "worst"): accuracy["linf 1/10"],
                    ("union", "worst"): accuracy["union"], ("linf 1/10", "pgd"): accuracy["linf 1/10"]}
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(EnvironmentFault, match="pandas"):
        found.to_pandas()


def test_a_model_that_masks_its_gradients_is_not_reportable():
    model = Wrap(lambda logits: logits * 1e4)  # saturated: the gradient of the cross-entropy vanishes
    x, _ = batch(32)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    found = mat_dist.evaluate(model, x, y, attacks="pgd", steps=2, checks=32)
    assert "zero gradients" in found.failed
    with pytest.raises(NotReportable, match="no gradient"):
        mat_dist.evaluate(Wrap(lambda logits: logits.detach()), x, y, **QUICK)


@pytest.mark.parametrize(("change", "text"), BAD_IMAGES)
def test_images_that_cannot_be_used_are_one_error(change, text):
    x, y = batch()
    text = "no batches|images" if text in ("ndarray", "NoneType") else text
    with pytest.raises(DataError, match=text):
        mat_dist.evaluate(network(), change(x), y, **QUICK)


@pytest.mark.parametrize(("change", "text"), BAD_LABELS)
def test_labels_that_cannot_be_used_are_one_error(change, text):
    x, y = batch()
    with pytest.raises(DataError, match=text):
        mat_dist.evaluate(network(), x, change(y), **QUICK)


def test_a_model_in_double_precision_is_evaluated_in_it():
    found = mat_dist.evaluate(network().double(), *batch(), **QUICK)
    assert found.result.config["step"]["precision"] == "fp64"
    with pytest.raises(ConfigError, match="pyautoattack computes in fp32"):
        mat_dist.evaluate(network().double(), *batch(), **{**QUICK, "attacks": "apgd-ce"})


@pytest.mark.parametrize(("make", "error", "text"), BAD_MODELS)
def test_a_model_that_cannot_be_used_is_one_error(make, error, text):
    with pytest.raises(error, match=text):
        mat_dist.evaluate(make(), *batch(), **QUICK)


@pytest.mark.parametrize(("given", "settings", "error", "text"), [
    ((None,), {}, DataError, "no batches"), ((3,), {}, DataError, "no batches"), (([],), {}, DataError, "no batches"),
    (([torch.rand(2, 1, 8, 8)],), {}, DataError, "batches|images"),
    ((torch.rand(2, 1, 8, 8),), {}, DataError, "no labels"),
    (("digits", torch.zeros(3)), {}, DataError, "labels beside"), (("digist",), {}, ConfigError, "did you mean digits"),
    (("cifar10",), {"data": {"root": "/none"}}, DataError, "none"), (batch(), {"size": 99}, DataError, "at most 6"),
    (batch(), {"attacks": "pdg"}, ConfigError, "did you mean pgd"), (batch(), {"attacks": []}, ConfigError, "attacks"),
    (batch(), {"targets": "peers"}, ConfigError, "no effect"),
    (batch(), {"sources": "none"}, ConfigError, "no effect"),
    (batch(), {"chekcs": 3}, ConfigError, "did you mean checks"), (batch(), {"save": True}, ConfigError, "no effect"),
    ((nn.Linear(2, 2),), {}, DataError, "no batches"),
])
def test_what_else_cannot_be_used_is_one_error(given, settings, error, text):
    with pytest.raises(error, match=text):
        mat_dist.evaluate(network(), *given, **{**QUICK, **settings})
