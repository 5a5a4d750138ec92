"""The preflight: what it finds, which code it ends with, that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from mat_dist.config import load_config
from mat_dist.core.graph import CohortGraph
from mat_dist.core.peer import Peer
from mat_dist.data import Batches, load_data
from mat_dist.distributed.launch import Launch
from mat_dist.errors import DataError
from mat_dist.models.registry import make_model
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import GUARD, RunLock
from mat_dist.tools.check import machine, memory, run
from mat_dist.tools.check.__main__ import main
from mat_dist.tools.check.models import Graph, Measured, _held, check_data, check_model, known_sample
from mat_dist.tools.check.run import file_system
from tests.small_runs import SMALL, run_small, tree_hash
from tests.unit.data_files import random_images, write_folder

QUICK = ("run.device=cpu", "model.width=0.25", "peers=2")


@pytest.fixture(autouse=True)
def quiet_place(tmp_path, monkeypatch):
    """An empty folder to run in, and no launcher's variables."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                 "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


class Checked:
    """One call of the command with --json."""

    def __init__(self, capsys, *words: str) -> None:
        self.code = main([*QUICK, *words, "--json"])
        told = capsys.readouterr()
        self.err = told.err
        self.rows = json.loads(told.out)["checks"]
        assert json.loads(told.out)["code"] == self.code

    def row(self, check: str) -> dict:
        return next(one for one in self.rows if one["check"] == check)

    def errors(self) -> list[str]:
        return [one["check"] for one in self.rows if one["status"] == "error"]


def write_npz(path: Path, *, scale: int = 1) -> None:
    images = random_images(60, 8, 8, 3) // scale
    np.savez(path, x_train=images, y_train=np.arange(60) % 3, x_test=images[:9], y_test=np.arange(9) % 3)


# ---------------------------------------------------------------- all is well


def test_the_default_configuration_passes_and_nothing_is_left_behind(capsys, tmp_path):
    before = tree_hash(tmp_path)
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert tree_hash(tmp_path) == before
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["ok"] * (len(lines) - 1)
    assert lines[-1] == f"mat_dist: check: {len(lines) - 1} ok"
    assert "1150 + 287 + 360 images" in out


def test_every_part_of_the_result_is_in_the_json(capsys):
    checked = Checked(capsys, "--ranks", "2")
    assert checked.code == 0
    names = [one["check"] for one in checked.rows]
    assert names == ["config", "versions", "ranks", "device", "optimizers", "data", "model peers 0-1", "memory",
                     "run folder", "disk", "environment", "port", "address", "interfaces"]
    found = checked.row("versions")["details"]["versions"]
    assert set(found) >= {"python", "torch", "torchvision", "numpy", "pydantic", "CUDA"}


def test_a_terminal_gets_a_table_with_what_was_found_word_by_word(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "150")
    assert main([*QUICK, "data.name=npz", "data.root=[bold]x"]) == 3
    out = capsys.readouterr().out
    assert "how to fix" in out
    assert "[bold]x" in out


# ---------------------------------------------------------------- each fault has its code


@pytest.mark.parametrize(("words", "code", "check", "text"), [
    (["attack.epz=1"], 2, "config", "epz"),
    (["peers=4", "--ranks", "3"], 6, "ranks", "3 ranks do not fit 4 peers"),
    (["peers=4", "--ranks=4", "--nodes", "3"], 6, "ranks", "4 ranks on 3 nodes"),
    (["train.accumulate=32", "--ranks=4"], 6, "ranks", "48 images per replica"),
    (["comm.backend=nccl", "run.device=auto"], 6, "device", "nccl needs GPUs"),
    (["data.name=npz", "data.root=missing.npz"], 3, "data", "the file does not exist"),
    (["data.name=unheard"], 2, "data", "unknown data set"),
    (["train.batch_size=5000"], 3, "data", "do not fill one batch"),
    (["model=tiny_cn"], 2, "model peers 0-1", "unknown model"),
    (["run.name=a", "run.resume=must"], 4, "run folder", "no run to continue"),
    (["run.root=file/x"], 5, "run folder", "Not a directory"),
])
def test_a_fault_is_named_and_decides_the_exit_code(capsys, tmp_path, monkeypatch, words, code, check, text):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    checked = Checked(capsys, *words)
    assert checked.code == code
    assert checked.errors()[0] == check
    assert text in checked.row(check)["found"]
    assert checked.row(check)["how"]
    assert checked.err.startswith("mat_dist: error: ")
    assert checked.err.count("\n") == 1
    assert "\nTraceback" not in checked.err


