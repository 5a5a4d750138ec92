"""One process makes, the others wait; downloads."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from mat_dist.data import shared as module
from mat_dist.data.shared import fetch_once, once
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import DataError, OutputError, StopRequested


def product(folder: Path):
    path = folder / "product"
    return lambda: path.read_text() if path.exists() else None


def maker(folder: Path, calls: list[int]):
    def make() -> None:
        calls.append(threading.get_ident())
        time.sleep(0.1)
        (folder / f"half_{os.getpid()}").write_text("made")
        os.replace(folder / f"half_{os.getpid()}", folder / "product")  # a look must not find half of it

    return make


def run_once(folder: Path, calls: list[int], build: bool = True, **other) -> str:
    return once(product(folder), maker(folder, calls), folder / "lock", build=build, what="it", poll=0.01, **other)


def test_two_readers_get_what_one_builder_makes_and_it_is_made_once(tmp_path):
    calls: list[int] = []
    results: list[str] = []
    threads = [threading.Thread(target=lambda build=build: results.append(run_once(tmp_path, calls, build)))
               for build in (False, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == ["made"] * 3
    assert calls == [threads[2].ident]


def test_of_many_processes_that_may_build_one_does(tmp_path):
    def work() -> None:
        calls: list[int] = []
        run_once(tmp_path, calls)
        (tmp_path / f"done_{os.getpid()}").write_text(str(len(calls)))

    processes = [multiprocessing.get_context("fork").Process(target=work) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert sorted(path.read_text() for path in tmp_path.glob("done_*")) == ["0"] * 5 + ["1"]


def test_a_builder_waits_for_the_one_that_holds_the_lock(tmp_path):
    calls: list[int] = []
    with FileLock(tmp_path / "lock"):
        second = threading.Thread(target=run_once, args=(tmp_path, calls))
        second.start()
        time.sleep(0.05)
        (tmp_path / "product").write_text("of the first")
    second.join(20)
    assert not second.is_alive()
    assert calls == []


def test_a_reader_without_a_builder_gives_up_with_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    with pytest.raises(DataError, match="the process that makes it stopped or did not start"):
        run_once(tmp_path, [], build=False)


def test_readers_do_not_wait_long_for_a_builder_that_gave_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.05)
    failed: list[BaseException] = []

    def read() -> None:
        try:
            run_once(tmp_path, [], build=False)
        except DataError as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    with pytest.raises(RuntimeError), FileLock(tmp_path / "lock"):
        reader.start()
        time.sleep(0.3)
        raise RuntimeError("the builder fails")
    reader.join(20)
    assert len(failed) == 1


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    def hold() -> None:
        FileLock(tmp_path / "lock").acquire()
        (tmp_path / "held").touch()
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    calls: list[int] = []
    assert run_once(tmp_path, calls) == "made" and len(calls) == 1


@pytest.mark.parametrize("left", [b"", b"1\nother-node\n", b'{"pid": 1, "host": "other-node", "job": "17"}'])
def test_a_lock_file_that_was_left_means_nothing_whoever_made_it(tmp_path, monkeypatch, left):
    """Of a killed builder on another node, or in a container, where this process may have its number."""
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    (tmp_path / "lock").write_bytes(left.replace(b"1", str(os.getpid()).encode(), 1))
    calls: list[int] = []
    assert run_once(tmp_path, calls) == "made" and len(calls) == 1
    (tmp_path / "lock").write_bytes(left)
    assert [run_once(tmp_path, calls, build) for build in (True, False)] == ["made"] * 2 and len(calls) == 1


def test_what_is_there_is_taken_although_another_process_holds_the_lock(tmp_path):
    (tmp_path / "product").write_text("complete")
    with FileLock(tmp_path / "lock"):
        assert [run_once(tmp_path, [], build) for build in (True, False)] == ["complete"] * 2


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_does_not_keep_anybody_from_building(tmp_path, monkeypatch, number):
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.fcntl, "flock", flock)
    calls: list[int] = []
    assert run_once(tmp_path, calls) == "made" and len(calls) == 1


def test_who_waits_to_build_says_for_what(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "FIRST", 0.05)
    with FileLock(tmp_path / "lock"):
        threading.Timer(0.3, lambda: (tmp_path / "product").write_text("of another")).start()
        assert run_once(tmp_path, []) == "of another"
    assert f"waiting for it: a process that lives makes it and holds {tmp_path / 'lock'}" in capsys.readouterr().err


def test_what_does_not_read_back_is_an_error_and_not_made_for_ever(tmp_path):
    calls: list[int] = []
    with pytest.raises(OutputError, match="does not read back"):
        once(lambda: None, maker(tmp_path, calls), tmp_path / "lock", build=True, what="it")
    assert len(calls) == 1


def test_a_folder_that_cannot_hold_the_lock_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=str(tmp_path / "file")):
        once(lambda: None, lambda: None, tmp_path / "file" / "lock", build=True, what="it")


def test_a_process_that_waits_for_another_one_hears_a_stop_request(tmp_path):
    flag = StopFlag()
    threading.Timer(0.1, flag.pass_on).start()
    with FileLock(tmp_path / "lock"), pytest.raises(StopRequested, match="while waiting for it"):
        run_once(tmp_path, [], build=False, stop=flag)


# ---------------------------------------------------------------- downloads


def fetch(folder: Path, **other) -> str:
    path = folder / "file"
    return fetch_once(lambda: path.read_text() if path.exists() else None, [("http://x/file", "file", "its md5")],
                      folder, build=True, name="it", **other)


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def replace_download(monkeypatch, content: bytes, then) -> None:
    def download(url: str, root: Path, filename: str, md5: str) -> None:
        assert (url, md5) == ("http://x/file", "its md5")
        assert filename != "file"  # a reader must not see half a file
        (Path(root) / filename).write_bytes(content)
        then()

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)


def test_a_download_comes_into_place_whole_and_is_made_once(tmp_path, monkeypatch):
    calls: list[int] = []
    replace_download(monkeypatch, b"all", lambda: calls.append(1))
    assert fetch(tmp_path / "new") == fetch(tmp_path / "new") == "all"
    assert calls == [1] and files(tmp_path / "new") == ["file"]


def test_a_download_stops_and_leaves_no_half_file(tmp_path, monkeypatch):
    flag, ended = StopFlag(), threading.Event()
    replace_download(monkeypatch, b"half", lambda: (flag.pass_on(), ended.wait(20)))
    with pytest.raises(StopRequested, match="while downloading file"):
        fetch(tmp_path, stop=flag)
    assert files(tmp_path) == []
    ended.set()


def test_an_endless_download_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 3)
    ended = threading.Event()
    replace_download(monkeypatch, b"more", lambda: ended.wait(20))
    with pytest.raises(DataError, match="more than 3 bytes"):
        fetch(tmp_path)
    assert files(tmp_path) == []
    ended.set()
