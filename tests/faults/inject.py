"""Faults, put into a process from outside: the methods of the package are wrapped before its main runs.

Nothing in the package knows of this. A fault waits for its rank, phase and number, says in a file that it
happens now (the runner measures from there), and acts.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import functools
import importlib
import inspect
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# phase: (module, class or "", function, argument that is the step or has it; "" counts the calls in this process)
PHASES = {
    "load": ("mat_dist.data", "", "load_data", ""),
    "batch": ("mat_dist.data", "Batches", "at", "step"),
    "attack": ("mat_dist.core.peer", "Peer", "attack", "part"),
    "craft": ("mat_dist.attacks.training_attack", "TrainingAttack", "_found", ""),
    "forward": ("mat_dist.core.peer", "Peer", "forward", "part"),
    "loss": ("mat_dist.core.peer", "Peer", "backward", "part"),
    "backward": ("mat_dist.core.peer", "Peer", "reduced", ""),
    "update": ("mat_dist.core.peer", "Peer", "update", "step"),
    "save": ("mat_dist.checkpoints", "", "write_peer", ""),
    "commit": ("mat_dist.checkpoints", "", "commit", ""),
    "models": ("mat_dist.checkpoints.load", "FinishedRun", "models", ""),
    "eval": ("mat_dist.evaluation.chunks", "", "attack_chunk", ""),
    "write": ("mat_dist.runs.files", "", "write_all", ""),
}


@dataclass(frozen=True)
class Fault:
    """What happens where.

    Attributes:
        kind: a key of `BEFORE`, `AFTER` or `AT_START`.
        phase: a key of PHASES.
        rank: the rank it happens on; None: all.
        at: the step, or for phases without one the number of the call from 0; None: whenever it is reached.
        times: how often at most; None: always.
        attempt: only after this many restarts of torchrun; None: in each.
        seconds, text, size: of the kinds that need them.
        mark: file in which the fault says that it happens; filled in by the runner.
    """

    kind: str
    phase: str = "attack"
    rank: int | None = 1
    at: int | None = None
    times: int | None = 1
    attempt: int | None = None
    seconds: float = 0.0
    text: str = ""
    size: int = 0
    mark: str = ""

    def dump(self) -> dict[str, Any]:
        return asdict(self)


def install(faults: list[Fault]) -> None:
    """Put the faults of this rank into this process."""
    rank, restart = int(os.environ.get("RANK", "0")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    for fault in faults:
        if fault.rank in (None, rank) and fault.attempt in (None, restart):
            if fault.kind in AT_START:
                AT_START[fault.kind](fault)
            else:
                _wrap(fault)


def _wrap(fault: Fault) -> None:
    module_name, class_name, name, counts = PHASES[fault.phase]
    module = importlib.import_module(module_name)
    owner = getattr(module, class_name) if class_name else module
    real = getattr(owner, name)
    signature = inspect.signature(real)
    state = {"calls": 0, "done": 0}

    @functools.wraps(real)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        number = state["calls"]
        state["calls"] += 1
        if counts:
            told = signature.bind(*args, **kwargs).arguments[counts]
            number = getattr(told, "step", told)
        if fault.at not in (None, number) or (fault.times is not None and state["done"] >= fault.times):
            return real(*args, **kwargs)
        state["done"] += 1
        if fault.kind in BEFORE:
            _tell(fault, number)
            BEFORE[fault.kind](fault, *args)
            return real(*args, **kwargs)
        result = real(*args, **kwargs)
        _tell(fault, number)
        change = AFTER[fault.kind]
        return {view: change(one) for view, one in result.items()} if isinstance(result, dict) else change(result)

    setattr(owner, name, wrapped)


def _tell(fault: Fault, number: int | None) -> None:
    """Say that it happens now; one write, so that ranks can share the file."""
    line = json.dumps({"time": time.monotonic(), "kind": fault.kind, "phase": fault.phase, "at": number,
                       "rank": int(os.environ.get("RANK", "0")), "pid": os.getpid()})
    handle = os.open(fault.mark, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


# ------------------------------------------------------------------------------------------------ what happens


def _raise(fault: Fault, *_: Any) -> None:
    raise RuntimeError(fault.text or "the cat sat on the cable")


def _out_of_memory(fault: Fault, *_: Any) -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def _hold_gil(fault: Fault, *_: Any) -> None:
    ctypes.PyDLL(None).sleep(int(fault.seconds))  # PyDLL keeps the interpreter's lock: no other thread runs


def _no_space(fault: Fault, *args: Any) -> None:
    """Half the bytes of a peer's file, then ENOSPC; other files are small and still fit."""
    path, data = args[:2]
    if ".peer_" in Path(path).name:
        Path(path).write_bytes(bytes(data[: len(data) // 2]))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _poison_weight(fault: Fault, peer: Any, *_: Any) -> None:
    next(peer.model.parameters()).data.view(-1)[0] = float("nan")


BEFORE: dict[str, Callable[..., None]] = {
    "kill": lambda fault, *_: os.kill(os.getpid(), signal.SIGKILL),
    "segv": lambda fault, *_: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": lambda fault, *_: os.abort(),
    "stop": lambda fault, *_: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda fault, *_: sys.exit(0),
    "hard exit": lambda fault, *_: os._exit(0),
    "raise": _raise,
    "oom": _out_of_memory,
    "sleep": lambda fault, *_: time.sleep(fault.seconds),
    "gil": _hold_gil,
    "no space": _no_space,
    "nan weight": _poison_weight,
    "vanish": lambda fault, *_: shutil.rmtree(fault.text),
    "truncate": lambda fault, *_: os.truncate(fault.text, fault.size),
    "overwrite": lambda fault, *_: _overwrite(Path(fault.text)),
    "usr1": lambda fault, *_: os.kill(os.getpid(), signal.SIGUSR1),
    "term": lambda fault, *_: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda fault, *_: os.kill(os.getpid(), signal.SIGINT),
}


def _overwrite(path: Path) -> None:
    """Change bytes of a file in place."""
    with path.open("r+b") as file:
        file.write(bytes(64))


def _wider(logits: Any) -> Any:
    import torch

    return torch.cat([logits, logits[:, :1]], dim=1)


# Of the result of the phase: batch gives (images, labels), attack images, forward logits, loss a scalar.
AFTER: dict[str, Callable[[Any], Any]] = {
    "permute": lambda batch: (batch[0].flip(0), batch[1].flip(0)),
    "labels": lambda batch: (batch[0], batch[1].roll(1)),
    "one pixel": lambda batch: (_one_pixel(batch[0]), batch[1]),
    "fewer": lambda images: images[:-1],
    "double": lambda images: images.double(),
    "wider": _wider,
    "nan": lambda tensor: tensor * float("nan"),
    "inf": lambda tensor: tensor * float("inf"),
    "x100": lambda tensor: tensor * 100,
}


def _one_pixel(images: Any) -> Any:
    images = images.clone()
    images.view(-1)[0] += 1 / 255
    return images


# ------------------------------------------------------------------------------------------------ from the start on


def _limit_files(fault: Fault) -> None:
    """No file may grow beyond `size` bytes: writes fail with EFBIG, as on a full disk with ENOSPC."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, resource.RLIM_INFINITY))


def _watch(fault: Fault) -> None:
    """Write down, after a refused step, which local peers are bit-equal to before it."""
    from mat_dist.core.state_hash import state_hash
    from mat_dist.training import trainer

    real = trainer.train_step

    def watched(cohort: Any, *args: Any, **kwargs: Any) -> Any:
        before = {peer.index: state_hash(peer.state()) for peer in cohort.peers}
        try:
            return real(cohort, *args, **kwargs)
        except Exception:
            kept = {peer.index: state_hash(peer.state()) == before[peer.index] for peer in cohort.peers}
            Path(f"{fault.mark}.kept.{os.environ.get('RANK', '0')}").write_text(json.dumps(kept))
            raise

    trainer.train_step = watched


def _stuck_groups(fault: Fault) -> None:
    """Closing or aborting process groups never ends, as NCCL's does while an exchange of theirs hangs, or it fails with
    `text`."""
    import torch.distributed as dist

    def for_ever(*_: Any) -> None:
        _tell(fault, None)
        while not fault.text:
            time.sleep(60)
        raise RuntimeError(fault.text)

    dist.destroy_process_group = dist.distributed_c10d._abort_process_group = for_ever


AT_START: dict[str, Callable[[Fault], None]] = {"limit": _limit_files, "watch": _watch, "words": lambda fault: None,
                                                "stuck groups": _stuck_groups}


def marked(fault: Fault, mark: Path) -> Fault:
    """The fault, told where to say that it happens."""
    return dataclasses.replace(fault, mark=str(mark))
