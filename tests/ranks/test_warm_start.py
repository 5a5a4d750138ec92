"""Attacks that start from the epoch before, against a loop with a plain dictionary of perturbations (fp64)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.config.schema import AugmentConfig, Config
from mat_dist.core.cohort import Cohort
from mat_dist.core.step import Batch, train_step
from mat_dist.data.batches import Batches
from mat_dist.data.images import ImageSet
from mat_dist.distributed.groups import Mesh
from tests.cohorts import (
    BATCH,
    CLASSES,
    SHAPE,
    build,
    complete,
    cut,
    hashes,
    largest_difference,
    nets,
    resumed_and_refused,
)
from tests.reference_mat import Reference, ce, project, start_noise, step_along

Run = Callable[..., list[Any]]
N, PER_EPOCH, STEPS, EPS = 19, 2, 7, 0.1  # three images of each epoch are left over
PAD = AugmentConfig(pad=2, flip=True)


def image_set() -> ImageSet:
    """Grey images, so that no value is cut at 0 or 1 but those of the padding."""
    noise = rng.uniform(rng.key(5, "carried-x"), (N, *SHAPE))
    labels = (rng.uniform(rng.key(5, "carried-y"), (N,)) * CLASSES).long()
    return ImageSet(((0.3 + 0.4 * noise) * 255).to(torch.uint8), labels.to(torch.uint8))


def configured(peers: int = 2, *, precision: str = "fp64", norm: str = "linf", reset: int = 0, pad: int = 2,
               accumulate: int = 1, **step: Any) -> Config:
    entry = {"threat": {"norm": norm, "eps": EPS}, "attack": {"steps": 2}, "loss": {"preset": "at"},
             "methods": {"warm_start": {"reset_epochs": reset}}, "optim": {"lr": 0.1, "schedule": "constant"}}
    return complete({"peers": [entry] * peers, "train": cut(accumulate),
                     "data": {"augment": {"pad": pad, "flip": pad > 0}}, "step": {"precision": precision, **step}})


def train(config: Config, mesh: Mesh, models: list[Any], steps: int = STEPS, cohort: Cohort | None = None,
          first: int = 0) -> Cohort:
    dtype = torch.float64 if config.step.precision == "fp64" else torch.float32
    cohort = cohort or build(config, mesh, models, steps_per_epoch=PER_EPOCH)
    batches = Batches(image_set(), seed=config.run.seed, batch_size=BATCH, augment=config.data.augment, dtype=dtype,
                      rows=cohort.rows)
    cohort.shown = batches.shown
    for step in range(first, steps):
        train_step(cohort, Batch(*batches.at(step), step, cohort.rows.start))
    return cohort


class Remembering:
    """The loop: PGD from the frame that was left behind, with crops and mirrors done by slices."""

    def __init__(self, config: Config, index: int, model: Any) -> None:
        spec = config.peers[index]
        self.net, self.index, self.threat = Reference(model), index, Threat(spec.threat.norm, spec.threat.eps)
        self.reset, self.pad = spec.methods["warm_start"].reset_epochs, config.data.augment.pad
        self.frames: dict[int, Tensor] = {}
        self.data = image_set()

    def views(self, step: int) -> list[tuple[int, int, int, bool]]:
        epoch, place = divmod(step, PER_EPOCH)
        order = rng.permutation(rng.key(0, "order", epoch), N)[place * BATCH:(place + 1) * BATCH]
        u = rng.uniform(rng.key(0, "augment-crop", step), (BATCH, 2), dtype=torch.float64)
        v = rng.uniform(rng.key(0, "augment-flip", step), (BATCH, 1), dtype=torch.float64)
        places = 2 * self.pad + 1
        return [(int(order[b]), int(u[b, 0] * places), int(u[b, 1] * places), bool(self.pad and v[b, 0] < 0.5))
                for b in range(BATCH)]

    def look(self, frame: Tensor, top: int, left: int, mirrored: bool) -> Tensor:
        seen = frame[:, top:top + SHAPE[1], left:left + SHAPE[2]]
        return seen.flip(-1) if mirrored else seen

    def step(self, step: int) -> None:
        if self.reset and step % (self.reset * PER_EPOCH) == 0:
            self.frames = {}
        views = self.views(step)
        images = [F.pad(self.data.images[n].double() / 255, (self.pad,) * 4) for n, *_ in views]
        x = torch.stack([self.look(one, *view[1:]) for one, view in zip(images, views, strict=True)])
        y = torch.tensor([int(self.data.labels[n]) for n, *_ in views])
        noise = start_noise(rng.key(0, "attack", step, self.index), "uniform", self.threat, x)
        start = [x[b] + (self.look(self.frames[n], *view) if n in self.frames else noise[b])
                 for b, (n, *view) in enumerate(views)]
        adv = project(torch.stack(start), x, self.threat)
        for _ in range(2):
            adv = adv.detach().requires_grad_()
            (g,) = torch.autograd.grad(ce(self.net.logits(adv, None), y), adv)
            adv = project(step_along(g, adv.detach(), x, self.threat, 2.5 * EPS / 2), x, self.threat)
        for b, (n, top, left, mirrored) in enumerate(views):
            frame = self.frames.get(n, torch.zeros_like(images[b])).clone()
            seen = (adv[b].detach() - x[b]).half().double()
            frame[:, top:top + SHAPE[1], left:left + SHAPE[2]] = seen.flip(-1) if mirrored else seen
            self.frames[n] = frame
        stats: list[Any] = []
        loss = ce(self.net.logits(adv.detach(), stats), y)
        self.net.descend(torch.autograd.grad(loss, self.net.w))
        self.net.settle([stats])


@pytest.mark.parametrize("norm,reset,pad", [("linf", 0, 2), ("linf", 2, 0), ("l2", 0, 2)])
def test_perturbations_are_carried_from_epoch_to_epoch_as_in_a_plain_loop(norm: str, reset: int, pad: int,
                                                                          run_ranks: Run) -> None:
    models, config = nets(2, dtype=torch.float64), configured(norm=norm, reset=reset, pad=pad)
    (cohort,) = run_ranks(lambda mesh: train(config, mesh, models), 2, 1)
    for index, peer in enumerate(cohort.peers):
        loop = Remembering(config, index, models[index])
        for step in range(STEPS):
            loop.step(step)
        assert loop.net.differences(peer.model.state_dict()) < 1e-9
        kept = peer.state()["methods"]["warm_start"]
        assert {n for n in range(N) if kept["known"][n]} == set(loop.frames)
        assert all(torch.allclose(kept["frames"][n].double(), frame, atol=1e-6) for n, frame in loop.frames.items())


def test_a_start_from_the_epoch_before_is_another_start(run_ranks: Run) -> None:
    models, config = nets(1), configured(1, precision="fp32")
    fresh = config.model_copy(update={"peers": tuple(p.model_copy(update={"methods": {}}) for p in config.peers)})
    one, other = (run_ranks(lambda mesh, c=c: train(c, mesh, models, 3), 1, 1) for c in (config, fresh))
    assert largest_difference(one, other) > 1e-4
    early = [run_ranks(lambda mesh, c=c: train(c, mesh, models, PER_EPOCH), 1, 1) for c in (config, fresh)]
    assert largest_difference(*early) == 0  # nothing is known in the first epoch


def test_placement_and_micro_batches_do_not_change_what_is_remembered(run_ranks: Run) -> None:
    models, config = nets(2), configured(precision="fp32")
    alone, spread = (hashes(run_ranks(lambda mesh: train(config, mesh, models), 2, world)) for world in (1, 2))
    assert alone == spread
    exact = nets(2, norm="group", dtype=torch.float64)
    plain = run_ranks(lambda mesh: train(configured(), mesh, exact), 2, 1)
    parts = run_ranks(lambda mesh: train(configured(accumulate=2), mesh, exact), 2, 1)
    assert largest_difference(plain, parts) < 1e-10
    replicas = run_ranks(lambda mesh: train(configured(), mesh, exact), 2, 4)
    assert largest_difference(plain, replicas) < 1e-9
    for cohort in replicas:
        mine, theirs = (c.peers[p].state()["methods"]["warm_start"]
                        for c, p in ((cohort, 0), (plain[0], cohort.peers[0].index)))
        assert torch.equal(mine["known"], theirs["known"])
        assert torch.allclose(mine["frames"], theirs["frames"], atol=1e-6)


def test_what_is_remembered_survives_a_checkpoint_and_not_a_refused_step(run_ranks: Run) -> None:
    models, config = nets(1), configured(1, precision="fp32")
    run_ranks(lambda mesh: resumed_and_refused(partial(train, config, mesh, models), STEPS, 3), 1, 1)
