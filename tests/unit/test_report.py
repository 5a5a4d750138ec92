"""The HTML report: its figures against the run's files, what a text may not do, and what is said where files lack."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from mat_dist.checkpoints.load import open_run, validation_file
from mat_dist.config.schema import ThreatConfig
from mat_dist.evaluation.attacks import scaled
from mat_dist.evaluation.results import Answers
from mat_dist.report import measure as measuring
from mat_dist.report.__main__ import main
from mat_dist.report.charts import Axis, Series, heat_map, interval_chart, line_chart, stacked_bars, surface
from mat_dist.report.compare import comparison_page, unlike
from mat_dist.report.curves import phase_means, thinned, training_figures
from mat_dist.report.files import read_run
from mat_dist.report.measure import Measured, Victims, load_victims, measure, png
from mat_dist.report.page import class_shares, result_section, run_page
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import RunLock
from tests.browser import CHROMIUM, Browser
from tests.small_runs import Finished, run_small, tree_hash
from tests.unit.data_files import write_folder

pytestmark = pytest.mark.slow  # half a minute of attacks and pages

EVIL = "<script>alert('x')</script>&\"'><img src=x onerror=alert(1)>\x00"
CPU = torch.device("cpu")


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the cells of all tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.style, self._in_cell, self._in_style = "", False, False
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")
        self._in_cell = name in ("td", "th", "small") and (self._in_cell or name != "small")
        self._in_style = name == "style"

    def handle_endtag(self, name):
        self._in_cell = self._in_cell and name not in ("td", "th")

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += f"{data}|"
        if self._in_style:
            self.style, self._in_style = data, False


@pytest.fixture(scope="module", autouse=True)
def few_attacks():
    """Fewer radii and steps than a real report shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "EPS_FACTORS", (0.0, 1.0, 3.0))
        patch.setattr(measuring, "STEPS", (1, 3))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Finished:
    """Two peers with averaged weights, all 40 test images attacked in two chunks."""
    done = run_small(tmp_path_factory.mktemp("runs"), "one", "eval.test_steps=1", "eval.every=1", "optim.ema_decay=0.5",
                     "log.every=1", "eval.test_steps=2", "train.epochs=2")
    assert done.code == 0
    return done


@pytest.fixture
def copy(run, tmp_path) -> RunFolder:
    """A copy of the run that a test may spoil."""
    return RunFolder(Path(shutil.copytree(run.folder.path, tmp_path / "copy",
                                          ignore=shutil.ignore_patterns("report"))))


@pytest.fixture(scope="module")
def victims(run) -> Victims:
    return load_victims(open_run(run.folder.path), 40, CPU)


@pytest.fixture(scope="module")
def measured(victims) -> Measured:
    return measure(victims, lambda _: None)


def page_of(folder: RunFolder, name: str = "index.html") -> str:
    return (folder.report / name).read_text()


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The two p at which (k/n - p)^2 = z^2 p (1 - p) / n, by bisection."""
    def root(inside: float, outside: float) -> float:
        for _ in range(100):
            middle = (inside + outside) / 2
            if (k / n - middle) ** 2 <= z * z * middle * (1 - middle) / n:
                inside = middle
            else:
                outside = middle
        return inside
    return root(k / n, 0.0), root(k / n, 1.0)


def counted(file: Path) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(images, right when clean, right under attack) of each target, from the rows of a result file."""
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in csv.DictReader(io.StringIO(file.read_text())):
        entry = found[row["target"], row["weights"]]
        entry[0] += 1
        entry[1] += row["clean_correct"] == "1" if "clean_correct" in row else row["clean_prediction"] == row["label"]
        entry[2] += int(row["robust"])
    return {key: (n, c, r) for key, (n, c, r) in found.items()}


# ------------------------------------------------------------------ figures


def test_the_headline_is_what_the_rows_of_the_test_say(run):
    assert main(["--no-attack", str(run.folder.path)]) == 0
    (file,) = run.folder.eval.glob("test_best_*.csv")
    rows = Page(page_of(run.folder)).rows
    for (target, weights), (n, clean, robust) in counted(file).items():
        if weights == "ema":
            cells = [f"{target}|not reportable|"]  # on 40 images
            for k in (clean, robust):
                low, high = wilson(k, n)
                cells.append(f"{100 * k / n:.2f}|{100 * low:.1f} – {100 * high:.1f}|")
            assert [*cells, "40|"] in rows


