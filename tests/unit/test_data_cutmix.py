"""CutMix against one image at a time, with windows and shares counted pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from mat_dist import rng
from mat_dist.attacks.apgd import apgd
from mat_dist.attacks.norms import Threat
from mat_dist.attacks.pgd import likeliest, pgd
from mat_dist.config.schema import AugmentConfig
from mat_dist.core.losses import accuracy, cross_entropy
from mat_dist.data.augment import cutmix
from mat_dist.data.batches import Batches
from mat_dist.data.images import ImageSet
from mat_dist.distributed.agreement import batch_checksum, weighted_checksum

CLASSES, AUGMENT = 5, AugmentConfig(pad=1, flip=True, cutmix=0.7)


def images(count: int = 40, height: int = 12, width: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, height, width, generator=draws), torch.randint(CLASSES, (count,), generator=draws)


def image_set(count: int = 61) -> ImageSet:
    draws = torch.Generator().manual_seed(1)
    return ImageSet(torch.randint(256, (count, 3, 6, 8), dtype=torch.uint8, generator=draws),
                    torch.randint(CLASSES, (count,), generator=draws))


def by_hand(x: torch.Tensor, y: torch.Tensor, probability: float, seed: int, step: int
            ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Images, labels and the pixels of each window, with plain numbers."""
    count, _, height, width = x.shape
    draws = rng.uniform(rng.key(seed, "augment-cutmix", step), (count, 4), dtype=torch.float64).tolist()
    order = rng.permutation(rng.key(seed, "augment-cutmix-order", step), count).tolist()
    mixed, labels, windows = x.clone(), torch.zeros(count, CLASSES), []
    for b, (u, kept, row, column) in enumerate(draws):
        tall, wide = int(height * math.sqrt(1 - kept)), int(width * math.sqrt(1 - kept))
        i, j = int(row * height), int(column * width)
        inside = [(p, q) for p in range(height) for q in range(width)
                  if i - tall // 2 <= p < i + tall // 2 and j - wide // 2 <= q < j + wide // 2 and u < probability]
        for p, q in inside:
            mixed[b, :, p, q] = x[order[b], :, p, q]
        labels[b, y[b]] += 1 - len(inside) / (height * width)
        labels[b, y[order[b]]] += len(inside) / (height * width)
        windows.append(len(inside))
    return mixed, labels, windows


@pytest.mark.parametrize("probability", [1.0, 0.5])
def test_windows_and_labels_are_those_computed_by_hand(probability: float) -> None:
    x, y = images()
    mixed, labels = cutmix(x, y, probability=probability, classes=CLASSES, seed=3, step=9)
    expected_x, expected_y, windows = by_hand(x, y, probability, 3, 9)
    assert torch.equal(mixed, expected_x)
    assert torch.allclose(labels, expected_y, atol=1e-6) and torch.allclose(labels.sum(1), torch.ones(40))
    share = sum(size > 0 for size in windows) / len(windows)
    assert share > 0.8 if probability == 1 else 0.25 < share < 0.65
    assert len(set(windows)) > 7 and max(windows) > 50 and labels.dtype == x.dtype


def test_draws_are_keyed_by_seed_and_step() -> None:
    x, y = images()
    def mixed(seed: int, step: int) -> torch.Tensor:
        return cutmix(x, y, probability=1.0, classes=CLASSES, seed=seed, step=step)[0]
    assert torch.equal(mixed(0, 0), mixed(0, 0))
    assert not torch.equal(mixed(0, 0), mixed(0, 1)) and not torch.equal(mixed(0, 0), mixed(1, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replicas_see_bitwise_the_rows_of_the_whole_mixed_batch(dtype: torch.dtype) -> None:
    """Windows come from images that other replicas hold."""
    def batches(rows: slice | None = None) -> Batches:
        return Batches(image_set(), seed=1, batch_size=12, augment=AUGMENT, dtype=dtype, rows=rows, classes=CLASSES,
                       generated=image_set(30), share=0.25)
    whole, shards = batches(), [batches(slice(first, first + 4)) for first in (0, 4, 8)]
    for step in (6, 0, 3):
        x, y = whole.at(step)
        parts = [shard.at(step) for shard in shards]
        assert torch.equal(x, torch.cat([part[0] for part in parts]))
        assert torch.equal(y, torch.cat([part[1] for part in parts]))
        assert x.dtype == y.dtype == dtype and y.shape == (12, CLASSES)
    assert (whole.at(0)[1].amax(1) < 1).any()


def test_other_augmentations_come_first_and_do_not_change() -> None:
    plain, mixed = (Batches(image_set(), seed=1, batch_size=12, augment=augment, classes=CLASSES)
                    for augment in (AugmentConfig(pad=1, flip=True), AUGMENT))
    x, y = plain.at(2)
    expected_x, expected_y, _ = by_hand(x, y, 0.7, 1, 2)
    assert torch.equal(mixed.at(2)[0], expected_x) and torch.allclose(mixed.at(2)[1], expected_y, atol=1e-6)


def test_mixed_labels_have_a_likeliest_class_and_a_cross_entropy() -> None:
    mixed, logits = torch.tensor([[0.0, 0.7, 0.3], [1.0, 0.0, 0.0]]), torch.tensor([[1.0, 3.0, 2.0], [0.0, 1.0, 0.0]])
    assert likeliest(mixed).tolist() == [1, 0] and likeliest(torch.tensor([2, 1])).tolist() == [2, 1]
    assert accuracy(logits, mixed) == 0.5
    first = math.log(math.exp(1) + math.exp(3) + math.exp(2)) - 0.7 * 3 - 0.3 * 2
    assert cross_entropy(logits, mixed) == pytest.approx((first + math.log(2 + math.exp(1))) / 2)


@pytest.mark.parametrize("method", ["pgd", "apgd"])
def test_an_attack_raises_the_mixed_cross_entropy(method: str) -> None:
    """And with labels of one class it is the attack on plain labels."""
    x, y = images(10)
    weights = torch.randn(x[0].numel(), CLASSES, generator=torch.Generator().manual_seed(2)) / 10
    def model(batch: torch.Tensor) -> torch.Tensor:
        return torch.tanh(batch.flatten(1) @ weights) * 3
    def attacked(labels: torch.Tensor) -> torch.Tensor:
        region = Threat("linf", 0.1).region(x)
        if method == "apgd":
            return apgd(model, x, labels, region=region, start_BCHW=x, loss="ce", steps=5).best_BCHW
        return pgd(model, x, labels, region=region, start_BCHW=x, loss="ce", steps=5, step_size=0.05)
    mixed = 0.6 * torch.eye(CLASSES)[y] + 0.4 * torch.eye(CLASSES)[y.flip(0)]
    assert torch.equal(attacked(torch.eye(CLASSES)[y]), attacked(y))
    found = attacked(mixed)
    assert not torch.equal(found, attacked(y))
    losses = [cross_entropy(model(one), mixed).item() for one in (x, attacked(y), found)]
    assert losses == sorted(losses)


def test_the_checksum_sees_a_label_that_is_mixed_otherwise() -> None:
    x, y = images(4)
    mixed = torch.eye(CLASSES)[y]
    assert batch_checksum(x, mixed) != batch_checksum(x, mixed.flip(0))
    assert batch_checksum(x, mixed) != batch_checksum(x, mixed * 0.9 + 0.02)


def test_the_checksum_of_a_gpu_is_a_sum_over_pixels_and_plain_or_mixed_labels() -> None:
    x, y = images(3, 4, 4)
    words = x.flatten().view(torch.int32).tolist()
    pixels = sum(word * (2 * n + 1) for n, word in enumerate(words))
    labels = sum((label + 1) * (2 * n + 1) for n, label in enumerate(y.tolist()))
    found = int(weighted_checksum(x, y)) % 2**64
    assert found == (pixels + labels * 0x9E3779B1) % 2**64
    mixed = torch.eye(CLASSES)[[0, 3, 1]]
    others = [mixed.flip(0), mixed * 0.9 + 0.02, mixed.roll(1, 1)]
    assert len({int(weighted_checksum(x, labels)) for labels in (mixed, *others)}) == 4
