"""TensorBoard, W&B, MLflow, trackio: numbers, pictures, resumes, and libraries that are missing or fail."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mat_dist
from mat_dist import checkpoints, train
from mat_dist.attacks.norms import Threat
from mat_dist.checkpoints.load import FinishedRun
from mat_dist.config import load_config
from mat_dist.config.schema import LogConfig
from mat_dist.data import as_float, load_data
from mat_dist.errors import OutputError
from mat_dist.evaluation.attacks import AttackPlan, Job
from mat_dist.evaluation.during_training import Evaluations, gallery
from mat_dist.evaluation.results import TargetResult
from mat_dist.runs import metrics
from mat_dist.runs.metrics import Picture, RunReporter, series
from mat_dist.runs.trackers import SERVICES, require_trackers
from mat_dist.tools.check.__main__ import main as check
from mat_dist.training import trainer
from tests.small_runs import SMALL, interrupted, run_small

PEERS = ("a", "b")


# ------------------------------------------------------------------------------------------------ names and pictures


def test_every_number_of_a_record_has_a_name_and_nothing_else() -> None:
    record = {"attempt": 2, "step": 7, "epoch": 0.5, "loss": [1.5, float("inf")], "transfer": [[1, 2, 3], [4, 5, 6]],
              "images_per_s": 9.0, "wait_share": [0.1, 0.2, 0.3], "phases_s": [{"attack": 1.0}, {"attack": 2.0}],
              "ensemble": {"clean_acc": 0.5}, "ema_clean_acc": None, "robust_acc": [0.4, None], "note": "text",
              "flag": True}
    assert series(record, PEERS) == {
        "epoch": 0.5, "loss/a": 1.5, "loss/b": float("inf"), "transfer/a/a": 1, "transfer/a/b": 2,
        "transfer/a/clean": 3, "transfer/b/a": 4, "transfer/b/b": 5, "transfer/b/clean": 6, "images_per_s": 9.0,
        "wait_share/rank0": 0.1, "wait_share/rank1": 0.2, "wait_share/rank2": 0.3, "phases_s/rank0/attack": 1.0,
        "phases_s/rank1/attack": 2.0,
        "ensemble/clean_acc": 0.5, "robust_acc/a": 0.4}


def picture(channels: int = 1, size: int = 8) -> Picture:
    one = torch.zeros(channels, size, size)
    return Picture(one, one + 0.5, one + 1, "class 3")


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_picture_is_three_images_in_a_row_of_a_size_to_see(channels: int) -> None:
    image = picture(channels).side_by_side()
    assert image.dtype == torch.uint8 and image.shape == (3, 96, 288)
    assert [image[0, 5, x].item() for x in (0, 95, 96, 191, 192, 287)] == [0, 0, 128, 128, 255, 255]
    assert picture(3, 224).side_by_side().shape == (3, 224, 672)


# ------------------------------------------------------------------------------------------------ the reporter


class Heard:
    """A tracker that remembers; fails at the calls asked for."""

    name = "heard"

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, list[tuple[Any, ...]]()

    def _call(self, verb: str, *args: Any) -> None:
        if verb == self.fails:
            raise ConnectionError("the network\nis gone")
        self.calls.append((verb, *args))

    def start(self, first_step: int) -> None:
        self._call("start", first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._call("scalars", step, dict(values))

    def pictures(self, step: int, group: str, pictures: Sequence[Picture]) -> None:
        self._call("pictures", step, group, len(pictures))

    def close(self) -> None:
        self._call("close")


def test_trackers_hear_what_the_files_get_and_no_point_twice(tmp_path: Path) -> None:
    heard = Heard()
    out = RunReporter(tmp_path, [heard], console="off")
    out.start(10, PEERS, first_step=4)
    out.log({"step": 5, "epoch": 0.5, "lr": [0.1, 0.2], "loss": [1.0, 2.0]})
    out.epoch({"step": 5, "epoch": 0.5, "lr": [0.1, 0.2], "robust_acc": [0.3, 0.4]})
    out.epoch({"step": 6, "epoch": 0.6, "lr": 0.1})
    out.pictures(6, "gallery", [picture()])
    out.close()
    assert heard.calls == [
        ("start", 4), ("scalars", 5, {"epoch": 0.5, "lr/a": 0.1, "lr/b": 0.2, "loss/a": 1.0, "loss/b": 2.0}),
        ("scalars", 5, {"robust_acc/a": 0.3, "robust_acc/b": 0.4}), ("scalars", 6, {"epoch": 0.6, "lr": 0.1}),
        ("pictures", 6, "gallery", 1), ("close",)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("verb", ["scalars", "pictures", "close"])
def test_a_tracker_that_fails_is_left_out_with_a_note_and_the_others_go_on(verb: str, tmp_path: Path) -> None:
    bad, good, notes = Heard(verb), Heard(), list[str]()
    out = RunReporter(tmp_path, [bad, good], console="off")
    out.note = notes.append  # type: ignore[method-assign]
    out.start(10, PEERS)
    for step in (1, 2):
        out.log({"step": step, "loss": [1.0, 2.0]})
    out.pictures(2, "gallery", [])
    out.close()
    assert [call[0] for call in good.calls] == ["start", "scalars", "scalars", "pictures", "close"]
    assert notes == ["warning: heard gets no more numbers of this attempt: ConnectionError: the network is gone"]


def test_a_full_disk_does_not_keep_numbers_from_the_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    out = RunReporter(tmp_path, [heard], console="off")
    out.start(10, PEERS)

    def full(*_: Any) -> None:
        raise OutputError("no space", "here", "free some")

    monkeypatch.setattr(metrics, "append_text", full)
    with pytest.raises(OutputError):
        out.log({"step": 1, "loss": [1.0, 2.0]})
    assert heard.calls[-1] == ("scalars", 1, {"loss/a": 1.0, "loss/b": 2.0})


# ------------------------------------------------------------------------------------------------ missing libraries


@pytest.mark.parametrize(("setting", "package", "command"), [
    ("log.trackers=tensorboard", "tensorboard", "pip install 'mat_dist[logging]'"),
    ("log.trackers=wandb:project", "wandb", "pip install wandb"),
    ("log.trackers=mlflow:experiment", "mlflow", "pip install mlflow"),
    ("log.trackers=tensorboard,trackio:project", "trackio", "pip install trackio")])
def test_a_missing_library_ends_with_6_before_anything_is_made(setting: str, package: str, command: str,
                                                               tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    if "tensorboard," in setting:
        pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, package, None)
    for more in ((), ("--dry-run",)):
        assert trainer_code(tmp_path, setting, *more) == 6
        err = capsys.readouterr().err
        assert command in err and setting.partition("=")[0] in err and err.count("\n") == 1
    assert not any(tmp_path.iterdir())
    require_trackers(LogConfig())  # nothing is asked for, nothing is needed


@pytest.mark.slow  # a whole preflight
def test_the_preflight_looks_for_the_libraries_too(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert check([*SMALL, f"run.root={tmp_path}", "log.trackers=wandb:project"]) == 6
    shown = capsys.readouterr()
    assert "trackers" in shown.out and "pip install wandb" in shown.out + shown.err


def trainer_code(root: Path, *words: str) -> int:
    return train.main([*SMALL, f"run.root={root}", "run.name=run", *words])


# ------------------------------------------------------------------------------------------------ TensorBoard


def accumulated(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0}).Reload()


RUN = ("train.epochs=2", "eval.every=1", "eval.test_steps=1", "log.every=2", "log.trackers=tensorboard")


def points(found: Any) -> dict[str, list[tuple[int, float]]]:
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def told(records: list[dict[str, Any]], names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """The newest record of each step, as series, without the repetitions of an epoch's record."""
    newest = {(one["step"], one["kind"]): one for one in records}
    found: dict[str, dict[int, float]] = {}
    for (step, _), one in sorted(newest.items(), key=lambda item: (item[0][0], item[0][1] == "epoch")):
        for tag, value in series({k: v for k, v in one.items() if k != "kind"}, names).items():
            found.setdefault(tag, {}).setdefault(step, value)
    return {tag: sorted(values.items()) for tag, values in found.items()}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow  # loads tensorboard
