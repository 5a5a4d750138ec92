"""Launch scripts, run with programs of the same names that only record how they were called."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = ["-m", "mat_dist.train"]


def write_program(folder: Path, name: str, body: str) -> None:
    """A program that appends its name and arguments to $CALLS, one JSON list per line, and then runs `body` (bash)."""
    folder.mkdir(parents=True, exist_ok=True)
    record = ("import json, os, sys; "
              "open(os.environ['CALLS'], 'a').write(json.dumps(sys.argv[1:]) + chr(10))")
    path = folder / name
    command = shlex.join([sys.executable, "-c", record, name])
    path.write_text(f'#!/usr/bin/env bash\n{command} "$@"\n{body}\n')
    path.chmod(0o755)


class Checkout:
    """A copy of the scripts with an active environment whose python is a recorder."""

    def __init__(self, folder: Path) -> None:
        self.root, self.env, self.calls_file = folder / "my repo", folder / "my env", folder / "calls"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        self.python("")
        self.variables = {"PATH": f"{self.env / 'bin'}:/usr/bin:/bin", "VIRTUAL_ENV": str(self.env),
                          "PYTHON": "absent",
                          "CALLS": str(self.calls_file), "SLURM_SUBMIT_DIR": str(self.root), "SLURM_JOB_ID": "123456",
                          "SLURM_JOB_NODELIST": "n[1-2]"}

    def python(self, body: str, where: Path | None = None) -> None:
        write_program((where or self.env) / "bin", "python", body)

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.unlink(missing_ok=True)
        environment = {key: value for key, value in {**self.variables, **variables}.items() if value}
        return subprocess.run(["bash", str(self.root / "launch" / script), *arguments], env=environment, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=60, cwd=self.root.parent)

    def calls(self) -> list[list[str]]:
        if not self.calls_file.exists():
            return []
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

    def installs(self) -> list[str]:
        return [call[-1] for call in self.calls() if call[1:4] == ["-m", "pip", "install"]]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


# ------------------------------------------------------------------ set-up


def test_an_active_environment_with_torch_is_used_and_installed_into_once(checkout):
    assert checkout.run("test.sh").returncode == 0
    assert checkout.installs() == [".[test]"]
    assert not (checkout.root / ".venv").exists()
    assert checkout.run("test.sh", "--fast").returncode == 0
    assert [call[:3] for call in checkout.calls()] == [["python", "-m", "pytest"]]


@pytest.mark.parametrize("change", ["setup.cfg", "pyproject.toml", "extras", "folder"])
def test_a_change_of_what_is_installed_installs_again(checkout, change):
    checkout.run("test.sh")
    extras = "test,eval" if change == "extras" else "test"
    if change.endswith((".cfg", ".toml")):
        with (checkout.root / change).open("a") as file:
            file.write("\n# changed\n")
    elif change == "folder":
        checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    checkout.run("test.sh", EXTRAS=extras)
    assert checkout.installs() == [f".[{extras}]"]


def test_a_failed_installation_leaves_no_stamp(checkout):
    checkout.python('case "$*" in *"pip install"*) exit 1 ;; esac')
    assert checkout.run("test.sh").returncode != 0
    checkout.python("")
    assert checkout.run("test.sh").returncode == 0
    assert checkout.installs() == [".[test]"]


BASE = """
case "$*" in
    *"import sys, torch"*) exit {torch} ;;
    *"version_info"*) exit {old} ;;
    *--version*) echo Python 3.10.4 ;;
    "-m venv "*) mkdir -p "${{@: -1}}/bin" && cp "$RECORDER" "${{@: -1}}/bin/python" ;;
