"""Whole runs with ranks as threads: stopping, resuming on other rank counts, evaluations that are due."""

from __future__ import annotations

import functools
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mat_dist import checkpoints, rng
from mat_dist.checkpoints import load, load_manifest, read_best
from mat_dist.config import load_config
from mat_dist.data import load_data
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import CheckpointError, ConfigError, OutputError, StopRequested
from mat_dist.evaluation import during_training
from mat_dist.evaluation.attacks import AttackPlan
from mat_dist.evaluation.during_training import Evaluations
from mat_dist.evaluation.survivors import target_rows
from mat_dist.models import registry
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.metrics import Reporter
from mat_dist.runs.session import Run as OpenRun
from mat_dist.runs.session import open_run
from mat_dist.runs.trackers import open_reporter
from mat_dist.training.trainer import Trainer
from tests.small_runs import SMALL, Finished, as_format_1, robust_of, run_small

pytestmark = pytest.mark.slow  # many small trainings

Run = Callable[..., Finished]
Ranks = Callable[..., list[Any]]
STEPS = 6
BASE = (f"train.max_steps={STEPS}", "train.epochs=2")
AVERAGED = ("optim.ema_decay=0.9", "optim.clip_norm=1.0")
EVALUATED = ("eval.every=1", "train.max_steps=null", "eval.chunk=20", "eval.size=25")  # after steps 4 and 8


