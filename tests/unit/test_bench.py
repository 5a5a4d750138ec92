"""The benchmark measures what it says: equal mathematics, counted passes, a cost model that finds its constants."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import mat_dist
from benchmarks.command import Watch
from benchmarks.record import training_seconds
from benchmarks.speed import engines, measures, references
from benchmarks.speed.__main__ import COMMANDS, main, read_options
from benchmarks.speed.measures import check_equal, recipe_of
from benchmarks.speed.references import Recipe
from benchmarks.speed.scale import IMAGENET, NETWORKS, Costs, Point, predictions
from benchmarks.speed.subject import Limit, PhaseClock, Subject
from benchmarks.speed.tables import print_result
from benchmarks.speed.timing import Spread, Timing, both, interleaved, ratio, together
from mat_dist.config import load_config
from mat_dist.core.state_hash import state_hash
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import ConfigError, PeerFailed, StopRequested
from mat_dist.runs.folder import RunFolder

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SMALL = ("model=tiny_cnn", "peers=3", "train.batch_size=6", "attack.steps=2")


def subject(*overrides: str) -> Subject:
    config = load_config("bench_small", [*SMALL, *overrides])
    return Subject.make(config, Mesh(Placement.place(len(config.peers), 1, 0), CPU), (3, 8, 8), 5)


# ------------------------------------------------------------------------------------------------ what is measured


@pytest.mark.parametrize("changed", [
    (), ("train.accumulate=2", "step.memory=recompute", "step.wire=int8"), ("methods.awp.gamma=0.01",),
    ("peers.0.union.strategy=avg", "peers.0.union.threats=linf:0.1,l2:1"), ("loss=at", "peers=1"),
    ("step.teachers=ema", "optim.ema_decay=0.9", "optim.clip_norm=0.1")])
def test_the_step_without_guards_is_the_same_step(changed: tuple[str, ...]) -> None:
    ours, bare = subject(*changed), subject(*changed)
    for _ in range(3):
        ours.step()
        bare.unguarded_step()
    assert [state_hash(p.state()) for p in ours.cohort.peers] == [state_hash(p.state()) for p in bare.cohort.peers]


@pytest.mark.parametrize("changed", ["attack.method=free", "methods.warm_start.reset_epochs=0",
                                     "attack.loss=kl_teacher"])
def test_steps_that_are_not_alike_are_refused(changed: str) -> None:
    free = ("attack.steps=1", "train.replays=2") if "free" in changed else ()
    with pytest.raises(ConfigError, match="steps that are all alike"):
        subject(changed, *free)


@pytest.mark.parametrize("changed", [(), ("loss=at",), ("loss=at", "peers=1")])
def test_the_references_compute_the_same_loss_and_attack(changed: tuple[str, ...]) -> None:
    made = subject("step.precision=fp64", *changed)
    found = check_equal(made, recipe_of(made.config))
    assert found["loss"] < 1e-5 and found["attack"] < 1e-5  # the references are fp32


@pytest.mark.parametrize("changed", ["hard_weight", "kd_weight", "eps"])
def test_another_mathematics_is_noticed(changed: str) -> None:
    made = subject()
    right = recipe_of(made.config)
    wrong = Recipe(**{**vars(right), changed: 1.5 * getattr(right, changed)})
    with pytest.raises(PeerFailed, match="the references reach another"):
        check_equal(made, wrong)


def test_the_naive_trainer_learns() -> None:
    made = subject()
    models = [copy.deepcopy(p.model) for p in made.cohort.peers]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in models]
    x, y = next(references.batches(made.images.permute(0, 2, 3, 1).contiguous(), made.labels, 6))
    losses = [references.train_step(models, optimizers, x, y, recipe_of(made.config)) for _ in range(8)]
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))


def test_the_limit_is_the_passes_of_the_step_and_no_more() -> None:
    """K attack passes and P learning passes for each of P = 3 peers."""
    made = subject()
    limit, calls = Limit(made), []
    for model in (*limit._models, *(called._called for called in limit._called)):
        model.register_forward_hook(lambda m, given, out: calls.append(m.training))
    before = [state_hash(p.state()) for p in made.cohort.peers]
    limit()
    assert calls == ([False] * 2 + [True] * 3) * 3
    assert [state_hash(p.state()) for p in made.cohort.peers] == before


@pytest.mark.parametrize("changed", [(), ("train.accumulate=2", "methods.awp.gamma=0.01")])
def test_a_step_has_all_its_phases_in_order(changed: tuple[str, ...]) -> None:
    """Micro-batches add to the same ones."""
    made = subject(*changed)
    made.step()
    assert list(made.clocks[0]) == ["data", "attack", "AEs, header", "AEs, exchange", "forward", "logits, header",
                                    "logits, exchange", "backward", "device", "vote", "optimizer"]


def test_phases_are_named_after_their_place() -> None:
    clock = PhaseClock(CPU, ["AEs", "logits", "vote"])
    for phase in ("attack", "wait", "exchange", "forward", "wait", "exchange", "backward", "wait"):
        clock.lap(phase)
    assert list(clock.seconds) == ["attack", "AEs, header", "AEs, exchange", "forward", "logits, header",
                                   "logits, exchange", "backward", "vote"]


# ------------------------------------------------------------------------------------------------ rounds


def test_contestants_take_turns_and_warm_up_rounds_do_not_count() -> None:
    order: list[str] = []
    times = interleaved({name: lambda n=name: order.append(n) for name in "abc"}, 2, subject().mesh)
    assert "".join(order) == "abcbcacab" and {name: len(t) for name, t in times.items()} == {"a": 2, "b": 2, "c": 2}


class Stopping:
    """As the flag of a signal that comes after so many looks at it."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def requested(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_signal_leaves_the_whole_rounds() -> None:
    """It comes in the third timed round of two contestants, after one of them; or in the warm-up: nothing is left."""
    contestants, mesh = {"a": int, "b": int}, subject().mesh
    times = interleaved(contestants, 9, mesh, Watch(cast(StopFlag, Stopping(2 + 4 + 1))))
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}
    with pytest.raises(StopRequested, match="before one round"):
        interleaved(contestants, 9, mesh, Watch(cast(StopFlag, Stopping(3))))