def test_all_checks_are_made_and_the_first_error_decides(capsys, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "many")
    checked = Checked(capsys, "data.name=npz", "data.root=missing.npz", "run.resume=must")
    assert checked.errors() == ["data", "run folder", "environment"]
    assert checked.code == 3
    assert [one["check"] for one in checked.rows if one["status"] == "skipped"] == [
        "model peers 0-1", "memory", "disk", "port", "address", "interfaces"]


def test_all_mistakes_of_a_configuration_are_listed(capsys):
    checked = Checked(capsys, "attack.epz=1", "optim.lr=fast")
    assert checked.errors() == ["config", "config"]
    assert checked.row("port")["status"] == "ok"  # what needs no settings is still looked at


@pytest.mark.parametrize("words", [["--ranks", "x"], ["--ranks"], ["--nodes=0"], ["--ranks=-1"], ["--dry-run"],
                                   ["--rank=2"]])
def test_a_wrong_option_is_one_line_and_code_2(capsys, words):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_the_help_names_its_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(option in out for option in ("--ranks N", "--nodes M", "--json", "--config", "--plugin"))


def test_it_is_started_as_one_process(capsys, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost"),
                        ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    assert main([*QUICK]) == 6
    assert "start it as one process: python -m mat_dist.check --ranks N" in capsys.readouterr().err


# ---------------------------------------------------------------- data


def test_images_that_were_scaled_twice_are_a_warning(capsys, tmp_path):
    write_npz(tmp_path / "dark.npz", scale=255)  # bytes 0 and 1
    words = ("data.name=npz", "data.root=dark.npz", "data.val_size=10", "train.batch_size=16", "model=small_cnn")
    checked = Checked(capsys, *words)
    assert checked.row("data")["status"] == "warning"
    assert "brightest pixel" in checked.row("data")["how"]
    write_npz(tmp_path / "dark.npz")
    assert Checked(capsys, *words).row("data")["status"] == "ok"


FOLDER = ("data.name=folder", "data.root=set", "data.residency=mmap", "data.cache=cache", "train.batch_size=8",
          "model=small_cnn")


def test_a_cache_is_not_built_but_its_images_are_tried(capsys, tmp_path):
    write_folder(tmp_path / "set", train=30, test=6, side=16)
    checked = Checked(capsys, *FOLDER)
    assert checked.code == 0
    assert "72 images of 2 classes, 16 x 16 x 3; 60 of them decode; the run will build a cache" in \
        checked.row("data")["found"]
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "set/train/cat/0007.png").write_bytes(b"no image")
    checked = Checked(capsys, *FOLDER)
    assert checked.code == 3
    assert "train/cat/0007.png" in checked.row("data")["found"]
    assert Checked(capsys, *FOLDER, "data.on_bad=skip").code == 0


def test_a_folder_without_a_cache_is_looked_at_as_a_run_would_read_it(capsys, tmp_path):
    write_folder(tmp_path / "set", train=30, test=6, side=16)
    for words, found in ((["train.batch_size=64"], "48 training images do not fill one batch of 64"),
                         (["data.test_size=13"], "13 test images asked for, 12 are there")):
        checked = Checked(capsys, *FOLDER, *words)
        assert checked.code == 3 and found in checked.row("data")["found"]


def test_a_cache_that_is_there_is_opened(capsys, tmp_path):
    write_folder(tmp_path / "set", train=30, test=6, side=16)
    load_data(load_config(None, FOLDER).data, seed=0, batch_size=8)
    assert "training, validation, test" in Checked(capsys, *FOLDER).row("data")["found"]


