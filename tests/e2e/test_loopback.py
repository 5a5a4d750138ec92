"""Who can reach a run on one node: real torchrun, sockets as the kernel lists them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Each rank prints the addresses on which it and its agent listen, as /proc/net/tcp and tcp6 write them; on attempt 0
# rank 1 fails where it is asked to.
RANK = """
import json, os, re, sys
from pathlib import Path
import torch
from mat_dist.config.schema import CommConfig
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.groups import open_mesh
from mat_dist.distributed.stopping import StopFlag

def listening(pid):
    sockets, found = set(), []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        link = re.fullmatch(r"socket:\\[(\\d+)\\]", os.readlink(file)) if os.path.lexists(file) else None
        sockets |= {link[1]} if link else set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in sockets:
                found.append(columns[1].partition(":")[0])
    return found

launch = Launch.from_environment()
with open_mesh(2, CommConfig(timeout=60), torch.device("cpu"), launch, stop=StopFlag()) as mesh:
    told = mesh.gather_json({"rank": listening(os.getpid()), "agent": listening(os.getppid())})
    if launch.rank == 0:
        print(json.dumps({"restart": launch.restart, "ranks": told}))
    if sys.argv[1:] == ["fail"] and launch.restart == 0 and launch.rank == 1:
        sys.exit(3)
"""
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def launch(folder: Path, *words: str) -> list[dict]:
    """What rank 0 printed in each attempt."""
    script = folder / "rank.py"
    script.write_text(RANK)
    options = [word for word in words if word.startswith("--")]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *options, str(script),
                           *(word for word in words if word not in options)],
                          cwd=folder, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_with_our_rendezvous_nothing_listens_beyond_loopback_also_after_a_restart(tmp_path):
    attempts = launch(tmp_path, "--rdzv-backend=mat_dist_local", "--max-restarts=1", "fail")
    assert [one["restart"] for one in attempts] == [0, 1]
    for one in attempts:
        for told in one["ranks"]:
            assert told["rank"] and told["agent"], "the sockets were not found"
            assert set(told["rank"]) | set(told["agent"]) <= LOOPBACK


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
@pytest.mark.thorough
def test_with_torchruns_own_store_the_ranks_stay_on_loopback(tmp_path):
    (one,) = launch(tmp_path, "--standalone")
    assert one["restart"] == 0 and all(set(told["rank"]) <= LOOPBACK for told in one["ranks"])


def test_our_rendezvous_refuses_several_nodes(tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv-backend=mat_dist_local",
                           "x.py"], cwd=tmp_path, text=True, capture_output=True, timeout=100)
    assert done.returncode != 0
    assert "is for one node, --nnodes asks for 2" in done.stderr
