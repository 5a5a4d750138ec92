"""A run on two hosts whose cable is pulled out: both sides end, say why, and the run goes on when it is back.

Measured, torch 2.14: with --rdzv_backend=c10d torchrun on the cut-off host would stay for minutes after its ranks have
left (it waits for the store, and nobody closes the connection); `distributed/agent.py` ends it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mat_dist.runs.folder import RunFolder
from tests.cluster.hosts import TwoHosts
from tests.cluster.runs import SETTINGS, TIMEOUT, environment, failed_at, steps_done, wait_until
from tests.small_runs import Finished

MARGIN = 10  # seconds beyond comm.timeout in which a rank has to give up
TEARDOWN = 20  # seconds that processes may take to end after that, on a busy machine


def start(hosts: TwoHosts, root: Path, rendezvous: str, attempt: int) -> list[subprocess.Popen[bytes]]:
    """The same command on both hosts: torchrun with two ranks each."""
    started = []
    for number, host in enumerate((hosts.a, hosts.b)):
        own = [f"--node_rank={number}"] if rendezvous == "static" else [f"--local_addr={host.address}"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
                   f"--rdzv_backend={rendezvous}", "--rdzv_endpoint=hosta:29400", f"--rdzv_id=attempt{attempt}", *own,
                   "-m", "mat_dist.train", *SETTINGS, f"run.root={root}", "run.name=two"]
        started.append(host.start(command, root / f"{host.name}.log", environment(pause=0.03)))
    return started


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_a_cut_cable_ends_both_sides_and_the_run_goes_on_later(two_hosts, tmp_path, reference, rendezvous):
    folder = tmp_path / "two"
    agents = start(two_hosts, tmp_path, rendezvous, 1)

    def training() -> bool:
        assert all(agent.poll() is None for agent in agents), [log.read_text() for log in tmp_path.glob("host?.log")]
        return steps_done(folder) >= 8

    wait_until(training, "8 steps")
    two_hosts.link(up=False)
    cut = time.time()
    wait_until(lambda: not two_hosts.a.ranks() + two_hosts.b.ranks(), "all ranks end", TIMEOUT + MARGIN + TEARDOWN)
    delays = [failed_at(folder / f"rank_{rank}.log") - cut for rank in range(4)]
    assert max(delays) <= TIMEOUT + MARGIN
    logs = [tmp_path / f"host{letter}.log" for letter in "ab"]
    wait_until(lambda: all("mat_dist: error:" in log.read_text() for log in logs), "torchrun tells it", TEARDOWN)
    here, there = (log.read_text() for log in logs)
    # Which host has rank 0 and the store is up to the rendezvous; that side can still agree on who is missing.
    sides = {"names": re.findall(r"error: rank \d \(peer \d\), rank \d \(peer \d\) stopped answering", here + there),
             "gone": re.findall(r"error: the rendezvous store is gone: the node of rank 0", here + there)}
    assert {key: len(found) for key, found in sides.items()} == {"names": 1, "gone": 1}, here + there
    assert json.loads((folder / "exit.json").read_text())["code"] == 14
    wait_until(lambda: all(agent.poll() == 14 for agent in agents), "torchrun ends on both hosts", TEARDOWN)

    two_hosts.a.stop_all()
    two_hosts.b.stop_all()
    two_hosts.link(up=True)
    agents = start(two_hosts, tmp_path, rendezvous, 2)
    assert [agent.wait(timeout=180) for agent in agents] == [0, 0], (tmp_path / "hosta.log").read_text()
    done = Finished(0, RunFolder(folder))
    assert done.codes() == [14, 0] and done.hashes() == reference
