"""Without any one file of mat_dist/methods/ the package imports, trains, and says what there is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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
GONE = [name for name in FILES if name not in ("__init__", "presets")]
# Imports what all copies of the package need, then a process for each: importing it in each would take a minute in all.
SCRIPT = """
import contextlib, importlib, io, json, os, pkgutil, sys
import matplotlib, numpy, pydantic, rich, ruamel.yaml, safetensors.torch, torch, torchvision

def tell(root, settings, asked):
    sys.path.insert(0, root)
    os.chdir(root)
    import mat_dist
    for module in pkgutil.walk_packages(mat_dist.__path__, "mat_dist."):
        if not module.name.endswith("__main__") and "torchrun_plugin" not in module.name:
            importlib.import_module(module.name)
    from mat_dist import train
    told = {}
    for word in [None, *asked]:
        name = [f"run.root={root}/runs", f"run.name=run{len(told)}"]
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = train.main([*settings, *name, *([word] if word else [])])
        told[word or ""] = [code, err.getvalue()]
    with open("told.json", "w") as file:
        json.dump([mat_dist.__file__, told], file)

settings, copies = json.loads(sys.argv[1])
torch.set_num_threads(1)
for root, asked in copies.items():
    child = os.fork()
    if child == 0:
        tell(root, settings, asked)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By file, what the package without it says: of a training of two steps with `mat` (""), and of what is asked."""
    folders = {name: tmp_path_factory.mktemp(name) for name in GONE}
    for name, folder in folders.items():
        shutil.copytree(ROOT / "mat_dist", folder / "mat_dist", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "configs", folder / "configs")
        (folder / "mat_dist" / "methods" / f"{name}.py").unlink()
    arguments = [[*SMALL, "loss=mat", "train.max_steps=2"], {str(folders[name]): ASKED[name] for name in GONE}]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", SCRIPT, json.dumps(arguments)], cwd=folders[GONE[0]],
                          env=environment, text=True, timeout=290, capture_output=True)
    print(done.stderr)
    return folders


@pytest.mark.parametrize("name", GONE)
def test_a_method_goes_with_its_file_and_nothing_else_breaks(name: str, answers: dict[str, Path]) -> None:
    where, told = json.loads((answers[name] / "told.json").read_text())
    assert Path(where).is_relative_to(answers[name])
    assert told.pop("") == [0, ""]
    gone = {word.rpartition("=")[2] for word in ASKED[name]} | {name}
    for word, (code, text) in told.items():
        (line,) = [line for line in text.splitlines() if line]
        assert code == 2 and line.startswith("mat_dist: error:"), (word, text)
        there = KNOWN[word.partition("=")[0] if not word.startswith("methods.") else "methods"]()
        assert all(one in line for one in set(there) - gone), (word, line)
