"""The commands in README.md, CONTRIBUTING.md and docs/ work.

Every command in a bash block is in one of the tables below; a new one fails until somebody says how it is checked.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mat_dist.__main__ import main as mat_dist_main
from mat_dist.train import main
from tests.documents import DATA, METHOD, MODEL, NORM, ROOT, blocks, table

TRAIN = "python -m mat_dist.train"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RESULT = re.compile(r"Accuracy on the test set, under\s+PGD-1\b")  # the title of the last table

# Run exactly as written.
AS_WRITTEN = {
    f"{TRAIN} --help",
    f"{TRAIN} --config cifar10_resnet18 attack.eps=4/255 peers.2.model=wrn_28_10 --dry-run",
    f"{TRAIN} --config cifar10_at train.epochs=30 optim.milestones=[0.5,0.75] --dry-run",
    f"{TRAIN} --config cifar10_resnet18 peers=2 peers.1.loss=at peers.all.optim.lr=0.05 --dry-run",
    f"{TRAIN} loss=mat_kd loss.kd_weight=0.7 loss.temperature=2 --dry-run",
}
# Run with the few images and attack steps of SMALL, else as written; in this order, since the last one continues a run.
MADE_SMALL = (
    f"{TRAIN} --plugin {MODEL} --plugin {DATA} model=my_model data.name=stripes",
    f"{TRAIN} run.name=first",
    f"{TRAIN} run.name=first train.epochs=30",
)
# The same, each in a process of its own, because it would add a method or a norm to this one.
ALONE = (f"{TRAIN} --plugin {METHOD} methods.centralise={{}}",
         f"{TRAIN} --plugin {NORM} threat=first_channel threat.eps=0.1")
# Not run, for the reason given, but described by --dry-run.
DESCRIBED = {
    f"{TRAIN} --plugin {MODEL} model=my_model": "a minute or more; another command runs the plug-in",
    f"{TRAIN} --plugin {MODEL} peers.0.model=my_model": "a minute or more; another command runs the plug-in",
    f"{TRAIN} --plugin {DATA} data.name=stripes": "a minute or more; another command runs the plug-in",
    "torchrun --standalone --nproc_per_node=4 -m mat_dist.train --config cifar10_resnet18": "days without GPUs",
    "torchrun --standalone --nproc_per_node=4 -m mat_dist.train --config union_generalist": "days without GPUs",
    "torchrun --standalone --nproc_per_node=2 -m mat_dist.train --config union_mutual": "days without GPUs",
    "sbatch --nodes=2 --gres=gpu:4 launch/slurm.sbatch --config cifar10_resnet18": "SLURM; tests/unit/test_launch.py",
    "sbatch --gres=gpu:4 --time=24:00:00 launch/slurm.sbatch --config cifar10_resnet18": "SLURM; tests/cluster",
    "sbatch --nodes=2 --gres=gpu:4 --time=24:00:00 launch/slurm_multinode.sbatch --config cifar10_resnet18":
        "SLURM; tests/cluster",
    f"{TRAIN} data.name=folder data.root=my_images data.image_size=32 model=resnet18 attack.eps=8/255": "needs images",
    f"{TRAIN} data.name=npz data.root=my_images.npz model=resnet18 attack.eps=8/255": "needs images",
}
# Scripts with slow tests of their own below, and what has its tests elsewhere.
SCRIPTS = {"bash launch/demo.sh": "test_the_demo_...", "bash launch/placement.sh": "test_placement_...",
           "bash launch/test.sh": "it would start this test again; tests/unit/test_launch.py",
           "sbatch --array=0-5 --gres=gpu:4 --time=24:00:00 launch/slurm_array.sbatch --seeds 1,2,3 "
           "--configs cifar10_at,cifar10_trades": "SLURM; tests/cluster",
           **dict.fromkeys(("python3 -m venv .venv", "source .venv/bin/activate", "pip install --editable ."),
                           "launch/env.sh does the same; the wheel is built in tests/unit/test_packaging.py"),
           "bash launch/test.sh --fast": "as bash launch/test.sh",
           "ruff check .": "a check of the style", "python -m mypy": "a check of the types",
           **dict.fromkeys(("python tests/record_hashes.py before.json",
                            "python tests/record_hashes.py --compare before.json after.json"),
                           "minutes of training; it is what tells two versions apart"),
           "python -m mat_dist.evaluate runs/first attacks=pgd,cw": "test_the_training_commands_...",
           **dict.fromkeys(("python -m mat_dist.evaluate runs/NAME",
                            "python -m mat_dist.evaluate runs/NAME attacks=pgd,cw steps=100 restarts=5 images=1000",
                            "torchrun --standalone --nproc_per_node=4 -m mat_dist.evaluate runs/NAME "
                            "threats=linf:8/255,l2:1/2", "python -m mat_dist.evaluate --compare runs/A runs/B"),
                           "tests/unit/test_evaluate.py"),
           **dict.fromkeys(("python -m mat_dist.evaluate FILE.pt model=resnet18 data.name=cifar10 data.root=DATA "
                            "threats=linf:8/255 mean=0.4914,0.4822,0.4465 std=0.2471,0.2435,0.2616",
                            "python -m mat_dist.evaluate runs/NAME sources=runs/B,runs/C:peer1"),
                           "tests/unit/test_evaluate_foreign.py"),
           **dict.fromkeys((f"{TRAIN} log.trackers=tensorboard", "tensorboard --logdir runs"),
                           "tests/unit/test_trackers.py"),
           **dict.fromkeys(("export MASTER_ADDR=$(hostname) MASTER_PORT=29500", "srun --ntasks-per-node=4 "
                            "--gpus-per-task=1 bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS exec python -m "
                            "mat_dist.train'"), "SLURM; tests/cluster"),
           **dict.fromkeys(("docker build --file containers/Dockerfile --tag mat_dist .",
                            "apptainer build mat_dist.sif containers/mat_dist.def",
                            "apptainer run mat_dist.sif train --help", "kubectl create -f launch/trainjob.yaml",
                            "sky jobs launch launch/sky.yaml --env CONFIG=cifar10_resnet18",
                            "mkdocs build --strict --config-file .mkdocs.yml"), "tests/unit/test_distribution.py"),
           **dict.fromkeys(("python -m mat_dist export runs/first --to safetensors exported",
                            "python -m mat_dist export runs/first --to onnx --peer ensemble exported_onnx"),
                           "tests/unit/test_export.py"),
           f"{TRAIN} --config configs/cifar10_resnet18.yaml peers.all.model=timm/vit_tiny_patch16_224 "
           "peers.all.init_from=pretrained": "needs the hub; tests/unit/test_pretrained.py",
           f"{TRAIN} --config configs/cifar10_resnet18.yaml peers=2 peers.0.loss=rslad peers.1.frozen=true "
           "peers.1.model=robustbench/Wang2023Better_WRN-28-10 "
           "peers.1.init_from=models/Wang2023Better_WRN-28-10.pt": "needs the file; tests/unit/test_published.py",
           "python -m mat_dist.table runs/array-1234/*": "tests/unit/test_table.py",
           "python -m mat_dist.report runs/first": "test_the_training_commands_...",
           "python -m mat_dist.report runs/first --images 1000 --device cuda": "tests/unit/test_report.py",
           "python -m mat_dist.report runs/first runs/second": "tests/unit/test_report.py",
           "python -m mat_dist.report runs/first --figures pdf": "tests/unit/test_report.py",
           "bash benchmarks/startup.sh": "a measurement; the trainer's own tests start it",
           "bash benchmarks/gpu.sh": "needs a GPU; the benchmarks have tests in tests/unit/test_bench.py",
           **{f"python -m benchmarks.study {rest}": "tests/unit/test_study.py, with a smaller plan" for rest in (
               "evidence --suite overfit --dry-run", "evidence --suite overfit data.root=FOLDER",
               "search --suite overfit data.root=FOLDER")},
           **dict.fromkeys(("bash benchmarks/slice.sh gpu_overfit - out1 data.root=cifar10.npz",
                            "bash benchmarks/slice.sh gpu_overfit out1 out2 data.root=cifar10.npz"),
                           "tests/unit/test_study_slices.py, with a smaller plan"),
           "python -m benchmarks.study reasons runs/NAME": "tests/unit/test_study_reasons.py",
           "python -m benchmarks.study units runs/NAME runs/OTHER --json units.json": "tests/unit/test_study_units.py",
           **{f"{start} -m benchmarks.speed {rest}": "tests/unit/test_bench.py, with a smaller model"
              for start, rest in (("python", "step"), ("python", "naive"), ("python", "scale --rounds 5"),
                                  ("python", "memory"),
                                  ("python", "engines --config bench_resnet18 peers=1 loss=at step.precision=bf16"),
                                  ("torchrun --nproc_per_node=2", "step peers=2"))}}

SMALL = ("train.batch_size=16", "data.train_size=16", "attack.steps=1", "eval.steps=1", "eval.test_steps=1",
         "eval.size=8", "eval.test_size=8", "eval.every=15", "checkpoint.every=15", "log.console=plain",
         "run.device=cpu")


def commands() -> dict[str, str]:
    """Every command in a bash block, without the comment behind it, with the place where it stands."""
    lines = [(line.partition("  # ")[0], where) for where, text in blocks("bash")
             for line in text.replace("\\\n", " ").splitlines()]
    return {" ".join(line.split()): where for line, where in lines if line.strip() and not line.startswith("#")}


def trainer_words(command: str) -> tuple[list[str], int, int]:
    """The trainer's arguments in a command, the number of ranks that it starts, and those per node."""
    words = shlex.split(command)
    start = next(n for n, word in enumerate(words) if word == "mat_dist.train" or word.startswith("launch/slurm"))
    values = dict(word.split("=", 1) for word in words[:start] if "=" in word)
    per_node = int(values.get("--nproc_per_node") or values.get("--gres", "gpu:1").rpartition(":")[2])
    return words[start + 1:], per_node * int(values.get("--nodes", values.get("--nnodes", 1))), per_node


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The repository as working directory, no launcher's environment; torch's settings are restored."""
    monkeypatch.chdir(ROOT)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in LAUNCHER:
            monkeypatch.delenv(name)
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark


Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the trainer in this process; returns what it printed, asserts its exit code."""
    def trainer(*words: str, code: int = 0) -> str:
        try:
            ended = main(words)
        except SystemExit as leave:
            ended = leave.code
        out, err = capsys.readouterr()
        assert ended == code, err
        return err if code else out
    return trainer


