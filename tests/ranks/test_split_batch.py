"""A batch of AEs that all peers make together, against a plain loop; its cost against the passes counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.config import load_config
from mat_dist.config.schema import Config
from mat_dist.core.graph import CohortPlan
from mat_dist.core.step import train_step
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import EnvironmentFault
from mat_dist.tools.dryrun import step_passes, training_passes
from tests.cohorts import BATCH, batch, build, cohort_config, nets, train
from tests.ranks.test_step import hashes, largest_difference
from tests.reference_mat import Reference, Stats, ce, kl, start_noise

Run = Callable[..., list[Any]]
STEPS, ATTACK_STEPS, LINF = 3, 2, Threat("linf", 0.1)


def configured(preset: str, peers: int, *, precision: str = "fp64", loss: str | None = None, **step: Any) -> Config:
    attack = {"steps": ATTACK_STEPS, "split_batch": True, "loss": loss}
    return cohort_config(preset, peers, entry={"attack": attack}, step={"precision": precision, **step})


def made_together(peers: list[Reference], preset: str, step: int, labels: Tensor | None = None
                  ) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images, labels, and the AEs: row r is made by peer (r + step) mod P, with the noise of its row r // P."""
    x, y = batch(step, dtype=torch.float64)
    y = y if labels is None else labels
    mixed = torch.full_like(x, torch.nan)
    trades = preset == "trades"
    for j, peer in enumerate(peers):
        rows = [r for r in range(BATCH) if (r + step) % len(peers) == j]
        noise = start_noise(rng.key(0, "attack", step, j), "gaussian" if trades else "uniform", LINF, x[rows])
        mixed[rows] = peer.attack(x[rows], y[rows], noise, LINF, steps=ATTACK_STEPS,
                                  loss="kl_clean" if trades else "ce")
    return x, y, mixed


def reference_step(peers: list[Reference], preset: str, step: int) -> None:
    x, y, mixed = made_together(peers, preset, step)
    passes: list[list[tuple[Tensor, Stats]]] = []
    for peer in peers:
        seen: list[tuple[Tensor, Stats]] = []
        for images in ((x, mixed) if preset == "trades" else (mixed,)):
            stats: Stats = []
            seen.append((peer.logits(images, stats), stats))
        passes.append(seen)
    gradients = []
    for k, peer in enumerate(peers):
        z, others = passes[k][-1][0], [passes[i][-1][0].detach() for i in range(len(peers)) if i != k]
        loss = ce(z, y)
        if preset in ("mat_kd", "dml_at"):
            loss = 0.5 * loss + 0.5 * sum(kl(t, z) for t in others) / len(others)
        if preset == "trades":
            loss = ce(passes[k][0][0], y) + 6 * kl(passes[k][0][0], z)
        gradients.append(torch.autograd.grad(loss, peer.w))
    for peer, gradient, seen in zip(peers, gradients, passes, strict=True):
        peer.descend(gradient)
        peer.settle([stats for _, stats in seen])


@pytest.mark.parametrize("preset,peers", [
    ("at", 4), ("mat_kd", 2), pytest.param("dml_at", 4, marks=pytest.mark.thorough), ("trades", 2)])
def test_all_peers_learn_the_batch_that_each_has_made_a_part_of(preset: str, peers: int, run_ranks: Run) -> None:
    models = nets(peers, dtype=torch.float64)
    (cohort,) = run_ranks(lambda mesh: train(configured(preset, peers), mesh, models, STEPS, dtype=torch.float64),
                          peers, 1)
    references = [Reference(model) for model in models]
    for step in range(STEPS):
        reference_step(references, preset, step)
    for ours, theirs in zip(cohort.peers, references, strict=True):
        assert theirs.differences(ours.model.state_dict()) < 1e-9


def learned_images(mesh: Mesh, config: Config, models: list[Any], step: int) -> dict[int, Tensor]:
    """The images that each local peer learns in a step."""
    cohort, seen = build(config, mesh, models), {}
    for peer in cohort.peers:
        def noting(x: Tensor, draw: Any, index: int = peer.index, learn: Any = peer.learn) -> Tensor:
            seen[index] = x.detach().clone()
            return learn(x, draw)
        peer.learn = noting  # type: ignore[method-assign]
    x, y = batch(step, dtype=torch.float64)
    train_step(cohort, x[cohort.rows], y[cohort.rows], step)
    return seen


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.thorough), 4])
def test_each_image_is_the_one_of_its_maker_on_any_placement(world: int, run_ranks: Run) -> None:
    models = nets(4, dtype=torch.float64)
    for step in (0, 3):
        _, _, mixed = made_together([Reference(model) for model in models], "at", step)
        found = {k: x for rank in run_ranks(lambda mesh, s=step: learned_images(mesh, configured("at", 4), models, s),
                                            4, world) for k, x in rank.items()}
        assert sorted(found) == [0, 1, 2, 3]
        assert all(torch.allclose(x, mixed, atol=1e-12) for x in found.values())
        assert all(torch.equal(x, found[0]) for x in found.values())


