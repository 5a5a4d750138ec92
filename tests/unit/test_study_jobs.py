"""Several runs of a study at a time: order, failures, and what the finished ones ran on."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from benchmarks.study import runs
from benchmarks.study.__main__ import read_options
from benchmarks.study.runs import Job, Runner, last_line, machines, side_by_side
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import ConfigError


def run_of(folder: Path, row: str, *settings: str, seed: int = 0) -> Job:
    return Job.make(row, seed, folder, "digits", settings)


def test_two_jobs_run_at_the_same_time(tmp_path: Path) -> None:
    """Each waits for the other: one after the other, the barrier would break."""
    both = threading.Barrier(2, timeout=30)
    ended = side_by_side([(run_of(tmp_path, name), both.wait) for name in ("a", "b")], 2)
    assert sorted(future.result() for _, future in ended) == [0, 1]


def test_a_run_waits_for_the_one_whose_peers_it_takes_and_for_no_other(tmp_path: Path) -> None:
    """With a barrier only c and b can pass, b of seed 1 must not wait for a of seed 0, which waits for it."""
    order: list[str] = []
    other_seed = threading.Event()

    def first() -> None:
        assert other_seed.wait(30)
        order.append("a")

    needs_a = ("peers=2", "peers.1.init_from=RUN(a):peer1")
    tasks = [(run_of(tmp_path, "a"), first), (run_of(tmp_path, "b", *needs_a), lambda: order.append("b")),
             (run_of(tmp_path, "b", *needs_a, seed=1), other_seed.set)]
    numbers = [number for number, future in side_by_side(tasks, 3) if future.result() is None]
    assert order == ["a", "b"] and sorted(numbers) == [0, 1, 2]


def test_one_failed_run_stops_no_other(tmp_path: Path) -> None:
    def fails() -> None:
        raise ConfigError("broken", "here", "mend it")

    found = dict(side_by_side([(run_of(tmp_path, "a"), fails), (run_of(tmp_path, "b"), lambda: 7)], 1))
    assert isinstance(found[0].exception(), ConfigError) and found[1].result() == 7


def test_where_the_study_fails_what_has_not_begun_never_does(tmp_path: Path) -> None:
    """As with a full disk: the second run is under way, the others wait."""
    begun: list[int] = []
    free = threading.Event()

    def task(number: int) -> None:
        begun.append(number)
        assert number == 0 or free.wait(30)

    tasks = [(run_of(tmp_path, f"row{n}"), partial(task, n)) for n in range(8)]
    runner = Runner(StopFlag(), None, print)
    with pytest.raises(OSError, match="full"), closing(side_by_side(tasks, 2)) as ended, runner.ending():
        for number, _ in ended:
            free.set()
            raise OSError(f"the disk is full after {number}")
    assert runner.over and len(begun) < 8


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1000"])
def test_a_number_of_jobs_must_make_sense(value: str) -> None:
    with pytest.raises(ConfigError, match="--jobs"):
        read_options(["evidence", f"--jobs={value}"])


def test_the_machines_of_a_table_are_those_of_its_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two runs on one device and one on another, as their records say; what is not finished does not count."""
    monkeypatch.setattr(Job, "done", property(lambda self: self.row != "d"))
    for row, device in (("a", "cpu"), ("b", "cpu"), ("c", "H100"), ("d", "cpu")):
        record = {"attempt": 1, "devices": [device] * 2, "git": "abc", "versions": {"torch": "2", "system": "x"}}
        (tmp_path / f"{row}_0").mkdir()
        (tmp_path / f"{row}_0" / "environment.json").write_text(json.dumps({**record, "attempts": [record]}))
    found = machines(run_of(tmp_path, row) for row in "abcd")
    assert found == [{"devices": ["cpu"], "git": "abc", "versions": {"torch": "2"}, "runs": 2},
                     {"devices": ["H100"], "git": "abc", "versions": {"torch": "2"}, "runs": 1}]


def test_a_run_of_a_version_with_other_settings_is_not_done_and_stops_no_other(tmp_path: Path) -> None:
    made = run_of(tmp_path, "a")
    made.folder.path.mkdir()
    made.folder.config.write_text("step: {unheard_of: 1}\n")
    assert not made.done and "unheard_of" in made.conflicts[0]
    assert machines([made]) == []


def test_a_study_whose_folder_moved_keeps_the_runs_that_begin_from_others(tmp_path: Path) -> None:
    needs = ("peers=2", "loss=mat_share", "peers.1.frozen=true", "peers.1.init_from=RUN(a):peer1")
    before, now = run_of(tmp_path / "before", "b", *needs), run_of(tmp_path / "now", "b", *needs)
    now.folder.path.mkdir(parents=True)
    now.folder.config.write_text(json.dumps(before.config.model_dump(mode="json")))
    assert now.conflicts == []
    assert "optim.lr" in run_of(tmp_path / "now", "b", *needs, "optim.lr=0.5").conflicts[0]
    other = [word.replace("RUN(a)", "RUN(c)") for word in needs]
    assert "init_from" in run_of(tmp_path / "now", "b", *other).conflicts[0]


def test_what_a_command_printed_last_is_one_line(tmp_path: Path) -> None:
    """As the study tells it of a long run; nothing printed yet is no mistake."""
    log = tmp_path / "at_0.log"
    log.write_text("")
    assert last_line(log) == "started"
    log.write_text("step 1\n" + "step  2 \t" + "x" * 200 + "\n\n")
    assert last_line(log) == "step 2 " + "x" * 93


def test_a_long_command_is_told_of_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.py").write_text("import time; print('step 7', flush=True); time.sleep(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runs, "EVERY", 0.3)
    told: list[str] = []
    assert Runner(StopFlag(), None, told.append).run("slow", (), tmp_path / "at_0.log") == 0
    assert "at_0: step 7" in told
