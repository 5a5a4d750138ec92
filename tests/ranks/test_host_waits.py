"""Between its exchanges a step asks the device for nothing: on a GPU the host runs ahead, and a graph can hold it all.

All tensors are on the CPU here, where nothing waits. So the tests look at what is called: a value that is read, a copy
to the host, a shape that depends on values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mat_dist.config.methods import attack_losses, attack_methods, methods, presets, strategies
from mat_dist.config.norms import known_norms
from mat_dist.config.schema import Config, OptimConfig
from mat_dist.core.guard import Guard
from mat_dist.core.optim import WAITS, build_optimizer, clipped
from mat_dist.core.step import train_step
from mat_dist.data.augment import AugmentedView
from tests.cohorts import BATCH, build, local, make_peer, nets
from tests.ranks.test_reference import TEACHER, alone
from tests.reference_mat import configured, mixed_images

Run = Callable[..., list[Any]]
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.allclose}
SHAPES = {aten.nonzero, aten.nonzero_static, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount,
          aten.unique_consecutive, aten.repeat_interleave}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
HOST = {Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.__array__}


def waits_in(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of torch would make the host wait for a GPU."""
    if isinstance(func, torch._ops.OpOverload):
        packet = func.overloadpacket
        masked = packet in INDEXED and any(one is not None and one.dtype == torch.bool for one in args[1])
        return masked or packet in READS or packet in SHAPES
    return func in HOST or (func is Tensor.to and "cpu" in (*args[1:], kwargs.get("device")))


def place() -> str:
    """The file and function of the package that runs now."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "/mat_dist/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/mat_dist/')[2]}, {frame.f_code.co_name}"


def watcher(kind: type, name: str, found: set[str]) -> Any:
    """A mode of torch that notes each call that waits."""
    def call(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits_in(func, args, kwargs or {}):
            found.add(f"{place()}: {getattr(func, '__name__', func)}")
        return func(*args, **(kwargs or {}))

    return type("Watcher", (kind,), {name: call})()


@contextmanager
def noting(found: set[str]) -> Iterator[None]:
    """What is called from Python, and the operators that it, and the backward pass, come to."""
    calls, operators = (watcher(kind, name, found) for kind, name in (
        (TorchFunctionMode, "__torch_function__"), (TorchDispatchMode, "__torch_dispatch__")))
    with calls, operators:
        yield


def watched(found: set[str] | None, work: Callable[..., Any], *args: Any) -> Any:
    with nullcontext() if found is None else noting(found):
        return work(*args)


@pytest.fixture(autouse=True)
def watched_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local work of a mesh that has `waits` is watched; not the checksum of images on the host, and not the vote, which
    is the step's only wait."""
    plain = Guard.run

    def run(guard: Guard, phase: str, work: Callable[..., Any], *args: Any) -> Any:
        found = None if phase in ("checksum", "device") else getattr(guard.mesh, "waits", None)
        return plain(guard, phase, watched, found, work, *args)

    monkeypatch.setattr(Guard, "run", run)