@pytest.mark.parametrize("wire", ["full", pytest.param("int8", marks=pytest.mark.thorough)])
def test_placement_does_not_change_a_bit(wire: str, run_ranks: Run) -> None:
    models, config = nets(4), configured("mat_kd", 4, precision="fp32", wire=wire)
    alone, spread = (run_ranks(lambda mesh, log=log: train(config, mesh, models, STEPS, log=log), 4, world)
                     for world, log in ((1, False), (4, True)))
    assert hashes(alone) == hashes(spread)


def test_micro_batches_replicas_and_recomputing_give_the_same_weights(run_ranks: Run) -> None:
    models = nets(2, norm="group", dtype=torch.float64)
    def trained(world: int, **step: Any) -> list[Any]:
        config = configured("mat_kd", 2, **step)
        return run_ranks(lambda mesh: train(config, mesh, models, STEPS, dtype=torch.float64), 2, world)
    plain = trained(1)
    assert largest_difference(plain, trained(1, microbatches=2)) < 1e-10
    assert largest_difference(plain, trained(1, memory="recompute")) < 1e-10
    assert largest_difference(plain, trained(4)) < 1e-9
    config = configured("mat_kd", 2, microbatches=4)
    errors = run_ranks(lambda mesh: build(config, mesh, models), 2, 4, errors="return")
    assert all(isinstance(e, EnvironmentFault) and "2 peers cannot split 1 images" in str(e) for e in errors)


def test_the_transfer_table_has_the_accuracy_on_the_rows_of_each_maker(run_ranks: Run) -> None:
    models, config = nets(2, dtype=torch.float64), configured("at", 2)
    y = Reference(models[0]).logits(batch(1, dtype=torch.float64)[0], []).argmax(1)  # so that some are right
    references = [Reference(model) for model in models]
    x, _, mixed = made_together(references, "at", 1, y)

    def one(mesh: Mesh) -> Tensor:
        table = train_step(build(config, mesh, models), x, y, 1, log=True).transfer_PS
        assert table is not None
        return table
    (table,) = run_ranks(one, 2, 1)
    for k, peer in enumerate(references):
        right, clean = ((peer.logits(images, []).argmax(1) == y).double() for images in (mixed, x))
        rows = [[r for r in range(BATCH) if (r + 1) % 2 == j] for j in range(2)]
        assert table[k].tolist() == pytest.approx([*(right[r].mean().item() for r in rows), clean.mean().item()])
    assert len(set(table.flatten().tolist())) > 2


@pytest.mark.parametrize("preset,loss", [("at", None), ("mat_kd", "kl_teacher"), ("trades", None)])
def test_the_counters_tell_the_passes_of_a_real_step(preset: str, loss: str | None, run_ranks: Run) -> None:
    config = configured(preset, 2, loss=loss, attack_copy=False)
    def one(mesh: Mesh) -> list[list[float]]:
        cohort = build(config, mesh, nets(2, dtype=torch.float64))
        counts = {peer.index: [0.0, 0.0] for peer in cohort.peers}
        for peer in cohort.peers:
            def count(_: Any, inputs: tuple[Tensor], __: Any, index: int = peer.index) -> None:
                counts[index][0] += len(inputs[0]) / BATCH
                counts[index][1] += len(inputs[0]) / BATCH * torch.is_grad_enabled()
            peer.model.register_forward_hook(count)
        train_step(cohort, *batch(0, dtype=torch.float64), 0)
        return list(counts.values())
    (counted,) = run_ranks(one, 2, 1)
    told = step_passes(config, CohortPlan.of(config.peers))
    assert counted == [[row.forward, row.backward] for row in told]
    assert sum(row.attack for row in told) == ATTACK_STEPS  # as many for the cohort as for one peer alone


def test_passes_of_a_training_with_split_batches_by_hand() -> None:
    """5 steps of 7 attack steps for half of the batch and one learning pass, of 2 peers."""
    settings = ["peers=2", "loss=at", "train.epochs=1", "train.batch_size=256", "data.val_size=100",
                "attack.split_batch=true"]
    assert training_passes(load_config("digits", settings)) == (5, 5 * (7 + 2), 5 * (7 + 2))


def test_where_no_loss_uses_aes_the_clean_images_stand_in_for_them(run_ranks: Run) -> None:
    """Nobody attacks then; each maker's part of the clean batch goes where its AEs would."""
    def one(mesh: Mesh) -> list[bool]:
        config = cohort_config("at", 2, loss={"hard_weight": 0, "clean_weight": 1}, step={"precision": "fp64"},
                               entry={"attack": {"steps": ATTACK_STEPS, "split_batch": True}})
        cohort = build(config, mesh, [net.double() for net in nets(2)])
        x, y = batch(0, dtype=torch.float64)
        train_step(cohort, x, y, 0)
        return [all(p.isfinite().all() for p in peer.model.parameters()) for peer in cohort.peers]

    assert run_ranks(one, 2, 1) == [[True, True]]
