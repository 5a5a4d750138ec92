"""Run the fault table: python -m tests.faults [--only 1,6] [--subset ci] [--list] [--resume] [--soak MINUTES]

Every case appends a JSON row to the results file; docs/reliability.md holds a table of them (--table). Exit code 0
where every case passed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed.run

from tests.faults import cases, launching
from tests.faults.lab import Lab
from tests.faults.registry import Case, run_case
from tests.faults.soak import soak
from tests.faults.table import update_table

RESULTS = Path("runs/faults/results.jsonl")


def main() -> int:
    """Parse the command line, run what it names."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", metavar="1,6.rank 2", help="rows or single cases")
    parser.add_argument("--subset", choices=["ci"], help="the short subset")
    parser.add_argument("--list", action="store_true", help="print the cases and leave")
    parser.add_argument("--resume", action="store_true", help="leave out what has passed in the results file")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"results file (default {RESULTS})")
    parser.add_argument("--keep", type=Path, help="keep all files of the cases in this folder")
    parser.add_argument("--table", action="store_true", help="write the results file into docs/reliability.md")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="random faults with restarts instead")
    parser.add_argument("--seed", type=int, default=0, help="of the soak")
    options = parser.parse_args()
    torch.set_num_threads(1)
    launching.adopt_orphans()
    if options.soak is not None:
        return soak(options.soak, options.seed, options.results.with_name("soak.jsonl"))
    chosen = choose(options)
    if options.list:
        print("\n".join(f"{case.key:24} {case.title}" for case in chosen))
        return 0
    if options.table and not (options.only or options.subset):
        return update_table(options.results)
    passed = run_all(chosen, options.results, options.keep)
    return update_table(options.results) if options.table and passed else 1 - passed


def choose(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line names, in the order of the table."""
    chosen = sorted(cases.CASES, key=lambda case: case.row)
    if options.subset:
        chosen = [case for case in chosen if case.ci]
    if options.only:
        names = [name.strip() for name in options.only.split(",")]
        chosen = [case for case in chosen if case.key in names or str(case.row) in names]
    if options.resume and options.results.exists():
        rows = [json.loads(line) for line in options.results.read_text().splitlines()]
        done = {(row["row"], row["variant"]) for row in rows if row["passed"]}
        chosen = [case for case in chosen if (case.row, case.variant) not in done]
    return chosen


def run_all(chosen: list[Case], results: Path, keep: Path | None) -> bool:
    """Run cases one after another, a row each -> whether all passed."""
    results.parent.mkdir(parents=True, exist_ok=True)
    root = keep or Path(tempfile.mkdtemp(prefix="mat_dist_faults_"))
    references: dict[tuple[str, ...], list[str]] = {}
    began, failed = time.monotonic(), 0
    for case in chosen:
        if case.needs_root and os.geteuid() != 0:
            print(f"skipped  {case.key}: needs root")
            continue
        folder = root / case.key.replace(" ", "_").replace("/", "_")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        row = run_one(case, Lab(folder, references))
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        failed += not row["passed"]
        late = "" if row["in_time"] is not False else f"  LATE: {row['seconds']} s, bound {row['bound']} s"
        word = "passed" if row["passed"] else "FAILED"
        print(f"{word}  {case.key:26} {row['wall_s']:6.1f} s  {row['why'][:300]}{late}", flush=True)
        if row["passed"] and keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(chosen) - failed} of {len(chosen)} passed in {time.monotonic() - began:.0f} s; {results}"
          + (f"; files of the failed ones: {root}" if failed or keep else ""))
    if not failed and keep is None:
        shutil.rmtree(root, ignore_errors=True)
    return not failed


def run_one(case: Case, lab: Lab) -> dict[str, Any]:
    """Run a case -> its row of the results."""
    began = time.monotonic()
    try:
        run_case(case, lab)
    except Exception as error:  # a broken case is a failed one, and the others still run
        lab.problems.append(f"{type(error).__name__}: {error}")
        (lab.folder / "traceback").write_text(traceback.format_exc())
    seconds = round(max(lab.seconds), 2) if lab.seconds else None
    message = str(lab.notes.get("message", "")).replace(str(lab.folder), "...")
    return {
        "row": case.row, "variant": case.variant, "title": case.title,
        "kind": " + ".join(dict.fromkeys(lab.kinds)) or "process",
        "expected": case.code, "code": lab.notes.get("code"), "seconds": seconds, "bound": case.bound,
        "in_time": None if seconds is None or case.bound is None else seconds <= case.bound, "message": message,
        "culprit": lab.notes.get("names", ""), "lost_steps": lab.notes.get("lost_steps"), "passed": not lab.problems,
        "why": "; ".join(lab.problems), "wall_s": round(time.monotonic() - began, 1),
        "time": datetime.now(UTC).isoformat(timespec="seconds")}

