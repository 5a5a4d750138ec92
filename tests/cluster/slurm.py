"""Jobs on the private SLURM cluster of slurm_lab.sh."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from mat_dist.runs.folder import RunFolder
from tests.cluster.runs import ROOT, SETTINGS, environment, steps_done, wait_until
from tests.small_runs import Finished

LAB = Path(__file__).with_name("slurm_lab.sh")
LACKS = 77  # its exit code where this machine cannot have the cluster


class Job:
    """One job, or one task of an array."""

    def __init__(self, slurm: Slurm, job: str, folder: Path, log: Path) -> None:
        self.slurm, self.id, self.log, self.folder = slurm, job, log, folder

    def show(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm.command("scontrol", "show", "job", "-o", self.id)))

    @property
    def run(self) -> Finished:
        """Its run, with the code of the batch script."""
        return Finished(int(self.show()["ExitCode"].split(":")[0]), RunFolder(self.folder))

    def wait_for_step(self, step: int) -> None:
        """Until so many steps have been done, over all attempts."""
        wait_until(lambda: steps_done(self.folder) >= step, f"{step} steps in {self.folder}, {self.text()}")

    def wait_for(self, *states: str, restarts: int = 0, seconds: float = 240) -> dict[str, str]:
        """Until the job is in one of the states after at least so many restarts."""
        def reached() -> bool:
            shown = self.show()
            return shown["JobState"] in states and int(shown["Restarts"]) >= restarts

        wait_until(reached, f"job {self.id} is {' or '.join(states)} after {restarts} restarts", seconds)
        return self.show()

    def text(self) -> str:
        """What the script and its ranks printed."""
        return self.log.read_text() if self.log.exists() else ""

    def processes(self, node: str) -> dict[int, list[bytes]]:
        """Process id -> command line of what the job runs on a node, the batch script and srun included."""
        wanted = {f"SLURM_JOB_ID={self.id}".encode(), f"SLURMD_NODENAME={node}".encode()}
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")
        return found

    def ranks(self, node: str) -> list[int]:
        """torchrun and the ranks on a node."""
        found = [pid for pid, words in self.processes(node).items()
                 if b"mat_dist.train" in words and b"python" in words[0].rpartition(b"/")[2]]
        assert found
        return found

    def kill_on(self, node: str) -> None:
        """SIGKILL what this job runs on a node, but the batch script."""
        for pid in self.ranks(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Slurm:
    """The cluster, for jobs whose runs and logs go below `root`."""

    def __init__(self, lab: Path, root: Path) -> None:
        self.lab, self.root = lab, root
        self.variables = {"SLURM_CONF": str(lab / "etc" / "slurm.conf")}
        self.jobs: list[str] = []

    def command(self, *words: str, seconds: float = 60, **variables: str) -> str:
        """Output of a SLURM command, run in the repository."""
        done = subprocess.run(words, cwd=ROOT, env={**environment(), **self.variables, **variables},
                              capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def submit(self, script: str, *options: str, settings: tuple[str, ...] = SETTINGS, pause: float = 0.0,
               ranks: int = 2, **variables: str) -> Job:
        """`sbatch OPTIONS launch/SCRIPT SETTINGS run.root=...`, with `ranks` per node; `pause` slows the steps."""
        output = "%A_%a.log" if "array" in script else "%j.log"
        shown = self.command("sbatch", "--parsable", f"--output={self.root / output}", *options, f"launch/{script}",
                             *settings, f"run.root={self.root}", PAUSE=str(pause), NPROC=str(ranks), **variables)
        job = shown.strip().split(";")[0]
        self.jobs.append(job)
        return Job(self, job, self.root / f"slurm-{job}", self.root / f"{job}.log")

    def warn(self, job: Job) -> None:
        """The signal that SLURM sends to the batch script before the time limit."""
        self.command("scancel", "--signal=USR1", "--batch", job.id)

    def stop_node(self, job: Job, node: str) -> None:
        """What a node that loses its power does: slurmd, slurmstepd and all processes of the job end at once."""
        ranks = job.ranks(node)
        parents = {_parent(pid) for pid in ranks} - set(ranks)
        daemon = int((self.lab / "run" / f"slurmd-{node}.pid").read_text())
        steps = {pid for pid in parents if "slurmstepd" in Path(f"/proc/{pid}/cmdline").read_text()}
        assert steps
        for pid in (daemon, *steps, *ranks):
            os.kill(pid, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Power is back."""
        subprocess.run(["bash", str(LAB), "node", str(self.lab), node], cwd=ROOT, check=True, timeout=60)

    def cancel_all(self) -> None:
        """End all jobs of this object and wait until they are gone."""
        for job in self.jobs:
            subprocess.run(["scancel", job], env={**environment(), **self.variables}, capture_output=True, timeout=60)
        wait_until(lambda: not self.command("squeue", "-h", "-o", "%i").strip(), "the jobs are gone")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
