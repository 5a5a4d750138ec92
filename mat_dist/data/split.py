"""Stratified subsets and the validation split, as functions of (labels, key)."""

from __future__ import annotations

import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.errors import DataError

VAL_SHARE = 0.02  # of the training images,
VAL_LEAST = 500  # but this many (RobustBench-size sets keep 49 000 or 59 000 of their training images),
VAL_MOST = 0.2  # and never more than this share


def allot(sizes: list[int], caps: list[int], count: int) -> list[int]:
    """Split `count` over classes of the given sizes by largest remainder, at most `caps` each; ties to the first class.

    The parts differ from count * size / sum(sizes) by less than one where no cap binds.
    """
    total = sum(sizes)
    parts = [min(count * size // total, cap) for size, cap in zip(sizes, caps, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda k: (-(count * sizes[k] % total), k))
    while (missing := count - sum(parts)) > 0:
        open_classes = [k for k in by_remainder if parts[k] < caps[k]]
        for k in open_classes[:missing]:
            parts[k] += 1
    return parts


def stratified(labels: Tensor, count: int, stream: int, *, leave_one: bool = False, one_each: bool = False) -> Tensor:
    """Indices (sorted, int64) of `count` images with the class shares of `labels`.

    Args:
        labels: int64 (N,).
        count: size of the subset, at most N (N minus the number of classes with `leave_one`).
        stream: key of the draw.
        leave_one: take all but one image of a class at most.
        one_each: take at least one image of each class; `count` is at least the number of classes.
    """
    labels = labels.cpu()
    classes, sizes = labels.unique(return_counts=True)
    caps = [size - int(leave_one) for size in sizes.tolist()]
    if count > sum(caps):
        raise ValueError(f"cannot take {count} of {len(labels)} images")
    order = rng.permutation(stream, len(labels))
    shuffled = labels[order]
    parts = allot(sizes.tolist(), caps, count)
    while one_each and 0 in parts:
        parts[parts.index(max(parts))] -= 1
        parts[parts.index(0)] = 1
    chosen = [order[shuffled == label][:part] for label, part in zip(classes.tolist(), parts, strict=True)]
    return torch.cat(chosen).sort().values


def complement(chosen: Tensor, count: int) -> Tensor:
    """The indices 0..count-1 that are not in `chosen`, sorted."""
    keep = torch.ones(count, dtype=torch.bool)
    keep[chosen] = False
    return keep.nonzero().flatten()


def default_val_size(train: int) -> int:
    """max(2 % of train, 500 images), at most 20 % of train."""
    return min(max(int(train * VAL_SHARE), VAL_LEAST), int(train * VAL_MOST))


def split_train(labels: Tensor, *, seed: int, val_size: int | None, train_size: int | None) -> tuple[Tensor, Tensor]:
    """Indices (train, val) of the training images with these labels.

    The validation images are taken first, so they do not depend on `train_size`.

    Raises:
        DataError: val_size or train_size does not fit.
    """
    total, classes = len(labels), len(labels.unique())
    size = default_val_size(total) if val_size is None else val_size
    if not 1 <= size <= total - classes:
        raise DataError(f"cannot hold {size} validation images out of {total} training images of {classes} classes",
                        "data.val_size", f"choose 1 to {total - classes}, each class keeps a training image")
    val = stratified(labels, size, rng.key(seed, "val-split"), leave_one=True)
    train = complement(val, total)
    if train_size is None:
        return train, val
    if not classes <= train_size <= len(train):
        raise DataError(f"{train_size} training images asked for, {len(train)} of {classes} classes are there "
                        f"({size} more are held out for validation)", "data.train_size",
                        f"choose {classes} to {len(train)}")
    subset = stratified(labels[train], train_size, rng.key(seed, "train-subset"), one_each=True)
    return train[subset], val


def subset_test(labels: Tensor, test_size: int | None) -> Tensor | None:
    """Indices of the test subset, the same for every seed so that results of several seeds compare; None: all."""
    if test_size is None:
        return None
    if test_size > len(labels):
        raise DataError(f"{test_size} test images asked for, {len(labels)} are there", "data.test_size",
                        f"choose 1 to {len(labels)}")
    return stratified(labels, test_size, rng.key(0, "test-subset"))
