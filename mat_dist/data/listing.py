"""Which image files a folder has, as train/CLASS/* and test/CLASS/*; what is passed over is counted and told."""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mat_dist.data.decode import EXTENSIONS
from mat_dist.data.shared import Voice
from mat_dist.distributed.stopping import StopFlag, leave_if
from mat_dist.errors import DataError, nearest, printable

LAYOUT = "expected train/CLASS/*.jpg and test/CLASS/*.jpg below data.root"
HELD_OUT = ("test", "val", "valid", "validation")  # the first with a class of train/ holds the test images
# Folders that file servers, archivers and notebooks put everywhere, beside those with a dot.
FOREIGN = frozenset({"@eadir", "@recycle", "@recently-snapshot", "@tmp", "@sharebin", "#recycle", "#snapshot",
                     "~snapshot", "$recycle.bin", "recycler", "system volume information", "lost+found", "__macosx",
                     "network trash folder", "temporary items", "__pycache__"})
HIDDEN, OTHERS, SPECIAL, LINKS, AGAIN, LOOSE = (
    "hidden files or folders, passed over", "folders of other programs, passed over",
    "entries that are no files (FIFO, socket, device), passed over", "linked folders, followed",
    "folders met a second time through links, not entered again", "files outside the class folders, not read")


@dataclass(frozen=True)
class Split:
    """The image files of a split, sorted by class and path, as paths below the root; labels int64 (N,)."""

    files: tuple[str, ...]
    labels: np.ndarray


@dataclass(frozen=True)
class Listing:
    """What is in the folder. `digest` covers paths, sizes and modification times of all files."""

    root: Path
    classes: tuple[str, ...]
    train: Split
    test: Split
    digest: str
    notes: tuple[str, ...]

    @property
    def count(self) -> int:
        """Image files of both splits."""
        return len(self.train.files) + len(self.test.files)


def list_images(root: Path, stop: StopFlag | None = None, voice: Voice | None = None) -> Listing:
    """The classes and files below `root`; opens no image. Raises DataError where the folder is missing, not readable or
    not laid out as expected, or a class has no image."""
    if not root.is_dir():
        found, npz = ("is a file", "data.name=npz reads an .npz file; ") if root.exists() else ("does not exist", "")
        raise DataError(f"the folder {found}", f"data.root={root}", npz + LAYOUT)
    there = sorted(name for name in next(_walk(root))[1] if not name.startswith("."))
    if "train" not in there:
        raise DataError(f"no folder train, found {', '.join(there[:5]) or 'nothing'}", f"data.root={root}", LAYOUT)
    held_out = [_Tree(root, name, stop, voice) for name in HELD_OUT if name in there]
    if not held_out:
        raise DataError("no folder test (nor val or valid)", f"data.root={root}", LAYOUT)
    train = _Tree(root, "train", stop, voice)
    if len(train.folders) < 2:
        raise DataError(f"{len(train.folders)} class folders{train.instead()}", str(train.where),
                        f"two or more are needed; {LAYOUT}")
    test, notes = _held_out(held_out, train)
    digest = hashlib.sha256()
    splits = [tree.split(tuple(train.folders), digest) for tree in (train, test)]
    empty = sorted(set(range(len(train.folders))) - set(splits[0].labels.tolist()))
    if empty:
        name = list(train.folders.values())[empty[0]]
        raise DataError(f"class {name!r} has no image{train.instead()}", str(train.where),
                        f"give it images ({', '.join(EXTENSIONS)}) or remove its folder")
    if not splits[1].files:
        raise DataError(f"no test image{test.instead()}", str(test.where), LAYOUT)
    classes = tuple(map(printable, train.folders.values()))
    return Listing(root, classes, splits[0], splits[1], digest.hexdigest(), (*notes, *train.notes(), *test.notes()))


def _held_out(trees: list[_Tree], train: _Tree) -> tuple[_Tree, list[str]]:
    """The folder with the test images, and what is to be told about the choice."""
    usable = [tree for tree in trees if tree.folders.keys() & train.folders.keys()]
    test = (usable or trees)[0]
    unknown = [name for key, name in test.folders.items() if key not in train.folders]
    if unknown or not usable:
        lists = [name for name in test.loose if name.endswith((".txt", ".csv"))]
        near = nearest(unknown[0] if unknown else "", train.folders)
        how = f"test classes must be among the training classes{f': is it {near!r}?' if near else ''}"
        if not usable and not near:
            source = lists[0] if lists else "a list that came with them, such as val_annotations.txt,"
            how = f"put each image into {test.name}/CLASS/; {source} may say its class"
        raise DataError(f"class {unknown[0]!r} is not in train/ ({len(unknown)} such classes)" if unknown else
                        f"no class folders{test.instead()}", str(test.where), how)
    notes = [f"{tree.name}/ is not read: validation images are taken from train/" for tree in usable[1:]]
    if test.name != "test":
        why = "there is no test/" if trees[0] is test else f"no folder of {trees[0].name}/ is a class of train/"
        notes.append(f"test images come from {test.name}/, {why}; validation images are taken from train/")
    notes += [f"class {printable(name)!r} has another Unicode form in {test.name}/ than in train/, and is taken as one"
              for key, name in test.folders.items() if name != train.folders[key]]
    return test, notes


