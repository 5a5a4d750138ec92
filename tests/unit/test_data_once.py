"""One process makes, the others wait."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from pathlib import Path

import pytest

from mat_dist.data import once as module
from mat_dist.data.once import once, take_lock
from mat_dist.errors import DataError, OutputError


def product(folder: Path):
    path = folder / "product"
    return lambda: path.read_text() if path.exists() else None


def maker(folder: Path, calls: list[int], text: str = "made"):
    def make(lock: module.MakerLock) -> None:
        calls.append(threading.get_ident())
        lock.beat()
        (folder / "product").write_text(text)

    return make


def test_two_readers_get_what_one_builder_makes_and_it_is_made_once(tmp_path):
    calls: list[int] = []
    results: list[str] = []

    def work(build: bool) -> None:
        results.append(once(product(tmp_path), maker(tmp_path, calls), tmp_path / "lock", build=build, what="it",
                            poll=0.01))

    readers = [threading.Thread(target=work, args=(False,)) for _ in range(2)]
    for reader in readers:
        reader.start()
    builder = threading.Thread(target=work, args=(True,))
    builder.start()
    for thread in (*readers, builder):
        thread.join(20)
    assert results == ["made"] * 3
    assert calls == [builder.ident]
    assert not (tmp_path / "lock").exists()


def test_a_second_builder_waits_for_the_first(tmp_path):
    calls: list[int] = []
    lock = take_lock(tmp_path / "lock")
    assert lock is not None
    assert take_lock(tmp_path / "lock") is None
    second = threading.Thread(target=once, args=(product(tmp_path), maker(tmp_path, calls), tmp_path / "lock"),
                              kwargs={"build": True, "what": "it", "poll": 0.01})
    second.start()
    with lock:
        (tmp_path / "product").write_text("of the first")
    second.join(20)
    assert not second.is_alive()
    assert calls == []


def test_a_reader_without_a_builder_gives_up_with_a_clear_error(tmp_path):
    with pytest.raises(DataError, match="the process that makes it stopped or did not start"):
        once(product(tmp_path), maker(tmp_path, []), tmp_path / "lock", build=False, what="it", patience=0.05,
             poll=0.01)


def test_readers_do_not_wait_long_for_a_builder_that_gave_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.05)
    lock = take_lock(tmp_path / "lock")
    assert lock is not None
    failed: list[BaseException] = []
    looked = threading.Event()

    def read() -> None:
        try:
            once(lambda: looked.set(), maker(tmp_path, []), tmp_path / "lock", build=False, what="it", patience=1e6,
                 poll=0.01)
        except DataError as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    with pytest.raises(RuntimeError), lock:
        reader.start()
        assert looked.wait(20)
        raise RuntimeError("the builder fails")
    reader.join(20)
    assert len(failed) == 1


def test_a_silent_lock_of_another_host_is_taken_over(tmp_path):
    (tmp_path / "lock").write_text("elsewhere 1 0")
    calls: list[int] = []
    once(product(tmp_path), maker(tmp_path, calls), tmp_path / "lock", build=True, what="it", patience=0.05, poll=0.01)
    assert len(calls) == 1


def test_a_beating_lock_of_another_host_is_respected(tmp_path):
    path = tmp_path / "lock"
    path.write_text("elsewhere 1 0")
    stop, calls = threading.Event(), []

    def beat() -> None:
        for _ in range(30):
            stop.wait(0.02)
            os.utime(path)
        (tmp_path / "product").write_text("of the other host")

    beating = threading.Thread(target=beat)
    beating.start()
    assert once(product(tmp_path), maker(tmp_path, calls), path, build=True, what="it", patience=0.3, poll=0.01) \
        == "of the other host"
    beating.join(20)
    assert calls == []


def test_the_lock_of_a_process_that_has_ended_is_taken_over_at_once(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    (tmp_path / "lock").write_text(f"{socket.gethostname()} {process.pid} 0")
    calls: list[int] = []
    once(product(tmp_path), maker(tmp_path, calls), tmp_path / "lock", build=True, what="it", patience=1e6, poll=0.01)
    assert len(calls) == 1


def test_a_lock_that_was_taken_over_is_not_removed_by_its_first_holder(tmp_path):
    first = take_lock(tmp_path / "lock")
    assert first is not None
    with first:
        (tmp_path / "lock").write_text("another holder")
        first._last = -1e9
        first.beat()
    assert (tmp_path / "lock").read_text() == "another holder"


def test_what_does_not_read_back_is_an_error_and_not_made_for_ever(tmp_path):
    calls: list[int] = []
    with pytest.raises(OutputError, match="does not read back"):
        once(lambda: None, maker(tmp_path, calls), tmp_path / "lock", build=True, what="it", poll=0.01)
    assert len(calls) == 1


def test_a_folder_that_cannot_hold_the_lock_is_named(tmp_path):
    with pytest.raises(OutputError, match=str(tmp_path / "missing")):
        take_lock(tmp_path / "missing" / "lock")
