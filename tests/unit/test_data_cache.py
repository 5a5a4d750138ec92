"""The cache of decoded images; stop requests while folders are listed and decoded."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mat_dist import train
from mat_dist.config.schema import DataConfig
from mat_dist.data import ImageSet, load_data, shared
from mat_dist.data import cache as module
from mat_dist.data import folder as folder_module
from mat_dist.data.cache import cache_folder
from mat_dist.data.folder import load_folder
from mat_dist.data.images import RawData
from mat_dist.data.listing import list_images
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import DataError, OutputError, StopRequested
from tests.unit.data_files import write_folder


@pytest.fixture
def settings(tmp_path) -> DataConfig:
    write_folder(tmp_path / "set", train=30, test=6, side=16)
    return DataConfig(name="folder", root=str(tmp_path / "set"), residency="mmap", cache=str(tmp_path / "cache"))


def image_file(config: DataConfig) -> Path:
    (found,) = Path(str(config.cache)).glob("*.u8")
    return found


def files(config: DataConfig) -> list[str]:
    return sorted(path.suffix for path in Path(str(config.cache)).iterdir())


def same(a: RawData, b: RawData) -> bool:
    return all(np.array_equal(np.asarray(getattr(a, name)), np.asarray(getattr(b, name)))
               for name in ("train_images", "train_labels", "test_images", "test_labels"))


def test_mapped_images_digest_and_splits_equal_those_in_memory(settings):
    mapped, loaded = (load_data(config, seed=1, batch_size=8) for config in
                      (settings, settings.model_copy(update={"residency": "host"})))
    assert mapped.digest == loaded.digest
    assert mapped.train.mapped
    assert not loaded.train.mapped
    for name in ("train", "val", "test"):
        assert torch.equal(getattr(mapped, name).images, getattr(loaded, name).images)
        assert torch.equal(getattr(mapped, name).labels, getattr(loaded, name).labels)


def test_a_second_start_opens_the_cache_without_decoding(settings, monkeypatch):
    first = load_folder(settings, True)
    monkeypatch.setattr(folder_module.Decoder, "_read", None)  # calling it would be an error
    assert same(first, load_folder(settings, True))
    assert same(first, load_folder(settings, False))
    assert files(settings) == [".json", ".lock", ".u8"]


def test_files_and_folder_are_private(settings):
    load_folder(settings, True)
    assert os.stat(str(settings.cache)).st_mode & 0o777 == 0o700
    assert image_file(settings).stat().st_mode & 0o777 == 0o600


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def change_and_restore_time(path: Path) -> None:
    status = path.stat()
    change(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def damage_manifest(path: Path) -> None:
    manifest = path.with_suffix(".json")
    text = manifest.read_text()
    digit = text.index("image_sha256") + 20
    manifest.write_text(text[:digit] + ("0" if text[digit] != "0" else "1") + text[digit + 1 :])


def replace_by_link(path: Path) -> None:
    elsewhere = path.with_suffix(".x")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize(("damage", "reason"), [
    (cut, r"it has 55295 bytes instead of 55296"), (change, "its images or its manifest were changed"),
    (change_and_restore_time, "its images or its manifest were changed"),
    (lambda path: path.unlink(), "its images cannot be read"), (damage_manifest, "its manifest were changed"),
    (lambda path: path.with_suffix(".json").write_text("[]"), "its manifest is damaged"),
    (replace_by_link, "not a file of this user")])
def test_a_damaged_cache_is_rebuilt_with_a_note(settings, damage, reason):
    first = load_folder(settings.model_copy(update={"residency": "host"}), True)
    load_folder(settings, True)
    damage(image_file(settings))
    second = load_folder(settings, True)
    assert same(first, second)
    assert any("is rebuilt" in note and re.search(reason, note) for note in second.notes)
    assert not any("is rebuilt" in note for note in load_folder(settings, True).notes)


def test_changed_files_and_settings_get_another_cache(settings):
    load_folder(settings, True)
    os.utime(Path(str(settings.root)) / "train/cat/0000.png", (1, 1))
    load_folder(settings, True)
    load_folder(settings.model_copy(update={"image_size": 8}), True)
    load_folder(settings.model_copy(update={"on_bad": "skip"}), True)
    assert len(list(Path(str(settings.cache)).glob("*.u8"))) == 4


def test_readers_wait_for_the_builder(settings):
    results: list[RawData] = []
    threads = [threading.Thread(target=lambda build=build: results.append(load_folder(settings, build)))
               for build in (False, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 3
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_skipped_files_are_remembered_in_the_cache(settings, monkeypatch):
    monkeypatch.setattr(folder_module, "SKIP_SHARE", 0.05)
    path = Path(str(settings.root)) / "train/cat/0007.png"
    path.write_bytes(path.read_bytes()[:50])
    config = settings.model_copy(update={"on_bad": "skip"})
    for _ in range(2):
        raw = load_folder(config, True)
        assert len(raw.train_images) == len(raw.train_labels) == 59
        assert raw.train_labels.tolist() == [0] * 29 + [1] * 30
        assert any("1 unreadable images were left out: train/cat/0007.png" in note for note in raw.notes)


def test_a_failed_build_leaves_nothing_behind(settings, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(OutputError, match=r"cannot write a cache of 0.0 GiB: No space left on device"):
        load_folder(settings, True)
    assert files(settings) == [".lock"]


def test_a_disk_that_is_too_small_is_refused_at_once(settings, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match=r"GiB are free .*data.cache"):
        load_folder(settings, True)


def test_the_cache_of_another_user_or_of_everybody_is_refused(tmp_path, monkeypatch):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(OutputError, match="anybody may write"):
        cache_folder(str(open_to_all))
    monkeypatch.setattr(module.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(OutputError, match="belongs to another user"):
        cache_folder(str(tmp_path / "mine"))


def test_a_cache_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot use the cache folder"):
        cache_folder(str(tmp_path / "file"))


def test_a_user_without_home_needs_a_cache_folder(monkeypatch):
    monkeypatch.setattr(module.os.path, "expanduser", lambda path: path)  # what it does where it finds no home
    with pytest.raises(OutputError, match="there is no home folder"):
        cache_folder(None)


def test_large_folders_are_mapped_without_being_asked(settings, monkeypatch):
    automatic = settings.model_copy(update={"residency": "auto"})
    assert not load_folder(automatic, True).mapped
    monkeypatch.setattr(folder_module, "MMAP_FILES", 71)
    assert load_folder(automatic, True).mapped


def resident_kib(path: Path) -> int:
    """Resident part of the mappings of a file in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_a_batch_of_a_mapped_set_reads_only_its_rows(tmp_path):
    path = tmp_path / "images.u8"
    with open(path, "wb") as file:
        file.truncate(64 << 20)  # 1024 images of 64 KiB
    store = torch.from_numpy(np.memmap(path, np.uint8, mode="c", shape=(1024, 1, 256, 256)))
    images = ImageSet(store, torch.zeros(1024, dtype=torch.int64), mapped=True).select(torch.arange(1024).flip(0))
    before = resident_kib(path)
    images.batch(torch.tensor([3, 500, 900]))
    # 192 KiB of rows; the kernel maps up to 64 KiB around each page it finds in memory.
    assert 192 <= resident_kib(path) - before < 1024


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_a_cache_that_is_written_to_under_the_run_is_noticed_before_it_is_read(settings, damage):
    data = load_data(settings, seed=0, batch_size=4)
    file = data.train.file.path
    data.train.batch(torch.arange(4))
    if damage == "truncated":
        os.truncate(file, 10)
    else:
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(DataError, match=r"changed under the run.*\.u8"):
        data.val.batch(torch.arange(1))