def test_event_files_hold_the_numbers_of_metrics_and_the_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert run_small(tmp_path, "run", *RUN).code == 0
    found = accumulated(tmp_path / "run" / "tensorboard")
    expected = told(records(tmp_path / "run"), ("peer0", "peer1"))
    assert {"loss/peer0", "robust_acc/peer1", "transfer/peer0/peer1", "images_per_s"} <= set(expected)
    assert points(found).keys() == expected.keys()
    for tag, values in points(found).items():
        assert [step for step, _ in values] == [step for step, _ in expected[tag]], tag
        assert [v for _, v in values] == pytest.approx([v for _, v in expected[tag]], rel=1e-6), tag  # float32 there
    images = found.Tags()["images"]
    assert {tag.rpartition("/")[0] for tag in images} == {"gallery_validation", "gallery_test_best",
                                                          "gallery_test_last"}
    assert [one.step for one in found.Images("gallery_validation/5")] == [4, 8]
    one = found.Images("gallery_test_last/0")[0]
    assert (one.step, one.width, one.height) == (8, 288, 96)


@pytest.mark.slow
def test_a_resumed_run_has_each_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    with monkeypatch.context() as patch:
        interrupted(patch, (trainer, "train_step"), 8, lambda: OutputError("the disk is on fire", "disk", "put it out"))
        assert run_small(tmp_path, "run", *RUN, "log.every=1").code == 5
    assert [one["step"] for one in records(tmp_path / "run") if one["kind"] == "step"] == [1, 2, 3, 4, 5, 6, 7]
    assert run_small(tmp_path, "run", *RUN, "log.every=1").code == 0  # from step 4
    found = points(accumulated(tmp_path / "run" / "tensorboard"))
    assert [step for step, _ in found["loss/peer0"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [step for step, _ in found["robust_acc/peer0"]] == [4, 8]


@pytest.mark.slow
def test_trackers_do_not_change_a_bit_of_the_weights(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with_it, without = run_small(tmp_path, "a", *RUN), run_small(tmp_path, "b", *RUN, "log.trackers=null")
    assert with_it.hashes() == without.hashes() and not (tmp_path / "b" / "tensorboard").exists()


# ------------------------------------------------------------------------------------------------ the gallery


@pytest.mark.slow
def test_the_gallery_shows_what_fools_the_most_robust_peer_first(tmp_path: Path) -> None:
    run = run_small(tmp_path, "run", "data.train_size=300", "train.epochs=3", "optim.lr=0.05", "threat.eps=0.2",
                    "peers.1.optim.ema_decay=0.5")
    manifest = checkpoints.load_manifest(run.folder)
    config = load_config(str(run.folder.config))
    data = load_data(config.data, seed=0, batch_size=16)
    targets = [TargetResult(name, weights, 40, {"union": robust}) for name, weights, robust in (
        ("peer0", "raw", 1.0), ("peer0", "ema", 0.0), ("peer1", "ema", 0.5), ("ensemble", "ema", 1.0))]
    job = Job((Threat("linf", 0.2),), {"pgd": AttackPlan(3)}, ("pgd",), seed=config.run.seed)
    opened = FinishedRun(run.folder, config, manifest, "ema")
    found = gallery(opened, data.test, job, targets, torch.device("cpu"))
    model = mat_dist.load(run.folder.path, "peer1", which="latest", weights="ema")
    clean = torch.stack([one.clean for one in found])
    adversarial = torch.stack([one.adversarial for one in found])
    before, after = model(clean).argmax(1).tolist(), model(adversarial).argmax(1).tolist()
    shown = [(as_float(data.test.images) == one).flatten(1).all(1).nonzero()[0, 0].item() for one in clean]
    labels = data.test.labels[torch.tensor(shown)].tolist()
    assert [one.caption for one in found] == [f"class {y}, peer1 says {b}, under attack {a}"
                                              for y, b, a in zip(labels, before, after, strict=True)]
    fooled = [b == y != a for y, b, a in zip(labels, before, after, strict=True)]
    assert fooled[:3] == [True] * 3 and shown[:3] == sorted(shown[:3]) and shown[3:] == sorted(shown[3:])
    assert len(set(shown)) == 6 and (adversarial - clean).abs().max() <= 0.2 * (1 + 1e-6)
    for one in found:
        change = one.adversarial - one.clean
        torch.testing.assert_close(one.perturbation, 0.5 + change / (2 * change.abs().max()))


def test_pictures_that_cannot_be_made_are_a_note(tmp_path: Path) -> None:
    notes: list[str] = []
    reporter = RunReporter(tmp_path, [Heard()], console="off")
    reporter.note = notes.append  # type: ignore[method-assign]
    nothing: Any = types.SimpleNamespace(step=3, log=logging.getLogger("nowhere"))
    Evaluations(nothing, nothing, nothing, nothing, nothing, reporter).show_gallery("test", nothing, nothing,
                                                                                   nothing, [])
    assert len(notes) == 1 and notes[0].startswith("warning: no pictures of step 3: ")


# ------------------------------------------------------------------------------------------------ W&B


class FakeWandb(types.ModuleType):
    """Takes steps as the real one: forward only."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("wandb")
        self.error, self.inits, self.logged, self.finished = error, list[dict[str, Any]](), list[Any](), 0

    def init(self, **words: Any) -> FakeWandb:
        if self.error is not None:
            raise self.error
        self.inits.append(words)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if not self.logged or step >= self.logged[-1][0]:
            self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    @staticmethod
    def Settings(**words: Any) -> dict[str, Any]:
        return words

    @staticmethod
    def Image(data: Any, caption: str) -> tuple[tuple[int, ...], str]:
        return data.shape, caption


WANDB = (*RUN[:-1], "log.trackers=wandb:robustness", "log.every=1")


def test_wandb_gets_the_same_numbers_and_pictures_and_is_continued(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with monkeypatch.context() as patch:
        interrupted(patch, (trainer, "train_step"), 8, lambda: OutputError("the disk is on fire", "disk", "put it out"))
        assert run_small(tmp_path, "run", *WANDB).code == 5
    assert run_small(tmp_path, "run", *WANDB).code == 0 and fake.finished == 2
    first, second = fake.inits
    assert first == second and first["id"] == (tmp_path / "run" / "wandb" / "mat_dist_id").read_text().strip()
    assert (first["project"], first["name"], first["resume"]) == ("robustness", "run", "allow")
    assert first["settings"] == {"console": "off"}
    assert first["config"]["data"]["train_size"] == 64 and Path(first["dir"]) == tmp_path / "run"
    seen: dict[str, dict[int, Any]] = {}
    for step, values in fake.logged:
        for tag, value in values.items():
            seen.setdefault(tag, {})[step] = value
    expected = told(records(tmp_path / "run"), ("peer0", "peer1"))
    numbers = {tag: sorted(v.items()) for tag, v in seen.items() if not tag.startswith("gallery")}
    assert numbers.keys() == expected.keys() and numbers["robust_acc/peer0"] == expected["robust_acc/peer0"]
    assert [step for step, _ in numbers["loss/peer0"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {value[0] for value in seen["gallery_validation/0"].values()} == {(96, 288, 3)}
    assert all("peer" in value[1] for value in seen["gallery_test_best/0"].values())


# ------------------------------------------------------------------------------------------------ MLflow and trackio


class FakeTrackio(types.ModuleType):
    """Takes any step, any number of times, and finds a run again by its name; speaks on the screen."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("trackio")
        self.error, self.inits, self.rows, self.closed = error, list[dict[str, Any]](), list[Any](), 0
        self.Image = FakeWandb.Image

    def init(self, **words: Any) -> FakeTrackio:
        print("* trackio speaks")
        if self.error is not None:
            raise self.error
        self.inits.append(words)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows += [(tag, step, value) for tag, value in values.items()]

    def finish(self) -> None:
        self.closed += 1


class FakeMlflow(types.ModuleType):
    """A server of one experiment: parameters are set once, the points of a metric are kept as they come."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("mlflow")
        self.error, self.closed, self.rows = error, 0, list[Any]()
        self.experiments, self.runs, self.params = dict[str, str](), list[str](), dict[str, str]()
        self.MlflowClient, self.entities = lambda: self, self

    Metric = staticmethod(lambda key, value, timestamp, step: (key, step, value))
    Param = staticmethod(lambda key, value: (key, value))

    def get_experiment_by_name(self, name: str) -> Any:
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, "7")

    def create_run(self, experiment: str, run_name: str) -> Any:
        assert experiment == "7"
        self.runs.append(run_name)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"id{len(self.runs)}"))

    def update_run(self, run: str, status: str) -> None:
        assert (run, status) == ("id1", "RUNNING")

    def log_batch(self, run: str, metrics: Sequence[Any] = (), params: Sequence[Any] = ()) -> None:
        assert run == "id1" and not {key for key, _ in params} & set(self.params)
        self.rows += metrics
        self.params.update(params)

    def log_image(self, run: str, image: Any, file: str) -> None:
        group, step, name = file.removesuffix(".png").split("/")
        number, caption = name.split(" ", 1)
        self.rows.append((f"{group}/{number}", int(step), (image.shape, caption)))

    def set_terminated(self, run: str) -> None:
        self.closed += run == "id1"


FAKES: dict[str, Any] = {"mlflow": FakeMlflow, "trackio": FakeTrackio}


@pytest.mark.parametrize("package", FAKES)
def test_a_service_hears_no_step_again_that_an_earlier_attempt_has_passed(
        package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake, config = FAKES[package](), load_config(None, ["peers=2"])
    monkeypatch.setitem(sys.modules, package, fake)
    for attempt, steps in enumerate((range(1, 6), range(4, 8), range(6, 9)), 1):
        service = SERVICES[package](tmp_path, "robustness", config)
        out = RunReporter(tmp_path, [service], console="off", attempt=attempt)
        out.start(8, PEERS, first_step=steps[0] - 1)
        for step in steps:
            out.log({"step": step, "loss": [float(step), 2.0]})
        if attempt == 3:
            out.pictures(8, "gallery", [picture(), picture(3)])
        out.close()
    assert [row for row in fake.rows if row[0] == "loss/a"] == [
        *(("loss/a", step, float(step)) for step in (1, 2, 3, 4, 5)), ("loss/a", 5, 5.0),  # the newest may come again
        ("loss/a", 6, 6.0), ("loss/a", 7, 7.0), ("loss/a", 7, 7.0), ("loss/a", 8, 8.0)]
    assert [row for row in fake.rows if row[0].startswith("gallery")] == [
        ("gallery/0", 8, ((96, 288, 3), "class 3")), ("gallery/1", 8, ((96, 288, 3), "class 3"))]
    assert fake.closed == 3 and "speaks" not in capsys.readouterr().out
    if package == "mlflow":
        assert fake.runs == [tmp_path.name] and fake.experiments == {"robustness": "7"}
        assert fake.params["peers.1.loss.temperature"] == str(config.peers[1].loss.temperature)
    else:
        assert fake.inits[0] == fake.inits[2] and fake.inits[0]["name"].startswith(f"{tmp_path.name}-")
        assert fake.inits[0]["config"] == config.model_dump(mode="json") and fake.inits[0]["resume"] == "allow"


def test_a_service_that_is_asked_for_later_gets_all_that_is_trained_from_then_on(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    (tmp_path / "metrics.jsonl").write_text('{"kind":"step","attempt":1,"step":9,"loss":[1.0,2.0]}\n')
    service = SERVICES["trackio"](tmp_path, "robustness", load_config(None, []))
    out = RunReporter(tmp_path, [service], console="off", attempt=2)
    out.start(10, PEERS, first_step=4)
    out.log({"step": 5, "loss": [1.0, 2.0]})
    assert [row[:2] for row in fake.rows] == [("loss/a", 5), ("loss/b", 5)]


def test_two_runs_whose_folders_share_a_name_are_two_runs_of_trackio(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        SERVICES["trackio"](tmp_path / parent / "run", "robustness", load_config(None, [])).start(0)
    assert fake.inits[0]["name"] != fake.inits[1]["name"]


@pytest.mark.parametrize(("package", "fake", "way_out"), [
    ("wandb", FakeWandb, "wandb login"), ("mlflow", FakeMlflow, "MLFLOW_TRACKING_URI"),
    ("trackio", FakeTrackio, "TRACKIO_SPACE_ID")])
def test_a_service_that_cannot_begin_ends_with_6_in_one_line(package: str, fake: Any, way_out: str, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, fake(RuntimeError("not configured\n(no-tty)")))
    assert run_small(tmp_path, "run", f"log.trackers={package}:robustness").code == 6
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and way_out in err and "not configured (no-tty)" in err
