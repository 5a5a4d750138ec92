"""What is read of a folder of images, what is passed over, and that both are told."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
from PIL import Image

from mat_dist.config.schema import DataConfig
from mat_dist.data import load_data
from mat_dist.data.folder import load_folder
from mat_dist.data.images import RawData
from mat_dist.data.listing import list_images
from mat_dist.errors import DataError
from tests.unit.data_files import write_folder


def load(root: Path, **settings) -> RawData:
    return load_folder(DataConfig(name="folder", root=str(root), **settings), True)


def copy_of_one(root: Path, path: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / "train/dog/0000.png", root / path)


def test_linked_folders_are_followed_and_counted(tmp_path):
    write_folder(tmp_path)
    for number in range(5):
        copy_of_one(tmp_path, f"elsewhere/deep/{number}.png")
    (tmp_path / "train/cat/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/bird").symlink_to(tmp_path / "elsewhere/deep")  # a whole class
    raw = load(tmp_path)
    assert [(raw.train_labels == label).sum() for label in range(3)] == [5, 12 + 5, 12]
    assert "train/: 2 linked folders, followed" in raw.notes
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "test").symlink_to("train")
    assert "test/: 3 linked folders, followed" in load(tmp_path).notes


def test_links_in_a_circle_end_and_every_folder_counts_once(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train/cat/a").mkdir()
    (tmp_path / "train/cat/a/up").symlink_to("..")
    (tmp_path / "train/cat/b").symlink_to("a")
    (tmp_path / "train/cat/self").symlink_to("self")
    raw = load(tmp_path)
    assert raw.train_labels.tolist() == [0] * 12 + [1] * 12
    assert "train/: 2 folders met a second time through links, not entered again" in raw.notes
    assert "train/: 1 files are no images and were not read: 1 without ending" in raw.notes


@pytest.mark.parametrize(("name", "said"), [
    *((name, "folders of other programs, passed over") for name in (
        "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "#recycle", "~snapshot", "System Volume Information")),
    *((name, "hidden files or folders, passed over") for name in (".ipynb_checkpoints", ".AppleDouble", ".Trash-0"))])
def test_folders_of_other_programs_are_passed_over_among_images_and_among_classes(tmp_path, name, said):
    write_folder(tmp_path)
    for place in (f"train/cat/{name}/0000.png/thumb.png", f"train/dog/deep/{name}/0001.png", f"train/{name}/x.png",
                  f"test/{name}/x.png"):
        copy_of_one(tmp_path, place)
    raw = load(tmp_path)
    assert raw.classes == ("cat", "dog") and len(raw.train_labels) == 24 and len(raw.test_labels) == 8
    assert {f"train/: 3 {said}", f"test/: 1 {said}"} <= set(raw.notes)


def test_hidden_files_and_files_beside_the_classes_are_counted(tmp_path):
    write_folder(tmp_path)
    for path in ("train/cat/._0000.png", "train/.DS_Store", "test/dog/.0001.png", "train/0001.png", "test/labels.csv"):
        copy_of_one(tmp_path, path)
    assert set(load(tmp_path).notes) == {
        "train/: 2 hidden files or folders, passed over", "test/: 1 hidden files or folders, passed over",
        "train/: 1 files outside the class folders, not read", "test/: 1 files outside the class folders, not read"}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


@pytest.mark.parametrize("make", [fifo, bound_socket, lambda path: path.symlink_to("/dev/zero")],
                         ids=["FIFO", "socket", "device"])
@pytest.mark.parametrize("name", ["train/cat/0000a.png", "test/dog/9.JPG", "train/extra"])
def test_what_is_no_regular_file_is_counted_and_never_opened(tmp_path, make, name):
    write_folder(tmp_path)
    make(tmp_path / name)
    raw = load(tmp_path)
    assert len(raw.train_labels) == 24 and len(raw.test_labels) == 8
    assert any(word in note for note in raw.notes for word in
               ("entries that are no files (FIFO, socket, device), passed over", "outside the class folders"))


def test_names_that_are_not_utf_8_are_read_and_can_be_printed(tmp_path):
    write_folder(tmp_path)
    for split in ("train", "test"):
        os.rename(tmp_path / split / "cat", os.fsencode(tmp_path / split) + b"/caf\xe9")
    bad = os.fsencode(tmp_path) + b"/train/caf\xe9/\xff.png"
    shutil.copy(tmp_path / "train/dog/0000.png", bad)
    os.link(bad, os.fsencode(tmp_path) + b"/train/dog/x.\xfe")
    config = DataConfig(name="folder", root=str(tmp_path))
    data = load_data(config, seed=0, batch_size=8)
    assert data.classes == ("caf\\udce9", "dog") and len(data.train) + len(data.val) == 25
    assert {"train/: the name of a class is not UTF-8, or has control characters: caf\\udce9",
            "train/: 1 files are no images and were not read: 1 .\\udcfe"} <= set(data.notes)
    Path(os.fsdecode(bad)).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"caf\\udce9/\\udcff.png") as caught:
        load_data(config, seed=0, batch_size=8)
    str(caught.value).encode()


def test_names_that_a_terminal_would_obey_are_shown_with_escapes(tmp_path):
    write_folder(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / "cat").rename(tmp_path / split / "\x1b[31mcat")
    (tmp_path / "train/dog/\x9b2J.png").write_bytes(b"no image")
    data = load_data(DataConfig(name="folder", root=str(tmp_path), on_bad="skip"), seed=0, batch_size=8)
    assert data.classes == ("\\x1b[31mcat", "dog") and any("train/dog/\\x9b2J.png" in note for note in data.notes)
    with pytest.raises(DataError, match=r"train/dog/\\x9b2J.png\)"):
        load(tmp_path)


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_a_class_in_two_unicode_forms_is_one_class_and_is_told(tmp_path):
    write_folder(tmp_path, classes=(COMPOSED, "dog"))
    expected = load(tmp_path)
    os.rename(tmp_path / "test" / COMPOSED, tmp_path / "test" / DECOMPOSED)
    raw = load(tmp_path)
    assert raw.classes == (COMPOSED, "dog") and raw.test_labels.tolist() == expected.test_labels.tolist()
    assert any("has another Unicode form in test/ than in train/" in note for note in raw.notes)
    (tmp_path / "train" / DECOMPOSED).mkdir()
    with pytest.raises(DataError, match=f"two folders of the name '{COMPOSED}', which differ in Unicode form only"):
        load(tmp_path)


def test_val_is_taken_where_test_has_no_labels_and_is_told_where_it_is_not_needed(tmp_path):
    write_folder(tmp_path)
    shutil.copytree(tmp_path / "test", tmp_path / "val")
    assert "val/ is not read: validation images are taken from train/" in load(tmp_path).notes
    shutil.rmtree(tmp_path / "test")
    copy_of_one(tmp_path, "test/images/0.png")  # Tiny ImageNet: unlabelled
    raw = load(tmp_path)
    assert len(raw.test_labels) == 8
    assert any(note.startswith("test images come from val/, no folder of test/ is a class") for note in raw.notes)


@pytest.mark.parametrize(("files", "said"), [
    (["val/ILSVRC2012_val_0.JPEG", "val/1.JPEG"], r"no class folders; found 2 files outside .*set/val\): put each "
     r"image into val/CLASS/; a list that came with them, such as val_annotations.txt, may"),
    (["val/images/0.JPEG", "val/labels.csv"],
     r"class 'images' is not in train/ .*set/val\): put each image into val/CLASS/; labels.csv may say its class"),
    (["val/images/0.JPEG", "test/images/0.JPEG"], r"class 'images' is not .*/test\): put each .*val_annotations.txt"),
    (["test/Dog/0.png", "test/Cat/0.png"], r"class 'Cat' is not in train/ .*: is it 'cat'\?"),
    (["test/Dog/0.png", "test/cat/0.png"], r"class 'Dog' is not in train/ .*: is it 'dog'\?"),
])
def test_test_images_without_class_folders_are_refused_with_what_is_there(tmp_path, files, said):
    root = tmp_path / "set"
    write_folder(root)
    shutil.rmtree(root / "test")
    for name in files:
        copy_of_one(root, name)
    with pytest.raises(DataError, match=said):
        load(root)


def test_a_class_without_readable_endings_says_what_is_there(tmp_path):
    write_folder(tmp_path)
    for path in (tmp_path / "train/cat").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"class 'cat' has no image; found 12 \.heic .*: give it images \(\.jpg"):
        load(tmp_path)


def test_images_directly_in_train_are_told(tmp_path):
    write_folder(tmp_path)
    shutil.rmtree(tmp_path / "train/cat")
    for number in range(3):
        copy_of_one(tmp_path, f"train/{number}.png")
    with pytest.raises(DataError, match="1 class folders; found 3 files outside the class folders"):
        load(tmp_path)


def test_the_order_is_that_of_each_folder_then_of_the_folders_in_it(tmp_path):
    write_folder(tmp_path, train=1)
    for path in ("train/cat/b/1.png", "train/cat/a.png", "train/cat/a/2.png", "train/cat/z.png", "train/cat/a/0/3.png"):
        copy_of_one(tmp_path, path)
    assert [name.removeprefix("train/cat/") for name in list_images(tmp_path).train.files][:6] == [
        "0000.png", "a.png", "z.png", "a/2.png", "a/0/3.png", "b/1.png"]


def test_a_folder_named_like_an_image_is_entered(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train/cat/x.png").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train/cat/x.png/0.png")
    assert len(load(tmp_path).train_labels) == 25
