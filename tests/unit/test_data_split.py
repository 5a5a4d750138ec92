"""Validation splits and stratified subsets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mat_dist.data.load import allot, complement, default_val_size, split_train, stratified, subset_test
from mat_dist.errors import DataError


def shuffled_labels(sizes: list[int]) -> torch.Tensor:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(("train", "val"), [(50_000, 1000), (60_000, 1200), (1437, 287), (10_000, 500), (2500, 500),
                                            (2499, 499), (1_281_167, 25623), (10, 2)])
def test_default_validation_size_is_two_percent_or_500_and_at_most_a_fifth(train, val):
    assert default_val_size(train) == val


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(2, 40), min_size=2, max_size=8), share=st.floats(0.05, 0.95), seed=st.integers(0, 9))
def test_stratified_subset_keeps_class_shares_to_within_one_image(sizes, share, seed):
    labels = shuffled_labels(sizes)
    count = max(1, int(share * len(labels)))
    chosen = stratified(labels, count, seed)
    assert len(chosen) == count
    assert torch.equal(chosen, chosen.unique())  # sorted, no image twice
    for k, size in enumerate(sizes):
        assert abs(int((labels[chosen] == k).sum()) - count * size / len(labels)) < 1


def test_allotment_by_largest_remainder_matches_a_hand_computed_case():
    # 10 of (5, 3, 12): exact shares 2.5, 1.5, 6; the two halves tie and the first class wins.
    assert allot([5, 3, 12], [5, 3, 12], 10) == [3, 1, 6]
    assert allot([5, 3, 12], [1, 3, 12], 10) == [1, 2, 7]


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=2, max_size=6), seed=st.integers(0, 5))
def test_validation_and_training_images_are_disjoint_and_every_class_can_be_trained(sizes, seed):
    labels = shuffled_labels(sizes)
    size = max(1, min(default_val_size(len(labels)), len(labels) - len(sizes)))
    if size > len(labels) - len(sizes):
        return
    train, val = split_train(labels, seed=seed, val_size=size, train_size=None)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(len(labels)))
    assert set(labels[train].tolist()) == set(range(len(sizes)))


def test_split_is_a_function_of_the_seed():
    labels = shuffled_labels([300, 300])
    first, again, other = (split_train(labels, seed=seed, val_size=None, train_size=None)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_validation_images_do_not_depend_on_train_size():
    labels = shuffled_labels([300, 300])
    whole, few = (split_train(labels, seed=0, val_size=None, train_size=size) for size in (None, 50))
    assert torch.equal(whole[1], few[1])
    assert len(few[0]) == 50
    assert set(few[0].tolist()) <= set(whole[0].tolist())


def test_small_training_subset_keeps_a_rare_class():
    labels = shuffled_labels([500, 500, 3])
    train, _ = split_train(labels, seed=0, val_size=10, train_size=20)
    assert set(labels[train].tolist()) == {0, 1, 2}
    assert len(train) == 20


def test_test_subset_is_stratified_and_has_no_seed():
    labels = shuffled_labels([40, 60])
    chosen = subset_test(labels, 10)
    assert torch.bincount(labels[chosen]).tolist() == [4, 6]
    assert subset_test(labels, None) is None


@pytest.mark.parametrize(("sizes", "where"), [({"val_size": 99, "train_size": None}, "data.val_size"),
                                              ({"val_size": 10, "train_size": 91}, "data.train_size"),
                                              ({"val_size": 10, "train_size": 1}, "data.train_size")])
def test_sizes_that_do_not_fit_name_the_setting(sizes, where):
    with pytest.raises(DataError) as caught:
        split_train(shuffled_labels([50, 50]), seed=0, **sizes)
    assert caught.value.where == where


def test_test_size_beyond_the_test_images_is_refused():
    with pytest.raises(DataError, match="11 test images asked for, 10 are there"):
        subset_test(torch.arange(10) % 2, 11)


def test_complement_is_everything_else():
    assert complement(torch.tensor([0, 3]), 5).tolist() == [1, 2, 4]