def test_a_disk_without_room_for_the_cache_is_named(capsys, tmp_path, monkeypatch):
    write_folder(tmp_path / "set", train=30, test=6, side=16)
    monkeypatch.setattr("mat_dist.data.cache.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1}))
    checked = Checked(capsys, *FOLDER)
    assert checked.code == 5
    assert "the cache of decoded images needs" in checked.row("data")["found"]


def test_data_that_the_run_will_download_are_a_warning_and_the_models_are_tried_on_noise(capsys, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.utils.download_url", None)  # a call would be an error
    checked = Checked(capsys, "data.name=cifar10", "data.root=.", "data.download=true", "model=small_cnn")
    assert checked.code == 0
    assert checked.row("data")["status"] == "warning"
    assert checked.row("model peers 0-1")["status"] == "ok"
    checked = Checked(capsys, "data.name=cifar10", "data.root=.", "model=small_cnn")
    assert checked.code == 3
    assert checked.row("model peers 0-1")["status"] == "ok"


# ---------------------------------------------------------------- models

PLUGIN = """
import torch
from torch import nn
from mat_dist.models import register_model

class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.line = nn.Linear(shape[0] * shape[1] * shape[2], classes)
    def forward(self, x):
        out = self.line(x.flatten(1))
        return {train} if self.training else out

@register_model("mine_{number}")
def build(config, shape, classes):
    return Net(shape, classes)
"""


@pytest.mark.parametrize(("number", "train", "code", "text"), [
    (0, "out", 0, "mine_0"), (1, "out[:, :3]", 13, "logits of shape (8, 3) for 8 images"),
    (2, "out / 0", 15, "logits are not finite"), (3, "out.detach()", 13, "RuntimeError"),
    (4, "torch.where(out > 99, out.sqrt(), out)", 15, "the gradient is not finite"),
    (5, "out.no_such_thing()", 13, "AttributeError")])
def test_a_model_is_tried_in_train_mode_with_its_gradient(capsys, tmp_path, number, train, code, text):
    (tmp_path / "mine.py").write_text(PLUGIN.format(number=number, train=train))
    checked = Checked(capsys, "--plugin", "mine.py", f"model=mine_{number}", "model.width=1")
    assert checked.code == code
    assert text in checked.row("model peers 0-1")["found"]


def test_a_teacher_for_other_data_is_named_beside_what_else_is_wrong(capsys, tmp_path):
    teacher = run_small(tmp_path, "teacher", "peers=1", "loss=at").folder
    student = ("peers.1.frozen=true", f"peers.1.init_from={teacher.path}:peer0")
    assert Checked(capsys, *student, "data.name=digits").code == 0
    found = Checked(capsys, *student, "data.name=cifar100", "data.root=.", "--ranks=3")
    assert set(found.errors()) >= {"ranks", "model peer 1"}
    teaching = found.row("model peer 1")
    assert "its models are for" in teaching["found"] and "init_from" in teaching["how"]


def test_peers_that_differ_are_tried_one_by_one(capsys):
    checked = Checked(capsys, "peers=3", "peers.1.threat=l2", "peers.1.attack.eps=1")
    assert [one["check"] for one in checked.rows if one["check"].startswith("model")] == ["model peers 0, 2",
                                                                                          "model peer 1"]


# ---------------------------------------------------------------- memory and disk


def test_the_size_of_a_checkpoint_is_that_of_the_files_that_a_run_writes(tmp_path):
    config = load_config(None, [*SMALL, "optim.ema_decay=0.9", "model.width=1"])
    measured = check_model(config, (0, 1), known_sample(config), torch.device("cpu")).value
    done = run_small(tmp_path / "runs", "a", "optim.ema_decay=0.9", "model.width=1")
    files = sorted(done.folder.checkpoints.glob("step_*/peer_0.safetensors"))
    # Names and alignment of a zip file come on top: 64 bytes per tensor.
    assert 0 <= files[-1].stat().st_size - measured.state < 20_000


@pytest.mark.parametrize("model", ["small_cnn", "resnet18"])
def test_what_a_graph_holds_follows_from_few_images(model):
    """Against the bytes that autograd saves for a batch four times as large as those that are tried."""
    config = load_config(None, ["run.device=cpu", f"model={model}", "model.width=0.25", "data.name=cifar10",
                                "data.root=."])
    sample = known_sample(config)
    measured = check_model(config, (0, 1, 2, 3), sample, torch.device("cpu")).value
    network_ = make_model(config.peers[0], sample.images, seed=0, step=config.step, device=torch.device("cpu"))
    peer = Peer(0, config.peers[0], network_, CohortGraph.of(config.peers).peers[0], seed=0, step=config.step)
    held = _held(peer, peer.learn, sample.x_BCHW[:32], (0, 0, 0)).total
    assert abs(measured.learn.at(32) / held - 1) < 0.02


def test_a_frozen_peer_needs_its_weights_alone():
    config = load_config(None, ["run.device=cpu", "peers=2", "peers.0.loss=ard", "optim.ema_decay=0.9",
                                "peers.1.frozen=true", "peers.1.init_from=run"])
    sample = known_sample(config)
    free = config.peers[1].model_copy(update={"init_from": None})
    config = config.model_copy(update={"peers": (config.peers[0], free)})
    student, teacher = (check_model(config, (peer,), sample, torch.device("cpu")).value for peer in (0, 1))
    assert (teacher.state, teacher.gradients) == (teacher.weights, 0)
    assert student.state > 2.9 * teacher.weights  # weights, their average, momentum


def test_the_need_of_a_rank_is_the_sum_that_a_hand_makes():
    config = load_config(None, ["run.device=cpu", "peers=4", "train.batch_size=40", "eval.chunk=100", "eval.every=1"])
    sample = known_sample(config)  # 64 pixels, 10 classes, 4 bytes each
    one = Measured(weights=1000, gradients=900, state=3000, learn=Graph(50, 7), attack=Graph(20, 3),
                   largest=Graph(10, 0))
    everyone = dict.fromkeys(range(4), one)

    def need(ranks: int) -> memory.Need:
        return memory.rank_need(config, Launch(world=ranks), 0, sample, everyone, base=5, images=6)

    # mat: each peer learns on its own AEs and those of three others, and teaches on all four.
    pixels, numbers = 64 * 4, 10 * 4
    learning = 16 * (50 * 40 + 7) + 2 * 400
    aes, logits = (8 + 4 + 1) * pixels * 40, (4 * 4 + 16) * numbers * 40
    assert learning < 20 * 40 + 3 + memory.ATTACK_IMAGES * pixels * 40  # so the attack counts
    step = 20 * 40 + 3 + memory.ATTACK_IMAGES * pixels * 40 + aes + logits + 4 * 900
    evaluation = 4 * (1000 + 20 * 100 + 3) + memory.ATTACK_IMAGES * pixels * 100
    assert need(1) == memory.Need(5, 6, 12_000, step, evaluation, 24_000)
    assert need(1).total(saving=False) == 5 + 6 + 12_000 + max(step, evaluation)
    assert need(4).state == 3000
    assert need(8).step < need(4).step  # half of the batch
    config = load_config(None, ["run.device=cpu", "peers=4", "methods.warm_start.reset_epochs=0", "data.augment.pad=1"])
    sample = dataclasses.replace(sample, train=300)
    assert need(2).state == 2 * (3000 + 300 * 10 * 10 * 2)  # with the perturbations of padded images, in fp16


@pytest.mark.parametrize(("factor", "status"), [(0.9, "error"), (1.1, "warning"), (2, "ok")])
def test_memory_that_is_short_is_an_error_and_memory_that_is_tight_a_warning(capsys, monkeypatch, factor, status):
    needed = Checked(capsys).row("memory")["details"]["total"]
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)
    free = Checked(capsys).row("memory")["details"]["total"]
    assert free < needed
    monkeypatch.setattr(memory, "available_bytes", lambda: int(free * factor))
    checked = Checked(capsys)
    assert checked.row("memory")["status"] == status
    assert checked.code == (6 if status == "error" else 0)
    if status != "ok":
        assert "step.memory=recompute" in checked.row("memory")["how"]


def test_a_disk_that_cannot_hold_the_checkpoints_is_named_with_bytes(capsys, monkeypatch):
    checked = Checked(capsys, "checkpoint.keep=10")
    details = checked.row("disk")["details"]
    assert details["needed"] == 12 * details["checkpoint_bytes"]  # 10, the best, and the one being written
    monkeypatch.setattr(run, "free_bytes", lambda _: details["needed"] - 1)
    checked = Checked(capsys, "checkpoint.keep=10")
    assert checked.code == 5
    assert "12 checkpoints" in checked.row("disk")["found"]


# ---------------------------------------------------------------- run folder


def test_a_run_in_use_is_named_with_its_process(capsys, tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    with RunLock(RunFolder(tmp_path / "runs" / "a"), None):
        checked = Checked(capsys, "run.name=a")
        assert checked.code == 5
        assert f"in use by pid {os.getpid()} on " in checked.row("run folder")["found"]
    assert Checked(capsys, "run.name=a").code == 0
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == [GUARD]


def test_a_finished_run_and_one_with_other_settings_are_told(capsys, tmp_path):
    assert run_small(tmp_path / "runs", "a").code == 0
    before = tree_hash(tmp_path / "runs")
    assert main([*SMALL, "run.name=a"]) == 5
    assert "the run is finished" in capsys.readouterr().err
    assert main([*SMALL, "run.name=a", "train.epochs=2"]) == 0
    assert "to be continued" in capsys.readouterr().out
    assert main([*SMALL, "run.name=a", "train.epochs=2", "optim.lr=0.5"]) == 4
    assert "optim.lr: 0.2 -> 0.5" in capsys.readouterr().err
    assert tree_hash(tmp_path / "runs") == before


MOUNTS = r"""/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb /home/me/scratch xfs rw 0 0
cluster /big\040disk lustre rw 0 0
tmpfs /run tmpfs rw 0 0
bucket /mnt fuse.juicefs rw 0 0
"""


@pytest.mark.parametrize(("path", "kind", "shared"), [
    ("/root/runs", "ext4", False), ("/home/me/runs", "nfs4", True), ("/home/me/scratch", "xfs", False),
    ("/home/me/scratch2", "nfs4", True), ("/big disk/runs", "lustre", True), ("/run/x", "tmpfs", False),
    ("/mnt/x", "fuse.juicefs", True)])
def test_the_file_system_of_a_folder_is_that_of_the_longest_mount(tmp_path, monkeypatch, path, kind, shared):
    table = tmp_path / "mounts"
    table.write_text(MOUNTS)
    assert file_system(Path(path), table)[0] == kind
    monkeypatch.setattr(run, "existing", lambda _: Path(path))
    monkeypatch.setattr(run, "file_system", lambda folder, _: file_system(folder, table))
    answer = run.check_shared(load_config(None), 2)
    assert bool(answer.warning) is not shared
    if not shared:
        assert "srun --nodes=2" in answer.warning


# ---------------------------------------------------------------- network


@pytest.fixture
def taken(monkeypatch) -> int:
    """A port on which this process listens."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        yield port


def test_a_port_in_use_is_named_with_ways_out(capsys, taken):
    checked = Checked(capsys, "--ranks", "2")
    assert checked.code == 6
    found = checked.row("port")["found"]
    assert f"port {taken} is in use (" in found
    assert "--standalone" in checked.row("port")["how"] and f"ss -ltnp sport = :{taken}" in checked.row("port")["how"]


def test_a_port_of_another_node_cannot_be_judged_here(capsys, taken, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.77")
    checked = Checked(capsys, "--ranks", "2")
    assert checked.row("port")["status"] == "warning"
    assert "check it there" in checked.row("port")["how"]


def test_a_closed_connection_does_not_count_as_a_port_in_use(monkeypatch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # this side waits in TIME_WAIT
        client.close()
    machine._listen(port)


@pytest.mark.parametrize("port", ["many", "0", "65536", "-1", "1" * 5000, "²"])
def test_a_port_that_is_none_is_refused(capsys, monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    checked = Checked(capsys, "--ranks", "2")
    assert checked.code == 6
    assert checked.errors() == ["environment"]


def resolves_to(monkeypatch, address: str | None) -> None:
    def resolve(host, *_, **__):
        if address is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(machine.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(machine, "interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.5"})


@pytest.mark.parametrize(("address", "nodes", "status", "text"), [
    ("127.0.1.1", 2, "error", "leads to 127.0.1.1"), ("127.0.1.1", 1, "ok", "ranks on one node use 127.0.0.1"),
    (None, 2, "error", "has no address"), (None, 1, "ok", "has no address"),
    ("10.0.0.5", 2, "ok", "advertises 10.0.0.5"), ("10.0.0.6", 2, "warning", "which no interface of this node has")])
def test_the_address_that_ranks_advertise_must_reach_other_nodes(capsys, monkeypatch, address, nodes, status, text):
    resolves_to(monkeypatch, address)
    checked = Checked(capsys, "--ranks=2", f"--nodes={nodes}", "run.root=runs")
    assert checked.row("address")["status"] == status
    assert text in checked.row("address")["found"]
    if status != "ok":
        assert "(eth0)" in checked.row("address")["how"]
    assert checked.code == (6 if status == "error" else 0)


@pytest.mark.parametrize(("variable", "value", "nodes", "text"), [
    ("GLOO_SOCKET_IFNAME", "eth9", 1, "no such interface"), ("GLOO_SOCKET_IFNAME", "^docker", 1, "takes whole names"),
    ("GLOO_SOCKET_IFNAME", "lo", 2, "does not reach other nodes"), ("GLOO_SOCKET_IFNAME", "eth0", 2, ""),
    ("GLOO_SOCKET_IFNAME", "lo", 1, ""), ("NCCL_SOCKET_IFNAME", "ib", 2, "no interface fits"),
    ("NCCL_SOCKET_IFNAME", "^docker,lo", 2, "")])
def test_interfaces_that_the_environment_names_must_exist(capsys, monkeypatch, variable, value, nodes, text):
    resolves_to(monkeypatch, "10.0.0.5")
    monkeypatch.setenv(variable, value)
    checked = Checked(capsys, "--ranks=2", f"--nodes={nodes}")
    assert checked.errors() == (["interfaces"] if text else [])
    assert text in checked.row("interfaces")["found"]


@pytest.mark.parametrize(("pattern", "names"), [
    ("eth", ["eth0", "eth1"]), ("=eth0", ["eth0"]), ("ib,eth1", ["eth1", "ib0"]), ("=eth", []),
    ("^docker,lo", ["eth0", "eth1", "ib0"]), ("^=eth0", ["lo", "eth1", "ib0", "docker0"])])
def test_interfaces_are_matched_as_nccl_documents_it(pattern, names):
    assert machine.nccl_matches(pattern, ["lo", "eth0", "eth1", "ib0", "docker0"]) == names


def test_several_nodes_also_ask_for_a_shared_folder(capsys, monkeypatch):
    resolves_to(monkeypatch, "10.0.0.5")
    monkeypatch.setattr(run, "file_system", lambda *_: ("nfs4", "/home"))
    assert Checked(capsys, "--ranks=2", "--nodes=2").row("shared folder")["status"] == "ok"
    assert not [one for one in Checked(capsys, "--ranks=2").rows if one["check"] == "shared folder"]


# ---------------------------------------------------------------- devices


def test_too_few_gpus_for_the_ranks_are_an_error_that_names_the_ways_out(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    checked = Checked(capsys, "peers=4", "--ranks=4", "run.device=auto")
    assert checked.code == 6
    assert "4 ranks on this node but 2 GPUs" in checked.row("device")["found"]
    assert "run.device=cpu" in checked.row("device")["how"]
    assert "on cpu" in checked.row("model peers 0-3")["found"]  # tried all the same


@pytest.mark.parametrize(("gpus", "free", "says"), [
    (0, 0, ["cpu, 1 cores for 2 threads"]), (2, 80, ["2 x H100, 80 GiB each, 1 cores for 2 threads"]),
    (2, 40, ["another program uses memory of GPU 0, 1"])])
def test_more_threads_than_cores_are_a_warning_on_gpus_too(gpus, free, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free << 30, 80 << 30))
    config = load_config(None, [*QUICK, "run.device=auto"])
    for cores, warned in ((1, True), (2, False)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        answer = run.check_device(config, Launch(world=2, local_world=2))
        assert answer.value.type == ("cuda" if gpus else "cpu")
        assert ("2 threads share 1 cores" in answer.warning and "--cpus-per-task" in answer.warning) == warned
        assert all(text.replace("1 cores", f"{cores} cores") in answer.found + answer.warning for text in says)


def test_the_first_batch_is_checked_after_augmentation(monkeypatch):
    config = load_config(None, list(QUICK))
    bright = torch.full((4, 1, 8, 8), 1.5), torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr(Batches, "at", lambda *_: bright)
    with pytest.raises(DataError, match=r"pixels from 1\.5 to 1\.5"):
        check_data(config)