def test_attacks_for_the_page_are_those_of_the_evaluation(run, measured):
    """All images, the evaluator's chunks and noise: the curve goes through the number of the result file."""
    (file,) = run.folder.eval.glob("test_best_*.csv")
    for (target, weights), (n, clean, robust) in counted(file).items():
        if weights == "ema":
            by_eps = dict(measured.by_eps["linf 1/10"][target])
            assert (by_eps[0.0], by_eps[0.1]) == (clean / n, robust / n)
            assert dict(measured.by_steps["linf 1/10"][target])[2] == robust / n
            assert sum(measured.answers[target].correct["union"].values()) == robust
    table = measured.transfer["linf 1/10"]
    assert [row[-1] for row in table] == [dict(measured.by_eps["linf 1/10"][t])[0.0]
                                          for t in ("peer0", "peer1", "ensemble")]
    assert [table[i][i] for i in (0, 1)] == [dict(measured.by_eps["linf 1/10"][f"peer{i}"])[0.1] for i in (0, 1)]


def test_the_surface_holds_the_clean_loss_and_that_of_the_aes(victims, measured):
    model = victims.targets[victims.source]
    _, x, y = next(victims.batches())
    x, y = x[:16], y[:16]
    adv = victims.craft(model, x, y, victims.threats[0], victims.plan(), 0)
    middle = measured.places.index(min(measured.places, key=abs))
    for place, images in ((middle, x), (-1, adv)):
        logits = model(images).double()
        expected = -(logits.gather(1, y[:, None])[:, 0] - logits.exp().sum(1).log()).mean().item()
        assert measured.surface[middle][place] == pytest.approx(expected, rel=1e-5)


def test_pictures_are_the_images_and_their_answers(victims, measured):
    pictures = measured.examples
    assert len(pictures) == len({one.sample for one in pictures}) == 6
    for one in pictures:
        x, y = victims.data.batch(torch.tensor([one.sample]))
        assert torch.equal(one.clean, x[0].float() / 255) and one.label == int(y)
        assert 0 < (one.adversarial - one.clean).abs().max() <= 0.1 * (1 + 1e-6)
        for name, clean, sure, attacked, surely in one.answers:
            for image, answer, probability in ((one.clean, clean, sure), (one.adversarial, attacked, surely)):
                found = victims.targets[name](image[None]).exp()[0]
                assert int(found.argmax()) == answer
                assert float(found[answer] / found.sum()) == pytest.approx(probability, rel=1e-4)


def test_classes_are_counted_by_hand():
    found = Answers({7: 0, 8: 0, 9: 2}, {"clean": {7: True, 8: True, 9: False}, "union": {7: True, 8: False, 9: False}})
    assert class_shares(found, 3) == [(2, 1.0, 0.5), (0, None, None), (1, 0.0, 0.0)]


def test_phases_are_means_over_the_log_steps_of_the_newest_number_of_ranks():
    records = [{"phases_s": [{"wait": 9.0}]}, {"phases_s": [{"wait": 1.0}, {"wait": 2.0, "attack": 4.0}]},
               {"loss": [1.0]}, {"phases_s": [{"wait": 3.0}, {"wait": 0.0}]}]
    assert phase_means(records) == [{"wait": 2.0}, {"wait": 1.0, "attack": 2.0}]


def test_long_curves_are_means_of_neighbours():
    points = [(float(n), None if n == 3 else float(n % 2)) for n in range(1500)]
    found = thinned(points)
    assert len(found) == 500 and found[0] == (1.0, pytest.approx(1 / 3)) and found[1] == (4.0, 0.5)
    assert thinned(points[:500]) == points[:500]


def test_of_records_with_the_same_step_the_newest_attempt_counts(copy):
    with copy.metrics.open("a") as file:
        file.write(json.dumps({"kind": "step", "attempt": 2, "step": 1, "epoch": 0.25, "loss": [7.0, 8.0]}) + "\n")
        file.write('{"kind": "step", "step": 1e999}\n{"kind": "step", "step": 9, "epoch": 1' + "0" * 400 + "}\n")
        file.write('{"kind": "step", "attempt": 3, "st')
    read = read_run(copy)
    assert [one["step"] for one in read.steps] == list(range(1, 9)) and read.steps[0]["loss"] == [7.0, 8.0]
    assert "metrics.jsonl: 3 damaged lines are left out" in read.notes


# ------------------------------------------------------------------ charts and pictures


