"""Stochastic weight averaging: the batch-norm statistics of the averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from mat_dist import rng
from mat_dist.config.schema import Config
from mat_dist.core.cohort import Cohort
from mat_dist.core.peer import Peer
from mat_dist.data import DataSets, training_batches
from mat_dist.models.classifier import DTYPES, Images, make_model

NORM_IMAGES = 10_000  # training images behind the statistics: a fifth of CIFAR; fewer where an epoch has fewer


def norm_renewal(config: Config, data: DataSets, images: Images) -> Callable[[Cohort, int], None]:
    """A function (cohort, done steps) that renews the batch-norm statistics of all local SWA weights.

    The averaged weights never saw the activations that the averaged statistics belong to (Izmailov et al., UAI 2018,
    section 3.2), so one pass over the first `NORM_IMAGES` training images in the order of the first epoch, augmented
    as there and clean (Chen et al., ICLR 2021, do so), sets them to the mean over its batches. Each rank passes whole
    batches through each of its peers alone: the result is a function of the weights and of the run's seed, whatever the
    placement.
    """

    def renew(cohort: Cohort, done: int) -> None:
        peers = [peer for peer in cohort.peers if peer.averaged_epochs(done)]
        if not peers:
            return
        batches = training_batches(config, data, cohort.mesh.device, DTYPES[config.step.precision])
        count = min(batches.steps_per_epoch, -(-NORM_IMAGES // config.train.batch_size))
        for peer in peers:
            _renew(peer, config, images, cohort.mesh.device, (batches.at(step)[0] for step in range(count)))

    return renew


def _renew(peer: Peer, config: Config, images: Images, device: torch.device, batches: Iterable[Tensor]) -> None:
    """The statistics of one peer's averaged weights over `batches` (B, C, H, W), one in memory at a time."""
    assert peer.ema is not None
    # A model of its own: the peer's may have norm layers that wait for its replicas.
    model = make_model(peer.spec, images, seed=config.run.seed, step=config.step, device=device)
    model.load_state_dict(peer.ema)
    with rng.keyed_rng(peer.stream("swa-norms")), peer.precision():  # dropout draws from the global generator
        update_bn(map(peer.arrange, batches), model)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in peer.ema:
                peer.ema[name].copy_(buffer)
