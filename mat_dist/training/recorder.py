"""What records operations of torch and launches them again: CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch

from mat_dist.core.guard import Lane


class Graph(Protocol):
    """Operations that can be launched again."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """What makes graphs."""

    def scope(self) -> AbstractContextManager[Any]:
        """Where recording happens."""

    def begin(self) -> None:
        """What follows is recorded, not executed."""

    def end(self) -> Graph:
        """Until here."""

    def lanes(self, count: int) -> AbstractContextManager[Lane]:
        """As in `Guard`."""

    def room(self) -> bool:
        """Whether a step without a graph fits in memory beside what was recorded."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory, since they run one after another."""

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._lanes: list[torch.cuda.Stream] = []
        self._eager = 0  # bytes that eager steps took beside what lives between steps

    @contextmanager
    def scope(self) -> Iterator[None]:
        torch.cuda.synchronize()
        gc.collect()  # what is freed while a graph is captured would end the capture
        self._eager = max(self._eager, torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                if self._graph is not None:  # something failed
                    with suppress(RuntimeError):  # it tells again what has failed
                        self.end()
        torch.cuda.current_stream().wait_stream(self._stream)

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog thread asks its events meanwhile, which a global capture would forbid.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Graph:
        graph, self._graph = self._graph, None
        assert graph is not None
        graph.capture_end()
        return graph

    @contextmanager
    def lanes(self, count: int) -> Iterator[Lane]:
        """A stream for each peer. What one peer makes and another reads lives until the step ends, so that no memory
        changes hands while somebody reads it."""
        if count == 1:
            yield lambda number: nullcontext()
            return
        self._lanes += [torch.cuda.Stream() for _ in range(count - len(self._lanes))]
        main, used = torch.cuda.current_stream(), self._lanes[:count]
        for stream in used:
            stream.wait_stream(main)
        yield lambda number: torch.cuda.stream(used[number])
        for stream in used:
            main.wait_stream(stream)

    def room(self) -> bool:
        """Whether the device has as much free memory as eager steps took before the recording."""
        torch.cuda.empty_cache()  # what eager steps have left behind is free; what graphs use is not given back
        return torch.cuda.mem_get_info()[0] >= self._eager
