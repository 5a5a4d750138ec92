"""Malformed configurations in a process without torch: what the train command says to each, and how long it takes.

python -m tests.faults.settings malformed|eps FOLDER     prints JSON: problems, slowest_s, code, message
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from pathlib import Path

from mat_dist import train
from mat_dist.config import config_warnings, load_config

# what the file holds: what the message must name
MALFORMED: dict[str, tuple[bytes, str]] = {
    "unknown key": (b"trian: {epochs: 3}", "train"),
    "unknown key inside": (b"train: {epochs: 3, bacth_size: 4}", "batch_size"),
    "wrong type": (b"train: {epochs: many}", "train.epochs"),
    "NaN": (b"optim: {lr: .nan}", "optim.lr"),
    "1e400": (b"optim: {lr: 1e400}", "optim.lr"),
    "truth value": (b"train: {epochs: true}", "train.epochs"),
    "duplicate key": (b"train: {epochs: 1}\ntrain: {epochs: 2}", "train"),
    "huge file": (b"x: 1 #" + b"a" * (1 << 20), "larger than 1 MiB"),
    "bad UTF-8": (b"train: {epochs: 1} # \xff\xfe", "not UTF-8"),
    "deep nesting": (b"x: " + b"[" * 100_000, "nested deeper"),
    "object tag": (b"x: !!python/object/apply:os.system [ls]", "tag"),
    "not YAML": (b"a: [", "not YAML"),
    "empty": (b"", "nothing"),
    "all at once": (b"trian: 1\nthreat: {eps: 8}\noptim: {lr: -1}", "optim.lr"),
}
# override: what the message must name
EPS = {"attack.eps=8": "8/255", "attack.eps=-1": "eps", "attack.eps=0": "eps", "attack.eps=nan": "eps",
       "attack.eps=8/0": "eps", "attack.eps=1e400": "eps", "attack.eps=x": "eps"}


def main(which: str, folder: Path) -> None:
    """Try each one; all must end with code 2, at once, with one line per problem and no traceback."""
    problems: list[str] = []
    slowest, message = 0.0, ""
    trials = [([f"--config={_file(folder, text)}"], says, name) for name, (text, says) in MALFORMED.items()]
    if which == "eps":
        trials = [([word], says, word) for word, says in EPS.items()]
    for words, says, name in trials:
        screen = io.StringIO()
        began = time.monotonic()
        with contextlib.redirect_stderr(screen):
            code = train.main([*words, f"run.root={folder}/runs"])
        slowest = max(slowest, time.monotonic() - began)
        message = screen.getvalue().splitlines()[0].partition("error: ")[2] if screen.getvalue() else ""
        if code != 2 or says not in screen.getvalue() or "Traceback" in screen.getvalue():
            problems.append(f"{name}: code {code}, {screen.getvalue()[:200]!r} lacks {says!r}")
    if which == "eps":
        warnings = config_warnings(load_config(None, ["attack.eps=0.1", "attack.step_size=0.25"]))
        if not any("step_size" in line for line in warnings):
            problems.append(f"no warning of a step of more than 2 eps: {warnings}")
    if "torch" in sys.modules:
        problems.append("torch was imported")
    if (folder / "runs").exists():
        problems.append("something was written")
    print(json.dumps({"problems": problems, "slowest_s": slowest, "code": 2, "message": message}))


def _file(folder: Path, text: bytes) -> Path:
    path = folder / f"{abs(hash(text))}.yaml"
    path.write_bytes(text)
    return path


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