def waits(mesh: Any, config: Config, models: list[nn.Module], **data: Any) -> set[str]:
    """Where local work of two steps waits, after a first one, in which attacks make their copies."""
    found: set[str] = set()
    cohort = build(config, mesh, models, steps_per_epoch=2)
    rows, update = torch.arange(cohort.rows.start, cohort.rows.stop), cohort.update
    cohort.shown = lambda step: AugmentedView.plain(rows, BATCH)
    for step in range(3):
        if step == 1:
            mesh.waits, cohort.update = found, partial(watched, found, update)  # type: ignore[method-assign]
        train_step(cohort, local(cohort, step // config.train.replays, **data), log=step < 2)
    return found


def config(*entries: dict[str, Any], train: dict[str, Any] | None = None, **step: Any) -> Config:
    made = configured(list(entries), 3, **{"precision": "fp32", **step})
    return made.model_copy(update={"train": made.train.model_copy(update=train or {})})


def cases() -> dict[str, Config]:
    """Every value that a setting of the step's algorithm can have, those of all methods among them."""
    at: dict[str, Any] = {"loss": {"preset": "at"}}
    mat: dict[str, Any] = {"loss": {"preset": "mat"}, "optim": {"ema_decay": 0.9, "clip_norm": 1.0}}
    found = {f"preset {name}": config(*[{"loss": {"preset": name}}] * 2, TEACHER) for name in presets()}
    found |= {f"strategy {name}": config(*alone(name)) for name in strategies()}
    found |= {f"attack {name}": config({**at, "attack": {"method": name, "steps": 1}},
                                       train={"replays": 2 if name == "free" else 1}) for name in attack_methods()}
    found |= {f"{method} in {name}": config({**at, "threat": {"norm": name, "eps": 0.1}, "attack": {"method": method}})
              for name in known_norms() for method in ("pgd", "apgd")}
    found |= {f"attack loss {name}": config({**at, "attack": {"loss": name}}, mat) for name in attack_losses()}
    found |= {f"start {name}": config({**at, "attack": {"start": name}}) for name in ("uniform", "gaussian", "zero")}
    found |= {f"method {name}": config({"loss": {"preset": "trades"}, "methods": {name: {}}})
              for name, method in methods().items() if method.section is not None}
    found["projected gradients"] = config({**alone("ramp")[0], "methods": {"ramp": {"projection": 0.5}}})
    found |= {f"kd_where {name}": config(*[{"loss": {"preset": "mat", "kd_where": name}}] * 2)
              for name in ("teacher_right", "student_wrong")}
    found |= {f"{key} {value}": config(mat, mat, **{key: value}) for key, value in (
        ("memory", "recompute"), ("accumulate", 2), ("teachers", "ema"), ("wire", "int8"), ("wire", "fp16"),
        ("precision", "bf16"), ("precision", "fp16"), ("precision", "fp64"))}
    return found


CASES = cases()
NOW_AND_THEN = {"attacks/attack_copy.py, _compare: _local_scalar_dense.default"}  # in the attacks 1, 2, 4, 8 ...
NEEDED = {"strategy eat": {  # draws the norm of the next step by what was counted in this one
    "methods/unions.py, commit: tolist",  # after the vote, when the device has nothing to do
    "methods/unions.py, choose: _local_scalar_dense.default"}}  # the draw, a number of the host


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_the_device_only_at_its_vote(name: str, run_ranks: Run) -> None:
    count = len(CASES[name].peers)
    models = nets(count, dtype=torch.float64 if CASES[name].step.precision == "fp64" else torch.float32)
    (found,) = run_ranks(lambda mesh: waits(mesh, CASES[name], models), count, 1)
    assert found - NOW_AND_THEN == NEEDED.get(name, set())


@pytest.mark.parametrize("name", ["preset trades", "method awp"])
def test_replicas_add_no_wait(name: str, run_ranks: Run) -> None:
    """Batch norm over all of them included."""
    models, one = nets(1), CASES[name].model_copy(update={"peers": CASES[name].peers[:1]})
    assert run_ranks(lambda mesh: waits(mesh, one, models), 1, 2) == [NOW_AND_THEN] * 2


def test_mixed_labels_add_no_wait(run_ranks: Run) -> None:
    models = nets(1, dtype=torch.float64)
    mixed = config({"loss": {"preset": "trades"}}, precision="fp64")
    assert run_ranks(lambda mesh: waits(mesh, mixed, models, data=mixed_images), 1, 1) == [NOW_AND_THEN]


class Reads(list[str]):
    """Each call that waits, where a set keeps one of each place."""

    add = list.append


def test_text_of_all_ranks_is_read_at_once_and_not_rank_by_rank(run_ranks: Run) -> None:
    def gathered(mesh: Any) -> int:
        reads = Reads()
        with noting(reads):  # type: ignore[arg-type]
            found = mesh.gather_json({"rank": mesh.placement.rank, "text": "ü" * 10 * mesh.placement.rank})
        assert found == [{"rank": rank, "text": "ü" * 10 * rank} for rank in range(len(found))]
        return len(reads)

    (few,), (many,) = ({*run_ranks(gathered, world, world)} for world in (2, 6))
    assert 0 < few == many


@pytest.mark.parametrize("call", [
    lambda x: x.sum().item(), lambda x: float(x[0]), lambda x: bool((x > 0).all()), lambda x: x.tolist(),
    lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.to(device="cpu"), lambda x: x.numpy(), lambda x: x.nonzero(),
    lambda x: x[x > 0], lambda x: x.masked_select(x > 0), lambda x: x.clone().index_put_((x > 0,), x.sum()),
    lambda x: x.unique(), lambda x: torch.where(x > 0), lambda x: torch.equal(x, x), lambda x: range(10)[x.long()[1]],
    lambda x: 1 if x.sum() > 0 else 2], ids=range(17))
def test_what_waits_is_noticed(call: Callable[[Tensor], Any]) -> None:
    found: set[str] = set()
    with noting(found):
        call(torch.arange(3.0))
    assert found


def test_what_waits_in_a_backward_pass_is_noticed_and_what_does_not_wait_is_not() -> None:
    found: set[str] = set()
    x = torch.arange(3.0, requires_grad=True)
    with noting(found):
        loss = torch.where(x > 1, x, 0)[torch.tensor([0, 2])].to(torch.float64).to(x.device).sum()
        loss.backward()
    assert not found
    x.register_hook(lambda grad: grad * grad.sum().item())
    with noting(found):
        x.square().sum().backward()
    assert found


KINDS = sorted(key for key, kind in vars(torch.optim).items() if isinstance(kind, type)
               and issubclass(kind, torch.optim.Optimizer) and key not in ("Optimizer", "LBFGS", "SparseAdam"))


@pytest.mark.parametrize("kind", KINDS)
def test_optimizers_that_wait_are_listed(kind: str) -> None:
    """On torch's device without values, where reading one is an error; counts of steps stay on the host."""
    model = nn.Linear(3, 3, bias=False, device="meta")
    optimizer, waited = build_optimizer(model, OptimConfig(name=kind, lr=0.1, weight_decay=0.0)), False
    for _ in range(2):
        model.weight.grad = torch.empty_like(model.weight)
        clipped(model, [model.weight.grad], 1.0)
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "cannot be called on meta tensors" in str(error)
            waited = True
    assert waited == (kind in WAITS)
    entry = config({"optim": {"name": kind, "weight_decay": 0.0}})
    notes = [make_peer(nn.Linear(3, 3, bias=False, device=device), entry).notes for device in ("cpu", "meta")]
    assert notes == [[], [f"peer0: optim.name={kind} waits for the GPU in each update"] * waited]