def test_a_second_signal_ends_at_once_and_leaves_the_whole_rounds() -> None:
    def again() -> None:
        calls.append(1)
        if len(calls) == 1 + 2 + 1:
            raise StopRequested("stopped at once by a second SIGINT", "signal", "again")

    calls: list[int] = []
    times = interleaved({"a": again, "b": lambda: None}, 9, subject().mesh)
    assert [len(found) for found in times.values()] == [2, 2]


def test_the_references_are_preceded_by_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(measures, "interleaved", lambda contestants, rounds, mesh, watch: told.append("it begins") or {
        name: [Timing(1.0, 1.0)] * rounds for name in contestants})
    found = measures.measure_against_references(subject(), 3, Watch(tell=told.append))
    assert found["rounds"] == 3 and (told[0], told[2]) == ("checking that all trainers compute the same", "it begins")
    assert re.fullmatch(r"a warm-up and 3 rounds of the step and both trainers take about \d+:\d\d:\d\d", told[1])


def test_a_long_work_is_told_first_and_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 3 s by the clock: 4 rounds take 12 s, and a line comes after every 5 s or more."""
    now, told = [0.0], list[str]()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    interleaved({"step": lambda: now.__setitem__(0, now[0] + 3)}, 4, subject().mesh, Watch(tell=told.append))
    assert told == ["4 rounds of step take about 0:00:12; Ctrl-C ends them earlier",
                    "step, round 3 of 4, 0:00:06 left"]


# ------------------------------------------------------------------------------------------------ arithmetic


def test_ratios_are_taken_round_by_round() -> None:
    """A round at half speed does not move the ratio."""
    assert ratio([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0) and Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_ranks_add_their_cpu_time_and_the_slowest_one_counts() -> None:
    times = together([{"a": [(1.0, 5.0)], "b": [(1.0, 1.0)]}, {"a": [(2.0, 3.0)], "b": [(2.0, 2.0)]}])
    assert times == {"a": [Timing(3.0, 5.0)], "b": [Timing(3.0, 2.0)]}
    assert both(times, "a", "b", minus=1.0)["wall"]["median"] == 1.5


def test_the_fit_finds_the_constants_that_made_the_times() -> None:
    true = Costs(0.003, 0.001, 2e-9, 5e-9)
    points = [Point(peers, peers, batch, values, steps) for peers in (1, 2, 4) for batch in (8, 64)
              for values in (192, 3072) for steps in (1, 10)]
    found = Costs.fit(points, [true.seconds(p) for p in points])
    assert vars(found) == pytest.approx(vars(true), rel=1e-6)


def test_no_constant_of_the_fit_is_negative() -> None:
    points = [Point(1, 1, batch, 100, steps) for batch in (1, 10, 100) for steps in (1, 5)]
    found = Costs.fit(points, [max(1e-9, 1e-6 * p.batch * p.attack_steps - 1e-7) for p in points])
    assert min(vars(found).values()) >= 0


def test_a_prediction_by_hand() -> None:
    """16 GPUs with a peer each: 15 peers' AEs of 128 images of 3 x 224 x 224 and 16 x 1000 logits of each, in fp32."""
    rows = predictions(Costs(0, 0, 0, 0), load_config("bench_small", ["peers=2"]), (3, 32, 32), 10)
    (row,) = [r for r in rows if r["gpus"] == r["peers"] == 16 and r["network"] == "NVLink" and "ImageNet" in r["case"]]
    assert row["compute_s"] == pytest.approx(128 * (10 * 2 + 16 * 3) / 8250)
    assert row["exchange_s"] == pytest.approx(4 * 128 * 15 * (150528 + 16000) / 300e9 + 5 * 5e-6 * 5)
    assert len(rows) == 2 * len(NETWORKS) * (1 + 2 + 2 + 2) and IMAGENET.fixed == 0


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.slow
@pytest.mark.parametrize("command", ["step", "naive", pytest.param("scale", marks=pytest.mark.thorough)])
def test_a_command_writes_all_figures(command: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "figures.json"
    assert main([command, "--rounds", "1", "--image=3x8x8", "--json", str(file), *SMALL, "peers=2"]) == 0
    written = json.loads(file.read_text())
    assert written["command"] == command and written["figures"]["rounds"] == 1 and written["versions"]["torch"]
    assert written["what"].split(",")[0] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.thorough  # a minute of CPU time: smaller activations drown in what libraries take
@pytest.mark.timeout(600)
def test_recompute_holds_one_graph_and_keep_all_of_them(tmp_path: Path) -> None:
    """Large activations beside a small model: what a contestant keeps is what it costs."""
    file = tmp_path / "memory.json"
    assert main(["memory", "--json", str(file), "peers=4", "train.batch_size=128", "attack.steps=1"]) == 0
    found = json.loads(file.read_text())["figures"]
    assert found["recompute_over_naive"] < 1 < found["keep_over_naive"]


@pytest.mark.parametrize(("words", "message"), [
    (["fast"], "there are summary, step, naive, scale, memory"), (["stap"], "did you mean step?"),
    (["step", "--rounds", "0"], "a whole number from 1"),
    (["step", "--image", "32x32"], "three whole numbers such as 3x32x32"),
    (["step", "--rounds"], "expected one argument"),
    (["naive", "peers=1", "loss=trades"], "preset mat"), (["naive", "threat=l2", "attack.eps=0.5"], "threat (linf)"),
])
def test_mistakes_end_in_code_2_with_one_line(words: list[str], message: str, capsys: Any) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_one_file_knows_the_core_and_the_references_know_nothing_of_ours() -> None:
    """What changes in the core is adapted in one place; what it is compared with stands on its own."""
    texts = {file.name: file.read_text() for file in (Path(__file__).parents[2] / "benchmarks/speed").glob("*.py")}
    assert [name for name, text in texts.items() if "mat_dist.core" in text] == ["subject.py"]
    assert "import mat_dist" not in texts["references.py"] and "from mat_dist" not in texts["references.py"]


def test_the_package_does_without_the_benchmarks() -> None:
    """It neither imports nor installs them."""
    package = Path(mat_dist.__file__).parent
    imports = re.compile(r"^\s*(from|import) benchmarks", re.M)
    assert not [file for file in package.rglob("*.py") if imports.search(file.read_text())]
    assert "include = mat_dist, mat_dist.*\n" in (package.parent / "setup.cfg").read_text()


def test_options_may_have_an_equals_sign() -> None:
    options = read_options(["step", "--rounds=3", "--image", "1x28x28", "peers=2", "--json=a.json"])
    assert (options.rounds, options.image, options.json) == (3, (1, 28, 28), Path("a.json"))
    assert options.words == ("peers=2",)
    with pytest.raises(ConfigError, match="--classes: 'x' is not a whole number"):
        read_options(["step", "--classes=x"])


def test_the_summary_of_a_folder_has_a_row_per_benchmark(tmp_path: Path, capsys: Any) -> None:
    assert main(["naive", "--rounds", "1", "--image=3x8x8", f"--json={tmp_path / 'two.json'}", *SMALL]) == 0
    capsys.readouterr()
    assert main(["summary", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "two.json").read_text())["figures"]
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[4].strip("│ ").split("│")]
    assert cells[0] == "two" and cells[4] == f"{figures['naive_over_step']['wall']['median']:.2f}"
    assert cells[3] == f"{50_000 * figures['step_s']['median'] / 6:.1f}"
    assert main(["summary", str(tmp_path / "absent")]) == 2


