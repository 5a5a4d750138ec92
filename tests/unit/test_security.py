"""What a stranger's file, a stranger on the network, or a neighbour on the machine must not be able to do.

Tests of single readers stand beside them: hostile checkpoints (test_checkpoint_hostile), archives and images
(test_data_npz, test_data_sets, test_data_folder), names (test_runfolder), the race for the lock (test_runfolder_lock).
"""

from __future__ import annotations

import ast
import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch.distributed as dist

import mat_dist
from mat_dist.config import load_config, load_plugins
from mat_dist.config.schema import DataConfig
from mat_dist.data.cache import cache_folder
from mat_dist.data.folder import load_folder
from mat_dist.data.images import find_dataset
from mat_dist.distributed import processes
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.torchrun_plugin import LocalRendezvous
from mat_dist.errors import ConfigError, EnvironmentFault, OutputError
from mat_dist.models import build_model
from mat_dist.runs import record
from tests.small_runs import run_small
from tests.unit.data_files import write_folder

PACKAGE = Path(mat_dist.__file__).parent


@cache
def calls() -> list[tuple[str, ast.Call, str]]:
    """Every call in the package: place, node, what is called."""
    return [(f"{path.name}:{node.lineno}", node, ast.unparse(node.func)) for path in sorted(PACKAGE.rglob("*.py"))
            for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


# ---------------------------------------------------------------- nothing that is read can run


@pytest.mark.parametrize(("function", "option", "value"), [("torch.load", "weights_only", True),
                                                           ("np.load", "allow_pickle", False)])
def test_every_read_says_that_nothing_may_run(function, option, value):
    """The defaults of the libraries are safe since torch 2.6 and numpy 1.16; ours do not depend on them."""
    found = [(where, {word.arg: getattr(word.value, "value", None) for word in node.keywords})
             for where, node, name in calls() if name in (function, f"numpy.{function[3:]}")]
    assert found
    assert not [where for where, options in found if options.get(option) is not value]


def test_no_collective_unpickles_what_a_peer_sends():
    forbidden = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
                 "send_object_list", "recv_object_list", "rpc_sync", "rpc_async", "init_rpc"}
    assert not [where for where, _, name in calls() if name.split(".")[-1] in forbidden]


def test_nothing_is_unpacked_to_disk_but_the_published_archives_of_cifar():
    """Members of archives are read in memory, by name and with bounds: no path inside an archive is ever followed.

    Those of CIFAR are unpacked after their SHA-256 was compared (test_data_sets), and no path may lead elsewhere.
    """
    found = [(where.partition(":")[0], [ast.unparse(word) for word in node.keywords]) for where, node, name in calls()
             if name.split(".")[-1] in ("extract", "extractall", "unpack_archive", "extract_archive")]
    assert found == [("builtin.py", [])]
    text = (Path(mat_dist.__file__).parent / "data" / "builtin.py").read_text()
    assert re.search(r'extraction_filter = getattr\(tarfile, "data_filter", None\)\s+tar\.extractall\(folder\)', text)


def test_only_downloads_of_data_and_of_weights_ask_the_network_for_files():
    names = {"urlopen", "urlretrieve", "download_url", "download_and_extract_archive", "load_state_dict_from_url",
             "hf_hub_download", "snapshot_download"}
    assert {where.partition(":")[0] for where, _, name in calls() if name.split(".")[-1] in names} == {
        "shared.py", "hub.py"}


@pytest.mark.parametrize("text", [
    "plugin: evil.py", "plugins: [evil.py]", "_target_: os.system", "model: {_target_: os.system}",
    "model: !!python/object/apply:os.system ['touch ran']", "data: {name: digits, loader: os.system}",
    "defaults: [https://example.org/x.yaml]"])
def test_a_configuration_cannot_name_code(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w')")
    (tmp_path / "evil.yaml").write_text(f"{text}\n")
    with pytest.raises(ConfigError):
        load_config("evil.yaml")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["os.system", "evil.py:build", "../evil", "torchvision/../../evil",
                                  "timm/hf-hub:someone/evil", "torchvision/os.system"])
def test_names_of_models_and_data_sets_lead_to_known_functions_only(name):
    config = load_config(None, [f"model.name={name}"]).peers[0].model
    with pytest.raises((ConfigError, EnvironmentFault)):  # timm may not be installed
        build_model(config, shape=(3, 32, 32), classes=10, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ConfigError):
        find_dataset(name)


def test_a_plugin_runs_as_the_bytes_whose_digest_is_recorded(tmp_path):
    """Not as bytecode that somebody left in __pycache__."""
    plugin = tmp_path / "mine.py"
    plugin.write_text("raise RuntimeError('old')")
    with pytest.raises(ConfigError, match="old"):
        load_plugins([str(plugin)])
    plugin.write_text("VALUE = 1")
    assert len(load_plugins([str(plugin)])[str(plugin)]) == 64
    assert not (tmp_path / "__pycache__").exists()