# ------------------------------------------------------------------ commands


def test_every_command_of_the_documents_is_checked_somewhere():
    listed = AS_WRITTEN | set(MADE_SMALL) | set(ALONE) | set(DESCRIBED) | set(SCRIPTS)
    found = commands()
    assert not {command: where for command, where in found.items() if command not in listed}
    assert not listed - set(found), "no document has these commands any more"


@pytest.mark.parametrize("command", sorted(AS_WRITTEN))
def test_a_command_that_only_tells_runs_as_written(command, run):
    out = run(*trainer_words(command)[0])
    assert ("usage:" if "--help" in command else "placement ") in out


def made_images(path):
    """400 images of two classes for each split, as an archive or in folders."""
    images, labels = np.zeros((400, 32, 32, 3), np.uint8), np.arange(400) % 2
    if path.suffix:
        np.savez(path, x_train=images, x_test=images, y_train=labels, y_test=labels)
        return
    for split in ("train", "test"):
        for number, label in enumerate(labels):
            (path / split / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number]).save(path / split / str(label) / f"{number}.png")


@pytest.mark.parametrize("command", DESCRIBED)
def test_a_training_command_is_understood(command, run, monkeypatch, tmp_path):
    words, ranks, per_node = trainer_words(command)
    if mine := re.search(r"data.root=(my_images\S*)", command):  # a dry run looks at them
        made_images(tmp_path / mine[1])
        words = [*words, f"data.root={tmp_path / mine[1]}"]
    if ranks > 1:
        for name, value in zip(LAUNCHER, (0, ranks, 0, per_node, "no.such.host.invalid", 29500), strict=True):
            monkeypatch.setenv(name, str(value))
    out = run(*words, "run.device=cpu", "--dry-run")
    assert f"placement   {2 if 'union_mutual' in command else 4} peers on {ranks} rank" in out
    assert ("my_model" in out) == ("my_model" in command)