@pytest.fixture(autouse=True)
def one_thread_at_a_time_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks in one process share torch's global generator, which builds the models: let them take turns. Forwards, in
    which replicas wait for each other, must not; the models here draw nothing."""
    lock, keyed = threading.RLock(), rng.keyed_rng

    @contextmanager
    def locked(stream: int) -> Iterator[None]:
        with lock, keyed(stream):
            yield

    monkeypatch.setattr(registry, "rng", SimpleNamespace(key=rng.key, keyed_rng=locked))


@pytest.fixture
def cohort_run(tmp_path: Path, run_ranks: Ranks) -> Run:
    """cohort_run(name, world, *overrides, stop_after=, on_rank=): train in `world` threads; a stop request is no error.

    `stop_after` = n: one rank (the last by default) is asked to stop while it fetches the batch of step n.
    """
    def run(name: str, world: int, *overrides: str, stop_after: int | None = None) -> Finished:
        config = load_config(None, [*SMALL, *BASE, f"run.root={tmp_path}", f"run.name={name}", *overrides])
        data = load_data(config.data, seed=config.run.seed, batch_size=config.train.batch_size)

        def rank(mesh: Mesh) -> None:
            launch = Launch(mesh.placement.rank, world)
            with open_run(config, mesh, launch, config_name="test", argv=[], plugins={}) as opened:
                flag = StopFlag()
                evaluations = Evaluations(config, mesh, opened, data, flag, open_reporter(opened, config))
                member = Trainer(config, mesh, opened, data, flag, evaluations)
                if launch.rank == world - 1 and stop_after is not None:
                    member.batches.at = asking(member.batches.at, flag, stop_after)  # type: ignore[method-assign]
                member.fit()

        results = run_ranks(rank, len(config.peers), world, errors="return")
        failed = [r for r in results if isinstance(r, Exception) and not isinstance(r, StopRequested)]
        assert len({str(r) for r in results}) == 1  # all ranks leave with one text
        if failed:
            raise failed[0]
        return Finished(75 if results[0] is not None else 0, RunFolder(tmp_path / name))

    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """The train command in one process, once for each set of settings."""
    @functools.cache
    def run(*overrides: str) -> Finished:
        return run_small(tmp_path_factory.mktemp("whole"), "whole", *BASE, *overrides)

    return run


def asking(fetch: Callable[[int], Any], flag: StopFlag, after: int) -> Callable[[int], Any]:
    def at(step: int) -> Any:
        if step == after - 1:
            flag.take(signal.SIGTERM, None)
        return fetch(step)
    return at


# ------------------------------------------------------------------------------------------------ stop and resume


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_run_stopped_at_any_step_ends_with_the_same_weights(stop: int, cohort_run: Run, uninterrupted: Run) -> None:
    first = cohort_run("stopped", 2, *AVERAGED, stop_after=stop)
    assert first.code == 75 and first.steps()[-1] == stop
    second = cohort_run("stopped", 2, *AVERAGED)
    assert second.hashes() == uninterrupted(*AVERAGED).hashes()
    assert second.codes() == [75, 0]


def test_perturbations_of_the_epoch_before_survive_a_stop_and_a_move(cohort_run: Run, uninterrupted: Run) -> None:
    settings = ("loss=at", "methods.warm_start.reset_epochs=0", "data.augment.pad=1", "data.augment.flip=true")
    assert cohort_run("stopped", 2, *settings, stop_after=5).steps()[-1] == 5  # in the second epoch
    assert cohort_run("stopped", 1, *settings).hashes() == uninterrupted(*settings).hashes()


def test_free_training_goes_on_in_the_midst_of_a_batch_and_an_epoch_is_longer(cohort_run: Run,
                                                                              uninterrupted: Run) -> None:
    settings = ("loss=at", "attack.method=free", "train.replays=2", "train.max_steps=null", "train.epochs=1")
    assert cohort_run("stopped", 2, *settings, stop_after=3).steps() == [5]  # the first replay of the third batch
    whole = uninterrupted(*settings)
    assert whole.steps() == [8] and cohort_run("stopped", 1, *settings).hashes() == whole.hashes()


@pytest.mark.parametrize("worlds", [(4, 2, 1), (1, 4, 2)], ids=str)
def test_a_run_may_move_to_other_rank_counts(worlds: tuple[int, ...], cohort_run: Run, uninterrupted: Run) -> None:
    settings = ("peers=4", *AVERAGED)
    assert cohort_run("moving", worlds[0], *settings, stop_after=2).steps() == [2]
    assert cohort_run("moving", worlds[1], *settings, stop_after=5).steps() == [2, 4, 5]  # 4: the end of an epoch
    moved = cohort_run("moving", worlds[2], *settings)
    assert moved.hashes() == uninterrupted(*settings).hashes() and moved.codes() == [75, 75, 0]


def test_ranks_with_other_plug_ins_stop_before_a_folder_is_made(tmp_path: Path, run_ranks: Ranks) -> None:
    config = load_config(None, [*SMALL, f"run.root={tmp_path}", "run.name=run"])

    def rank(mesh: Mesh) -> None:
        launch, digest = Launch(mesh.placement.rank, 2), f"{mesh.placement.rank}" * 64
        with open_run(config, mesh, launch, config_name="test", argv=[], plugins={"net.py": digest}):
            pass

    first, second = run_ranks(rank, 2, 2, errors="return")
    assert isinstance(first, ConfigError) and str(first) == str(second) and not (tmp_path / "run").exists()
    assert "rank 1 has other plug-ins than rank 0: net.py (000000000000) -> net.py (111111111111)" in str(first)


def test_all_ranks_leave_with_one_text_where_the_lock_is_lost(tmp_path: Path, cohort_run: Run,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoints.begin

    def begin(folder: RunFolder, *args: Any) -> Path:
        made = real(folder, *args)
        folder.lock.unlink()
        return made

    monkeypatch.setattr(checkpoints, "begin", begin)
    with pytest.raises(OutputError, match="the lock file has been removed"):
        cohort_run("run", 2, "log.every=100")
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_a_stop_request_in_the_last_step_is_a_finished_run(cohort_run: Run) -> None:
    run = cohort_run("last", 2, stop_after=STEPS)
    assert run.code == 0 and run.codes() == [0] and run.steps()[-1] == STEPS


def test_a_damaged_newest_checkpoint_costs_its_steps_and_no_bit(cohort_run: Run, uninterrupted: Run) -> None:
    settings = (*AVERAGED, "checkpoint.every_steps=1")
    run = cohort_run("damaged", 2, *settings, stop_after=4)
    file = run.folder.checkpoints / "step_00000004" / "peer_1.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    again = cohort_run("damaged", 1, *settings)
    assert again.hashes() == uninterrupted(*AVERAGED).hashes()
    assert "continuing from step 3" in again.folder.rank_log(0).read_text()


def test_a_run_of_an_older_format_goes_on_without_the_loss_of_a_bit(cohort_run: Run, uninterrupted: Run) -> None:
    run = cohort_run("older", 2, *AVERAGED, stop_after=4)
    as_format_1(run.folder.checkpoints / "step_00000004")
    assert not list(run.folder.path.rglob("*.safetensors"))
    again = cohort_run("older", 1, *AVERAGED)
    assert again.hashes() == uninterrupted(*AVERAGED).hashes() and again.steps()[0] == 4
    assert [load_manifest(run.folder, step).format for step in (4, STEPS)] == [1, 2]


def test_a_finished_run_goes_on_when_it_is_given_more_epochs(cohort_run: Run, uninterrupted: Run) -> None:
    settings = ("train.max_steps=null", "optim.schedule=constant")
    assert cohort_run("longer", 2, *settings, "train.epochs=1").steps() == [4]
    longer = cohort_run("longer", 1, *settings)
    assert longer.steps() == [4, 8] and longer.hashes() == uninterrupted(*settings).hashes()


# ------------------------------------------------------------------------------------------------ evaluations

def robust(run: Finished, step: int) -> dict[tuple[str, str], float]:
    return robust_of(run.result(f"validation_step_{step:08d}"))


@pytest.mark.parametrize("ema", ["null", "0.5"])
def test_best_has_the_highest_mean_robust_accuracy_of_the_peers(ema: str, cohort_run: Run) -> None:
    run = cohort_run("best", 1, *EVALUATED, "train.epochs=4", "optim.lr=0.5", f"optim.ema_decay={ema}")
    weights = "raw" if ema == "null" else "ema"
    scores = {step: sum(robust(run, step)[f"peer{i}", weights] for i in range(2)) / 2 for step in (4, 8, 12, 16)}
    best = read_best(run.folder)
    assert best is not None and best.score == pytest.approx(max(scores.values()))
    assert best.step == max(scores, key=lambda step: (scores[step], -step))  # the first of equals
    assert len(set(scores.values())) > 1


def test_scores_of_another_attack_are_measured_again_before_they_are_compared(cohort_run: Run) -> None:
    """The second attempt meets PGD-20 on more images; so does the best checkpoint of the first one."""
    settings = (*EVALUATED, "optim.lr=0.5", "optim.schedule=constant")
    before = read_best(cohort_run("harder", 1, *settings).folder)
    assert before is not None and before.attack == "PGD-1 on 25 images"
    hard = (*settings, "train.epochs=3", "eval.steps=20", "eval.size=40")
    again, direct = cohort_run("harder", 2, *hard), cohort_run("direct", 1, *hard)
    scores = {step: sum(robust(direct, step)[f"peer{i}", "raw"] for i in range(2)) / 2 for step in (before.step, 12)}
    best = read_best(again.folder)
    assert best is not None and (best.score, best.attack) == (max(scores.values()), "PGD-20 on 40 images")
    assert best.step == max(scores, key=lambda step: (scores[step], -step))
    assert (f"step {before.step}, the best so far, had {100 * before.score:.1f} % under PGD-1 on 25 images; under "
            f"PGD-20 on 40 images it has {100 * scores[before.step]:.1f} %") in again.folder.rank_log(0).read_text()
    assert robust_of(again.result(f"validation_step_{before.step:08d}-2")) == robust(direct, before.step)


def test_an_evaluation_does_not_depend_on_the_number_of_ranks(uninterrupted: Run, run_ranks: Ranks) -> None:
    """Chunks of 14 of 40 images: ranks get 3, 2 + 1 or 1 + 1 + 1 + 0 of them."""
    run = uninterrupted("peers=4", "peers.1.threat=l2", "peers.1.threat.eps=0.5", "peers.0.optim.ema_decay=0.5",
                        "eval.chunk=14")
    config = load_config(str(run.folder.config))
    data = load_data(config.data, seed=config.run.seed, batch_size=config.train.batch_size)
    manifest = load_manifest(run.folder)

    def rank(mesh: Mesh) -> Any:
        opened = OpenRun(run.folder, 1, logging.getLogger("nowhere"), [], mesh)
        one = Evaluations(config, mesh, opened, data, StopFlag(), Reporter())
        return one.attack(manifest, replace(one.job(1), plans={"pgd": AttackPlan(1, restarts=2)}), "val", None)

    tables = {world: run_ranks(rank, 4, world) for world in (1, 2, 4)}
    whole = tables[1][0]
    for world, (first, *others) in tables.items():
        assert first == whole and others == [{"raw": [], "ema": []}] * (world - 1)
    rows = target_rows({"raw": whole["raw"]})
    assert [len(chunk["samples"]) for chunk in whole["ema"]] == [14, 14, 12] and len(rows) == 5
    assert rows[0]["n"] == 40 and rows[0]["accuracy"]["clean"] > 0


def test_a_stop_at_the_end_of_an_epoch_leaves_its_evaluation_to_the_next_attempt(cohort_run: Run,
                                                                                  uninterrupted: Run) -> None:
    whole = uninterrupted(*EVALUATED)
    stopped = cohort_run("stopped", 2, *EVALUATED, stop_after=4)
    assert stopped.steps() == [4] and not stopped.folder.eval.exists()
    again = cohort_run("stopped", 1, *EVALUATED)
    assert again.hashes() == whole.hashes()
    for step in (4, 8):
        assert robust(again, step) == robust(whole, step)
    assert [r["step"] for r in again.records("epoch")] == [4, 8]
    assert read_best(again.folder).step == read_best(whole.folder).step  # type: ignore[union-attr]


@pytest.mark.parametrize("broken,call", [("attack", 1), ("attack", 2), ("write_result", 2)])
def test_an_evaluation_that_failed_is_done_first_on_resume(broken: str, call: int, cohort_run: Run, uninterrupted: Run,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a checkpoint and the end of its evaluation; for call 2 nothing else is left to do."""
    whole = uninterrupted(*EVALUATED)
    calls: list[str] = []
    owner = Evaluations if broken == "attack" else during_training
    original = getattr(owner, broken)

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(broken)
        if len(calls) == call:
            raise OutputError("disk full", "eval", "free some space")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, broken, failing)
    with pytest.raises(OutputError):
        cohort_run("failed", 1, *EVALUATED)
    again = cohort_run("failed", 1, *EVALUATED)
    assert again.hashes() == whole.hashes() and again.codes() == [5, 0]
    assert f"continuing after step {4 * call} of 8" in again.folder.rank_log(0).read_text()
    assert sorted(p.name for p in again.folder.eval.iterdir()) == sorted(p.name for p in whole.folder.eval.iterdir())
    assert all(robust(again, step) == robust(whole, step) for step in (4, 8))
    assert read_best(again.folder) == read_best(whole.folder)