# ---------------------------------------------------------------- neighbours on the machine


@pytest.mark.parametrize(("mode", "who"), [(0o777, "anybody"), (0o770, "its group"), (0o720, "its group")])
def test_a_cache_into_which_others_may_write_is_refused(tmp_path, mode, who):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(OutputError, match=f"{who} may write .*chmod go-w"):
        cache_folder(str(tmp_path / "cache"))


def test_a_cache_is_private_whatever_the_umask(tmp_path):
    write_folder(tmp_path / "set", train=30, test=6)
    before = os.umask(0)
    try:
        load_folder(DataConfig(name="folder", root=str(tmp_path / "set"), residency="mmap",
                               cache=str(tmp_path / "cache")), True)
    finally:
        os.umask(before)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    (images,) = (tmp_path / "cache").glob("*.u8")
    assert images.stat().st_mode & 0o777 == 0o600


def test_an_identity_from_the_network_cannot_end_another_program_of_this_user(monkeypatch):
    """Heartbeats name the process to stop, and the store that carries them asks nobody for a password."""
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) as victim:
        found = processes.process_start(victim.pid)
        own = processes.ProcessIdentity.own()
        named = processes.ProcessIdentity(own.host, own.boot_id, own.pid_namespace, victim.pid, found[1])
        assert named.runs()
        named.kill()
        with pytest.raises(subprocess.TimeoutExpired):
            victim.wait(0.2)
        monkeypatch.setattr(processes, "command_line", lambda pid: "a rank")  # as if both were ranks of one launch
        named.kill()
        assert victim.wait(20) == -9


# ---------------------------------------------------------------- the network


def listeners(port: int) -> set[str]:
    """Local addresses that listen on `port`, as /proc/net/tcp and tcp6 write them."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and int(row[1].partition(":")[2], 16) == port}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_the_store_of_a_one_node_run_can_be_bound_to_loopback():
    agent = LocalRendezvous("run")
    first = agent.next_rendezvous()
    where = first.bootstrap_store_info
    assert (first.rank, first.world_size, where.master_addr) == (0, 1, "127.0.0.1")
    assert listeners(where.master_port) == {"0100007F"}
    rank = dist.TCPStore("127.0.0.1", where.master_port, is_master=False, wait_for_workers=False,
                         timeout=timedelta(seconds=10))
    rank.set("key", "value")
    assert rank.get("key") == b"value"
    assert agent.next_rendezvous().bootstrap_store_info.master_port == where.master_port  # a restart finds it again
    assert agent.shutdown()


@pytest.mark.parametrize(("variables", "interface"), [
    ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, "lo"),
    ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, None),  # two nodes
    ({"WORLD_SIZE": "4"}, None),  # srun without torchrun: perhaps several nodes
    ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "GLOO_SOCKET_IFNAME": "eth0"}, "eth0")])
def test_ranks_of_one_node_listen_on_loopback_unless_the_user_says_otherwise(monkeypatch, variables, interface):
    for name in ("LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
                        **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    Launch.from_environment().stay_on_node()
    assert os.environ.pop("GLOO_SOCKET_IFNAME", None) == interface


# ---------------------------------------------------------------- secrets


@pytest.mark.parametrize("word", [
    "https://host/x.npz?access_token=AAA&v=1", "data.root=https://host/x?v=1&X-Amz-Signature=AAA", "--auth=AAA",
    "db.pwd=AAA", "hf_AAAAAAAAAAAAAAAAAAAAAAAA", "data.root=/x/ghp_AAAAAAAAAAAAAAAAAAAA/y", "AKIAAAAAAAAAAAAAAAAA",
    "--header=Bearer eyJAAAAAAAAAAAA.eyJAAAAAAAAAAAA.AAA"])
def test_secrets_are_hidden_by_name_by_place_and_by_form(word):
    assert "AAA" not in record.redact(["train", word])[1]


@pytest.mark.parametrize("word", ["data.root=/scratch/task-force-2024/images", "model=wrn_28_10",
                                  "data.root=/d?v=1&w=2", "run.name=ask-me-anything-again", "attack.eps=8/255"])
def test_what_is_no_secret_stays(word):
    assert record.redact([word]) == [word]


def test_no_file_of_a_run_holds_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "sentinel-of-the-environment")
    done = run_small(tmp_path, "a")
    assert done.code == 0
    files = [path for path in done.folder.path.rglob("*") if path.is_file()]
    assert {"environment.json", "exit.json", "config.yaml", "rank_0.log"} <= {path.name for path in files}
    assert not [path for path in files if re.search(b"sentinel-of-the-environment", path.read_bytes())]
