"""Run folder: names, confinement, exit record, environment, JSON lines."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from mat_dist.config import dump_config, load_config
from mat_dist.errors import CheckpointError, ConfigError, MatError, NonFinite, OutputError
from mat_dist.runs import files, record
from mat_dist.runs.files import output_error
from mat_dist.runs.folder import RunFolder, create_or_open, existing
from mat_dist.runs.session import check_continues

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def make(root, name=None, config_name="digits", resume="auto", job_id=None):
    return create_or_open(root, name, config_name=config_name, resume=resume, job_id=job_id, now=NOW)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return make(tmp_path, "a")


def test_import_does_not_load_torch():
    code = "import sys, mat_dist.runs; sys.exit('torch' in sys.modules or 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_default_name_is_config_and_utc_time(tmp_path):
    assert [make(tmp_path).name for _ in range(3)] == [
        "digits-20260102T030405Z", "digits-20260102T030405Z-2", "digits-20260102T030405Z-3"]


def test_twenty_launches_in_one_second_get_twenty_folders(tmp_path):
    with ThreadPoolExecutor(20) as pool:
        names = list(pool.map(lambda _: make(tmp_path).name, range(20)))
    assert len(set(names)) == 20


def test_a_job_finds_its_folder_again(tmp_path):
    first = make(tmp_path, job_id="4711")
    assert first.name == "digits-job4711"
    record.write_exit(first, 1, None, "stopped")
    assert make(tmp_path, job_id="4711") == first


@pytest.mark.parametrize("name", ["\0", "a\0", "../a", "a/../a", "x" * 300, ""])
def test_a_name_that_no_run_can_have_leads_to_no_folder(tmp_path, name):
    """A start that is refused looks for the folder before its settings are read."""
    record.write_exit(make(tmp_path, "a"), 1, None, "stopped")
    (tmp_path / "b").mkdir()
    assert existing(tmp_path / "b" if name.startswith("..") else tmp_path, name, "digits", None) is None
    assert existing(tmp_path, "a", "digits", None) == RunFolder(tmp_path / "a")


def test_odd_job_and_config_names_stay_distinct_legal_and_short(tmp_path):
    odd = ["a/b", "a-b", "../x", "a b", "x" * 200, "$(id)", "\n", "", "-rf"]
    names = [make(tmp_path, job_id=one).name for one in odd]
    names += [make(tmp_path, config_name=one, job_id="1").name for one in odd if one != "-rf"]
    assert len(set(names)) == len(names)
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert all(len(name) <= 64 and make(tmp_path, name).name == name for name in names)


def hostile_names() -> list[str]:
    fixed = ["", ".", "..", "../x", "a/b", "/etc", "a\\b", "-rf", "--help", ".hidden", "_x", "a\0b", "a\nb", "a\n",
             "a\r", "$(id)", "`id`", "a;b", "a b", "a|b", "a&b", "a>b", "*", "a?", "~", "~root", "a'b", 'a"b', "x" * 65,
             "x" * 300, "ä", "日本", "a\u202eb", "a\u200bb", "%2e%2e", "a:b", "\ud800", "a\tb", "a=b", "{a}", "[a]",
             "a,b", "#", "@"]
    random.seed(0)
    bad = "/\\\0\n\r\t $`;|&<>*?~'\"(){}[]!#%^=+,:@é\x7f\x1b"
    while len(fixed) < 200:
        text = "".join(random.choice("ab1.-_" + bad) for _ in range(random.randint(1, 20)))
        fixed += [text] if set(text) & set(bad) else []
    return fixed


def test_200_hostile_names_are_refused_and_nothing_is_created(tmp_path):
    root = tmp_path / "root"
    names = hostile_names()
    assert len(names) == 200
    for name in names:
        with pytest.raises(ConfigError):
            make(root, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("root", ["", "a\0b", "~nobody-has-this-name/x"])
def test_a_root_that_is_no_path_is_refused(root):
    with pytest.raises(ConfigError, match=r"run\.root"):
        make(root, "a")


def test_symlinked_run_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "nowhere")
    for name in "ab":
        with pytest.raises(OutputError, match="symbolic link"):
            make(tmp_path / "root", name)
    assert list((tmp_path / "elsewhere").iterdir()) == [] and not (tmp_path / "nowhere").exists()


def test_symlinked_root_is_allowed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert make(tmp_path / "runs", "a").path == tmp_path / "disk" / "a"


@pytest.mark.parametrize("where", ["root", "run"])
def test_a_file_in_the_way_is_named(tmp_path, where):
    (tmp_path / ("runs" if where == "root" else "a")).write_text("mine")
    with pytest.raises(OutputError, match=r"runs|/a"):
        make(tmp_path / "runs" if where == "root" else tmp_path, "a")


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="not a run folder"):
        make(tmp_path, "a")
    assert os.listdir(tmp_path / "a") == ["thesis.tex"]


def test_a_run_killed_at_its_start_can_be_opened(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("config.yaml", "rank_0.log", ".exit.json.12.tmp"):
        (tmp_path / "a" / name).write_text("")
    assert make(tmp_path, "a").path == tmp_path / "a"


def test_resume_never_refuses_a_run_and_must_needs_one(tmp_path):
    with pytest.raises(CheckpointError):
        make(tmp_path, "a", resume="must")
    with pytest.raises(ConfigError):
        make(tmp_path, None, resume="must")
    run = make(tmp_path, "a", resume="never")
    record.write_exit(run, 1, None, "done")
    with pytest.raises(OutputError, match="exists already"):
        make(tmp_path, "a", resume="never")
    assert make(tmp_path, "a", resume="must") == run


@pytest.mark.parametrize("made", [None, "checkpoints", "metrics.jsonl"])
def test_other_settings_are_refused_only_where_something_was_trained(folder, made):
    folder.config.write_text(dump_config(load_config(None, ["data.name=folder", "data.root=mistyped"])))
    if made:
        (folder.path / made).mkdir()
    with pytest.raises(CheckpointError, match="other settings") if made else nullcontext():
        check_continues(folder, load_config(None, ["data.name=npz", "data.root=mistyped"]))


def test_unwritable_folder_is_an_output_error(folder, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        make(folder.path.parent, folder.name)


def test_paths_of_a_run(tmp_path):
    run = RunFolder(tmp_path)
    names = [run.config, run.environment, run.metrics, run.summary, run.checkpoints, run.eval, run.report, run.exit,
             run.rank_log(3)]
    assert [path.relative_to(tmp_path).as_posix() for path in names] == [
        "config.yaml", "environment.json", "metrics.jsonl", "summary.csv", "checkpoints", "eval", "report", "exit.json",
        "rank_3.log"]


def test_exit_file_keeps_every_attempt(folder):
    assert record.read_exit(folder) is None and record.next_attempt(folder) == 1
    record.write_exit(folder, 1, NonFinite("loss is NaN", "peer 2", "lower the rate"), "failed")
    record.write_exit(folder, 2, KeyError("x\ny"), "failed")
    assert not record.finished(folder)
    record.write_exit(folder, 3, None, "done")
    document = json.loads(folder.exit.read_text())
    assert [(one["attempt"], one["code"], one["state"]) for one in document["attempts"]] == [
        (1, 15, "failed"), (2, 70, "failed"), (3, 0, "done")]
    assert document["attempts"][0]["what"] == "loss is NaN" and document["attempts"][0]["how"] == "lower the rate"
    assert "KeyError" in document["attempts"][1]["what"] and "\n" not in document["attempts"][1]["what"]
    assert (document["code"], document["state"]) == (0, "done")
    assert record.finished(folder) and record.next_attempt(folder) == 4


def test_a_second_record_of_an_attempt_replaces_the_first(folder):
    record.write_exit(folder, 1, None, "stopped")
    record.write_exit(folder, 1, MatError("a", "b", "c"), "failed")
    assert [one["code"] for one in record.read_exit(folder)["attempts"]] == [70]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"attempts": 3}', b'{"attempts": [{"code": 0}]}', b"\xff",
                                    b'{"code": NaN, "state": "done", "attempts": [{"attempt": 1}]}', b"[" * 100000])
def test_damaged_exit_file_is_set_aside_not_lost(folder, damage):
    folder.exit.write_bytes(damage)
    assert record.next_attempt(folder) == 1
    record.write_exit(folder, 1, None, "done")
    folder.exit.write_bytes(damage)
    assert record.read_exit(folder) is None
    for name in ("exit.json.damaged", "exit.json.damaged-2"):
        assert (folder.path / name).read_bytes() == damage


def test_undecodable_text_can_be_recorded(folder):
    record.write_exit(folder, 1, OSError("\udcff"), "failed")
    assert "\udcff" in record.read_exit(folder)["attempts"][0]["what"]


def noted(folder, attempt, argv=("train.py",)):
    record.write_environment(folder, attempt=attempt, argv=argv, devices=["cpu"] * 2, seed=7,
                             placement={"peers": 4, "ranks": 2}, job_id="12")


def test_environment_lists_attempts_and_counts_killed_ones(folder):
    noted(folder, 1)
    assert record.next_attempt(folder) == 2  # attempt 1 left no exit record: it was killed
    noted(folder, 2, argv=["train.py", "run.seed=7"])
    document = json.loads(folder.environment.read_text())
    assert [one["attempt"] for one in document["attempts"]] == [1, 2]
    assert document["command"] == ["train.py", "run.seed=7"] and document["placement"] == {"peers": 4, "ranks": 2}
    assert document["versions"]["python"] == sys.version.split()[0]
    assert document["versions"]["torch"][0].isdigit()


def test_secrets_in_the_command_line_are_hidden():
    argv = ["train", "wandb.api_key=AAA1", "--token", "AAA2", "--hub-token=AAA3", "optim.lr=0.1", "PASSWORD=AAA4",
            "http://me:AAA5@host/x", "my_secret=AAA6=AAA7", "--credentials", "AAA8", "--dry-run"]
    shown = record.redact(argv)
    assert "AAA" not in " ".join(shown) and len(shown) == len(argv)
    assert shown[0] == "train" and "optim.lr=0.1" in shown and "--dry-run" in shown and "--token" in shown


def test_git_revision_is_that_of_the_checkout(monkeypatch, tmp_path):
    revision = record.git_revision()
    assert revision is None or len(revision.removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.git_revision() is None


def test_failed_exit_record_keeps_the_old_one(folder, monkeypatch):
    record.write_exit(folder, 1, None, "stopped")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match="No space left"):
        record.write_exit(folder, 2, None, "done")
    assert [one["attempt"] for one in record.read_exit(folder)["attempts"]] == [1]
    assert os.listdir(folder.path) == ["exit.json"]


def test_a_disk_without_free_inodes_is_not_told_as_free_bytes(folder, monkeypatch):
    real = os.statvfs(folder.path)
    for favail, most, says in ((0, 100, "no inode is free"), (5, 100, "bytes free"), (0, 0, "bytes free")):
        stat = {"f_bavail": 1000, "f_frsize": real.f_frsize, "f_favail": favail, "f_files": most}
        monkeypatch.setattr(os, "statvfs", lambda _, stat=stat: SimpleNamespace(**stat))
        told = str(output_error(OSError(28, "No space left on device"), folder.exit, 10))
        assert says in told and ("bytes" in told) == (says == "bytes free")


def test_a_full_disk_does_not_leave_the_end_of_the_attempt_before(folder, monkeypatch):
    record.write_exit(folder, 1, None, "done")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(files, "write_all", full)
    record.write_exit(folder, 2, OutputError("full", "disk", "free space"), record.REFUSED)
    document = record.read_exit(folder)
    assert (document["code"], [one["code"] for one in document["attempts"]]) == (5, [0, 5])
    assert record.finished(folder)  # a start that was refused leaves the run as it was


@pytest.mark.parametrize("name", [
    "checkpoints", "eval", "config.yaml", "environment.json", "exit.json", "metrics.jsonl", "summary.csv", "lock",
    "rank_0.log", "rank_1.log", "checkpoints/latest", "checkpoints/best"])
@pytest.mark.parametrize("kind", ["other", "pipe", "link to nothing"])
def test_what_stands_in_the_place_of_a_runs_file_or_folder_is_named(name, kind, folder):
    record.write_exit(folder, 1, None, "stopped")
    path = folder.path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    elif name in ("checkpoints", "eval"):
        path.write_text("mine")
    else:
        path.mkdir()
    with pytest.raises(OutputError, match="something else stands there") as caught:
        make(folder.path.parent, folder.name)
    assert caught.value.where == str(path)
