"""Which device and which place on its node a rank takes, however it was started, with doubled GPUs and environments."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mat_dist.config.schema import CommConfig, Config
from mat_dist.distributed import groups
from mat_dist.distributed.groups import Mesh, choose_device, open_mesh
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.placement import Placement
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import EnvironmentFault
from mat_dist.tools.check.machine import free_port

MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """surroundings(variables): nothing else is told by any launcher."""
    def set_to(variables: dict[str, Any]) -> None:
        for name in [*os.environ]:
            if name.startswith(("SLURM", "OMPI", "PMI", "MV2", "JSM", "MASTER_", "TORCHELASTIC", "LOCAL_", "GROUP_")) \
                    or name in ("RANK", "WORLD_SIZE", "NCCL_MULTI_RANK_GPU_ENABLE"):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
    return set_to


def torchrun(rank: int, local_rank: int, nodes: int = 1, local: int = 4, **more: Any) -> dict[str, Any]:
    return {**MASTER, "RANK": rank, "WORLD_SIZE": nodes * local, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local,
            "GROUP_WORLD_SIZE": nodes, "GROUP_RANK": rank // local, "TORCHELASTIC_RUN_ID": "none", **more}


def srun(task: int, local: int, per_node: str, node: int = 0, tasks: int = 4, **more: Any) -> dict[str, Any]:
    return {**MASTER, "RANK": task, "WORLD_SIZE": tasks, "SLURM_PROCID": task, "SLURM_LOCALID": local,
            "SLURM_NODEID": node, "SLURM_NTASKS": tasks, "SLURM_STEP_NUM_TASKS": tasks,
            "SLURM_STEP_TASKS_PER_NODE": per_node, **more}


def mpirun(start: str, task: int, local: int, on_node: int, tasks: int = 4, **more: Any) -> dict[str, Any]:
    return {**MASTER, "RANK": task, "WORLD_SIZE": tasks, f"{start}_RANK": task, f"{start}_SIZE": tasks,
            f"{start}_LOCAL_RANK": local, f"{start}_LOCAL_SIZE": on_node, **more}


ORTED = {"SLURM_PROCID": 1, "SLURM_LOCALID": 0, "SLURM_NODEID": 1, "SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2,
         "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}  # mpirun starts one task per node by srun, and those start the ranks


@pytest.mark.parametrize(("variables", "gpus", "device", "node"), [
    pytest.param(variables, gpus, device, node, id=name) for name, variables, gpus, device, node in [
        ("one process", {}, 4, 0, range(1)),
        ("torchrun", torchrun(3, 3), 4, 3, range(4)),
        ("torchrun on the second node", torchrun(5, 1, nodes=2), 4, 1, range(4, 8)),
        ("torchrun, a wrapper shows each rank its GPU", torchrun(3, 3), 1, 0, range(4)),
        ("torchrun, nodes of 3 and 2", torchrun(3, 0, WORLD_SIZE=5, LOCAL_WORLD_SIZE=2, GROUP_WORLD_SIZE=2), 2, 0,
         range(3, 5)),
        ("--virtual-local-rank", torchrun(2, 0), 1, 0, range(4)),
        ("--virtual-local-rank on the second node", torchrun(6, 0, nodes=2), 1, 0, range(4, 8)),
        ("srun, all see all GPUs", srun(2, 2, "4"), 4, 2, range(4)),
        ("srun --gpus-per-task=1", srun(3, 3, "4"), 1, 0, range(4)),
        ("srun --gpus-per-task=2", srun(3, 3, "4"), 2, 1, range(4)),
        ("srun on two nodes", srun(3, 1, "2(x2)", node=1), 2, 1, range(2, 4)),
        ("srun on nodes of 3 and 1", srun(3, 0, "3,1", node=1), 4, 0, range(3, 4)),
        ("srun on nodes of 3 and 1, the first", srun(2, 2, "3,1"), 4, 2, range(3)),
        ("srun, LOCAL_RANK told by hand", srun(3, 1, "2(x2)", node=1, LOCAL_RANK=1), 2, 1, range(2, 4)),
        ("mpirun", mpirun("OMPI_COMM_WORLD", 3, 1, 2), 2, 1, range(2, 4)),
        ("mpirun under SLURM", mpirun("OMPI_COMM_WORLD", 1, 1, 2, **ORTED), 2, 1, range(2)),
        ("MVAPICH", mpirun("MV2_COMM_WORLD", 3, 1, 2), 2, 1, range(2, 4)),
        ("jsrun", mpirun("JSM_NAMESPACE", 3, 1, 2), 1, 0, range(2, 4))]])
def test_a_rank_takes_the_gpu_and_the_place_on_its_node_that_its_launcher_gave_it(
        variables: dict[str, Any], gpus: int, device: int, node: range, surroundings: Any,
        monkeypatch: pytest.MonkeyPatch) -> None:
    surroundings(variables)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    launch = Launch.from_environment()
    assert choose_device(Config(), launch.local_rank) == torch.device("cuda", device)
    assert launch.node == node and launch.rank - launch.node[0] == launch.local_rank


@pytest.mark.parametrize("variables", [
    {},
    {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"},  # the batch script itself
    srun(0, 0, "1(x2)", tasks=2, WORLD_SIZE=4),  # one task per node, whose ranks say nothing of their own
    srun(1, 1, "4", RANK=2),
    {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "many"},
    {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
    {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "4"}])
def test_ranks_whose_place_on_their_node_nobody_tells_are_refused(variables: dict[str, Any],
                                                                  surroundings: Any) -> None:
    surroundings({**MASTER, "RANK": "1", "WORLD_SIZE": "4", **variables})
    with pytest.raises(EnvironmentFault, match=r"^WORLD_SIZE=4 without LOCAL_RANK \(environment of this rank\)"):
        Launch.from_environment()


@pytest.mark.parametrize(("variables", "what"), [
    (srun(1, 5, "4"), "LOCAL_RANK=5 does not fit LOCAL_WORLD_SIZE=4"),
    (srun(1, 2, "4"), "LOCAL_RANK=2 does not fit RANK=1"),
    (mpirun("OMPI_COMM_WORLD", 1, 1, 8), "LOCAL_WORLD_SIZE=8 does not fit WORLD_SIZE=4")])
def test_places_that_cannot_be_true_are_refused(variables: dict[str, Any], what: str, surroundings: Any) -> None:
    surroundings(variables)
    with pytest.raises(EnvironmentFault, match=f"^{what}"):
        Launch.from_environment()


def met(monkeypatch: pytest.MonkeyPatch, uuids: list[str], backend: str) -> list[Any]:
    """Ranks on GPUs of these identities -> how many share the GPU of each, or why it was refused."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device.index]))

    def form(placement: Placement, device: torch.device, *_: Any) -> Any:
        return Mesh(placement, device), SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(groups, "_form", form)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    world, port = len(uuids), free_port()

    def one(rank: int) -> Any:
        launch = Launch(rank, world, rank, world, master=("127.0.0.1", port))
        device = torch.device("cuda", rank)  # a number of the double, which knows all
        try:
            with open_mesh(world, CommConfig(backend=backend), device, launch, stop=StopFlag()) as mesh:
                return mesh.sharing
        except EnvironmentFault as error:
            assert error.shared  # one rank speaks for all
            return f"{error.what}: {error.how}"

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


