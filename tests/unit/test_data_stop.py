"""Stop requests while data are listed, decoded, downloaded or waited for."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from mat_dist import train
from mat_dist.config.schema import DataConfig
from mat_dist.data import decode, load_data
from mat_dist.data.download import fetch_once
from mat_dist.data.folder import list_images, load_folder
from mat_dist.data.once import once, take_lock
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import DataError, StopRequested
from tests.unit.data_files import write_folder


@pytest.fixture
def settings(tmp_path, monkeypatch) -> DataConfig:
    """60 training and 12 test images, decoded 16 at a time."""
    write_folder(tmp_path / "set", train=30, test=6, side=16)
    monkeypatch.setattr(decode, "_CHUNK_FILES", 16)
    return DataConfig(name="folder", root=str(tmp_path / "set"), residency="mmap", cache=str(tmp_path / "cache"))


class Reader:
    """Counts decoded images and calls `action` before the image `at`."""

    def __init__(self, monkeypatch, at: int, action) -> None:
        self.count, self.at, self.action, self.real = 0, at, action, decode.read_image
        monkeypatch.setattr(decode, "read_image", self)
        monkeypatch.setattr(decode.os, "sched_getaffinity", lambda _: {0})  # one thread: files are read in order

    def __call__(self, path: Path, side: int | None) -> np.ndarray:
        self.count += 1
        if self.count == self.at:
            self.action()
        return self.real(path, side)


def files(config: DataConfig) -> list[str]:
    return sorted(path.suffix for path in Path(str(config.cache)).iterdir())


@pytest.mark.parametrize("at", [2, 18, 40, 66])  # the first image is also read for its size
def test_a_stopped_build_is_invisible_and_continued_to_the_same_cache(settings, tmp_path, monkeypatch, at):
    whole = load_data(settings.model_copy(update={"cache": str(tmp_path / "other")}), seed=0, batch_size=8)
    flag = StopFlag()
    reader = Reader(monkeypatch, at, flag.pass_on)
    with pytest.raises(StopRequested, match="while decoding images") as stopped:
        load_data(settings, seed=0, batch_size=8, stop=flag)
    assert stopped.value.code == 75
    assert reader.count == at, "no image after the request"
    assert files(settings) == [".json", ".kept"]  # neither images nor manifest nor lock
    with pytest.raises(DataError):  # a reader does not take it for a cache
        once(lambda: None, lambda _: None, Path(str(settings.cache)) / "lock", build=False, what="it", patience=0.01,
             poll=0.01)
    reader.count = 0
    continued = load_data(settings, seed=0, batch_size=8, stop=StopFlag())
    kept = (at - 2) // 16 * 16 if at < 62 else 60  # whole chunks; the training images end after 60
    assert reader.count == 1 + 72 - kept
    assert continued.digest == whole.digest
    assert any(f"{kept} images of the cache were there" in note for note in continued.notes) == (kept > 0)
    assert files(settings) == [".json", ".u8"]


def test_files_left_out_before_a_stop_count_after_it(settings, monkeypatch):
    monkeypatch.setattr("mat_dist.data.folder.SKIP_SHARE", 0.02)  # one of 60
    bad = [Path(str(settings.root)) / f"train/{name}.png" for name in ("cat/0003", "dog/0020")]
    bad[0].write_bytes(b"x")
    config = settings.model_copy(update={"on_bad": "skip"})
    flag = StopFlag()
    reader = Reader(monkeypatch, 30, flag.pass_on)
    with pytest.raises(StopRequested):
        load_folder(config, True, flag)
    reader.at = 0
    raw = load_folder(config, True)
    assert len(raw.train_images) == 59
    assert any("left out: train/cat/0003.png" in note for note in raw.notes)
    bad[1].write_bytes(b"x")
    reader.at, reader.count, flag = 30, 0, StopFlag()
    reader.action = flag.pass_on
    with pytest.raises(StopRequested):
        load_folder(config, True, flag)
    with pytest.raises(DataError, match="2 or more of 60 images cannot be read, at most 1"):
        load_folder(config, True)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    flip, lambda path: os.truncate(path, 100), lambda path: path.unlink(),
    lambda path: Path(f"{path}.json").write_text("[]"), lambda path: Path(f"{path}.json").write_text("{"),
    lambda path: Path(f"{path}.json").unlink(),
    lambda path: Path(f"{path}.json").write_text(json.dumps([{"images": -1, "skipped": [], "sha256": ""}] * 2))])
def test_a_damaged_half_is_not_continued(settings, monkeypatch, damage):
    expected = load_folder(settings.model_copy(update={"residency": "host"}), True)
    flag = StopFlag()
    Reader(monkeypatch, 40, flag.pass_on)
    with pytest.raises(StopRequested):
        load_folder(settings, True, flag)
    (kept,) = Path(str(settings.cache)).glob("*.kept")
    damage(kept)
    raw = load_folder(settings, True)
    assert np.array_equal(np.asarray(raw.train_images), expected.train_images)
    assert not any("were there" in note for note in raw.notes)
    assert files(settings) == [".json", ".u8"]


def test_a_request_before_anything_is_decoded_stops_too(settings):
    flag = StopFlag()
    flag.pass_on()
    with pytest.raises(StopRequested, match="while listing images"):
        list_images(Path(str(settings.root)), flag)
    with pytest.raises(StopRequested):
        load_data(settings.model_copy(update={"residency": "host"}), seed=0, batch_size=8, stop=flag)


def test_a_process_that_waits_for_another_one_stops_too(tmp_path):
    flag, stopped = StopFlag(), []
    lock = take_lock(tmp_path / "lock")
    assert lock is not None

    def wait() -> None:
        try:
            once(lambda: None, lambda _: None, tmp_path / "lock", build=False, what="it", poll=0.01, stop=flag)
        except StopRequested as error:
            stopped.append(str(error))

    waiter = threading.Thread(target=wait)
    with lock:
        waiter.start()
        flag.pass_on()
        waiter.join(20)
    assert len(stopped) == 1
    assert "while waiting for it" in stopped[0]


def test_a_download_stops_and_leaves_no_half_file(tmp_path, monkeypatch):
    flag, began, ended = StopFlag(), threading.Event(), threading.Event()

    def download(url: str, root: Path, filename: str, md5: str) -> None:
        (Path(root) / filename).write_bytes(b"half")
        began.set()
        ended.wait(20)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    threading.Thread(target=lambda: began.wait(20) and flag.pass_on()).start()
    with pytest.raises(StopRequested, match="while downloading file"):
        fetch_once(lambda: None, [("http://x/file", "file", "")], tmp_path, build=True, name="it", stop=flag)
    assert list(tmp_path.iterdir()) == []
    ended.set()


def test_an_endless_download_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mat_dist.data.download.MOST_BYTES", 3)
    ended = threading.Event()

    def download(url: str, root: Path, filename: str, md5: str) -> None:
        (Path(root) / filename).write_bytes(b"more")
        ended.wait(20)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    with pytest.raises(DataError, match="more than 3 bytes"):
        fetch_once(lambda: None, [("http://x/file", "file", "")], tmp_path, build=True, name="it")
    assert list(tmp_path.iterdir()) == []
    ended.set()


def test_a_signal_while_the_cache_is_built_ends_with_75_and_the_next_start_trains(settings, tmp_path, monkeypatch):
    words = [f"run.root={tmp_path / 'runs'}", "run.name=a", "run.device=cpu", "log.console=off", "peers=2",
             "data.name=folder", f"data.root={settings.root}", "data.residency=mmap", f"data.cache={settings.cache}",
             "model.width=0.25", "attack.steps=1", "train.batch_size=8", "train.epochs=1", "eval.every=0",
             "eval.test=false"]
    reader = Reader(monkeypatch, 30, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(words) == 75
    assert reader.count <= 33, "the main thread may notice it some images later, but in the same chunk"
    ended = json.loads((tmp_path / "runs" / "a" / "exit.json").read_text())
    assert (ended["code"], ended["state"]) == (75, "stopped")
    assert train.main(words) == 0