def test_the_training_commands_run_and_a_run_continues(run, tmp_path, monkeypatch, capsys):
    for number, command in enumerate(MADE_SMALL):
        name = [] if "run.name" in command else [f"run.name=run{number}"]
        out = run(*trainer_words(command)[0], *SMALL, *name, f"run.root={tmp_path}/runs")
        assert RESULT.search(out)
    assert "continuing after step 15 of 30" in out
    folder = tmp_path / "runs" / "first"
    monkeypatch.chdir(tmp_path)
    assert mat_dist_main(["evaluate", "runs/first", "attacks=pgd,cw", "checks=0", "run.device=cpu"]) == 0
    assert mat_dist_main(["report", "runs/first"]) == 0
    assert (folder / "report" / "index.html").is_file()
    capsys.readouterr()
    (shown,) = [text for where, text in blocks("python") if where.startswith("README.md")]
    for whole, part in (('{"epochs": 5}', '{"max_steps": 2}'),
                        ('"digits", threats', '"digits", size=9, checks=0, threats')):
        assert whole in shown
        shown = shown.replace(whole, part)
    exec(compile(shown, "README.md", "exec"), {})
    assert "linf 1/10 %" in capsys.readouterr().out and json.loads((tmp_path / "found.json").read_text())["n"] == 9
    assert (tmp_path / "exported" / "model.py").is_file()
    rows = [row.split(",")[:4] for row in (folder / "summary.csv").read_text().splitlines()]
    assert (rows[1], rows[-1]) == (["15.0", "15", "1", "peer0"], ["30.0", "30", "2", "peer3"])
    for path, _ in table("docs/architecture.md", "## The run folder"):
        base = ""
        for name in re.findall(r"`([^`]+)`", path):
            base = name.rpartition("/")[0] if "/" in name else base  # `checkpoints/latest`, `best`
            name = name if "/" in name or not base else f"{base}/{name}"
            assert list(folder.glob(re.sub(r"<\w>", "*", name).rstrip("/"))), f"architecture.md promises {name}"
    err = run(*trainer_words(MADE_SMALL[-1])[0], *SMALL, f"run.root={tmp_path}/runs", code=5)
    assert "the run is finished" in err


