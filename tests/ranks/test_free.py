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
from mat_dist.core.cohort import Cohort
from mat_dist.core.step import train_step
from mat_dist.distributed.groups import Mesh
from tests.cohorts import BATCH, batch, build, complete, nets, resumed_and_refused
from tests.ranks.test_step import hashes, largest_difference
from tests.reference_mat import Reference, Stats, ce, kl, project, step_along

Run = Callable[..., list[Any]]
REPLAYS, STEPS, EPS = 3, 8, 0.1  # two whole batches and two replays of a third


def configured(preset: str = "at", peers: int = 2, *, norm: str = "linf", precision: str = "fp64",
               **step: Any) -> Config:
    entry = {"threat": {"norm": norm, "eps": EPS}, "attack": {"method": "free", "steps": 1},
             "loss": {"preset": preset}, "optim": {"lr": 0.1, "schedule": "constant"}}
    return complete({"peers": [entry] * peers, "step": {"precision": precision, **step},
                     "train": {"batch_size": BATCH, "epochs": 1000, "replays": REPLAYS}})


def train(config: Config, mesh: Mesh, models: list[Any], steps: int = STEPS, cohort: Cohort | None = None,
          first: int = 0, log: bool = False) -> Cohort:
    cohort = cohort or build(config, mesh, models)
    dtype = torch.float64 if config.step.precision == "fp64" else torch.float32
    for step in range(first, steps):
        cohort.begin(step)
        x, y = batch(step // config.train.replays, dtype=dtype)
        train_step(cohort, x[cohort.rows], y[cohort.rows], step, log=log)
    return cohort


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
    (cohort,) = run_ranks(lambda mesh: train(config, mesh, models), 2, 1)
    for ours, theirs in zip(cohort.peers, published(models, preset, norm), strict=True):
        assert theirs.differences(ours.model.state_dict()) < 1e-9


def test_the_first_replay_of_all_is_of_the_clean_images_and_later_batches_begin_where_the_last_ended(
        run_ranks: Run) -> None:
    def one(mesh: Mesh) -> list[float]:
        cohort = build(configured(peers=1), mesh, nets(1, dtype=torch.float64))
        far = []
        for step in range(REPLAYS + 1):
            cohort.begin(step)
            x, y = batch(step // REPLAYS, dtype=torch.float64)
            far.append((cohort.peers[0].attack(x, y, step) - x).abs().max().item())
            train_step(cohort, x, y, step)
        return far
    (far,) = run_ranks(one, 1, 1)
    assert far[0] == 0 and far[1:] == pytest.approx([EPS] * REPLAYS)


def test_placement_micro_batches_and_replicas_do_not_change_free_training(run_ranks: Run) -> None:
    models, config = nets(2), configured("mat", precision="fp32")
    alone = hashes(run_ranks(lambda mesh: train(config, mesh, models), 2, 1))
    assert alone == hashes(run_ranks(lambda mesh: train(config, mesh, models, log=True), 2, 2))
    exact = nets(2, norm="group", dtype=torch.float64)
    plain = run_ranks(lambda mesh: train(configured(), mesh, exact), 2, 1)
    assert largest_difference(plain, run_ranks(
        lambda mesh: train(configured(microbatches=2), mesh, exact), 2, 1)) < 1e-10
    replicas = run_ranks(lambda mesh: train(configured(), mesh, exact), 2, 4)
    assert largest_difference(plain, replicas) < 1e-9
    kept = [c.peers[0].crafter.state()["carried"]["frames"] for c in (plain[0], *replicas) if c.peers[0].index == 0]
    assert len(kept) == 3 and all(torch.allclose(kept[0], other, atol=1e-9) for other in kept[1:])


def test_free_perturbations_survive_a_checkpoint_and_not_a_refused_step(run_ranks: Run) -> None:
    models, config = nets(1), configured(peers=1, precision="fp32")
    def one(mesh: Mesh) -> tuple[str, str]:
        return resumed_and_refused(partial(train, config, mesh, models), STEPS, 4)
    ((whole, resumed),) = run_ranks(one, 1, 1)
    assert whole == resumed


def test_lack_of_memory_in_the_backward_pass_does_not_change_the_image_gradient(run_ranks: Run) -> None:
    models, config = nets(1, dtype=torch.float64), configured(peers=1)
    def one(mesh: Mesh, short: bool) -> Cohort:
        cohort, calls = build(config, mesh, models), []
        peer = cohort.peers[0]
        def learn(x: Tensor, draw: Any, plain: Any = peer.learn) -> Tensor:
            logits = plain(x, draw)
            def lacking(gradient: Tensor) -> None:
                if short and not calls:
                    x.grad = torch.ones_like(x)  # as a backward pass that got so far would leave it
                    calls.append(1)
                    raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
            logits.register_hook(lacking)
            return logits
        peer.learn = learn  # type: ignore[method-assign]
        train(config, mesh, models, cohort=cohort)
        assert bool(calls) == short
        return cohort
    plain, lacking = (run_ranks(lambda mesh, s=short: one(mesh, s), 1, 1) for short in (False, True))
    assert largest_difference(plain, lacking) < 1e-11
