"""Record what 20 steps of training give, bit by bit, to compare two versions of the program on one machine.

    python tests/record_hashes.py OUT.json [NAME ...]      train (in the current environment) and write the hashes
    python tests/record_hashes.py --compare OLD.json NEW.json

Hashes differ between kinds of CPU and versions of torch: make both records on one machine. The script uses commands
alone, and reads checkpoints of format 1 (torch files) and 2 (safetensors), so that it runs at old commits too:

    PYTHONPATH=OLD_CHECKOUT python tests/record_hashes.py old.json
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = ["train.max_steps=20", "eval.every=0", "eval.test_size=10", "log.console=off", "run.threads=1"]
UNION = "peers.all.union.threats=linf:0.1,l2:0.5,l1:4"
RUNS: dict[str, list[str]] = {
    "default": [],
    "union_max": ["peers=2", "loss=at", "peers.all.union.strategy=max", UNION],
    "awp_mat_trades": ["loss=mat_trades", "methods.awp.gamma=0.005"],
    "ema_smoothing": ["optim.ema_decay=0.99", "loss.label_smoothing=0.1"],
}


def arguments(name: str) -> list[str]:
    """The settings of a run; an old name of a setting is tried where the new one is not known, see `train`."""
    return RUNS[name]


def train(name: str, root: Path) -> Path:
    """Run one configuration -> its run folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "mat_dist.train", f"run.root={root}", f"run.name={name}", *STEPS, *arguments(name)]
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)
    return root / name


def tensors(folder: Path) -> dict[str, Any]:
    """Weights, averaged weights and momentum of every peer of the newest checkpoint, by name."""
    import torch

    newest = max((folder / "checkpoints").glob("step_*"))
    found: dict[str, Any] = {}
    for path in sorted(newest.glob("peer_*.pt")):
        state = torch.load(path, weights_only=True)
        for part in ("model", "ema"):
            found.update({f"{path.stem}.{part}.{k}": v for k, v in (state[part] or {}).items()})
        for number, buffers in state["optimizer"]["state"].items():
            found[f"{path.stem}.momentum.{number}"] = buffers["momentum_buffer"]
    for path in sorted(newest.glob("peer_*.safetensors")):
        from safetensors.torch import load_file

        for key, value in load_file(path).items():
            part, _, rest = key.partition(".")
            if part in ("model", "ema"):
                found[f"{path.stem}.{key}"] = value
            elif key.endswith("momentum_buffer"):
                found[f"{path.stem}.momentum.{rest.split('.')[-2]}"] = value
    return found


def digest(named: dict[str, Any]) -> str:
    """SHA-256 over names, shapes, types and bits."""
    total = hashlib.sha256()
    for key in sorted(named):
        value = named[key].detach().cpu().contiguous()
        total.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()


def record(out: Path, names: list[str]) -> None:
    """Train the runs and write their hashes."""
    with tempfile.TemporaryDirectory() as root:
        hashes = {name: digest(tensors(train(name, Path(root)))) for name in names or RUNS}
    out.write_text(json.dumps(hashes, indent=1) + "\n")
    for name, value in hashes.items():
        print(f"{name:18} {value}")


def compare(old: Path, new: Path) -> int:
    """Print which hashes are equal -> 0 if all are."""
    before, after = json.loads(old.read_text()), json.loads(new.read_text())
    differ = [name for name in after if before.get(name) != after[name]]
    for name in after:
        print(f"{name:18} {'DIFFERS' if name in differ else 'equal'}")
    return 1 if differ else 0


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    if sys.argv[1] == "--compare":
        sys.exit(compare(Path(sys.argv[2]), Path(sys.argv[3])))
    record(Path(sys.argv[1]), sys.argv[2:])