def lines_of(svg: str, colour: str = "#1f6fb5") -> list[list[int]]:
    """Of every line of a colour: how many points its unbroken parts have."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: {colour}', svg)
    return [[1 + part.count("L") for part in path.split("M")[1:]] for path in paths]


def test_a_gap_stays_open_and_a_point_without_neighbours_is_a_dot():
    points = [(0, 0.0), (1, 1.0), (2, None), (3, math.nan), (4, 0.5), (5, None), (6, 0.5), (8, 0.25), (9, 0.7)]
    few = line_chart("t", [Series("a", points, 0)], Axis("x"), Axis("y", limits=(0, 1))).svg
    assert lines_of(few)[0] == [2, 1, 3]
    assert few.count("<use") == 6
    many = line_chart("t", [Series("a", [*points, *((x, 0.5 + x % 2) for x in range(10, 20))], 0)], Axis("x"),
                      Axis("y")).svg
    assert many.count("<use") == 1


def test_cells_are_written_in_per_cent_and_unknown_ones_are_empty():
    svg = heat_map("t", ["a"], ["b", "c"], [[0.5, None]], label="", description="").svg
    assert ">50.0</text>" in svg and ">-</text>" in svg


def test_constant_missing_and_huge_values_give_a_chart():
    for values in ([1.0, 1.0], [None, None], [1e300, -1e300], [0.0], [1e-12, 2e-12]):
        svg = line_chart("t", [Series("a", list(enumerate(values)), 0)], Axis("x"), Axis("y")).svg
        ElementTree.fromstring(svg)
        assert "nan" not in svg and "inf" not in svg


def charts_of(text: str):
    """One chart of each kind, with `text` wherever a text goes."""
    line = Series(text, [(1, 0.5), (2, 0.7)], 0, [(1, 0.4, 0.6), (2, 0.6, 0.8)])
    x, y = Axis(text, log=True, marks=(1, 2)), Axis(text, percent=True)
    return [line_chart(text, [line, line], x, y, guide=(1, text)),
            heat_map(text, [text], [text], [[0.5]], label=text, description=text, gap=0),
            interval_chart(text, [(text, [(0.5, 0.4, 0.6)] * 2)], [text, text], description=text),
            stacked_bars(text, [(text, [1.0, 2.0])], [text, text], label=text, description=text),
            surface(text, [-1, 0, 1], [[0.0, 1.0, 2.0]] * 3, labels=(text, text, text), description=text)]


def test_equal_charts_are_equal_files_of_their_kind():
    drawn = [charts_of("name") for _ in range(2)]
    for kind, start in (("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")):
        files = [[chart.render(kind) for chart in charts] for charts in drawn]
        assert files[0] == files[1] and all(file.startswith(start) for file in files[0])


def test_a_chart_has_texts_for_screen_readers_and_colours_for_the_dark():
    for chart in charts_of("a name"):
        root = ElementTree.fromstring(chart.svg)
        assert [part.text for part in root[:2]] == ["a name", chart.description] and chart.description
        assert "prefers-color-scheme:dark" in chart.svg
        assert '[style*="fill: #ffffff"]{fill:#14181c!important}' in chart.svg


def test_matplotlib_is_imported_when_a_chart_is_drawn_not_before():
    program = "import sys; from mat_dist.report import charts; assert not {'matplotlib', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_pictures_keep_their_pixels():
    grey = torch.arange(6.0).view(1, 2, 3) / 5
    image = Image.open(io.BytesIO(png(grey)))
    assert image.size == (96, 64) and [image.getpixel((x, 40)) for x in (5, 40, 90)] == [153, 204, 255]
    colour = torch.zeros(3, 300, 300)
    colour[0] = 1
    image = Image.open(io.BytesIO(png(colour)))
    assert image.size == (300, 300) and image.getpixel((7, 7)) == (255, 0, 0)
    assert scaled(torch.tensor([-0.05, 0.0, 0.025])).tolist() == pytest.approx([0, 0.5, 0.75])


# ------------------------------------------------------------------ security


@pytest.mark.parametrize("text", [EVIL, "$x^2_{$", "\ud800\uffff\x1b", "_名字\n" * 50, ""])
def test_any_name_gives_charts_that_are_well_formed_and_run_nothing(text):
    for chart in charts_of(text):
        ElementTree.fromstring(chart.svg)
        tags = Page(chart.svg).tags
        assert not {name for name, _ in tags} & {"script", "img", "foreignobject"}
        assert not [key for _, attributes in tags for key in attributes if key.startswith("on")]
        assert chart.render("pdf") and chart.render("png")


def test_names_are_drawn_as_they_are():
    svg = line_chart("a $", [Series("_a$b$", [(0, 1.0)], 0), Series("b" * 40, [(0, 2.0)], 1)], Axis("x"), Axis("y")).svg
    texts = [one.text for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"_a$b$", "b" * 25 + "…", "a $"} <= set(texts)


def test_hostile_files_of_a_run_add_no_markup(copy):
    exits, environment = json.loads(copy.exit.read_text()), json.loads(copy.environment.read_text())
    exits["attempts"][-1].update(code=13, state=EVIL, what=EVIL, where=EVIL)
    environment.update(devices=[EVIL], versions={"torch": EVIL}, placement={"ranks": EVIL})
    copy.exit.write_text(json.dumps(exits))
    copy.environment.write_text(json.dumps(environment))
    for file in copy.eval.glob("test_best_*.json"):
        text = file.read_text().replace('"peer0"', json.dumps(EVIL)).replace("1/10", json.dumps(EVIL)[1:-1])
        file.write_text(text)
    with copy.metrics.open("a") as lines:
        lines.write(json.dumps({"kind": "step", "step": 99, "epoch": 3, "loss": [EVIL, None], "lr": EVIL, "transfer": [
            [EVIL] * 3] * 2, "phases_s": [{EVIL: EVIL}, EVIL], "images_per_s": 10**400}) + "\n")
    assert main(["--no-attack", str(copy.path)]) == 0
    found = Page(page_of(copy))
    assert EVIL[:8] not in page_of(copy) and "\x00" not in page_of(copy)
    assert all(a["src"].startswith("data:image/svg+xml;base64,") for name, a in found.tags if name == "img")
    assert not {name for name, _ in found.tags} & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]


def test_class_names_of_a_folder_are_text_and_colours_stay(tmp_path, capsys):
    classes = ("<script>alert(1)<", "b&b")
    write_folder(tmp_path / "images", train=40, test=8, side=16, classes=classes)
    trained = run_small(tmp_path, "folder", "data.name=folder", f"data.root={tmp_path / 'images'}",
                        "data.image_size=16", f"data.cache={tmp_path / 'cache'}", "data.train_size=32",
                        "data.val_size=8", "data.test_size=16", "eval.test_steps=1")
    assert main([str(trained.folder.path)]) == 0
    text = page_of(trained.folder)
    assert classes[0] not in text and "&lt;script&gt;alert(1)&lt;" in text
    assert {cell for row in Page(text).rows for cell in row[:1]} >= {"<script>alert(1)<|", "b&b|"}
    pictures = [Image.open(path) for path in trained.folder.report.glob("gallery_*.png")]
    assert len(pictures) == 18 and {(one.mode, one.size) for one in pictures} == {("RGB", (96, 96))}


def test_the_policy_allows_this_style_sheet_and_images_inside_the_page_only(run):
    assert main(["--images", "10", str(run.folder.path)]) == 0
    text = page_of(run.folder)
    found = Page(text)
    (policy,) = [a["content"] for name, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(found.style.encode()).digest()).decode()
    assert policy == (f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
                      "form-action 'none'")
    images = [a for _, a in found.tags if "src" in a]
    pictures = [a for a in images if a["src"].startswith("data:image/png;base64,")]
    charts = [a for a in images if a["src"].startswith("data:image/svg+xml;base64,")]
    assert len(pictures) == 18 and len(charts) >= 12 and len(images) == len(pictures) + len(charts)
    assert all(len(a["alt"]) > 10 for a in images)  # for screen readers
    for chart in charts:
        ElementTree.fromstring(base64.b64decode(chart["src"].split(",")[1]))
    assert all(a["href"].startswith("#") for _, a in found.tags if "href" in a)
    assert not [a for _, a in found.tags if "style" in a]  # the policy would refuse it
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for _, a in found.tags if "href" in a} <= set(ids)


@pytest.mark.thorough
def test_the_report_changes_nothing_else_in_the_run_folder(copy):
    before = tree_hash(copy.path)
    assert main(["--images", "10", str(copy.path)]) == 0
    files = sorted(path.name for path in copy.report.iterdir())
    assert "index.html" in files and len([name for name in files if name.endswith(".png")]) == 18
    for name in files:
        if name.endswith(".svg"):
            ElementTree.parse(copy.report / name)
    (copy.report / "mine.svg").write_text("a user's")
    assert main(["--no-attack", "--figures", "pdf", str(copy.path)]) == 0
    assert not list(copy.report.glob("gallery_*"))  # those of the report before
    assert [path.name for path in copy.report.glob("*.svg")] == ["mine.svg"]
    assert all(path.read_bytes().startswith(b"%PDF") for path in copy.report.glob("*.pdf"))
    assert {"accuracy.pdf", "loss.pdf"} <= {path.name for path in copy.report.iterdir()}
    shutil.rmtree(copy.report)
    assert tree_hash(copy.path) == before


# ------------------------------------------------------------------ what is missing


def complaint(capsys) -> str:
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("mat_dist:")]
    assert len(lines) == 1 and "Traceback" not in err and not out
    return lines[0]


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    for path, text in ((tmp_path, "is not the folder of a run"), (tmp_path / "nothing", "there is no run folder")):
        assert main([str(path)]) == 2
        assert text in complaint(capsys)


@pytest.mark.parametrize("words", [[], ["--no-attack"]])
def test_a_run_that_goes_on_is_shown_as_far_as_it_is(copy, words, capsys):
    shutil.rmtree(copy.checkpoints)  # none is there before the first epoch ends
    copy.exit.unlink()
    for file in copy.eval.iterdir():
        file.unlink()
    lines = copy.metrics.read_text().splitlines(keepends=True)
    copy.metrics.write_text("".join(lines[:3]) + lines[3][:40])  # the newest record is being written
    with RunLock(copy, None):
        assert main([*words, str(copy.path)]) == 0
    text = page_of(copy)
    assert "it goes on, written by pid" in text and "this is what there was by then" in text
    assert "damaged lines" not in text and "exit.json" not in text.replace("Attempts (exit.json)", "")
    assert ("no pictures, radius, steps and loss surface yet: there is no checkpoint" in text) == (words == [])


def test_without_a_checkpoint_only_a_report_without_attacks_is_made(copy, capsys):
    shutil.rmtree(copy.checkpoints)
    assert main([str(copy.path)]) == 4
    assert "there is no checkpoint" in complaint(capsys)
    assert main(["--no-attack", str(copy.path)]) == 0


def test_a_damaged_checkpoint_is_refused(copy, capsys):
    for file in copy.checkpoints.glob("step_*/peer_1.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert main([str(copy.path)]) == 4
    assert "differs from what was saved" in complaint(capsys)


def test_a_run_without_evaluation_has_a_report_that_says_so(tmp_path):
    plain = run_small(tmp_path, "plain")
    assert main(["--images", "10", str(plain.folder.path)]) == 0
    text = page_of(plain.folder)
    assert "no evaluation on the test set" in text and "has no evaluation yet" in text
    assert "10 test images, attacked for this report" in text  # classes


def test_files_that_are_missing_or_foreign_are_named(copy):
    for file in (copy.metrics, copy.environment, copy.exit):
        file.unlink()
    (copy.eval / "autoattack.json").write_text("{}")
    (copy.eval / "test_best_step_00000009.json").write_text('{"attack": 1}')
    assert main(["--no-attack", str(copy.path)]) == 0
    text = page_of(copy)
    for name in ("no metrics.jsonl", "no environment.json", "no exit.json", "eval/autoattack.json is left out",
                 "eval/test_best_step_00000009.json is left out", "--no-attack"):
        assert name in text


def evaluated(folder: RunFolder, name: str, **changes: object) -> None:
    """A result file as python -m mat_dist.evaluate writes it: 3 of 4 clean, pgd leaves 2, autoattack 2, together 1."""
    document = {
        "checkpoint": "best", "step": 8, "split": "test", "time": "2030-01-01T00:00:00+00:00", "seed": 0, "config": {},
        "transfer": False,
        "threats": [{"norm": "linf", "eps": "1/10"}], "attacks": ["pgd", "autoattack"],
        "plans": {"pgd": {"steps": 20, "restarts": 5}},
        "targets": [{"target": target, "weights": "ema", "n": 4, "accuracy": {"clean": 0.75, "linf 1/10": 0.25,
                                                                              "union": 0.25},
                     "attacks": {"linf 1/10": {"pgd": 0.5, "autoattack": 0.5}},
                     "checks": [{"check": "zero gradients", "threat": "", "passed": target != "peer1", "found": ""}]}
                    for target in ("peer0", "peer1", "ensemble:prob", "ensemble:vote")], **changes}
    rows = [f"{sample},{label},linf 1/10,{attack},peer0,ema,{clean},{found},{int(clean == label == found)},1"
            for attack, answers in (("pgd", (1, 1, 0, 0)), ("autoattack", (1, 0, 1, 0)))
            for sample, (label, clean, found) in enumerate(zip((1, 1, 1, 1), (1, 1, 1, 0), answers, strict=True))]
    (folder.eval / f"{name}.json").write_text(json.dumps(document))
    (folder.eval / f"{name}.csv").write_text("\n".join([
        "sample,label,threat,attack,target,weights,clean_prediction,prediction,robust,attacked", *rows]))


def test_an_evaluation_with_more_attacks_is_the_headline_and_failed_checks_are_named(copy):
    evaluated(copy, "evaluate_test_best_step_00000008_0123456789ab")
    evaluated(copy, "evaluate_test_best_step_00000008_ba9876543210", attacks=["pgd"], time="2031-01-01T00:00:00+00:00")
    one = read_run(copy).headline
    assert one.file == "evaluate_test_best_step_00000008_0123456789ab.json"
    assert one.attacks.lower() == "pgd-20 x 5, autoattack"
    assert [target.target for target in one.targets] == ["peer0", "peer1", "ensemble", "ensemble:vote"]
    correct = one.answers["peer0", "ema"].correct
    assert [list(correct[name].values()) for name in ("clean", "union")] == [[True, True, True, False],
                                                                             [True, False, False, False]]
    assert main(["--no-attack", str(copy.path)]) == 0
    text = page_of(copy)
    rows = Page(text).rows
    interval = "25.00|{:.1f} – {:.1f}|".format(*(100 * end for end in wilson(1, 4)))
    clean = "75.00|{:.1f} – {:.1f}|".format(*(100 * end for end in wilson(3, 4)))
    assert ["peer0|not reportable|", clean, interval, "4|"] in rows
    assert ["peer0|", "50.00|", "50.00|"] in rows
    assert "Do not report these numbers" in text and "peer1: zero gradients" in text
    assert "attack the checkpoint with AutoAttack" not in text


def test_an_evaluation_of_a_checkpoint_that_is_no_longer_the_best_or_the_last_is_history(copy):
    evaluated(copy, "evaluate_test_best_step_00000008_0123456789ab")
    best, last = copy.checkpoints / "best", copy.checkpoints / "latest"
    best.write_text("step_00000004\n")
    assert read_run(copy).headline.images == "test set, last checkpoint"  # what was the best is the last now
    last.write_text("step_00000012\n")
    read = read_run(copy)
    assert (read.headline.file, read.headline.step) == ("validation_step_00000004.json", 4)
    assert [one.step for one in read.evaluations if one.present] == [4]
    assert any("of step 8, are history" in note for note in read.notes)
    assert main(["--no-attack", str(copy.path)]) == 0
    headline, _, history = page_of(copy).partition("History: evaluations of checkpoints")
    assert "worst attack" not in headline and "autoattack" not in headline
    assert "test set, then the best checkpoint, step 8, PGD-20 x 5, autoattack" in history
    best.write_text("step_00000012\n")
    assert read_run(copy).headline is None and main(["--no-attack", str(copy.path)]) == 0
    assert "no evaluation of its best or last checkpoint yet" in page_of(copy)


def test_too_few_images_do_not_lead_where_a_test_had_enough(copy):
    evaluated(copy, "evaluate_test_best_step_00000008_0123456789ab")  # AutoAttack on 4 images
    assert read_run(copy).headline.file.startswith("evaluate")
    for file in copy.eval.glob("test_best_*.json"):
        file.write_text(file.read_text().replace('"n": 40', '"n": 400'))
    assert read_run(copy).headline.file.startswith("test_best")


def test_each_threat_has_its_column_its_tile_and_its_curve_and_their_union_is_called_so(copy):
    shares = {"clean": 0.75, "linf 1/10": 0.5, "l2 1/2": 0.5, "union": 0.25}
    evaluated(copy, "evaluate_test_best_step_00000008_0123456789ab", attacks=["pgd"], targets=[
        {"target": target, "weights": "ema", "n": 4, "accuracy": shares, "checks": []}
        for target in ("peer0", "ensemble:prob")], threats=[{"norm": "linf", "eps": "1/10"},
                                                            {"norm": "l2", "eps": "1/2"}])
    run = read_run(copy)
    found = result_section(run)
    name = "PGD-20 x 5"
    assert found["table"].head == ["target", "clean %", f"{name}, linf 1/10 %", f"{name}, l2 1/2 %", "union %", "n"]
    assert [(label, value) for label, value, _ in found["headline"]][:4] == [
        (f"ensemble, {name}, union of linf 1/10, l2 1/2", "25.00 %"), (f"ensemble, {name}, l2 1/2", "50.00 %"),
        (f"ensemble, {name}, linf 1/10", "50.00 %"), ("ensemble, clean", "75.00 %")]
    compared = comparison_page([run, run]).html
    assert "ensemble l2 1/2 %" in compared and "ensemble union %" in compared and "robust %" not in compared

    peers = [peer.model_copy(update={"threat": ThreatConfig(norm=norm, eps=eps)})
             for peer, (norm, eps) in zip(run.config.peers, (("linf", 0.1), ("l2", 0.5)), strict=True)]
    record = {"epoch": 1, "clean_acc": [0.9, 0.8], "robust_acc": [0.2, 0.1],
              "threat_acc": {"linf 1/10": [0.6, 0.3], "l2 1/2": [0.2, 0.5]}}
    two = replace(run, config=run.config.model_copy(update={"peers": tuple(peers)}),
                  epochs=[{f"ema_{key}": value for key, value in record.items() if key != "epoch"} | {"epoch": 1}])
    curves = {one.name: one.chart for one in training_figures(two)}
    assert [(name, chart.title) for name, chart in curves.items() if name.startswith("validation")] == [
        ("validation_clean", "Validation: clean"), ("validation_1", "Validation: linf 1/10, PGD-1"),
        ("validation_2", "Validation: l2 1/2, PGD-1"), ("validation_union", "Validation: union, PGD-1")]


def test_an_evaluation_without_checks_is_marked(copy):
    evaluated(copy, "evaluate_test_best_step_00000008_0123456789ab", targets=[
        {"target": "peer0", "weights": "ema", "n": 4, "accuracy": {"clean": 1, "linf 1/10": 0.5, "union": 0.5},
         "checks": []}])
    assert main(["--no-attack", str(copy.path)]) == 0
    text = page_of(copy)
    assert "Do not report these numbers" in text and "peer0: no checks were made" in text


def test_a_frozen_peer_is_not_the_source_of_the_gallery(copy):
    opened = open_run(copy.path)
    file = validation_file(copy, opened.manifest.step)
    document = json.loads(file.read_text())
    for one in document["targets"]:
        one["accuracy"]["union"] = 0.5 if one["target"] == "peer0" else 0.4
    file.write_text(json.dumps(document))
    teacher = opened.config.peers[0].model_copy(update={"frozen": True})
    taught = opened.config.model_copy(update={"peers": (teacher, *opened.config.peers[1:])})
    chosen = [load_victims(one, 10, CPU).source for one in (opened, replace(opened, config=taught))]
    assert chosen == ["peer0", "peer1"]


def test_the_best_peer_is_that_of_the_checkpoint_that_is_there(copy):
    """One that was damaged and made again has a second file; the first one is of weights that are gone."""
    opened = open_run(copy.path)
    file = validation_file(copy, opened.manifest.step)
    document = json.loads(file.read_text())

    def write(path: Path, best: str, files: dict[str, str]) -> None:
        for one in document["targets"]:
            one["accuracy"]["union"] = 0.5 if one["target"] == best else 0.4
        path.write_text(json.dumps({**document, "files": files}))

    write(file, "peer0", {"peer_0.safetensors": "gone"})
    assert opened.chosen_peer() is None
    write(file.with_stem(f"{file.stem}-2"), "peer1", document["files"])
    assert opened.chosen_peer() == "peer1"
    write(file, "peer0", document["files"])
    assert opened.chosen_peer() == "peer1"


def test_images_that_are_gone_leave_a_report_of_the_files(copy):
    copy.config.write_text(copy.config.read_text().replace("name: digits", "name: fashion_mnist"))
    assert main([str(copy.path)]) == 0
    assert "no pictures, radius, steps and loss surface:" in page_of(copy)


@pytest.mark.parametrize("words", [["--images", "0", "x"], ["--images"], ["--device", "tpu", "x"], ["--fast", "x"],
                                   ["--no-attack"], ["--figures", "gif", "x"], ["--image", "5", "x"]])
def test_a_wrong_command_line_is_refused(words, capsys):
    assert main(words) == 2
    complaint(capsys)


def test_the_options_are_named_in_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(option in told for option in ("--images", "--device", "--no-attack", "--figures", "--plugin"))


@pytest.mark.thorough
def test_options_may_stand_anywhere(copy, capsys):
    assert main(["--images=7", str(copy.path), "--device", "cpu", "--figures=png"]) == 0
    assert "attacking 7 test images on cpu" in capsys.readouterr().err
    assert (copy.report / "accuracy.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------ several runs


def test_a_comparison_has_a_row_per_run_and_the_settings_that_differ(run, tmp_path, capsys):
    other = run_small(tmp_path, "two", "eval.test_steps=1", "eval.test_steps=2", "optim.lr=0.05", "run.seed=1")
    run.folder.report.mkdir(exist_ok=True)
    old = run.folder.report / "comparison_9.pdf"  # of a comparison before
    old.touch()
    unfinished = run_small(tmp_path, "three")
    assert main([str(one.folder.path) for one in (run, other, unfinished)]) == 0
    assert capsys.readouterr().out.strip() == str(run.folder.report / "comparison.html") and not old.exists()
    text = page_of(run.folder, "comparison.html")
    rows = {row[0]: row for row in Page(text).rows if row}
    n, clean, robust = counted(next(other.folder.eval.glob("test_last_*.csv")))["ensemble", "raw"]
    found = rows["two (not reportable)|"]  # 40 images
    assert found[5] == f"{n}|"
    assert [cell.split("|")[0] for cell in found[1:3]] == [f"{100 * clean / n:.2f}", f"{100 * robust / n:.2f}"]
    assert rows["three|"][1] == "-|"
    assert rows["peers.0.optim.lr|"] == ["peers.0.optim.lr|", "0.2|", "0.05|", "0.2|"] and "run.seed|" in rows
    assert "run.name|" not in rows and "three: no evaluation on the test set" in text


def test_runs_with_other_attacks_are_said_not_to_compare(run, tmp_path):
    other = run_small(tmp_path, "two", "eval.test_steps=1", "eval.test_steps=3", "data.test_size=20", "eval.every=1")
    assert unlike([read_run(one.folder) for one in (run, other)]) == ["number of images: 40 | 20",
                                                                        "attack: PGD-2 | PGD-3"]
    assert main([str(one.folder.path) for one in (run, other)]) == 0
    assert "do not compare like with like" in page_of(run.folder, "comparison.html")
    assert unlike([read_run(run.folder)] * 2) == []


# ------------------------------------------------------------------ browser


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_a_browser_shows_all_of_the_page_on_a_desk_and_on_a_phone(copy, tmp_path):
    evaluated(copy, "evaluate_test_best_step_00000008_0123456789ab")  # with long names, and failed checks
    assert main(["--images", "10", str(copy.path)]) == 0
    assert main([str(copy.path), str(copy.path)]) == 0
    with Browser(tmp_path / "profile") as browser:
        for name, images in (("index.html", 18), ("comparison.html", 0)):
            images += len(re.findall("data:image/svg", page_of(copy, name)))
            for width, dark in ((1280, False), (390, True), (360, False)):
                browser.open((copy.report / name).as_uri(), width=width, dark=dark)
                assert browser.value("document.documentElement.scrollWidth") == width  # nothing sticks out
                assert browser.value("[...document.images].filter(i => i.complete && i.naturalWidth).length") == images
                assert browser.value("document.querySelectorAll('table').length") >= 3
                assert browser.value("Math.min(...[...document.querySelectorAll('figure img')].map("
                                     "s => s.getBoundingClientRect().height))") > 80
                style = "getComputedStyle(document.body).backgroundColor"
                assert browser.value(style) == ("rgb(20, 24, 28)" if dark else "rgb(255, 255, 255)")
                browser.screenshot(tmp_path / f"{name}_{width}.png")
                assert Image.open(tmp_path / f"{name}_{width}.png").width == width
        browser.pdf(tmp_path / "print.pdf")
        for dark, ground in ((False, (255, 255, 255)), (True, (20, 24, 28))):
            browser.open((copy.report / "loss.svg").as_uri(), width=400, dark=dark)
            browser.screenshot(tmp_path / "loss.png", whole=False)
            assert Image.open(tmp_path / "loss.png").convert("RGB").getpixel((398, 100)) == ground
        assert browser.complaints == []
        assert all(url.startswith(("data:image/", "file:")) for url in browser.requests)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_the_policy_stops_scripts_and_requests_that_got_in(run, tmp_path):
    """Should escaping ever fail: the page with a script, a handler and a picture of another server in it."""
    text = run_page(read_run(run.folder), None, None, []).html
    inside = ("<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
              "<img src='http://127.0.0.1:9/spy.png'>")
    (tmp_path / "evil.html").write_text(text.replace("<main>", f"<main>{inside}"))
    with Browser(tmp_path / "profile") as browser:
        browser.open((tmp_path / "evil.html").as_uri(), width=800)
        assert browser.value("document.title") == "Run one"
        assert sum("Content Security Policy" in told for told in browser.complaints) >= 3
