"""Peers that are pulled towards their mean weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from mat_dist.distributed.groups import Mesh
from mat_dist.models.modes import bn_buffers


@torch.no_grad()
def pull_together(models: Sequence[nn.Module], mesh: Mesh, share: float, left_out: Collection[int] = ()) -> None:
    """w_k <- w_k + share (mean_i w_i - w_k), for the weights and batch-norm statistics of the local peers, in place.

    Elastic averaging (Zhang, Choromanska, LeCun, NeurIPS 2015) whose centre is the mean itself; with a share of 1 all
    go on from the mean (local SGD). One gather per tensor, summed in peer order: the same bits on every placement, and
    no more memory than P copies of the largest tensor.

    Args:
        models: of the local peers, in peer order; one architecture in the whole cohort.
        share: in (0, 1].
        left_out: peers that neither count nor move. A tensor that is not finite does not count either, so that a broken
            peer, which the next step names, breaks no other.
    """
    taking = [i for i in range(mesh.placement.peers) if i not in left_out]
    moved = [i in taking for i in mesh.placement.local_peers]
    for tensors_L in zip(*map(_floating, models), strict=True):
        everyones = mesh.gather_peers(torch.stack(tensors_L))[taking].reshape(len(taking), tensors_L[0].numel())
        sound = everyones.isfinite().all(1, keepdim=True)
        mean = torch.where(sound, everyones, 0).sum(0) / sound.sum()
        for tensor, moves in zip(tensors_L, moved, strict=True):
            if moves:
                tensor.lerp_(mean.view(tensor.shape), share)


def _floating(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *(b for b in bn_buffers(model) if b.is_floating_point())]