@pytest.mark.parametrize(("uuids", "backend", "sharing"), [
    (["a", "b", "c"], "auto", [1, 1, 1]), (["a", "b", "a"], "gloo", [2, 1, 2])])
def test_ranks_know_how_many_of_them_share_a_gpu(uuids: list[str], backend: str, sharing: list[int], surroundings: Any,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    surroundings({})
    assert met(monkeypatch, uuids, backend) == sharing


@pytest.mark.parametrize(("uuids", "named"), [(["a", "b", "a"], "0, 2"), (["a", "a", "b", "b"], "0, 1, 2, 3")])
@pytest.mark.parametrize("backend", ["auto", "nccl"])
def test_ranks_that_would_share_a_gpu_over_nccl_are_refused_by_all_with_one_line(
        uuids: list[str], named: str, backend: str, surroundings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    surroundings({})
    (told,) = set(met(monkeypatch, uuids, backend))
    assert told.startswith(f"ranks {named} share GPUs") and "comm.backend=gloo" in told


@pytest.mark.thorough  # the store's first client may take five seconds
def test_nccl_may_be_asked_to_let_ranks_share_a_gpu(surroundings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    surroundings({"NCCL_MULTI_RANK_GPU_ENABLE": "1"})
    assert met(monkeypatch, ["a", "a"], "nccl") == [2, 2]