def test_a_cache_that_is_deleted_or_exchanged_stays_readable(settings):
    data = load_data(settings, seed=0, batch_size=4)
    before, file = data.train.batch(torch.arange(4))[0].clone(), data.train.file.path
    file.unlink()
    assert torch.equal(data.train.batch(torch.arange(4))[0], before)
    file.write_bytes(b"another file")
    assert torch.equal(data.train.batch(torch.arange(4))[0], before)


# ---------------------------------------------------------------- stop requests


class Reader:
    """Counts decoded images and calls `action` before the image `at`."""

    def __init__(self, monkeypatch, at: int, action) -> None:
        self.count, self.at, self.action, self.real = 0, at, action, folder_module.read_image
        monkeypatch.setattr(folder_module, "_CHUNK_FILES", 16)
        monkeypatch.setattr(folder_module, "read_image", self)
        monkeypatch.setattr(folder_module.os, "sched_getaffinity", lambda _: {0})  # one thread: files are read in order

    def __call__(self, path: Path, side: int | None, tell) -> np.ndarray:
        self.count += 1
        if self.count == self.at:
            self.action()
        return self.real(path, side, tell)


@pytest.mark.parametrize("at", [2, 18, 40, 66])  # the first image is also read for its size
def test_a_stopped_build_leaves_nothing_and_the_next_one_makes_the_same_cache(settings, tmp_path, monkeypatch, at):
    whole = load_data(settings.model_copy(update={"cache": str(tmp_path / "other")}), seed=0, batch_size=8)
    flag = StopFlag()
    reader = Reader(monkeypatch, at, flag.pass_on)
    with pytest.raises(StopRequested, match="while decoding images") as stopped:
        load_data(settings, seed=0, batch_size=8, stop=flag)
    assert stopped.value.code == 75
    assert reader.count == at, "no image after the request"
    assert files(settings) == [".lock"]
    assert load_data(settings, seed=0, batch_size=8, stop=StopFlag()).digest == whole.digest
    assert files(settings) == [".json", ".lock", ".u8"]


