"""Free adversarial training against the published algorithm, written here as a loop on plain tensors (fp64)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mat_dist.attacks.norms import Threat
from mat_dist.config.schema import Config
from mat_dist.distributed.groups import Mesh
from tests import cohorts
from tests.cohorts import (
    BATCH,
    batch,
    build,
    complete,
    first_view,
    hashes,
    largest_difference,
    nets,
    one_step,
    resumed_and_refused,
)
from tests.reference_mat import Reference, Stats, ce, kl, project, step_along

Run = Callable[..., list[Any]]
REPLAYS, STEPS, EPS = 3, 8, 0.1  # two whole batches and two replays of a third


def configured(preset: str = "at", peers: int = 2, *, norm: str = "linf", precision: str = "fp64",
               accumulate: int = 1, **step: Any) -> Config:
    entry = {"threat": {"norm": norm, "eps": EPS}, "attack": {"method": "free", "steps": 1},
             "loss": {"preset": preset}, "optim": {"lr": 0.1, "schedule": "constant"}}
    return complete({"peers": [entry] * peers, "step": {"precision": precision, **step},
                     "train": {"batch_size": BATCH, "epochs": 1000, "replays": REPLAYS,
                               "accumulate": accumulate}})


def replayed(step: int, *shape: Any) -> tuple[Tensor, Tensor]:
    """Each batch several times."""
    return batch(step // REPLAYS, *shape)


train = partial(cohorts.train, data=replayed)


def published(models: list[Any], preset: str, norm: str) -> list[Reference]:
    """Shafahi et al., NeurIPS 2019, algorithm 1: delta <- 0; for each batch m times: one backward pass of the loss at
    x + delta gives both gradients; then theta descends and delta ascends by eps, clipped to the ball (and to the
    pixels' range)."""
    threat, peers = Threat(norm, EPS), [Reference(model) for model in models]
    delta = [torch.zeros(batch(0)[0].shape, dtype=torch.float64) for _ in peers]
    for step in range(STEPS):
        x, y = batch(step // REPLAYS, dtype=torch.float64)
        aes = [project(x + one, x, threat).requires_grad_() for one in delta]
        fixed = [one.detach() for one in aes]
        passes: list[dict[int, tuple[Tensor, Stats]]] = []
        for k, peer in enumerate(peers):
            slots = {}
            for j in ([*(j for j in range(len(peers)) if j != k), k] if preset == "mat" else [k]):
                stats: Stats = []
                slots[j] = (peer.logits(aes[k] if j == k else fixed[j], stats), stats)
            passes.append(slots)
        gradients = []
        for k, peer in enumerate(peers):
            z = {j: logits for j, (logits, _) in passes[k].items()}
            loss = ce(z[k], y)
            if preset == "mat":  # two peers
                loss = 0.5 * loss + 0.5 / 2 * sum(kl(passes[1 - k][j][0].detach(), z[j]) for j in z)
            gradients.append(torch.autograd.grad(loss, [*peer.w, aes[k]]))
        for k, peer in enumerate(peers):
            *weights, image = gradients[k]
            peer.descend(tuple(weights))
            peer.settle([stats for _, stats in passes[k].values()])
            delta[k] = project(step_along(image, fixed[k], x, threat, EPS), x, threat).detach() - x
    return peers


@pytest.mark.parametrize("preset,norm,step", [
    ("at", "linf", {}), ("mat", "linf", {}), ("at", "l2", {}), ("mat", "linf", {"memory": "recompute"})], ids=str)
def test_free_training_equals_the_published_algorithm(preset: str, norm: str, step: dict[str, str],
                                                      run_ranks: Run) -> None:
    models = nets(2, dtype=torch.float64)
    config = configured(preset, norm=norm, **step)
    (cohort,) = run_ranks(lambda mesh: train(config, mesh, models, STEPS), 2, 1)
    for ours, theirs in zip(cohort.peers, published(models, preset, norm), strict=True):
        assert theirs.differences(ours.model.state_dict()) < 1e-9


def test_the_first_replay_of_all_is_of_the_clean_images_and_later_batches_begin_where_the_last_ended(
        run_ranks: Run) -> None:
    def one(mesh: Mesh) -> list[float]:
        cohort = build(configured(peers=1), mesh, nets(1, dtype=torch.float64))
        far = []
        for step in range(REPLAYS + 1):
            cohort.peers[0].hooks[0].begin(step, None)
            x, y = replayed(step, BATCH, torch.float64)
            far.append((first_view(cohort.peers[0], x, y, step) - x).abs().max().item())
            one_step(cohort, step, data=replayed)
        return far
    (far,) = run_ranks(one, 1, 1)
    assert far[0] == 0 and far[1:] == pytest.approx([EPS] * REPLAYS)


def test_placement_micro_batches_and_replicas_do_not_change_free_training(run_ranks: Run) -> None:
    models, config = nets(2), configured("mat", precision="fp32")
    alone = hashes(run_ranks(lambda mesh: train(config, mesh, models, STEPS), 2, 1))
    assert alone == hashes(run_ranks(lambda mesh: train(config, mesh, models, STEPS, log=True), 2, 2))
    exact = nets(2, norm="group", dtype=torch.float64)
    plain = run_ranks(lambda mesh: train(configured(), mesh, exact, STEPS), 2, 1)
    assert largest_difference(plain, run_ranks(
        lambda mesh: train(configured(accumulate=2), mesh, exact, STEPS), 2, 1)) < 1e-10
    replicas = run_ranks(lambda mesh: train(configured(), mesh, exact, STEPS), 2, 4)
    assert largest_difference(plain, replicas) < 1e-9
    kept = [c.peers[0].state()["methods"]["free_at"]["frames"] for c in (plain[0], *replicas) if c.peers[0].index == 0]
    assert len(kept) == 3 and all(torch.allclose(kept[0], other, atol=1e-9) for other in kept[1:])


def test_free_perturbations_survive_a_checkpoint_and_not_a_refused_step(run_ranks: Run) -> None:
    models, config = nets(1), configured(peers=1, precision="fp32")
    run_ranks(lambda mesh: resumed_and_refused(partial(train, config, mesh, models), STEPS, 4), 1, 1)
