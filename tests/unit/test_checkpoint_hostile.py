"""Checkpoints from strangers, from the past and from the future: nothing in them runs, none is misread."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mat_dist import checkpoints
from mat_dist.checkpoints import Meta, find_newest, json_digest, load_manifest, load_peer, save_peer
from mat_dist.checkpoints.peers import migrated
from mat_dist.checkpoints.store import MANIFEST, TooNew
from mat_dist.errors import CheckpointError
from mat_dist.runs.folder import RunFolder


class Touch:
    """Pickles into a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    directory = checkpoints.begin(folder, 10, 1)
    entry = save_peer(directory, 0, {"w": torch.ones(3), "step": 10})
    checkpoints.commit(folder, 10, 1, [entry], Meta(1, ("a",), "c", "d"))
    return folder


def rewrite(folder: RunFolder, **changes: Any) -> Path:
    """Change entries of the manifest and give it a valid digest again."""
    file = folder.checkpoints / "step_00000010" / MANIFEST
    document = {**json.loads(file.read_text()), **changes}
    document.pop("digest")
    file.write_text(json.dumps({**document, "digest": json_digest(document)}) + "\n")
    return file


def plant(folder: RunFolder, data: bytes, version: int = 2) -> None:
    """Replace the peer's file by `data`, with a manifest that vouches for it."""
    name = "peer_0.pt" if version == 1 else "peer_0.safetensors"
    (folder.checkpoints / "step_00000010" / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    rewrite(folder, format=version, files=[{"name": name, "size": len(data), "sha256": digest}])


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def repacked(program: bytes, compression: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None) -> bytes:
    """A torch file whose pickle is `program`."""
    good, buffer = zipfile.ZipFile(io.BytesIO(saved({"w": torch.ones(3)}))), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in good.namelist():
            archive.writestr(name, program if name.endswith("data.pkl") else good.read(name))
        for name, data in (more or {}).items():
            archive.writestr(name, data)
    return buffer.getvalue()


def looped() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["self"] = [loop]
    return {"state": loop, "bad": torch.float32}


def doubled() -> dict[str, Any]:
    tree: list[Any] = []
    for _ in range(60):
        tree = [tree, tree]
    return {"tree": tree, "bad": torch.float32}


def nested(depth: int) -> bytes:
    return b"\x80\x02}q\x00X\x01\x00\x00\x00x" + b"]" * depth + b"a" * (depth - 1) + b"s."


def allocation(count: int) -> bytes:
    """A pickle that asks for bytearray(count) behind the key "x"."""
    return (b"\x80\x02}q\x00X\x01\x00\x00\x00xcbuiltins\nbytearray\n\x8a\x08" + struct.pack("<q", count) + b"\x85Rs.")


def overlapping() -> bytes:
    """A zip whose directory lists the same record many times."""
    data = saved({"w": torch.zeros(3000)})
    start = data.index(b"PK\x01\x02")
    count = 40 * len(zipfile.ZipFile(io.BytesIO(data)).infolist())
    end = data.rindex(b"PK\x05\x06")
    listing = data[start:end].split(b"PK\x06\x06")[0] * 40
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(listing), start, 0)
    return data[:start] + listing + tail


HOSTILE = {
    "reduce": lambda touch: saved({"w": torch.ones(2), "x": touch}),
    "reduce at the top": lambda touch: saved(touch),
    "reduce as a key": lambda touch: repacked(pickle.dumps({(touch,): 1}, protocol=2)),
    "legacy file": lambda touch: saved({"x": touch}, _use_new_zipfile_serialization=False),
    "legacy file of tensors": lambda touch: saved({"x": torch.ones(2)}, _use_new_zipfile_serialization=False),
    "raw pickle": lambda touch: pickle.dumps({"x": touch}),
    "protocol 4": lambda touch: saved({"x": touch}, pickle_protocol=4),
    "os.system": lambda touch: repacked(b"cposix\nsystem\nX\x04\x00\x00\x00true\x85R."),
    "inst": lambda touch: repacked(b"(X\x04\x00\x00\x00trueiposix\nsystem\n."),
    "module": lambda touch: saved(torch.nn.Linear(1, 1)),
    "script": lambda touch: scripted(),
    "bytearray of 1 TiB": lambda touch: repacked(allocation(1 << 40)),
    "compressed zeros": lambda touch: repacked(b"\x80\x02}q\x00.", zipfile.ZIP_DEFLATED,
                                               {"archive/data/9": bytes(1 << 26)}),
    "overlapping records": lambda touch: overlapping(),
    "list": lambda touch: saved([torch.ones(2)]),
    "set": lambda touch: saved({"x": {1, 2}}),
    "contains itself": lambda touch: saved(looped()),
    "2^60 nodes": lambda touch: saved(doubled()),
    "deeply nested": lambda touch: repacked(nested(100_000)),
    "empty": lambda touch: b"",
    "text": lambda touch: b"PK\x03\x04 and nothing else",
    "truncated zip": lambda touch: saved({"w": torch.ones(2000)})[:-30],
}


