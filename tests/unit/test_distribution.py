"""Workflows, containers, cluster files, torch.hub and the site: checked without the programs that read them.

The models below are the published fields that our files may use: an unknown one is an error there, as it is here.
"""

from __future__ import annotations

import configparser
import fnmatch
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML

import mat_dist
from mat_dist.config import load_config
from mat_dist.distributed.placement import Placement
from mat_dist.errors import CheckpointError
from tests.documents import DOCUMENTS, ROOT
from tests.small_runs import run_small

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def document(file: Path | str) -> Any:
    return YAML(typ="safe", pure=True).load((ROOT / file).read_text())


def extras() -> set[str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return set(parser["options.extras_require"])


class Strict(BaseModel):
    """Keys as in the file: some-key, someKey."""

    model_config = ConfigDict(extra="forbid", strict=True,
                              alias_generator=lambda name: name.rstrip("_").replace("__", "-"))


# ------------------------------------------------------------------ GitHub Actions


class Step(Strict):
    name: str | None = None
    uses: str | None = Field(None, pattern=r"^[\w-]+/[\w.-]+@(v\d+|release/v\d+)$")
    with_: dict[str, Any] = {}
    run: str | None = None
    env: dict[str, str] = {}


class Strategy(Strict):
    fail__fast: bool
    matrix: dict[str, list[str]]


class Job(Strict):
    runs__on: Literal["ubuntu-latest"] | None = None
    timeout__minutes: int | None = None
    needs: str | None = None
    uses: str | None = None
    environment: str | None = None
    env: dict[str, str] = {}
    permissions: dict[str, Literal["read", "write"]] = {}
    strategy: Strategy | None = None
    steps: list[Step] = []


class Workflow(Strict):
    name: str
    on: dict[Literal["push", "pull_request", "workflow_call"], dict[Literal["branches", "tags"], list[str]] | None]
    permissions: dict[str, Literal["read", "write"]]
    concurrency: dict[Literal["group", "cancel-in-progress"], str | bool] = {}
    env: dict[str, str] = {}
    jobs: dict[str, Job]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_has_published_fields_and_calls_files_that_are_there(file):
    workflow = Workflow.model_validate(document(file))
    assert workflow.permissions == {"contents": "read"}  # a job that needs more says so itself
    for name, job in workflow.jobs.items():
        assert job.needs is None or job.needs in workflow.jobs, name
        assert bool(job.uses) != bool(job.steps and job.runs__on and job.timeout__minutes), name
        assert job.uses is None or (ROOT / job.uses).is_file(), name
        for step in job.steps:
            assert bool(step.run) != bool(step.uses), name
            for script in re.findall(r"(?:bash|source|--config-file) (\S+)", step.run or ""):
                assert (ROOT / script).is_file(), script
        assert set(job.env.get("EXTRAS", "test").split(",")) <= extras()
    if shutil.which("actionlint"):
        subprocess.run(["actionlint", str(file)], check=True, timeout=60)


def test_an_unknown_field_of_a_workflow_is_noticed():
    broken = document(WORKFLOWS[0])
    broken["jobs"]["tests"]["time-out"] = 3
    with pytest.raises(ValidationError, match="time-out"):
        Workflow.model_validate(broken)


def test_ci_runs_what_one_runs_by_hand_and_a_release_is_tested_first():
    ci, release = (Workflow.model_validate(document(file)) for file in WORKFLOWS)
    assert "bash .ci/run" in [step.run for step in ci.jobs["tests"].steps]
    assert ci.jobs["tests"].strategy.matrix["python"][0] == "3.11"  # the oldest that setup allows
    assert release.jobs["tests"].uses == "./.github/workflows/ci.yml" and "workflow_call" in ci.on
    order, job = ["github"], release.jobs["github"]
    while job.needs:
        order.append(job.needs)
        job = release.jobs[job.needs]
    assert order == ["github", "pypi", "build", "tests"] and release.on == {"push": {"tags": ["v*"]}}


@pytest.mark.parametrize(("tag", "code"), [("v{}", 0), ("v{}1", 1), ("{}", 0), ("v9.9", 1)])
def test_only_the_tag_of_the_version_is_built(tag, code):
    (check,) = (step.run for step in Workflow.model_validate(document(WORKFLOWS[1])).jobs["build"].steps
                if step.name == "the tag is the version")
    done = subprocess.run(["bash", "-c", check], cwd=ROOT, timeout=10,
                          env={**os.environ, "GITHUB_REF_NAME": tag.format(mat_dist.__version__)})
    assert done.returncode == code


# ------------------------------------------------------------------ containers


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (ROOT / "containers" / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.replace("\\\n", " ").splitlines() if line]


def test_the_dockerfile_is_sound_and_copies_what_its_ignore_file_lets_through():
    found = instructions()
    assert {name for name, _ in found} <= {"FROM", "ENV", "WORKDIR", "RUN", "COPY", "USER", "CMD"}
    assert all(re.fullmatch(r"[\w./-]+:[\w.-]+( AS \w+)?", image) for name, image in found if name == "FROM")
    assert [user for name, user in found if name == "USER"][-1] not in ("0", "root")
    ignored = (ROOT / "containers" / "Dockerfile.dockerignore").read_text().split()
    copied = [word for name, words in found if name == "COPY" and "--from" not in words for word in words.split()[:-1]]
    assert ignored[0] == "*" and {f"!{word}" for word in copied} == {line for line in ignored if line.startswith("!")}
    assert all((ROOT / word).exists() for word in copied)
    if shutil.which("hadolint"):
        subprocess.run(["hadolint", str(ROOT / "containers" / "Dockerfile")], check=True, timeout=60)


def test_the_apptainer_definition_makes_what_the_dockerfile_makes():
    text = (ROOT / "containers" / "mat_dist.def").read_text()
    head, *parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    keys = dict(line.split(": ") for line in head.splitlines() if line and not line.startswith("#"))
    docker = instructions()
    assert keys == {"Bootstrap": "docker", "From": docker[0][1].removesuffix(" AS build")}
    assert set(sections) == {"files", "post", "environment", "runscript", "help"}
    pairs = [line.split() for line in sections["files"].splitlines() if line]
    assert all(there == f"/src/{here}" for here, there in pairs)
    assert {here for here, _ in pairs} == {word for name, words in docker if name == "COPY" and "--from" not in words
                                           for word in words.split()[:-1]}
    *_, sync = (words for name, words in docker if name == "RUN" and "uv sync" in words)
    installed = next(words for name, words in docker if name == "RUN" and "pip install" in words)
    assert sync in sections["post"] and installed in sections["post"]
    assert set(re.findall(r"--extra (\w+)", sync)) <= extras()
    for name in ("post", "environment", "runscript"):
        subprocess.run(["bash", "-n"], input=sections[name], text=True, check=True, timeout=10)


# ------------------------------------------------------------------ Kubernetes


class Variable(Strict):
    name: str
    value: str


class Resources(Strict):
    requests: dict[str, str] = {}
    limits: dict[str, str] = {}


class Trainer(Strict):
    image: str
    numNodes: int = Field(ge=1)
    numProcPerNode: int = Field(ge=1)
    command: list[str]
    args: list[str]
    env: list[Variable]
    resourcesPerNode: Resources


class Mount(Strict):
    name: str
    mountPath: str = Field(pattern="^/")


class Container(Strict):
    name: str
    volumeMounts: list[Mount]


class Volume(Strict):
    name: str
    persistentVolumeClaim: dict[Literal["claimName"], str] | None = None
    emptyDir: dict[Literal["medium"], Literal["Memory"]] | None = None


class Pod(Strict):
    terminationGracePeriodSeconds: int
    securityContext: dict[Literal["fsGroup"], int]
    containers: list[Container]
    volumes: list[Volume]


class Nested(Strict):
    """spec.replicatedJobs[0].template.spec.template.spec, with nothing beside."""

    spec: dict[Literal["replicatedJobs"], list[dict[Literal["name", "template"], Any]]]

    def pod(self) -> Pod:
        (job,) = self.spec["replicatedJobs"]
        assert job["name"] == "node" and set(job["template"]) == {"spec"}
        assert set(job["template"]["spec"]) == {"template"} and set(job["template"]["spec"]["template"]) == {"spec"}
        return Pod.model_validate(job["template"]["spec"]["template"]["spec"])


class Patch(Strict):
    manager: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    trainingRuntimeSpec: dict[Literal["template"], Nested]


class TrainJobSpec(Strict):
    runtimeRef: dict[Literal["apiGroup", "kind", "name"], str]
    trainer: Trainer
    runtimePatches: list[Patch]


class TrainJob(Strict):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainJob"]
    metadata: dict[Literal["name"], str]
    spec: TrainJobSpec


def test_the_trainjob_has_published_fields_and_starts_a_run_that_survives_its_pods():
    job = TrainJob.model_validate(document("launch/trainjob.yaml"))
    trainer, (patch,) = job.spec.trainer, job.spec.runtimePatches
    pod = patch.trainingRuntimeSpec["template"].pod()
    (container,) = pod.containers
    assert container.name == "node"  # the name that Kubeflow's runtime gives it
    assert {mount.name for mount in container.volumeMounts} == {volume.name for volume in pod.volumes}
    assert all(bool(volume.persistentVolumeClaim) != bool(volume.emptyDir) for volume in pod.volumes)
    kept = [mount.mountPath for mount in container.volumeMounts if mount.name == "runs"]
    assert [f"run.root={path}" for path in kept] == [word for word in trainer.args if word.startswith("run.root=")]
    assert any(word.startswith("run.name=") for word in trainer.args)
    assert trainer.resourcesPerNode.limits["nvidia.com/gpu"] == str(trainer.numProcPerNode)
    assert trainer.command[0] == "torchrun" and trainer.command[-2:] == ["-m", "mat_dist.train"]
    assert trainer.args[0] == "--config"
    config = load_config(str(ROOT / "configs" / f"{trainer.args[1]}.yaml"), trainer.args[2:])
    Placement.place(len(config.peers), trainer.numNodes * trainer.numProcPerNode, 0)  # refuses ranks that do not fit


# ------------------------------------------------------------------ SkyPilot


class Recovery(Strict):
    max_restarts_on_errors: int
    recover_on_exit_codes: list[int]


class Machines(Strict):
    accelerators: str = Field(pattern=r"^[\w-]+:\d+$")
    use_spot: bool
    disk_size: int
    job_recovery: Recovery


class Storage(Strict):
    name: str
    mode: Literal["MOUNT", "COPY", "MOUNT_CACHED"]


class Task(Strict):
    name: str
    num_nodes: int
    resources: Machines
    workdir: str
    envs: dict[str, str]
    file_mounts: dict[str, Storage]
    setup: str
    run: str


@pytest.mark.parametrize(("left", "code"), [(75, 75), (2, 2), (0, 1), (None, 1)])
def test_the_sky_task_has_published_fields_and_its_commands_start_and_tell_the_ranks_code(left, code, tmp_path):
    """With a torchrun that writes down its arguments, fails, and leaves an exit.json as the ranks do, or an old one."""
    task = Task.model_validate(document("launch/sky.yaml"))
    assert set(task.file_mounts) == {"/runs"} and task.file_mounts["/runs"].mode != "MOUNT"
    again = re.search(r"^\s+([\d|]+)\)", (ROOT / "launch" / "slurm_job.sh").read_text(), re.MULTILINE)[1]
    assert set(task.resources.job_recovery.recover_on_exit_codes) == set(map(int, again.split("|")))
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "env.sh").write_text(
        'set -euo pipefail\ntorchrun() { printf "%s\\n" "$@" > words; return 1; }\n')
    (tmp_path / "runs" / "mat-dist").mkdir(parents=True)
    if left is not None:
        (tmp_path / "runs" / "mat-dist" / "exit.json").write_text(f'{{"code": {left}}}')
    given = {**os.environ, **task.envs, "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
             "SKYPILOT_NUM_GPUS_PER_NODE": "4", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    for script, expected in ((task.setup, 0), (task.run.replace("/runs", "runs"), code)):
        assert subprocess.run(["bash", "-c", script], cwd=tmp_path, env=given, timeout=20).returncode == expected
    words = (tmp_path / "words").read_text().split()
    assert {"--nnodes=2", "--node_rank=1", "--nproc_per_node=4", "--master_addr=10.0.0.1"} <= set(words)
    assert words[-5:] == ["mat_dist.train", "--config", "cifar10_resnet18", "run.root=runs", "run.name=mat-dist"]


# ------------------------------------------------------------------ torch.hub


def test_torch_hub_finds_the_networks_of_a_clone():
    entries = {name for name, one in runpy.run_path(str(ROOT / "hubconf.py")).items() if callable(one)}
    assert {name for name in entries if not name.startswith("_")} == {"network", "trained"}
    model = torch.hub.load(str(ROOT), "network", "small_cnn", classes=7, shape=(1, 8, 8), width=0.25, source="local")
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 7)
    with pytest.raises(CheckpointError):
        torch.hub.load(str(ROOT), "trained", "no/such/run", source="local")