# ------------------------------------------------------------------------------------------------ on a GPU


def test_engines_are_timed_one_after_another_and_say_what_they_could_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    config = load_config("bench_small", [*SMALL, "run.device=cpu"])
    mesh = Mesh(Placement.place(3, 1, 0), CPU)
    found = engines.measure_engines(config, mesh, (3, 8, 8), 5, 2, Watch())
    assert list(found["engines"]) == ["eager", "graph", "compile"] and found["launch_us"] > 0
    assert len(found["notes"]) == 1 and "there is no GPU" in found["notes"][0]
    print_result({"command": "engines", "what": "tiny", "figures": found})


@pytest.mark.parametrize(("kernel", "kind"), [
    ("sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32", "convolution"), ("triton_poi_fused_add_1", "compiled"),
    ("at::native::batch_norm_collect_statistics_channels_last_kernel", "batch norm"), ("Memset (Device)", "copy"),
    ("at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "elementwise")])
def test_kernels_belong_to_classes(kernel: str, kind: str) -> None:
    assert engines.class_of(kernel) == kind


def test_every_line_of_the_script_for_gpus_has_settings_that_exist() -> None:
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    arrays = {name: words.split() for name, words in re.findall(r"^(\w+)=\((.*)\)$", text, re.MULTILINE)}
    lines = re.findall(r"^measure (\w+) (\w+) (?:torchrun )?(.*)$", text, re.MULTILINE)
    assert len(lines) >= 8
    for name, command, rest in lines:
        words = [one for word in rest.split() for one in arrays.get(word.strip('"${}[@]'), [word])]
        config = load_config("bench_resnet18", words)
        assert command in COMMANDS and f"_{len(config.peers)}_" in name


def test_a_record_counts_the_seconds_of_all_attempts(tmp_path: Path) -> None:
    def times(key: str, *minutes: int) -> dict[str, Any]:
        told = [{"attempt": n, key: f"2026-01-01T00:{minute:02}:00+00:00", "code": 0, "state": "done"}
                for n, minute in enumerate(minutes, 1)]
        return {**told[-1], "attempts": told}

    folder = RunFolder(tmp_path)
    folder.environment.write_text(json.dumps(times("started", 1, 10)))
    folder.exit.write_text(json.dumps(times("time", 3, 14)))
    assert training_seconds(folder) == 6 * 60
    folder.environment.write_text(json.dumps(times("started", 1, 10, 20)))
    with pytest.raises(ConfigError, match="not told its end"):
        training_seconds(folder)
