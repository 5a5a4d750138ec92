"""Rows 19 to 22, 41 and 42: what is wrong before the first step."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.inject import Fault
from tests.faults.lab import LIMIT, Lab
from tests.faults.launching import POLL, Group, fork_one, start_program
from tests.faults.registry import case

ROOT = Path(__file__).parents[3]
CONFIG, ENVIRONMENT = 2, 6


@case(19, "settings differ between ranks", code=CONFIG, bound=10)
def differing(lab: Lab, code: int) -> None:
    """The key and both values are printed, and nothing is written."""
    end = lab.run([Fault("words", rank=1, text="optim.lr=0.3")])
    lab.expect_end(end, code, names="rank 1 has other settings", says=["optim.lr", "0.2", "0.3"])
    lab.expect(set(end.codes.values()) == {code}, f"codes of the ranks: {end.codes}")
    lab.expect(not end.folder.exists(), "a run folder was made")


@case(20, "rank count does not fit the peers", "3 ranks 4 peers", code=ENVIRONMENT, bound=5)
def misplaced(lab: Lab, code: int) -> None:
    """Says which sizes work."""
    end = lab.run((), "peers=4", ranks=3)
    lab.expect_end(end, code, says=["3 ranks do not fit 4 peers", "1, 2, 4"])
    lab.expect(set(end.codes.values()) == {code}, f"codes of the ranks: {end.codes}")


@case(21, "malformed configuration", code=CONFIG, bound=1)
@case(22, "eps or step size out of range", code=CONFIG, bound=1)
def malformed(lab: Lab, code: int) -> None:
    """A process of its own, which shows that torch is not imported, tries every text of the table."""
    which = "eps" if lab.folder.name.startswith("22") else "malformed"
    done = subprocess.run([sys.executable, "-m", "tests.faults.settings", which, str(lab.folder)], cwd=ROOT, text=True,
                          capture_output=True, timeout=120, check=False)
    lab.expect(done.returncode == 0, done.stderr[-300:])
    told = json.loads(done.stdout)
    lab.problems += told["problems"]
    lab.seconds.append(told["slowest_s"])
    lab.notes.update(code=told["code"], message=told["message"])
    lab.kinds.append("process")


@case(41, "the port is in use", code=ENVIRONMENT, bound=10)
def occupied(lab: Lab, code: int) -> None:
    """Ranks without torchrun's store: rank 0 cannot listen. The message names the variables.

    Rank 1 waits for the foreign listener's answer; the runner ends it as `srun --kill-on-bad-exit` does.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        group = Group("process", lab.folder / "out_1")
        for rank in range(2):
            env = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": taken.getsockname()[1]}
            group.start(f"rank {rank}", lambda: _train(lab.words()), {key: str(value) for key, value in env.items()})
        lab.kinds.append(group.kind)
        began = group.send(0)  # type: ignore[arg-type]
        while group.alive() and "rank 0" not in group.codes and time.monotonic() - began < LIMIT:
            time.sleep(POLL)
        seconds = time.monotonic() - began
        group.send(signal.SIGKILL, "rank 1")
        end = lab.end(group)
    end.code, end.seconds = group.codes.get("rank 0"), seconds
    lab.expect_end(end, code, says=["MASTER_PORT", "port"])


@case(41, "the port is in use", "preflight", code=ENVIRONMENT, bound=10)
def preflight(lab: Lab, code: int) -> None:
    """python -m mat_dist.check says which port is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        group = start_program([sys.executable, "-m", "mat_dist.check", *lab.words()], lab.folder / "out_1", env)
        lab.kinds.append(group.kind)
        end = lab.end(group, since=group.send(0))  # type: ignore[arg-type]
    lab.expect_end(end, code, says=[str(port)])


@case(41, "the port is in use", "launch scripts", code=0)
def free_ports(lab: Lab, code: int) -> None:
    """The scripts let torchrun choose a free port, or take one from the job's number."""
    lab.notes["code"] = code
    lab.kinds.append("process")
    for script in [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")]:
        text = script.read_text()
        if "nproc_per_node" in text:
            chosen = "--standalone" in text or ("rdzv" in text and "SLURM_" in text)
            lab.expect(chosen, f"{script.name} has a fixed port")


@case(42, "hostile run name", code=CONFIG, bound=1, ci=True)
def hostile(lab: Lab, code: int) -> None:
    """200 names are refused before anything is written; the batch script hands them on as one word."""
    from tests.unit.test_config_hostile import hostile_names

    names = [name for name in hostile_names() if "\0" not in name and "\ud800" not in name]
    before = sorted(lab.folder.parent.rglob("*"))
    group = fork_one(lambda: _refuse_all(lab, names, code), lab.folder / "out_1")
    lab.kinds.append(group.kind)
    end = lab.end(group, since=group.send(0))  # type: ignore[arg-type]
    told = json.loads((lab.folder / "told").read_text())
    lab.problems += told["problems"]
    lab.seconds.append(told["slowest_s"])
    lab.notes.update(code=told["code"], message=end.message)
    new = {path.name for path in set(lab.folder.parent.rglob("*")) - set(before)} - {"out_1", "told"}
    lab.expect(not new, f"written: {sorted(new)}")
    _batch_script(lab, ["$(touch sentinel)", "`touch sentinel`", "a; touch sentinel", "a b", "-rf", "a'b", "x" * 300])


def _refuse_all(lab: Lab, names: list[str], code: int) -> int:
    """In a process of its own: train once per name; only the slowest and the problems are told."""
    problems, slowest, found = [], 0.0, code
    for name in names:
        began = time.monotonic()
        found = _train([f"run.root={lab.folder}", f"run.name={name}"])
        slowest = max(slowest, time.monotonic() - began)
        if found != code:
            problems.append(f"code {found} for the name {name!r}")
    (lab.folder / "told").write_text(json.dumps({"problems": problems, "slowest_s": slowest, "code": found}))
    return code


def _batch_script(lab: Lab, names: list[str]) -> None:
    """The script is sound shell, and a stub srun receives each name as one word."""
    script, tools = ROOT / "launch/slurm.sbatch", lab.folder / "bin"
    lab.expect(subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0, "bash -n fails")
    tools.mkdir()
    for tool, text in (("scontrol", "echo localhost"), ("srun", f'printf "%s\\n" "$@" > {lab.folder}/words; exit 1')):
        (tools / tool).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / tool).chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "1",
           "SLURM_JOB_NODELIST": "localhost", "SLURM_SUBMIT_DIR": str(ROOT)}
    for name in names:
        command = ["bash", str(script), f"run.root={lab.folder}", f"run.name={name}"]
        subprocess.run(command, env=env, capture_output=True, check=False, timeout=60)
        words = (lab.folder / "words").read_text().split("\n")
        lab.expect(words.count(f"run.name={name}") >= 1, f"srun did not get {name!r} as one word")
    found = [*lab.folder.rglob("sentinel"), *ROOT.glob("sentinel")]
    lab.expect(not found, "the shell has run a name")


def _train(words: list[str]) -> int:
    from mat_dist import train

    return train.main(words)