def test_a_file_that_a_killed_builder_left_is_overwritten(settings):
    load_folder(settings, True)
    key = image_file(settings)
    left = key.with_name(f"{key.stem}.{os.uname().nodename}.part")
    key.with_suffix(".json").unlink()
    left.write_bytes(b"half")
    assert load_folder(settings, True).mapped and not left.exists()


def test_a_request_before_anything_is_decoded_stops_too(settings):
    flag = StopFlag()
    flag.pass_on()
    with pytest.raises(StopRequested, match="while listing images"):
        list_images(Path(str(settings.root)), flag)
    with pytest.raises(StopRequested):
        load_data(settings.model_copy(update={"residency": "host"}), seed=0, batch_size=8, stop=flag)


def test_long_listing_and_decoding_tell_how_far_they_are(settings, monkeypatch, capsys):
    monkeypatch.setattr(shared, "FIRST", 0.0)
    monkeypatch.setattr(shared, "EVERY", 0.0)
    load_folder(settings.model_copy(update={"residency": "host"}), False)
    assert capsys.readouterr().err == "", "one process of a node is enough"
    load_folder(settings, True)
    said = capsys.readouterr().err
    assert "listed 60 images of" in said and "decoded 60 of 60 images of" in said


def test_a_signal_while_the_cache_is_built_ends_with_75_and_the_next_start_trains(settings, tmp_path, monkeypatch):
    words = [f"run.root={tmp_path / 'runs'}", "run.name=a", "run.device=cpu", "log.console=off", "peers=2",
             "data.name=folder", f"data.root={settings.root}", "data.residency=mmap", f"data.cache={settings.cache}",
             "model.width=0.25", "attack.steps=1", "train.batch_size=8", "train.epochs=1", "eval.every=0",
             "eval.test_steps=0"]
    reader = Reader(monkeypatch, 30, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(words) == 75
    assert reader.count <= 33, "the main thread may notice it some images later, but in the same chunk"
    ended = json.loads((tmp_path / "runs" / "a" / "exit.json").read_text())
    assert (ended["code"], ended["state"]) == (75, "stopped")
    assert train.main(words) == 0
