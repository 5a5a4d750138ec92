"""Batch norm over the images of all replicas, so that replicas compute what one process with the whole batch computes.

torch.nn.SyncBatchNorm has no CPU kernel, waits for the GPU to look for empty shards, and puts process groups into the
model, which can then not be copied. Here the shards are equal, the model stays as it is, and every batch norm of a
forward is met, also in layers of a user's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Gather = Callable[[Tensor], Tensor]  # (1, ...) here -> (R, ...) of all replicas, in their order, the same on each


class SynchronisedNorms(TorchFunctionMode):
    """Scope of a forward in train mode, entered by all replicas alike, with equally many rows each.

    Args:
        gather: an exchange between the replicas: one for each batch norm forward, and one backward.
    """

    def __init__(self, gather: Gather) -> None:
        super().__init__()
        self._gather = gather

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = self._batch_norm if func is F.batch_norm else func
        return called(*args, **(kwargs or {}))

    def _batch_norm(self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
                    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
                    momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
        """Arguments of `torch.nn.functional.batch_norm`."""
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        wide = torch.promote_types(input.dtype, torch.float32)
        ones, zeros = (torch.full(input.shape[1:2], value, dtype=wide, device=input.device) for value in (1.0, 0.0))
        out, mean, var, count = _BatchNorm.apply(input, ones if weight is None else weight,
                                                 zeros if bias is None else bias, eps, self._gather)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
                running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))
        return out


class _BatchNorm(torch.autograd.Function):
    """Gradients of the sum of all replicas' losses; those of weight and bias are this replica's share of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float,
                gather: Gather) -> tuple[Tensor, Tensor, Tensor, int]:
        wide = torch.zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        # With buffers the CPU kernel sums half-precision images in their type, as the GPU's does anyway.
        each_R2C = gather(torch.stack(torch.batch_norm_update_stats(x, wide[0], wide[1], 0.0))[None])
        count = len(each_R2C) * x.numel() // x.shape[1]
        if count == 1:
            raise ValueError(f"batch norm in train mode needs more than one value per channel, got {tuple(x.shape)}")
        mean, var = each_R2C[:, 0].mean(0), each_R2C[:, 1].mean(0) + each_R2C[:, 0].var(0, unbiased=False)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.gather, ctx.count = eps, gather, count
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True])
        # Those are at fixed statistics. Every value also moves the statistics, by its share of 1 / count.
        scale = -weight * torch.rsqrt(var + ctx.eps) / ctx.count
        through_2C = ctx.gather(torch.stack([grad_weight, grad_bias])[None]).sum(0) * scale
        grad_x.add_(F.batch_norm(x, mean, var, through_2C[0], through_2C[1], False, 0.0, ctx.eps))
        return grad_x, grad_weight, grad_bias, None, None
