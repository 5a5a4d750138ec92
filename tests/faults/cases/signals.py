"""Rows 10 to 12: requests to stop, in every phase, from the launcher, the scheduler and the keyboard."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from pathlib import Path

from tests.faults.inject import Fault
from tests.faults.lab import EVALUATED, INTERVAL, LIMIT, TIMEOUT, Lab
from tests.faults.launching import start_program
from tests.faults.registry import case

STOPPED = 75
AT = INTERVAL + 2
HELD = 1.0  # seconds that the phase lasts in which the signal comes
ROOT = Path(__file__).parents[3]


@case(10, "SIGTERM to the launcher", "attack 4 ranks", code=STOPPED, bound=20, phase="attack", ranks=4, torchrun=True)
@case(10, "SIGTERM to the launcher", "attack", code=STOPPED, bound=20, phase="attack", torchrun=True, ci=True)
@case(10, "SIGTERM to the launcher", "evaluation", code=STOPPED, bound=20, phase="eval", torchrun=True)
@case(10, "SIGTERM to the launcher", "loading", code=STOPPED, bound=20, phase="load", torchrun=True)
@case(10, "SIGTERM to the launcher", "SIGKILL to it", code=STOPPED, bound=20, phase="attack", torchrun=True,
      number=signal.SIGKILL)
@case(10, "SIGTERM to all ranks", "batch", code=STOPPED, bound=20, phase="batch")
@case(10, "SIGTERM to all ranks", "forward", code=STOPPED, bound=20, phase="forward")
@case(10, "SIGTERM to all ranks", "saving", code=STOPPED, bound=20, phase="save")
def terminated(lab: Lab, code: int, phase: str, ranks: int = 2, torchrun: bool = False,
               number: signal.Signals = signal.SIGTERM) -> None:
    """All ranks stop at one step and save; nothing is lost, and the restart ends bit-equal."""
    more = (*(EVALUATED if phase == "eval" else ()), f"peers={ranks}")
    at = {"load": 0, "eval": 1, "save": 1}.get(phase, AT)
    fault = Fault("sleep", phase, rank=None, at=at, seconds=HELD)
    group = lab.start([fault], lab.words(*more), ranks=ranks, torchrun=torchrun)
    lab.marked(group, ranks)
    sent = group.send(number)
    end = lab.end(group, since=sent)
    lab.expect_end(end, code)
    if phase in ("batch", "attack", "forward"):
        lab.expect(any(f"after step {AT + n}" in end.message for n in (1, 2)), f"signal at step {AT}, {end.message!r}")
        lab.expect_lost(end, most=0)
    lab.expect_resumed(*more)


@case(6, "SIGSTOP of a rank", "all ranks for a while", code=0)
def suspended(lab: Lab, code: int) -> None:
    """A suspended job goes on, though it stood still for longer than the timeout."""
    group = lab.start([Fault("sleep", rank=None, at=AT, seconds=HELD)], lab.words(), ranks=2)
    lab.marked(group, 2)
    group.send(signal.SIGSTOP)
    time.sleep(TIMEOUT + 2)
    group.send(signal.SIGCONT)
    lab.expect_end(lab.end(group), code)
    lab.expect(lab.hashes() == lab.reference(), "other weights than the undisturbed run")


@case(11, "SIGUSR1, the scheduler's warning", "one rank only", code=STOPPED, bound=20)
def warned(lab: Lab, code: int) -> None:
    """A signal to one rank stops all of them at one step."""
    end = lab.run([Fault("usr1", at=AT)], torchrun=True)
    lab.expect_end(end, code, says=["saved after step"])
    lab.expect_lost(end, most=0)
    lab.expect_resumed()


# Like srun: options, then the command; hands SIGUSR1 on to every process of the step.
SRUN = '''#!{python}
import os, signal, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
os.environ["SLURM_NODEID"] = "0"
while words[0].startswith("-"):
    words.pop(0)
def below(pid):
    found = []
    for task in os.listdir(f"/proc/{{pid}}/task"):
        for child in map(int, Path(f"/proc/{{pid}}/task/{{task}}/children").read_text().split()):
            found += [child, *below(child)]
    return found
def hand_on(number, frame):
    for pid in below(os.getpid()):
        os.kill(pid, number)
signal.signal(signal.SIGUSR1, hand_on)
sys.exit(subprocess.Popen(words).wait())
'''
SCONTROL = '''#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; else echo "$*" >> {calls}; fi
'''


@case(11, "SIGUSR1, the scheduler's warning", "launch/slurm.sbatch", code=STOPPED, bound=20)
def requeued(lab: Lab, code: int) -> None:
    """The batch script hands the warning on, reads exit.json and asks for a requeue, with fake srun and scontrol."""
    tools, calls = lab.folder / "bin", lab.folder / "calls"
    tools.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL.format(calls=calls))):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    python = tools / "python"
    # A rank that takes a moment for one step; train.main itself, through the victim, stays what the script starts.
    told = lab.folder / "mark_1"
    fault = [Fault("sleep", rank=None, at=AT, seconds=2 * HELD, mark=str(told)).dump()]
    replaced = f"{sys.executable} -m tests.faults.scripted {lab.folder}/fault"
    python.write_text(f"#!/usr/bin/env bash\nexec {replaced} \"$@\"\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    import json

    (lab.folder / "fault").write_text(json.dumps(fault))
    job = str(10_000 + os.getpid() % 20_000)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "localhost",
           "NPROC": "2", "SLURM_SUBMIT_DIR": str(ROOT), "VIRTUAL_ENV": sys.prefix}
    group = start_program(["bash", str(ROOT / "launch/slurm.sbatch"), *lab.words()], lab.folder / "out_1", env)
    lab.kinds.append("torchrun")
    lab.marked(group, 2)
    sent = group.send(signal.SIGUSR1)
    end = lab.end(group, since=sent)
    lab.expect_end(end, code, says=["saved after step"])
    lab.expect(calls.exists() and calls.read_text().strip() == f"requeue {job}", "no requeue was asked for")
    lab.expect_lost(end, most=0)


@case(12, "a second signal", "SIGTERM twice", code=STOPPED, bound=3)
@case(12, "a second signal", "SIGINT twice", code=STOPPED, bound=3, number=signal.SIGINT, ranks=1)
@case(12, "a second signal", "while saving", code=STOPPED, bound=3, phase="save")
@case(12, "a second signal", "within an evaluation", code=STOPPED, bound=3, phase="eval")
@case(12, "a second signal", "three Ctrl-C within a second", code=STOPPED, bound=3, number=signal.SIGINT, times=3,
      pause=0.2)
def stopped_at_once(lab: Lab, code: int, number: signal.Signals = signal.SIGTERM, phase: str = "attack", ranks: int = 2,
                    times: int = 2, pause: float = 1.3) -> None:
    """The phase would last two minutes; the second request (more than a second after the first) ends it at once."""
    more = EVALUATED if phase == "eval" else ()
    at = AT if phase == "attack" else 1
    group = lab.start([Fault("sleep", phase, rank=None, at=at, seconds=120)], lab.words(*more), ranks=ranks)
    lab.marked(group, ranks)
    sent = 0.0
    for turn in range(times):
        time.sleep(pause if turn else 0)
        sent = group.send(number)
    end = lab.end(group, since=sent, limit=LIMIT)
    lab.expect_end(end, code)
    lab.expect_lost(end, most=INTERVAL)
    lab.expect_resumed(*more)


@case(12, "a second signal", "the same one 0.2 s later", code=STOPPED, bound=20)
def same_request(lab: Lab, code: int) -> None:
    """What the scheduler and the launcher both pass on is one request: the step is finished and saved."""
    group = lab.start([Fault("sleep", rank=None, at=AT, seconds=HELD)], lab.words(), ranks=2)
    lab.marked(group, 2)
    sent = group.send(signal.SIGTERM)
    time.sleep(0.2)
    group.send(signal.SIGTERM)
    end = lab.end(group, since=sent)
    lab.expect_end(end, code, says=["saved after step"])
    lab.expect_lost(end, most=0)
