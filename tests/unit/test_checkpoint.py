"""Checkpoints: what is saved is what is loaded; damage is found; the newest intact one wins; retention."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies
from safetensors import safe_open
from safetensors.torch import _TYPES, load_file
from torch import nn

from mat_dist import checkpoints
from mat_dist.checkpoints import Meta, find_newest, load_manifest, load_peer, mark_best, prune, read_best, save_peer
from mat_dist.checkpoints.peers import TYPES
from mat_dist.checkpoints.store import MANIFEST, read_manifest
from mat_dist.errors import CheckpointError, NonFinite, OutputError
from mat_dist.runs.folder import RunFolder

META = Meta(epoch=2, peers=("ann", "bob"), config_digest="c" * 64, data_digest="d" * 64, extra={"best": 0.5})


def state(step: int, index: int) -> dict:
    return {"model": {"w": torch.full((40,), float(step)), "n": torch.tensor(index)}, "step": step}


def save(folder: RunFolder, step: int, attempt: int = 1):
    directory = checkpoints.begin(folder, step, attempt)
    entries = [save_peer(directory, index, state(step, index)) for index in range(2)]
    return checkpoints.commit(folder, step, attempt, entries, META)


def steps(folder: RunFolder) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.checkpoints.glob("step_*") if path.suffix == "")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def three(folder: RunFolder) -> RunFolder:
    for step in (10, 20, 30):
        save(folder, step)
    return folder


def test_saved_peers_come_back(folder):
    saved = save(folder, 123)
    manifest, notes = find_newest(folder)
    assert notes == [] and manifest == saved == load_manifest(folder) == load_manifest(folder, 123)
    assert manifest.directory == folder.checkpoints / "step_00000123"
    assert (manifest.step, manifest.attempt, manifest.meta) == (123, 1, META)
    for index in range(2):
        content = load_peer(manifest, index)
        assert content["step"] == 123 and torch.equal(content["model"]["w"], torch.full((40,), 123.0))
        assert content["model"]["n"] == index


def test_safetensors_and_json_read_the_files_without_us(folder):
    save(folder, 5)
    assert (folder.checkpoints / "latest").read_text() == "step_00000005\n"
    file = folder.checkpoints / "step_00000005" / "peer_1.safetensors"
    assert sorted(load_file(file)) == ["model.n", "model.w"] and load_file(file)["model.n"] == 1
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["state"]) == {
            "model": {"w": {"$tensor": "model.w"}, "n": {"$tensor": "model.n"}}, "step": 5}


def test_the_reader_printed_in_the_docs_works_and_finds_damage(folder, monkeypatch):
    save(folder, 5)
    monkeypatch.chdir(folder.checkpoints / "step_00000005")
    text = (Path(__file__).parents[2] / "docs" / "checkpoint.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    found: dict = {}
    exec(code, found)
    assert sorted(found["weights"]) == ["ann", "bob"] and found["weights"]["bob"]["n"] == 1
    flip(Path("peer_0.safetensors"), 900)
    with pytest.raises(AssertionError):
        exec(code, {})


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool,
          torch.complex64, torch.uint16, torch.int8, torch.float8_e5m2)
NESTS = {
    "dtypes": {str(dtype): torch.arange(6).to(dtype).reshape(2, 3) for dtype in DTYPES},
    "shapes": {"empty": torch.empty(0, 3), "scalar": torch.tensor([-0.0]), "0-dim": torch.tensor(3), "many": [
        torch.ones(1)] * 3},
    "plain": {"int": -(2**60), "float": 0.1, "tiny": 5e-324, "minus": -0.0, "none": None, "text": "\u00e4 \ud800 $",
              "flag": True, "no": False, "one": 1, "real": 1.0, "infinite": float("-inf")},
    "containers": {"list": [1, [2.5, "x"], []], "pair": (0.9, 0.999), "nested": ({"a": (torch.ones(1), None)}, [()]),
                   "nothing": {}},
    "keys": {3: {"a": torch.ones(1)}, "3": torch.zeros(1), -1: 2, "": torch.ones(2), "a.b": torch.ones(3),
             "a": {"b": torch.zeros(3), "": 1}, "__metadata__": torch.ones(4), "$tensor": "x", "$x": {"$tuple": [1]}},
    "only a tag": {"$tensor": "a.b"},
    "a tensor's name": {"__metadata__": torch.ones(1), "__metadata___": torch.ones(2)},
    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2), "step": torch.tensor(1.0)}, 1: {
        "momentum_buffer": None}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}]},
}


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return (type(other) is torch.Tensor and one.dtype == other.dtype and one.shape == other.shape
                and one.reshape(-1).view(torch.uint8).tolist() == other.reshape(-1).view(torch.uint8).tolist())
    if isinstance(one, dict):
        return type(other) is dict and [(k, type(k)) for k in one] == [(k, type(k)) for k in other] and all(
            same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


@pytest.mark.parametrize("nest", NESTS)
def test_any_nested_state_comes_back_as_it_was(folder, nest):
    directory = checkpoints.begin(folder, 1, 1)
    manifest = checkpoints.commit(folder, 1, 1, [save_peer(directory, 0, NESTS[nest])], Meta(0, ("a",), "", ""))
    assert same(NESTS[nest], load_peer(manifest, 0))


def test_tied_weights_and_layouts_are_saved_as_plain_copies(folder):
    shared = torch.arange(12.0).reshape(3, 4)
    wide = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    given = {"tied": shared, "too": shared, "row": shared[1], "turned": shared.T, "wide": wide,
             "same": torch.ones(1).expand(5), "parameter": nn.Parameter(torch.ones(2))}
    manifest = checkpoints.commit(folder, 1, 1, [save_peer(checkpoints.begin(folder, 1, 1), 0, given)],
                                  Meta(0, ("a",), "", ""))
    back = load_peer(manifest, 0)
    assert list(back) == list(given) and all(torch.equal(value, given[key]) for key, value in back.items())
    back["tied"].zero_()
    assert back["too"].sum() == 66


LEAVES = (strategies.none() | strategies.booleans() | strategies.integers(-2**63, 2**63) | strategies.text(max_size=5)
          | strategies.floats(allow_nan=False) | strategies.lists(strategies.floats(0, 1)).map(torch.tensor))
KEYS = strategies.text("$a._", max_size=3) | strategies.integers(0, 3)
STATES = strategies.recursive(LEAVES, lambda inner: strategies.dictionaries(KEYS, inner) | strategies.lists(
    inner, max_size=3) | strategies.lists(inner, max_size=3).map(tuple), max_leaves=12)


@settings(max_examples=60, deadline=None)
@given(STATES)
def test_any_nest_that_can_be_thought_of_comes_back(nest):
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        entry = save_peer(checkpoints.begin(folder, 1, 1), 0, {"x": nest})
        manifest = checkpoints.commit(folder, 1, 1, [entry], Meta(0, ("a",), "", ""))
        assert same({"x": nest}, load_peer(manifest, 0))


def test_a_model_and_its_optimizer_resume_bitwise(folder):
    def train(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()

    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()).to(memory_format=torch.channels_last)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    model, optimizer = fresh()
    train(model, optimizer, 3)
    directory = checkpoints.begin(folder, 3, 1)
    entry = save_peer(directory, 0, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    manifest = checkpoints.commit(folder, 3, 1, [entry], Meta(0, ("a",), "", ""))
    train(model, optimizer, 3)
    resumed, its_optimizer = fresh()
    content = load_peer(manifest, 0)
    resumed.load_state_dict(content["model"])
    its_optimizer.load_state_dict(content["optimizer"])
    train(resumed, its_optimizer, 3)
    for expected, value in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, value)


def test_every_type_of_our_files_is_that_of_safetensors():
    assert all(_TYPES[name] == dtype for dtype, name in TYPES.items())


def test_tensors_are_aligned_in_the_file(tmp_path):
    given = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(1, dtype=torch.float64), "c": torch.ones(5).half()}
    data = (tmp_path / save_peer(tmp_path, 0, given).name).read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    assert all((size + header[key]["data_offsets"][0]) % tensor.element_size() == 0 for key, tensor in given.items())


def test_a_snapshot_is_a_dense_copy(folder):
    big = torch.zeros(1000, 1000)
    weight = nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last))
    copy = checkpoints.snapshot({"row": big[3], "column": big[:, 3], "wide": torch.ones(1).expand(8), "weight": weight})
    big.fill_(7)
    with torch.no_grad():
        weight.fill_(7)
    tensors = copy.tensors
    assert all(tensor.is_contiguous() and tensor.untyped_storage().nbytes() == 4 * tensor.numel()
               for tensor in tensors.values())
    assert tensors["row"].sum() == 0 and tensors["weight"].sum() == 96 and type(tensors["weight"]) is torch.Tensor
    assert save_peer(folder.path, 0, {"row": big[3]}).size < 8000


def test_equal_states_give_equal_bytes(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir(), second.mkdir()
    assert save_peer(first, 0, state(1, 0)) == save_peer(second, 0, state(1, 0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_named_and_nothing_is_written(tmp_path, value):
    bad = {"model": {"conv.weight": torch.tensor([1.0, value])}, "step": 1}
    with pytest.raises(NonFinite, match=r"peer 3, model\.conv\.weight"):
        save_peer(tmp_path, 3, bad)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("value", "kind"), [
    (object(), r"builtins\.object"), ({1, 2}, "set"), (b"x", "bytes"), (Path("x"), "PosixPath"),
    (torch.float32, "dtype"), (nn.Linear(1, 1), "Linear"), (torch.ones(2).to_sparse(), "Tensor"),
    (torch.ones(2, dtype=torch.complex128), "Tensor"),
    (torch.Size([1]), "Size"), ({b"k": 1}, "bytes"), ({True: 1}, "bool"), (torch.device("cpu"), "device"),
    (lambda: 0, "function")])
def test_anything_but_tensors_and_plain_values_is_named_by_its_key(tmp_path, value, kind):
    with pytest.raises(CheckpointError, match=kind + r".*state\.a\.1\.b"):
        save_peer(tmp_path, 0, {"a": [1, {"b": value}]})
    assert os.listdir(tmp_path) == []


def test_numpy_numbers_are_refused(tmp_path):
    numpy = pytest.importorskip("numpy")
    with pytest.raises(CheckpointError, match="float64"):
        save_peer(tmp_path, 0, {"best": numpy.float64(0.5)})


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_sixty_random_bit_flips_are_all_found(three):
    good = {path: path.read_bytes() for path in (three.checkpoints / "step_00000030").iterdir()}
    assert len(good) == 3
    random.seed(0)
    for number in range(60):
        file = list(good)[number % 3]
        bit = random.randrange(8 * len(good[file]))
        flip(file, bit)
        manifest, notes = find_newest(three)
        assert manifest.step == 20, (file.name, bit)
        assert len(notes) == 1 and "step_00000030 is damaged" in notes[0] and "10 steps are redone" in notes[0]
        if file.name != MANIFEST:
            with pytest.raises(CheckpointError, match=file.name):
                load_peer(load_manifest(three, 30), int(file.stem[-1]))
        file.write_bytes(good[file])
    assert find_newest(three)[0].step == 30


def test_500_flipped_bits_of_a_manifest_are_all_found(folder):
    manifest = save(folder, 10)
    file = manifest.directory / MANIFEST
    good = file.read_bytes()
    random.seed(1)
    for bit in random.sample(range(8 * len(good)), 500):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises(CheckpointError):
            read_manifest(manifest.directory)


@pytest.mark.parametrize("name", ["peer_0.safetensors", "peer_1.safetensors", MANIFEST])
@pytest.mark.parametrize("damage", ["empty", "half", "one byte less", "one byte more", "zeros", "missing", "folder"])
def test_truncated_files_are_found(three, name, damage):
    file = three.checkpoints / "step_00000030" / name
    data = file.read_bytes()
    cut = {"empty": b"", "half": data[: len(data) // 2], "one byte less": data[:-1], "one byte more": data + b"x",
           "zeros": bytes(len(data))}
    if damage in cut:
        file.write_bytes(cut[damage])
    else:
        file.unlink()
        if damage == "folder":
            file.mkdir()
    assert find_newest(three)[0].step == 20
    with pytest.raises(CheckpointError):
        load_peer(load_manifest(three, 30), int(file.stem[-1]) if name != MANIFEST else 0)


def test_files_of_two_steps_cannot_be_mixed(three):
    older, newer = (three.checkpoints / name / "peer_1.safetensors" for name in ("step_00000020", "step_00000030"))
    shutil.copy(older, newer)
    assert find_newest(three)[0].step == 20
    with pytest.raises(CheckpointError, match="differs from what was saved"):
        load_peer(load_manifest(three), 1)


def test_a_renamed_checkpoint_is_refused(three):
    (three.checkpoints / "step_00000030").rename(three.checkpoints / "step_00000040")
    manifest, notes = find_newest(three)
    assert manifest.step == 20 and "holds the checkpoint of step 30" in notes[0]


def test_fallback_goes_as_far_as_needed_and_stops_when_nothing_is_left(three):
    assert find_newest(RunFolder(three.path / "new")) is None
    for step in (30, 20):
        flip(three.checkpoints / f"step_000000{step}" / "peer_0.safetensors", 99)
    manifest, notes = find_newest(three)
    assert manifest.step == 10 and [note[:13] for note in notes] == ["step_00000030", "step_00000020"]
    assert "20 steps are redone" in notes[0] and "10 steps are redone" in notes[1]
    (three.checkpoints / "step_00000010" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"all 3 checkpoints are damaged; step_00000030: .*peer_0"):
        find_newest(three)


def test_partial_folders_do_not_exist(folder):
    directory = checkpoints.begin(folder, 10, 1)
    save_peer(directory, 0, state(10, 0))
    assert find_newest(folder) is None
    assert checkpoints.begin(folder, 10, 2).is_dir() and not directory.exists()


def test_adopting_a_fallback_moves_damaged_ones_out_of_the_way(three):
    flip(three.checkpoints / "step_00000030" / "peer_0.safetensors", 99)
    manifest, _ = find_newest(three)
    notes = checkpoints.adopt(three, manifest)
    assert len(notes) == 1 and (three.checkpoints / "step_00000030.damaged").is_dir()
    assert load_manifest(three).step == 20 and steps(three) == [10, 20]
    save(three, 25, attempt=2)
    assert find_newest(three)[0].step == 25
    with pytest.raises(CheckpointError, match="not a checkpoint of this run"):
        checkpoints.adopt(RunFolder(three.path / "other"), manifest)


def test_the_same_checkpoint_again_is_kept_and_another_one_of_that_step_replaces_it(folder):
    first = save(folder, 10)
    inode = (first.directory / "peer_0.safetensors").stat().st_ino
    again = save(folder, 10, attempt=2)
    assert (again.directory / "peer_0.safetensors").stat().st_ino == inode and again.attempt == 1
    directory = checkpoints.begin(folder, 10, 3)
    other = checkpoints.commit(folder, 10, 3, [save_peer(directory, i, state(11, i)) for i in range(2)], META)
    assert other.attempt == 3 and load_peer(other, 0)["step"] == 11
    assert sorted(os.listdir(folder.checkpoints)) == ["latest", "step_00000010"]


def test_a_damaged_checkpoint_of_the_same_step_is_kept_aside(folder):
    flip(save(folder, 10).directory / "peer_1.safetensors", 50)
    save(folder, 10, attempt=2)
    assert find_newest(folder)[1] == []
    assert sorted(os.listdir(folder.checkpoints)) == ["latest", "step_00000010", "step_00000010.damaged"]


def test_commit_needs_the_files_of_all_peers(folder):
    directory = checkpoints.begin(folder, 10, 1)
    entries = [save_peer(directory, index, state(10, index)) for index in range(2)]
    with pytest.raises(ValueError, match="peer"):
        checkpoints.commit(folder, 10, 1, entries[:1], META)
    (directory / "peer_1.safetensors").unlink()
    with pytest.raises(OutputError, match=r"peer_1\.safetensors is not there.*share"):
        checkpoints.commit(folder, 10, 1, entries, META)
    assert find_newest(folder) is None and os.listdir(folder.checkpoints) == []


@pytest.mark.parametrize("which", ["latest", "best", "step_00000010", "10", 10, "step_10", "../x", "", -1, "9" * 30])
def test_a_missing_checkpoint_is_an_error_that_lists_what_there_is(folder, which):
    save(folder, 20)
    (folder.checkpoints / "latest").write_text("../../etc/passwd\n")
    with pytest.raises(CheckpointError, match="step_00000020"):
        load_manifest(folder, which)


def test_a_missing_peer_is_named(folder):
    manifest = save(folder, 10)
    for index in (-1, 2):
        with pytest.raises(CheckpointError, match=f"no peer {index}.*0 to 1"):
            load_peer(manifest, index)


def test_best_is_remembered_and_forgotten_with_its_checkpoint(three):
    assert read_best(three) is None
    mark_best(three, 20, 0.75)
    best = read_best(three)
    assert (best.step, best.score) == (20, 0.75)
    assert load_manifest(three, "best").step == 20 and find_newest(three)[1] == []
    with pytest.raises(CheckpointError):
        mark_best(three, 99, 0.9)
    shutil.rmtree(three.checkpoints / "step_00000020")
    assert read_best(three) is None


def test_prune_keeps_the_newest_and_the_best(folder):
    for step in range(10, 80, 10):
        save(folder, step)
    mark_best(folder, 20, 0.5)
    assert prune(folder, 2) == ([10, 30, 40, 50], [])
    assert steps(folder) == [20, 60, 70]
    (folder.checkpoints / "step_00000020" / "score.json").unlink()
    assert prune(folder, 2) == ([], [])
    assert sorted(os.listdir(folder.checkpoints)) == ["best", "latest"] + [f"step_000000{n}" for n in (20, 60, 70)]


def test_prune_never_removes_the_last_intact_one(three):
    save(three, 40)
    for step in (30, 40):
        flip(three.checkpoints / f"step_000000{step}" / "peer_0.safetensors", 77)
    assert prune(three, 2) == ([10], [])
    assert steps(three) == [20, 30, 40] and find_newest(three)[0].step == 20
    flip(three.checkpoints / "step_00000020" / "peer_0.safetensors", 77)
    assert prune(three, 2) == ([], [])


def test_incomplete_ones_do_not_count_as_kept(three):
    (three.checkpoints / "step_00000030" / "peer_0.safetensors").write_bytes(b"")
    assert prune(three, 2) == ([], []) and steps(three) == [10, 20, 30]
    with pytest.raises(ValueError, match="keep"):
        prune(three, 0)


@pytest.mark.parametrize("operation", ["rename", "rmdir"])
def test_prune_survives_a_failed_delete(three, monkeypatch, operation):
    real = getattr(os, operation)

    def refuse(path, *args, **kwargs):
        if "00000010" in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)
    monkeypatch.setattr(os, operation, refuse)
    removed, notes = prune(three, 1)
    assert removed == [20] and len(notes) == 1 and "step_00000010: Permission denied" in notes[0]
    save(three, 40)  # what cannot be removed does not stop the next save
    monkeypatch.undo()
    checkpoints.begin(three, 50, 1)
    assert [name for name in os.listdir(three.checkpoints) if name.endswith(".deleted")] == []


def test_a_file_size_limit_is_reported_and_leaves_nothing(folder):
    save(folder, 10)
    directory = checkpoints.begin(folder, 20, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match=r"peer_0\.safetensors.*ulimit") as caught:
            save_peer(directory, 0, {"w": torch.zeros(9000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in caught.value.what and "bytes needed" in caught.value.what
    assert "bytes free" in caught.value.what and os.listdir(directory) == []
    checkpoints.abandon(folder, 20, 1)
    assert find_newest(folder)[0].step == 10
    assert sorted(os.listdir(folder.checkpoints)) == ["latest", "step_00000010"]


def test_a_run_folder_that_vanishes_is_an_output_error(folder):
    save(folder, 10)
    directory = checkpoints.begin(folder, 20, 1)
    shutil.rmtree(folder.path)
    with pytest.raises(OutputError, match="the folder is gone"):
        save_peer(directory, 0, state(20, 0))
    checkpoints.abandon(folder, 20, 1)
    with pytest.raises(OutputError, match="the folder is gone"):
        checkpoints.begin(folder, 30, 1)
