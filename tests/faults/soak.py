"""Random faults with automatic restarts, until the run completes: its weights must be those of an undisturbed run.

Runs follow each other until the time is over. Each has 4 peers on 1, 2 or 4 ranks, another number at each start; most
starts meet a fault at a random rank, step and phase, or find their newest checkpoint damaged.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults.cases.checkpoints import SPOILS
from tests.faults.inject import Fault
from tests.faults.lab import TOTAL, End, Lab

PEERS = ("peers=4",)
# Not among them: lack of memory, which is survived with other rounding (half batches, another order of sums).
KINDS = ("kill", "segv", "abort", "exit", "hard exit", "raise", "stop", "gil", "nan", "inf", "no space", "term", "usr1",
         "hang")
PHASES = {"nan": ("attack", "forward", "loss"), "inf": ("forward", "loss"), "no space": ("write",),
          "hang": ("attack",), "gil": ("attack",)}
ANYWHERE = ("batch", "attack", "forward", "loss", "update", "save")
MOST_STARTS = 60


def soak(minutes: float, seed: int, results: Path) -> int:
    """Runs under faults for so many minutes -> exit code: 0 where every run ended bit-equal to the undisturbed one."""
    draw, began, faults, failed, number = random.Random(seed), time.monotonic(), 0, 0, 0
    root = Path(tempfile.mkdtemp(prefix="mat_dist_soak_"))
    results.parent.mkdir(parents=True, exist_ok=True)
    references: dict[tuple[str, ...], list[str]] = {}
    while number == 0 or time.monotonic() - began < 60 * minutes:
        folder = root / str(number)
        folder.mkdir()
        row = one_run(Lab(folder, references), draw)
        faults += len(row["faults"])
        failed += not row["passed"]
        with results.open("a") as file:
            file.write(json.dumps({"seed": seed, "run": number, **row}) + "\n")
        word = "passed" if row["passed"] else "FAILED"
        print(f"{word}  run {number}: {len(row['faults'])} faults, {row['starts']} starts  {row['why']}", flush=True)
        if row["passed"]:
            shutil.rmtree(folder)
        number += 1
    spent = (time.monotonic() - began) / 60
    print(f"{number - failed} of {number} runs bit-equal after {faults} faults in {spent:.0f} min; {results}"
          + (f"; files of the failed ones: {root}" if failed else ""))
    return int(failed > 0)


def one_run(lab: Lab, draw: random.Random) -> dict[str, Any]:
    """Start a run again and again, with a fault in most starts, until it completes."""
    told: list[str] = []
    codes: list[int | None] = []
    starts, complete = 0, False
    while not complete and starts < MOST_STARTS:
        starts += 1
        ranks, torchrun = draw.choice([1, 2, 2, 4]), draw.random() < 0.2
        found = sorted((lab.folder / "run" / "checkpoints").glob("step_????????"))
        done = int(found[-1].name.removeprefix("step_")) if found else 0
        if len(found) > 1 and draw.random() < 0.15:
            newest, how = found[-1], draw.choice(sorted(SPOILS))
            file = draw.choice(sorted(newest.glob("peer_*.safetensors")))
            SPOILS[how](file)
            told.append(f"{how}: {newest.name}/{file.name}")
        fault = random_fault(draw, ranks, done) if draw.random() < 0.9 else None
        end = disturbed(lab, fault, ranks, torchrun, draw)
        codes.append(end.code)
        if end.marks:
            mark = end.marks[0]
            told.append(f"{mark['kind']} in {mark['phase']} {mark['at']} on rank {mark['rank']} of {ranks}: {end.code}")
        lab.expect(not end.timed_out, f"start {starts} hung: {told[-1:]}")
        lab.expect(not end.orphans or end.timed_out, f"start {starts} left processes: {told[-1:]}")
        lab.expect(end.code != 4, f"start {starts}: {end.message}")
        if lab.problems:
            break
        complete = end.last is not None and end.last["code"] == 0
    lab.expect(complete, f"not complete after {starts} starts")
    if not lab.problems:
        lab.expect(lab.hashes() == lab.reference(*PEERS), "other weights than the undisturbed run")
    return {"starts": starts, "codes": codes, "faults": told, "passed": not lab.problems,
            "why": "; ".join(lab.problems)}


def random_fault(draw: random.Random, ranks: int, done: int) -> Fault:
    """A fault of any kind at a random rank, within the steps that come next."""
    kind = draw.choice(KINDS)
    phase = draw.choice(PHASES.get(kind, ANYWHERE))
    if phase in ("save", "write", "loss"):  # counted by calls in the process
        at = draw.randrange(8 if phase == "loss" else 2)
    else:
        at = draw.randrange(done, min(done + 8, TOTAL)) if done < TOTAL else 0
    kind = "sleep" if kind == "hang" else kind
    return Fault(kind, phase, rank=draw.randrange(ranks), at=at, seconds=120)


def disturbed(lab: Lab, fault: Fault | None, ranks: int, torchrun: bool, draw: random.Random) -> End:
    """One start. A lone rank that hangs has nobody to end it: the runner does, as a scheduler would."""
    group = lab.start([fault] if fault else [], lab.words(*PEERS), ranks=ranks, torchrun=torchrun)
    if ranks == 1 and fault is not None and fault.kind in ("stop", "sleep", "gil"):
        lab.marked(group)
        lab.problems.clear()  # it may have ended before the fault
        time.sleep(draw.random())
        for pid in group.alive():
            _kill(pid)
    return lab.end(group)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