def scripted() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
        archive.writestr("archive/data.pkl", b"\x80\x02c__torch__\nM\n)\x81.")
        archive.writestr("archive/code/__torch__.py", b"class M(Module):\n  pass\n")
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def tensors(metadata: Any = None, **changes: Any) -> bytes:
    """A safetensors file of one tensor, with changed entries in its header."""
    header = {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12], **changes}}
    if metadata is not None:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(12)


GOOD = {"state": "{}"}
HOSTILE_NOW = {
    "empty": b"", "text": b"nothing else", "zip": saved({"w": torch.ones(3)}), "pickle": pickle.dumps({"w": 1}),
    "a header of 2^63 bytes": b"\xff" * 8 + b"{}", "a header that is cut off": tensors()[:20],
    "metadata of numbers": tensors({"state": 3}), "metadata is a list": tensors([1]),
    "too many values": tensors(GOOD, shape=[1 << 40]), "no such type": tensors(GOOD, dtype="F7"),
    "outside": tensors(GOOD, data_offsets=[0, 1 << 40]), "before": tensors(GOOD, data_offsets=[-9, 3]),
    **{text[:40]: tensors({"state": text}) for text in (
        "{", "[]", "3", '{"a": {"$tensor": "x"}}', '{"a": {"$tensor": [1]}}', '{"a": {"$tuple": 3}}',
        '{"a": {"$items": [3]}}', '{"a": {"$items": [[[1], 2]]}}', '{"a": {"$items": [[true, 2]]}}',
        '{"a": {"$float": "x"}}', '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 200_000 + "]" * 200_000,
        '{"a":' * 20_000 + "1" + "}" * 20_000, '{"a": ' + "9" * 10_000 + "}")},
}