def _walk(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, through links; it raises DataError for a folder that cannot be listed."""
    def refuse(problem: OSError) -> None:
        raise DataError(f"cannot list the folder: {problem.strerror}", str(problem.filename), "make it readable") \
            from problem

    return os.walk(top, onerror=refuse, followlinks=True)


class _Tree:
    """The folder of a split: its class folders by their names in one Unicode form, and what was met in it."""

    def __init__(self, root: Path, name: str, stop: StopFlag | None, voice: Voice | None) -> None:
        self.root, self.name, self.where, self.stop, self.voice = root, name, root / name, stop, voice or Voice(False)
        self.met: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.folders: dict[str, str] = {}
        _, folders, files = next(_walk(self.where))
        for folder in self._visible(folders, FOREIGN):
            key = unicodedata.normalize("NFC", folder)
            if key in self.folders:
                raise DataError(f"two folders of the name {key!r}, which differ in Unicode form only", str(self.where),
                                "put their images into one of them")
            self.folders[key] = folder
        self.loose = self._visible(files)
        self.met[LINKS] = sum((self.where / name).is_symlink() for name in ("", *self.folders.values()))
        self.met[LOOSE] = len(self.loose)

    def split(self, classes: tuple[str, ...], digest: hashlib._Hash) -> Split:
        """The images of the classes, by their keys. Raises DataError, StopRequested."""
        files: list[str] = []
        labels: list[int] = []
        for label, key in enumerate(classes):
            if key in self.folders:
                for path, state in self._images(self.folders[key]):
                    digest.update(f"{path}\0{state}\0".encode("utf-8", "surrogateescape"))
                    files.append(path)
                    labels.append(label)
                    self.voice.tell(f"listed {len(files)} images of {self.where}")
        return Split(tuple(files), np.array(labels, np.int64))

    def _images(self, name: str) -> Iterator[tuple[str, str]]:
        """Path below the root and state of each image of a class: those of a folder, then of the folders in it."""
        entered = set[tuple[int, int]]()
        for folder, folders, files in _walk(self.where / name):
            status = os.stat(folder)
            again = (status.st_dev, status.st_ino) in entered
            entered.add((status.st_dev, status.st_ino))
            self.met[AGAIN] += again
            folders[:] = [] if again else self._visible(folders, FOREIGN)
            self.met[LINKS] += sum(os.path.islink(os.path.join(folder, one)) for one in folders)
            for file in [] if again else self._visible(files):
                leave_if(self.stop, "listing images", str(self.root))  # a network disk answers for some 1000 a second
                path = os.path.join(folder, file)
                if (state := self._state(path)) is not None:
                    yield os.path.relpath(path, self.root), state

    def _visible(self, names: list[str], others: Collection[str] = ()) -> list[str]:
        """Names in order, without what is hidden or of other programs."""
        seen = sorted(name for name in names if not name.startswith("."))
        kept = [name for name in seen if name.lower() not in others]
        self.met[HIDDEN] += len(names) - len(seen)
        self.met[OTHERS] += len(seen) - len(kept)
        return kept

    def _state(self, path: str) -> str | None:
        """Size and modification time of an image file; None for a file that is not read."""
        ending = os.path.splitext(path)[1].lower()
        if ending not in EXTENSIONS:
            self.endings[ending or "without ending"] += 1
            return None
        try:
            status = os.stat(path)
        except OSError:  # a broken link: reading it will be refused or skipped like any bad file
            return "unreadable"
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for a writer
            self.met[SPECIAL] += 1
            return None
        return f"{status.st_size} {status.st_mtime_ns}"

    def _others(self) -> str:
        return ", ".join(f"{count} {ending}" for ending, count in sorted(self.endings.items()))

    def instead(self) -> str:
        """For messages: what is there that is no image."""
        found = [f"{count} {kind}" for kind, count in self.met.items() if count and kind != LINKS]
        return "".join(f"; found {text}" for text in (self._others(), *found) if text)

    def notes(self) -> list[str]:
        """Lines for the log."""
        read = [f"{self.name}/: {sum(self.endings.values())} files are no images and were not read: {self._others()}"]
        strange = [name for name in self.folders.values() if name != printable(name)]
        return ((read if self.endings else []) +
                [f"{self.name}/: {count} {kind}" for kind, count in sorted(self.met.items()) if count] +
                [f"{self.name}/: the name of a class is not UTF-8, or has control characters: {printable(name)}"
                 for name in strange])
