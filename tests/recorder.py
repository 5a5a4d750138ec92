"""A recorder of CPU operations, which behaves as CUDA graphs do: what is replayed reads and writes the tensors of the
recording, with the numbers of the recording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mat_dist.core.guard import Lane, one_lane

Call = tuple[Any, Any, Any, Any]
UNSAID = {torch.ops.aten.native_batch_norm.default: {3, 4}}  # it moves the statistics, and its schema is silent


class Operations(TorchDispatchMode):
    """Every operation of torch, in order, with what it read and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.born: set[int] = set()  # storages made here
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what else was written, and what was there

    @torch.no_grad()
    def undo(self) -> None:
        """Nothing was executed, and what was made holds no values yet."""
        for _, _, _, found in self.calls:
            for one in tensors(found):
                if storage(one) in self.born and one.is_floating_point():
                    one.detach().fill_(torch.nan)
        for tensor, value in self.before.values():
            tensor.copy_(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = tensors((args, kwargs))
        said = {place for place, argument in enumerate(func._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write}
        written = [one for place in said | UNSAID.get(func, set()) for one in tensors(args[place:place + 1])]
        for one in written:
            if storage(one) not in self.born:
                self.before.setdefault(storage(one), (one, one.clone()))
        found = func(*args, **(kwargs or {}))
        self.born |= {storage(one) for one in tensors(found)} - {storage(one) for one in read}
        self.calls.append((func, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, found in self.calls:
            read = {storage(one) for one in tensors((args, kwargs))}
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and storage(old) not in read:
                    old.detach().copy_(new)


def tensors(given: Any) -> list[Tensor]:
    return [one for one in tree_leaves(given) if isinstance(one, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class CpuRecorder:
    """Records by doing, and undoes it. `fits`: whether there is room for eager steps beside."""

    def __init__(self, fits: bool = True) -> None:
        self.fits = fits
        self.now: Operations | None = None
        self.made: list[Operations] = []

    @contextmanager
    def scope(self) -> Iterator[None]:
        first = len(self.made)
        try:
            yield
        finally:
            if self.now is not None:
                self.end()
            for done in reversed(self.made[first:]):
                done.undo()

    def begin(self) -> None:
        self.now = Operations()
        self.now.__enter__()

    def lanes(self, count: int) -> AbstractContextManager[Lane]:
        return one_lane(count)

    def end(self) -> Operations:
        done, self.now = self.now, None
        assert done is not None
        done.__exit__(None, None, None)
        self.made.append(done)
        return done

    def room(self) -> bool:
        return self.fits
