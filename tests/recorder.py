"""A recorder of CPU operations, which behaves as CUDA graphs do: what is replayed reads and writes the tensors of the
recording, with the numbers of the recording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = tuple[Any, Any, Any, Any]


class Operations(TorchDispatchMode):
    """Every operation of torch, in order, with what it read and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, found in self.calls:
            read = {storage(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and storage(old) not in read:
                    old.detach().copy_(new)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class CpuRecorder:
    """Records by doing, so what it changes must be undone."""

    def __init__(self) -> None:
        self.now: Operations | None = None
        self.made: list[Operations] = []

    @contextmanager
    def scope(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self.now is not None:
                self.now.__exit__(None, None, None)
                self.now = None

    def begin(self) -> None:
        self.now = Operations()
        self.now.__enter__()

    def end(self) -> Operations:
        done, self.now = self.now, None
        assert done is not None
        done.__exit__(None, None, None)
        self.made.append(done)
        return done