@pytest.mark.slow  # trains
def test_a_trained_model_of_torch_hub_is_that_of_load(tmp_path):
    run = str(run_small(tmp_path, "run").folder.path)
    images = torch.rand(4, 1, 8, 8)
    model = torch.hub.load(str(ROOT), "trained", run, "peer1", which="latest", source="local")
    assert torch.equal(model(images), mat_dist.load(run, "peer1", which="latest")(images))


# ------------------------------------------------------------------ the site


def test_every_link_of_a_document_leads_to_a_page_or_file_of_the_site(monkeypatch):
    """The hook of the site, with doubles for mkdocs' files."""
    made = types.ModuleType("mkdocs.structure.files")
    made.File = types.SimpleNamespace(generated=lambda config, uri, **_: uri)
    monkeypatch.setitem(sys.modules, "mkdocs.structure.files", made)
    hook = runpy.run_path(str(ROOT / "docs" / "site.py"))
    docs = ROOT / "docs"
    there = {*hook["on_files"]([], None), *(str(path.relative_to(docs)) for path in docs.rglob("*"))}
    dead = []
    for file in [*DOCUMENTS, ROOT / "CHANGELOG.md"]:
        uri = hook["place"](str(file.relative_to(ROOT)))
        text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
        shown = hook["on_page_markdown"](text, types.SimpleNamespace(file=types.SimpleNamespace(src_uri=uri)))
        dead += [f"{file.name}: {link[2]}" for link in hook["LINK"].finditer(shown)
                 if os.path.normpath(os.path.join(os.path.dirname(uri), link[2])) not in there]
    assert not dead
    assert {"index.md", "CHANGELOG.md", "repository/configs/base.yaml"} <= there


def test_every_page_is_in_the_menu_of_the_site():
    text = (ROOT / ".mkdocs.yml").read_text()
    listed = re.findall(r"[\w./]+\.md", text.split("\nnav:")[1].split("\nvalidation:")[0])
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | {"index.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert sorted(listed) == sorted(pages)
    assert not [name for name in pages if fnmatch.fnmatch(name, "site*")]