@pytest.mark.parametrize("command", ALONE)
def test_a_command_with_a_method_or_a_norm_of_ones_own_runs(command, tmp_path):
    words = [sys.executable, *shlex.split(command)[1:], *SMALL, f"run.root={tmp_path}", "train.max_steps=2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and RESULT.search(done.stdout), done.stderr


def test_the_examples_of_the_python_interface_run_one_after_the_other(tmp_path):
    text = "\n".join(text for where, text in blocks("python") if where.startswith("docs/api.md"))
    (tmp_path / "examples.py").write_text(text)
    done = subprocess.run([sys.executable, "examples.py"], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """As a program that runs its cells; no Jupyter is needed for that."""
    cells = json.loads((ROOT / "docs/examples/python.ipynb").read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs")]  # they would name a machine's folders
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert "images outside [0, 1]" in capsys.readouterr().out
    assert names["history"] and names["found"].accuracy["clean"] > 0.5


def test_the_mistakes_in_the_documents_are_answered_as_shown(run):
    (shown,) = [text for _, text in blocks("text") if text.startswith("mat_dist: error:")]
    assert run("attack.esp=8", "loss=mat_dk", code=2) == shown


# ------------------------------------------------------------------ scripts


@pytest.fixture
def scripts(tmp_path: Path) -> Callable[..., str]:
    """Run a launch script with this Python as an environment that is set up already: nothing is installed."""
    env = tmp_path / "env"
    (env / "bin").mkdir(parents=True)
    python = env / "bin" / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    metadata = (ROOT / "setup.cfg").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    key = subprocess.run(["cksum"], input=metadata, capture_output=True, check=True).stdout.decode().strip()
    (env / ".mat_dist_stamp").write_text(f"{key} test {ROOT}\n")

    def launch(command: str, *words: str, **variables: str) -> str:
        done = subprocess.run([*shlex.split(command), *words], cwd=ROOT, capture_output=True, text=True, timeout=280,
                              env={**os.environ, "VIRTUAL_ENV": str(env), "EXTRAS": "test", **variables})
        assert done.returncode == 0, done.stdout + done.stderr
        assert "installing" not in done.stdout
        return done.stdout
    return launch


@pytest.mark.alone
def test_the_demo_trains_on_four_ranks_and_prints_the_table(scripts, tmp_path):
    out = scripts("bash launch/demo.sh", *SMALL, "train.max_steps=4", f"run.root={tmp_path}", "run.name=demo")
    assert "mat_dist: training on 4 ranks" in out
    assert out.splitlines()[-1] == f"mat_dist: run folder {tmp_path}/demo"
    rows = [line.split() for line in out.splitlines() if re.search(r"\d+\.\d\d", line) and "last" in line]
    assert [row[1] for row in rows] == ["peer0", "peer1", "peer2", "peer3", "ensemble"] * 2


@pytest.mark.alone
def test_placement_does_not_change_the_weights_that_the_script_shows(scripts, tmp_path):
    out = scripts("bash launch/placement.sh", *SMALL, "train.max_steps=2", RUN_ROOT=str(tmp_path))
    assert out.splitlines()[-1] == "all 3 runs are bitwise equal"
    assert len(re.findall(r"step 2  peer\d  [0-9a-f]{64}$", out, re.MULTILINE)) == 12
