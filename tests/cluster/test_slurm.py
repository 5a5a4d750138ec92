"""The launch scripts on a real SLURM: two virtual nodes on this machine, four peers, 30 steps."""

from __future__ import annotations

import json

from mat_dist.runs.folder import RunFolder
from mat_dist.tools.check.machine import free_port
from mat_dist.tools.table import main as print_table
from tests.cluster.runs import ROOT, SETTINGS, STEPS, wait_until
from tests.cluster.slurm import Job
from tests.small_runs import Finished

MULTINODE = "slurm_multinode.sbatch"


def ended_with(job: Job) -> list[int]:
    """The codes of all attempts, and that the last one came to the end."""
    assert job.run.steps()[-1] == STEPS
    return job.run.codes()


# ------------------------------------------------------------------ one node


def test_a_job_completes_with_the_weights_of_one_process(slurm, reference):
    job = slurm.submit("slurm.sbatch")
    shown = job.wait_for("COMPLETED", "FAILED")
    assert (shown["JobState"], shown["Restarts"], ended_with(job)) == ("COMPLETED", "0", [0]), job.text()
    assert job.run.hashes() == reference


def test_a_warned_job_saves_requeues_and_completes_with_the_same_weights(slurm, reference):
    job = slurm.submit("slurm.sbatch", pause=0.05)
    job.wait_for_step(5)
    slurm.warn(job)
    shown = job.wait_for("COMPLETED", "FAILED", restarts=1)
    assert (shown["JobState"], shown["Restarts"], ended_with(job)) == ("COMPLETED", "1", [75, 0]), job.text()
    assert "ended with 75, requeue 1 of 20" in job.text() and "continuing after step" in job.text()
    assert job.run.hashes() == reference


def test_the_time_limit_is_survived_as_often_as_it_comes(slurm, reference):
    # Asked for 50 s after the start, SLURM warns up to 30 s earlier; the steps alone take 48 s.
    job = slurm.submit("slurm.sbatch", "--time=2", "--signal=B:USR1@70", pause=0.2)
    shown = job.wait_for("COMPLETED", "FAILED", "TIMEOUT", restarts=1, seconds=500)
    codes = ended_with(job)
    assert shown["JobState"] == "COMPLETED" and codes == [75] * (len(codes) - 1) + [0] and len(codes) > 1, job.text()
    assert "time limit is near" in job.text()
    assert job.run.hashes() == reference


def test_jobs_that_may_not_come_back_save_and_stay_away(slurm):
    cancelled = slurm.submit("slurm.sbatch", pause=0.05)
    spent = slurm.submit("slurm.sbatch", pause=0.05, MAX_REQUEUE="0")
    for job in (cancelled, spent):
        job.wait_for_step(5)
    slurm.command("scancel", cancelled.id)
    slurm.warn(spent)

    shown = cancelled.wait_for("CANCELLED")
    assert (shown["Restarts"], cancelled.run.codes()) == ("0", [75]), cancelled.text()
    assert f"saved after step {cancelled.run.steps()[-1]}" in cancelled.text() and "requeue 1" not in cancelled.text()
    shown = spent.wait_for("FAILED")
    assert (shown["Restarts"], shown["ExitCode"], spent.run.codes()) == ("0", "75:0", [75]), spent.text()
    assert "no more (MAX_REQUEUE)" in spent.text()
    assert not slurm.command("squeue", "-h", "-t", "PENDING,RUNNING").strip()


# ------------------------------------------------------------------ two nodes


def test_tasks_of_srun_that_are_told_so_are_the_ranks(slurm, reference):
    """Without torchrun, as docs/slurm.md has it: each finds its place on its node in what SLURM tells."""
    words = " ".join([*SETTINGS, f"run.root={slurm.root}", "run.name=ranks"])
    slurm.command("srun", "--nodes=2", "--ntasks-per-node=2", "bash", "-c",
                  f"RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS exec python -m mat_dist.train {words}",
                  seconds=240, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), GLOO_SOCKET_IFNAME="lo")
    assert Finished(0, RunFolder(slurm.root / "ranks")).hashes() == reference


def test_a_job_whose_first_node_loses_its_ranks_goes_on_to_the_weights_of_one_process(slurm, reference):
    # Rank 0 and the rendezvous store are lost: the other node has to say so.
    job = slurm.submit(MULTINODE, pause=0.05)
    job.wait_for_step(6)
    job.kill_on("n1")
    shown = job.wait_for("COMPLETED", "FAILED", restarts=1)
    assert (shown["JobState"], ended_with(job)) == ("COMPLETED", [14, 0]), job.text()
    environment = json.loads(job.run.folder.environment.read_text())
    assert [one["placement"]["ranks"] for one in environment["attempts"]] == [4, 4] and shown["NumNodes"] == "2"
    assert job.text().count("mat_dist: error:") == 1 and "the rendezvous store is gone" in job.text()
    assert job.run.hashes() == reference


def test_a_job_that_loses_a_whole_node_goes_on_when_it_has_two_again(slurm, reference):
    job = slurm.submit(MULTINODE, pause=0.05)
    job.wait_for_step(6)
    slurm.stop_node(job, "n2")
    try:
        job.wait_for("PENDING", restarts=1)  # SLURM itself requeues it once it has missed the node
        wait_until(lambda: not job.processes("n1"), "the first attempt ends on the other node too")
        assert "mat_dist: error: rank" in job.text()
    finally:
        slurm.start_node("n2")
    shown = job.wait_for("COMPLETED", "FAILED", restarts=1)
    assert (shown["JobState"], shown["Restarts"], ended_with(job)) == ("COMPLETED", "1", [14, 0]), job.text()
    assert job.run.hashes() == reference


# ------------------------------------------------------------------ arrays


def test_an_array_of_seeds_and_configurations_ends_in_a_table(slurm, capsys):
    (slurm.root / "slower.yaml").write_text(f"defaults: [{ROOT / 'configs' / 'digits.yaml'}]\noptim:\n  lr: 0.1\n")
    settings = (*(word for word in SETTINGS if not word.startswith("eval.test_")), "eval.test_steps=2",
                "train.max_steps=8")
    array = slurm.submit("slurm_array.sbatch", "--array=0-3", ranks=1, pause=0.05, settings=(
        "--seeds", "0,7", "--configs", f"configs/digits.yaml,{slurm.root}/slower.yaml", *settings))
    tasks = [Job(slurm, f"{array.id}_{k}", slurm.root / f"{stem}-seed{seed}", slurm.root / f"{array.id}_{k}.log")
             for k, (seed, stem) in enumerate([(0, "digits"), (0, "slower"), (7, "digits"), (7, "slower")])]
    named = next(task for task in tasks if task.show()["JobId"] == array.id)  # its id is that of the whole array
    named.wait_for_step(2)
    slurm.warn(named)
    named.wait_for("COMPLETED", "FAILED", restarts=1)
    shown = [task.wait_for("COMPLETED", "FAILED") for task in tasks]
    assert sorted(one["Restarts"] for one in shown) == ["0", "0", "0", "1"], [task.text() for task in tasks]

    assert print_table([str(task.folder) for task in tasks]) == 0, [task.text() for task in tasks]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| digits |", "| slower |"))]
    assert len(rows) == 20 and all(row.endswith("| 2 |") for row in rows)  # 4 peers and the ensemble, raw and averaged