esac
"""


@pytest.mark.parametrize(("torch", "flags"), [(1, []), (0, ["--system-site-packages"])])
def test_without_an_active_environment_a_venv_is_made(checkout, torch, flags):
    write_program(checkout.root.parent / "base", "python3", BASE.format(torch=torch, old=0))
    variables = {"VIRTUAL_ENV": "", "PYTHON": "", "PATH": f"{checkout.root.parent / 'base'}:/usr/bin:/bin",
                 "RECORDER": str(checkout.env / "bin" / "python")}
    done = checkout.run("test.sh", **variables)
    assert done.returncode == 0, done.stderr
    assert ["python3", "-m", "venv", *flags, str(checkout.root / ".venv")] in checkout.calls()
    assert checkout.installs() == [".[test]"]
    checkout.run("test.sh", "--fast", **variables)
    assert [call[:3] for call in checkout.calls()] == [["python", "-m", "pytest"]]


def test_an_active_environment_without_torch_is_left_alone(checkout):
    checkout.python('case "$*" in *"import sys, torch"*) exit 1 ;; esac')
    write_program(checkout.root.parent / "base", "python3", BASE.format(torch=1, old=0))
    done = checkout.run("test.sh", PYTHON=str(checkout.root.parent / "base" / "python3"),
                        RECORDER=str(checkout.env / "bin" / "python"))
    assert done.returncode == 0, done.stderr
    assert (checkout.root / ".venv" / ".mat_dist_stamp").exists()
    assert not (checkout.env / ".mat_dist_stamp").exists()


@pytest.mark.parametrize(("name", "text"), [("python3", "Python 3.10.4"), ("absent", "no absent on PATH")])
def test_an_unsuitable_python_is_one_clear_line(checkout, name, text):
    write_program(checkout.root.parent / "base", "python3", BASE.format(torch=1, old=1))
    done = checkout.run("test.sh", VIRTUAL_ENV="", PYTHON=name, PATH=f"{checkout.root.parent / 'base'}:/usr/bin:/bin")
    assert done.returncode == 6
    assert done.stderr.count("\n") == 1 and text in done.stderr and "3.11" in done.stderr


# ------------------------------------------------------------------ demo and tests


def last_call(checkout: Checkout) -> list[str]:
    return checkout.calls()[-1][1:]


def test_the_demo_starts_a_rank_per_peer_and_tells_the_run_folder(checkout):
    checkout.python('for a; do case "$a" in run.name=*) mkdir -p "runs/${a#*=}" ;; esac; done')
    done = checkout.run("demo.sh", "attack.eps=8/255", "--config", "my file.yaml")
    call = last_call(checkout)
    assert call[:7] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "--local-ranks-filter=0",
                        *TRAIN]
    assert call[7:10] == ["attack.eps=8/255", "--config", "my file.yaml"]
    folder = f"runs/{call[-1].removeprefix('run.name=')}"
    assert done.stdout.splitlines()[-1] == f"mat_dist: run folder {folder}"
    assert (checkout.root / folder).is_dir()


def test_the_demo_keeps_the_callers_name_and_ends_with_the_launchers_code(checkout):
    checkout.python('case "$*" in *distributed.run*) exit 1 ;; esac')
    done = checkout.run("demo.sh", "run.name=mine", "run.root=a b", NPROC="2")
    assert done.returncode == 1
    assert "--nproc_per_node=2" in last_call(checkout)
    assert last_call(checkout)[-2:] == ["run.root=a b", "run.name=mine"]


TOGETHER = ["-n", "2", "--dist", "loadfile", "-m"]
QUICK = [*TOGETHER, "not slow and not cluster and not gpu and not thorough"]
PARTS = [[*TOGETHER, "(not cluster and not gpu and not thorough) and not alone"],
         ["-m", "(not cluster and not gpu and not thorough) and alone"]]
ALL = [[*TOGETHER, "not alone"], ["-m", "alone"]]


@pytest.mark.parametrize(("arguments", "expected"), [
    ([], PARTS), (["--fast"], [QUICK]), (["--all"], ALL),
    (["--fast", "--", "-k", "a b"], [[*QUICK, "-k", "a b"]]),
    (["--", "-x"], [[*part, "-x"] for part in PARTS])])
def test_the_test_script_selects_by_marker_and_passes_options_on(checkout, arguments, expected):
    assert checkout.run("test.sh", *arguments).returncode == 0
    calls = [call[3:] for call in checkout.calls() if call[1:3] == ["-m", "pytest"]]
    assert calls == expected


@pytest.mark.parametrize(("together", "alone", "worst"), [
    (0, 0, 0), (1, 0, 1), (0, 1, 1), (5, 0, 0), (0, 5, 0), (5, 5, 5), (2, 1, 2), (5, 1, 1)])
def test_the_test_script_ends_with_the_worst_code_of_its_parts(checkout, together, alone, worst):
    checkout.python(f'case "$*" in *"not alone"*) exit {together} ;; *alone*) exit {alone} ;; esac')
    assert checkout.run("test.sh").returncode == worst


def test_the_test_script_refuses_unknown_options(checkout):
    done = checkout.run("test.sh", "--quick")
    assert (done.returncode, checkout.calls()) == (2, [])
    assert "'--quick'" in done.stderr


# ------------------------------------------------------------------ SLURM

SRUN = ('for a; do case "$a" in run.root=*) root="${a#*=}" ;; run.name=*) name="${a#*=}" ;; esac; done\n'
        'd="$root/$name"; mkdir -p "$d"\n')
SCONTROL = 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; fi'


def ends_with(code: int, attempt: int = 1) -> str:
    record = json.dumps({"code": code, "state": "x", "attempts": [{"attempt": attempt}]})
    return f"{SRUN}printf '%s' '{record}' > \"$d/exit.json\"\nexit 1\n"


@pytest.fixture
def cluster(checkout: Checkout) -> Checkout:
    (checkout.env / "bin" / "python").unlink()
    (checkout.env / "bin" / "python").symlink_to(sys.executable)  # reads exit.json for real
    write_program(checkout.env / "bin", "scontrol", SCONTROL)
    write_program(checkout.env / "bin", "srun", ends_with(0))
    return checkout


def requeues(checkout: Checkout) -> list[list[str]]:
    return [call[1:] for call in checkout.calls() if call[:2] == ["scontrol", "requeue"]]


STATIC = ["--rdzv_backend=static", "--rdzv_endpoint=n1:23456"]


def test_every_batch_script_asks_for_cores_since_slurm_gives_a_task_one():
    scripts = [*ROOT.glob("launch/*.sbatch")]
    assert len(scripts) == 3
    assert all("\n#SBATCH --cpus-per-task=8\n" in script.read_text() for script in scripts)


@pytest.mark.parametrize(("script", "nodes", "rendezvous"), [
    ("slurm.sbatch", 1, ["--rdzv_backend=mat_dist_local"]), ("slurm.sbatch", 2, STATIC),
    ("slurm_multinode.sbatch", 2, STATIC)])
def test_slurm_starts_one_torchrun_per_node_with_names_of_this_job(cluster, script, nodes, rendezvous):
    listed = "\\n".join(f"n{k}" for k in range(1, nodes + 1))
    write_program(cluster.env / "bin", "scontrol", f'if [ "$1" = show ]; then printf "{listed}\\n"; fi')
    done = cluster.run(script, "--config", "my file.yaml", "attack.eps=8/255", SLURM_GPUS_ON_NODE="2",
                       SLURM_RESTART_COUNT="3")
    assert done.returncode == 0, done.stderr
    call = next(call for call in cluster.calls() if call[0] == "srun")
    assert "--kill-on-bad-exit=1" in call
    assert call[call.index("python"):] == [
        "python", "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc_per_node=2", *rendezvous,
        "--rdzv_id=123456.3", *TRAIN, "--config", "my file.yaml", "attack.eps=8/255", "run.root=runs",
        "run.name=slurm-123456"]
    assert requeues(cluster) == []


def test_each_node_tells_torchrun_which_one_it_is(cluster):
    write_program(cluster.env / "bin", "srun", 'export SLURM_NODEID=3; shift; exec "$@"')
    (cluster.env / "bin" / "python").unlink()
    write_program(cluster.env / "bin", "python", 'exit "$((40 + PET_NODE_RANK))"')
    assert cluster.run("slurm_multinode.sbatch").returncode == 43


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (3, False), (13, True), (14, True), (15, False),
                                             (70, False), (75, True)])
def test_slurm_requeues_by_the_code_in_exit_json(cluster, code, again):
    write_program(cluster.env / "bin", "srun", ends_with(code))
    done = cluster.run("slurm.sbatch")
    assert requeues(cluster) == ([["requeue", "123456"]] if again else [])
    assert done.returncode == (0 if again else code)


def test_slurm_requeues_a_limited_number_of_times(cluster):
    write_program(cluster.env / "bin", "srun", ends_with(75))
    assert cluster.run("slurm.sbatch", SLURM_RESTART_COUNT="4", MAX_REQUEUE="5").returncode == 0
    assert len(requeues(cluster)) == 1
    assert cluster.run("slurm.sbatch", "run.name=b", SLURM_RESTART_COUNT="5", MAX_REQUEUE="5").returncode == 75
    assert requeues(cluster) == []


def test_slurm_does_not_read_the_exit_code_of_an_earlier_attempt(cluster):
    write_program(cluster.env / "bin", "srun", ends_with(75))
    cluster.run("slurm.sbatch")
    write_program(cluster.env / "bin", "srun", "exit 137")  # killed before it could write
    done = cluster.run("slurm.sbatch", SLURM_RESTART_COUNT="1")
    assert (done.returncode, requeues(cluster)) == (137, [])
    assert "runs/slurm-123456/exit.json" in done.stderr


def test_slurm_requeues_a_job_that_was_killed_after_it_had_saved(cluster):
    killed = 'mkdir -p "$d/checkpoints"; echo step_$((RANDOM + 10)) > "$d/checkpoints/latest"\nexit 137'
    write_program(cluster.env / "bin", "srun", SRUN + killed)
    done = cluster.run("slurm.sbatch")
    assert requeues(cluster) == [["requeue", "123456"]] and "wrote no" in done.stderr
    write_program(cluster.env / "bin", "srun", "exit 137")  # and again, but without anything new
    assert (cluster.run("slurm.sbatch", SLURM_RESTART_COUNT="1").returncode, requeues(cluster)) == (137, [])


def test_a_job_that_slurm_ends_saves_and_does_not_requeue_itself(cluster):
    # scancel, preemption and the time limit send SIGTERM to the script and, by themselves, to the ranks.
    body = ends_with(75).replace("exit 1", "")
    write_program(cluster.env / "bin", "srun", f"kill -TERM $PPID\nsleep 0.3\n{body}")
    done = cluster.run("slurm.sbatch")
    assert (done.returncode, requeues(cluster)) == (75, [])
    assert "ended by SLURM" in done.stdout


def test_a_finished_slurm_run_that_is_started_again_ends_well(cluster):
    cluster.run("slurm.sbatch")
    write_program(cluster.env / "bin", "srun", "exit 0")
    assert cluster.run("slurm.sbatch").returncode == 0


def test_the_warning_signal_reaches_srun_and_the_script_waits_for_the_save(cluster):
    # This srun warns its parent, the batch script, and ends only when the signal has come back to it.
    body = ends_with(75).replace("exit 1", "")
    write_program(cluster.env / "bin", "srun",
                  "trap 'got=1' USR1\nkill -USR1 $PPID\nwhile [ -z \"${got:-}\" ]; do sleep 0.05; done\n"
                  f"sleep 0.3\n{body}")
    done = cluster.run("slurm.sbatch")
    assert done.returncode == 0, done.stderr
    assert "time limit is near" in done.stdout
    assert requeues(cluster) == [["requeue", "123456"]]


def test_the_launcher_survives_the_signal_that_its_ranks_handle(cluster):
    # srun runs what it was given; the signal goes to that process as it goes to torchrun.
    write_program(cluster.env / "bin", "srun", 'shift; exec "$@"')
    (cluster.env / "bin" / "python").unlink()
    write_program(cluster.env / "bin", "python", "kill -USR1 $$; exit 7")
    assert cluster.run("slurm.sbatch").returncode == 7  # 138 if the signal had killed it


# ------------------------------------------------------------------ SLURM arrays


def run_task(checkout: Checkout, task: int, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return checkout.run("slurm_array.sbatch", *arguments, SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID=str(task),
                        **variables)


def test_the_tasks_of_an_array_are_all_pairs_of_seed_and_configuration(cluster):
    runs = []
    for task in range(6):
        done = run_task(cluster, task, "--seeds", "1,2,5", "--configs", "configs/a b.yaml,digits", "attack.eps=8/255")
        assert done.returncode == 0, done.stderr
        call = next(call for call in cluster.calls() if call[0] == "srun")
        runs.append(call[call.index("mat_dist.train") + 1:])
    expected = [(seed, config) for seed in (1, 2, 5) for config in ("configs/a b.yaml", "digits")]
    assert runs == [["--config", config, "attack.eps=8/255", f"run.seed={seed}", "run.root=runs/array-77",
                     f"run.name={Path(config).stem}-seed{seed}"] for seed, config in expected]


def test_a_task_of_an_array_requeues_itself_alone(cluster):
    # The last task of an array has the array's id as its own: requeueing that would restart all tasks.
    write_program(cluster.env / "bin", "srun", ends_with(75))
    done = run_task(cluster, 0, SLURM_JOB_ID="77")
    assert requeues(cluster) == [["requeue", "77_0"]], done.stderr


@pytest.mark.parametrize(("task", "arguments", "problem"), [
    (4, ("--seeds", "1,2", "--configs", "a,b"), "use --array=0-3"), (1, (), "use --array=0-0"),
    (0, ("run.name=mine",), "run.name=mine"), (0, ("--seeds", "1", "run.seed=3"), "run.seed=3"),
    (0, ("--config", "a.yaml"), "use --seeds, --configs")])
def test_an_array_that_cannot_be_meant_is_one_line(cluster, task, arguments, problem):
    done = run_task(cluster, task, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and problem in done.stderr
    assert not [call for call in cluster.calls() if call[0] == "srun"]


@pytest.mark.parametrize("path", [*sorted((ROOT / "launch").glob("*.s*")), ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_a_script_has_no_syntax_error(path):
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=10)
