"""An attack as one CUDA graph: its few thousand small kernels are launched at once instead of one by one.

What a graph reads must stay where it is, so inputs are copied into fixed tensors; weights are read where the model
keeps them, and may change between calls. Random numbers are drawn before: a captured draw would repeat itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (clean images, labels, start) -> adversarial images, and what else the attack tells
Attack = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
Captured = tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]  # graph, inputs, results
WARM_UP = 3  # calls before the capture: cuDNN tries its kernels and autograd starts its threads


class GraphedAttack:
    """`attack` captured for each shape that it meets.

    Args:
        attack: deterministic, without a synchronisation with the host; always with the same model.

    Raises RuntimeError in a call where the capture fails; the attack itself can still be called then.
    """

    def __init__(self, attack: Attack) -> None:
        self._attack = attack
        self._graphs: dict[torch.Size, Captured] = {}

    def __call__(self, x_BCHW: Tensor, y_B: Tensor, start_BCHW: Tensor) -> tuple[Tensor, ...]:
        if x_BCHW.shape not in self._graphs:
            self._graphs[x_BCHW.shape] = self._capture(x_BCHW, y_B, start_BCHW)
        graph, inputs, result = self._graphs[x_BCHW.shape]
        for fixed, given in zip(inputs, (x_BCHW, y_B, start_BCHW), strict=True):
            fixed.copy_(given)
        graph.replay()
        return tuple(part.clone() for part in result)

    def _capture(self, *given: Tensor) -> Captured:
        x_BCHW, y_B, start_BCHW = (tensor.detach().clone() for tensor in given)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._attack(x_BCHW, y_B, start_BCHW)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog thread asks its events meanwhile, which a global capture would forbid.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self._attack(x_BCHW, y_B, start_BCHW)
        return graph, (x_BCHW, y_B, start_BCHW), result