def test_an_evaluation_that_was_done_is_not_repeated(cohort_run: Run) -> None:
    stopped = cohort_run("stopped", 1, *EVALUATED, stop_after=5)
    before = {p.name: p.read_bytes() for p in stopped.folder.eval.iterdir()}
    again = cohort_run("stopped", 1, *EVALUATED)
    after = {p.name: p.read_bytes() for p in again.folder.eval.iterdir()}
    assert sorted(after) == ["validation_step_00000004.json", "validation_step_00000008.json"]
    assert before == {name: after[name] for name in before}


def test_an_interrupted_test_is_repeated_without_training(cohort_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (*EVALUATED, "eval.test_steps=1")
    original = Evaluations.attack

    def failing(self: Evaluations, manifest: Any, job: Any, split: str, size: Any) -> Any:
        if split == "test":
            raise OutputError("disk full", "eval", "free some space")
        return original(self, manifest, job, split, size)

    monkeypatch.setattr(Evaluations, "attack", failing)
    with pytest.raises(OutputError):
        cohort_run("tested", 1, *settings)
    monkeypatch.setattr(Evaluations, "attack", original)
    again = cohort_run("tested", 1, *settings)
    assert [r["attempt"] for r in again.records("epoch")] == [1, 1]  # nothing was trained or validated again
    best = read_best(again.folder)
    assert best is not None
    names = {p.stem for p in again.folder.eval.glob("test_*.json")}
    assert names == {f"test_best_step_{best.step:08d}", "test_last_step_00000008"}


def test_a_damaged_best_checkpoint_does_not_keep_the_last_one_from_its_test(cohort_run: Run, tmp_path: Path,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    original, last = Evaluations.attack, []

    def damaged(self: Evaluations, manifest: Any, job: Any, split: str, size: Any) -> Any:
        if split == "test" and not last:
            last.append(manifest.step)
            raise CheckpointError("peer_0.safetensors is damaged", "step_00000004", "restore it")
        return original(self, manifest, job, split, size)

    monkeypatch.setattr(Evaluations, "attack", damaged)
    monkeypatch.setattr(Trainer, "best", lambda self: load_manifest(self.run.folder, 4))
    with pytest.raises(CheckpointError, match="peer_0"):
        cohort_run("half", 1, *EVALUATED, "eval.test_steps=1")
    assert last == [4] and [p.stem for p in tmp_path.rglob("test_*.json")] == ["test_last_step_00000008"]


def test_without_evaluations_only_the_last_checkpoint_is_tested(cohort_run: Run) -> None:
    run = cohort_run("unjudged", 1, "eval.test_steps=1", "eval.every=0")
    assert [p.name for p in run.folder.eval.glob("*.json")] == ["test_last_step_00000006.json"]
    assert read_best(run.folder) is None


# ------------------------------------------------------------------------------------------------ roles and baselines


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of two peers, first and second, that nobody evaluated."""
    return run_small(tmp_path_factory.mktemp("teacher"), "run", "peers=2", "loss=at", "train.max_steps=2",
                     "peers.0.name=first", "peers.1.name=second")


def baselines(teacher: Finished) -> tuple[str, ...]:
    """E-AT with AWP, a student of a frozen teacher, a generalist, a specialist."""
    return ("peers=4", "loss=at", "peers.0.union.strategy=eat", "peers.0.union.threats=linf:0.1,l1:2",
            "peers.0.methods.awp.gamma=0.02", "peers.1.loss=rslad",
            "peers.2.frozen=true", f"peers.2.init_from={teacher.folder.path}:second", "peers.3.role=generalist",
            "peers.3.loss=mat", "peers.3.loss.warmup_epochs=1")


@pytest.mark.parametrize("stop,worlds", [(1, (1, 1)), (3, (4, 1)), (4, (2, 4))], ids=str)
def test_eat_awp_frozen_teachers_and_warm_ups_go_on_as_if_nothing_had_happened(
        stop: int, worlds: tuple[int, int], teacher: Finished, cohort_run: Run, uninterrupted: Run) -> None:
    settings = (*baselines(teacher), "optim.ema_decay=0.9")
    whole = uninterrupted(*settings)
    assert cohort_run("stopped", worlds[0], *settings, stop_after=stop).code == 75
    again = cohort_run("stopped", worlds[1], *settings)
    assert again.hashes() == whole.hashes()
    told = [run.peers()[0]["methods"]["unions"]["eat"] for run in (whole, again)]
    assert told[0] == told[1] and sum(told[0]["seen"]) == STEPS * 16


@pytest.mark.parametrize("worlds", [(1, 4), (4, 2)], ids=str)
def test_experts_that_teach_on_the_views_of_a_generalist_go_on_after_a_move(worlds: tuple[int, int], cohort_run: Run,
                                                                           uninterrupted: Run) -> None:
    settings = ("peers=4", "peers.0.role=specialist", "peers.1.role=specialist", "peers.1.threat=l2",
                "peers.1.threat.eps=0.1", "peers.2.role=specialist", "peers.2.threat=l1", "peers.2.threat.eps=0.1",
                "peers.3.role=generalist", "loss=mat_union", "peers.1.loss.kd_weight=0.3",
                "peers.3.loss.hard_own=0.5", "peers.3.union.threats=linf:0.1,l2:0.5,l1:2", "optim.ema_decay=0.9")
    whole = uninterrupted(*settings)
    assert cohort_run("stopped", worlds[0], *settings, stop_after=3).code == 75
    assert cohort_run("stopped", worlds[1], *settings).hashes() == whole.hashes()


def test_a_run_with_cutmix_moves_to_other_rank_counts(cohort_run: Run, uninterrupted: Run) -> None:
    settings = ("data.augment.cutmix=0.8", "data.augment.pad=1", "loss.label_smoothing=0.1")
    assert cohort_run("moving", 2, *settings, stop_after=3).code == 75
    moved = cohort_run("moving", 1, *settings)
    assert moved.hashes() == uninterrupted(*settings).hashes()


def test_a_frozen_peer_keeps_its_weights_and_is_not_in_the_ensemble(teacher: Finished, uninterrupted: Run) -> None:
    run = uninterrupted(*baselines(teacher), "eval.every=1", "train.max_steps=null")
    source = teacher.peers()[1]["model"]
    assert all((v == source[k]).all() for k, v in run.peers()[2]["model"].items())
    model = load.load(run.folder.path, "ensemble", which="latest")
    assert len(next(iter(model.children()))) == 3  # type: ignore[arg-type]


def test_best_is_chosen_by_the_generalist(cohort_run: Run) -> None:
    roles = ("peers=3", "peers.0.role=specialist", "peers.1.role=specialist", "peers.2.role=generalist",
             "peers.1.threat=l2", "peers.1.threat.eps=0.5")
    run = cohort_run("best", 1, *EVALUATED, "train.epochs=4", "optim.lr=0.5", *roles)
    scores = {step: robust(run, step)["peer2", "raw"] for step in (4, 8, 12, 16)}
    best = read_best(run.folder)
    assert best is not None and best.score == pytest.approx(max(scores.values()))
    means = {step: sum(robust(run, step)[f"peer{i}", "raw"] for i in range(3)) / 3 for step in scores}
    assert means != pytest.approx(scores)


def test_a_peer_starts_from_the_weights_of_a_run(teacher: Finished, tmp_path: Path) -> None:
    """At rate 0 they stay."""
    run = run_small(tmp_path, "run", f"peers.0.init_from={teacher.folder.path}:first", "peers.1.init_from="
                    f"{teacher.folder.path}:second", "optim.lr=1e-30", "train.max_steps=1", "loss=at")
    for mine, theirs in zip(run.peers(), teacher.peers(), strict=True):
        assert all((v == theirs["model"][k]).all() for k, v in mine["model"].items() if k.endswith("weight"))


@pytest.mark.parametrize("source,settings,found", [
    ("{root}/nothing", (), "there is no such file or folder of a run"),
    ("{run}", (), "no evaluation says which peer is best"),
    ("{run}:third", (), "there is no peer 'third'"),
    ("{run}:first", ("peers.0.model.width=0.5",), "11 of 17 weights have another shape"),
    ("{run}:first", ("peers.0.model.name=small_cnn",), "the weights do not fit the network: 9 missing"),
    ("{run}:first", ("data.name=npz", "data.root={root}/data.npz"),
     "of 10 classes, these data have (1, 8, 8) of 3")],
    ids=lambda v: v if isinstance(v, str) else "")
def test_weights_that_cannot_be_taken_are_one_line_and_code_4(
        source: str, settings: tuple[str, ...], found: str, teacher: Finished, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    splits, noise = (("train", 128), ("test", 40)), np.random.default_rng(0)
    labels = {f"y_{split}": np.arange(count) % 3 for split, count in splits}
    images = {f"x_{split}": noise.integers(0, 256, (count, 8, 8), np.uint8) for split, count in splits}
    np.savez(tmp_path / "data.npz", **images, **labels)
    words = [word.format(root=tmp_path, run=teacher.folder.path) for word in (f"peers.0.init_from={source}", *settings)]
    assert run_small(tmp_path, "run", *words).code == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and found in lines[0]


@pytest.mark.thorough
def test_swa_is_the_same_on_every_placement_and_after_a_stop(cohort_run: Run) -> None:
    settings = ("train.max_steps=null", "train.epochs=4", "methods.swa.start=0.5", "checkpoint.every_steps=1")
    whole = cohort_run("whole", 1, *settings)
    assert cohort_run("split", 2, *settings).hashes() == whole.hashes()
    stopped = cohort_run("stopped", 1, *settings, stop_after=10)
    assert max(stopped.steps()) < 16
    assert cohort_run("stopped", 2, *settings).hashes() == whole.hashes()
    assert cohort_run("replicas", 4, *settings).peers()[0]["ema"] is not None
