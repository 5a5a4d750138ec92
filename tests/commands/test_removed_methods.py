"""Without any one file of mat_dist/methods/ the package imports, trains, and says what there is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mat_dist.config.methods import attack_losses, attack_methods, methods_model, presets, strategies
from tests.small_runs import SMALL

ROOT = Path(__file__).parents[2]
FILES = sorted(path.stem for path in (ROOT / "mat_dist" / "methods").glob("*.py"))
# What somebody may ask for that is gone with a file.
ASKED: dict[str, tuple[str, ...]] = {
    "awp": ("methods.awp.gamma=0.01",), "cat": ("loss=cat",), "distillation": ("loss=ard", "loss=rslad"),
    "free_at": ("attack.method=free",), "lbgat": ("loss=lbgat",),
    "guided_attack": ("attack.loss=kl_teacher", "loss=rslad", "loss=peeraid"),  # presets with that attack go too
    "mart": ("loss=mart", "methods.mart.beta=1"), "peeraid": ("loss=peeraid",),
    "ramp": ("union.strategy=ramp", "methods.ramp.weight=1"), "swa": ("methods.swa.start=0.5",),
    "unions": tuple(f"union.strategy={name}" for name in ("avg", "max", "random", "eat", "msd")),
    "warm_start": ("methods.warm_start.reset_epochs=1",),
}
KNOWN = {"loss": presets, "attack.method": attack_methods, "attack.loss": attack_losses, "union.strategy": strategies,
         "methods": lambda: methods_model().model_fields}
SCRIPT = """
import contextlib, importlib, io, json, pkgutil, sys
settings, asked, root = json.loads(sys.argv[1])
import mat_dist
for module in pkgutil.walk_packages(mat_dist.__path__, "mat_dist."):
    if not module.name.endswith("__main__") and "torchrun_plugin" not in module.name:
        importlib.import_module(module.name)
from mat_dist import train
told = {}
for word in [None, *asked]:
    name = [f"run.root={root}", f"run.name=run{len(told)}"]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = train.main([*settings, *name, *([word] if word else [])])
    told[word or ""] = [code, err.getvalue()]
print(json.dumps([mat_dist.__file__, told]))
"""


def run_without(name: str, folder: Path, asked: tuple[str, ...]) -> dict[str, tuple[int, str]]:
    """Exit code and messages of a training of two steps with `mat` (""), and with each of `asked`."""
    shutil.copytree(ROOT / "mat_dist", folder / "mat_dist", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "mat_dist" / "methods" / f"{name}.py").unlink()
    arguments: list[Any] = [[*SMALL, "loss=mat", "train.max_steps=2"], asked, str(folder / "runs")]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(arguments)], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    where, told = json.loads(done.stdout.splitlines()[-1])
    assert Path(where).is_relative_to(folder)
    return {word: (code, text) for word, (code, text) in told.items()}


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("__init__", "presets")])
def test_a_method_goes_with_its_file_and_nothing_else_breaks(name: str, tmp_path: Path) -> None:
    told = run_without(name, tmp_path, ASKED[name])
    assert told.pop("") == (0, "")
    gone = {word.rpartition("=")[2] for word in ASKED[name]} | {name}
    for word, (code, text) in told.items():
        (line,) = [line for line in text.splitlines() if line]
        assert code == 2 and line.startswith("mat_dist: error:"), (word, text)
        there = KNOWN[word.partition("=")[0] if not word.startswith("methods.") else "methods"]()
        assert all(one in line for one in set(there) - gone), (word, line)