def refused(folder: RunFolder) -> None:
    """Refused in one line, without taking much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"peer_0\.") as caught:
        load_peer(load_manifest(folder), 0)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_of_format_1_is_refused_and_nothing_runs(folder, tmp_path, kind):
    sentinel = tmp_path / "executed"
    plant(folder, HOSTILE[kind](Touch(sentinel)), version=1)
    refused(folder)
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", HOSTILE_NOW)
def test_a_hostile_file_of_format_2_is_refused(folder, kind):
    plant(folder, HOSTILE_NOW[kind])
    refused(folder)


def test_format_2_neither_writes_nor_reads_a_pickle(folder, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a pickle")
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, forbidden)
    directory = checkpoints.begin(folder, 20, 1)
    entry = save_peer(directory, 0, {"w": torch.ones(3), "step": 20, "groups": [{"betas": (0.9, 0.99)}]})
    found = checkpoints.commit(folder, 20, 1, [entry], Meta(1, ("a",), "c", "d"))
    assert load_peer(found, 0)["groups"] == [{"betas": (0.9, 0.99)}]
    data = (found.directory / entry.name).read_bytes()
    assert not zipfile.is_zipfile(io.BytesIO(data)) and entry.name.endswith(".safetensors")
    size = int.from_bytes(data[:8], "little")
    assert sorted(json.loads(data[8:8 + size])) == ["__metadata__", "w"] and len(data) == 8 + size + 12


def test_the_sentinel_works(tmp_path):
    pickle.loads(pickle.dumps(Touch(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


ENTRY = {"name": "peer_0.safetensors", "size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize("changes", [
    {"step": -1}, {"step": "10"}, {"step": True}, {"step": 10.0}, {"epoch": None}, {"attempt": -1}, {"peers": []},
    {"peers": ["a", "b"]}, {"peers": "a"}, {"files": []}, {"files": {}}, {"files": [1]}, {"files": [ENTRY, ENTRY]},
    {"files": [{**ENTRY, "name": "../../../etc/passwd"}]}, {"files": [{**ENTRY, "name": "/etc/passwd"}]},
    {"files": [{**ENTRY, "size": -1}]}, {"files": [{**ENTRY, "size": 1e3}]}, {"files": [{**ENTRY, "sha256": "0" * 63}]},
    {"files": [{**ENTRY, "sha256": "Z" * 64}]}, {"files": [{"name": ENTRY["name"]}]}, {"extra": []}, {"versions": "1"},
    {"config_digest": 1}, {"saved": None}, {"format": 0}, {"format": -1}, {"format": True}, {"format": "1"},
    {"format": -10**30}, {"format": None}])
def test_a_manifest_with_wrong_entries_is_refused(folder, changes):
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        load_manifest(folder, 10)
    assert not isinstance(caught.value, TooNew)
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        find_newest(folder)


@pytest.mark.parametrize("text", [
    b"", b"\n", b"null\n", b"[]\n", b"{}\n", b"[" * 100_000 + b"\n", b'{"a": ' * 100_000 + b"\n", b"\xff\xfe\n",
    b'{"digest": 1, "digest": 2}\n', b'{"step": NaN}\n', b'{"step": 1e400}\n', b"9" * 10_000 + b"\n", b'"\\ud800"\n',
    b'{"a": "\\ud800"}\n'])
def test_a_manifest_that_is_not_strict_json_is_refused(folder, text):
    (folder.checkpoints / "step_00000010" / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError):
        load_manifest(folder, 10)


def test_a_huge_manifest_is_not_read_whole(folder):
    os.truncate(folder.checkpoints / "step_00000010" / MANIFEST, 1 << 33)
    with pytest.raises(CheckpointError):
        load_manifest(folder, 10)


def test_a_later_format_is_named_and_never_passed_over(folder):
    directory = checkpoints.begin(folder, 5, 1)
    checkpoints.commit(folder, 5, 1, [save_peer(directory, 0, {})], Meta(0, ("a",), "", ""))
    rewrite(folder, format=3, versions={"mat_dist": "7.1"}, files="in a form nobody knows yet")
    for look in (lambda: find_newest(folder), lambda: load_manifest(folder, 10)):
        with pytest.raises(TooNew, match=r"needs mat_dist >= 7\.1") as caught:
            look()
        assert caught.value.code == 4
    rewrite(folder, format=4, versions=None)
    with pytest.raises(TooNew, match="later"):
        find_newest(folder)


OLD_STATE = {
    "name": "a", "model": {"conv.weight": torch.arange(6.0).reshape(2, 3), "bn.n": torch.tensor(7)}, "ema": None,
    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "eat": {"counted": [[1, 2]]}, "carried": {"frames": torch.zeros(4), "known": torch.ones(4, dtype=torch.bool)}}


def test_a_checkpoint_of_format_1_is_read_beside_those_of_format_2(folder):
    plant(folder, saved(OLD_STATE), version=1)
    (folder.checkpoints / "step_00000010" / "peer_0.safetensors").unlink()
    found, notes = find_newest(folder)
    content = load_peer(found, 0)
    assert notes == [] and found.format == 1
    assert list(content) == ["name", "model", "ema", "optimizer", "methods"]
    assert torch.equal(content["model"]["conv.weight"], OLD_STATE["model"]["conv.weight"])
    assert torch.equal(content["optimizer"]["state"][0]["momentum_buffer"], torch.ones(2, 3))
    directory = checkpoints.begin(folder, 20, 2)
    checkpoints.commit(folder, 20, 2, [save_peer(directory, 0, content)], Meta(1, ("a",), "c", "d"))
    assert [load_manifest(folder, step).format for step in (10, 20)] == [1, 2]
    assert repr(load_peer(load_manifest(folder, 20), 0)) == repr(content)
    assert checkpoints.prune(folder, 1) == ([10], [])


def test_what_belongs_to_a_method_moves_below_its_name():
    plain = {key: OLD_STATE[key] for key in ("name", "model", "ema", "optimizer")}
    assert migrated(plain) == {**plain, "methods": {}}
    carried = OLD_STATE["carried"]  # of a warm start or of Free-AT, which the settings tell
    assert migrated(OLD_STATE) == {**plain, "methods": {"unions": {"eat": OLD_STATE["eat"]}, "warm_start": carried,
                                                        "free_at": carried}}
    assert migrated(migrated(OLD_STATE)) == migrated(OLD_STATE)


def test_a_damaged_pointer_leads_nowhere(folder):
    for text in ("", "../..", "step_1", "step_00000010/..", "x" * 10_000, "step_00000099"):
        (folder.checkpoints / "latest").write_text(text)
        with pytest.raises(CheckpointError, match="step_00000010"):
            load_manifest(folder)
    (folder.checkpoints / "latest").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError):
        load_manifest(folder)


def test_the_package_never_unpickles_freely():
    package = Path(sys.modules["mat_dist"].__file__).parent / "checkpoints"
    text = "".join(file.read_text() for file in package.glob("*.py"))
    assert "weights_only=False" not in text and "pickle.load" not in text and "pickle.Unpickler" not in text
    assert text.count("torch.load(") == text.count("weights_only=True, map_location") == 1
    assert text.count("read_torch(") == 3  # its definition, format 1, and state dicts of other programs
