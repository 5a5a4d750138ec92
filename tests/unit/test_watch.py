"""Warnings of a run, against hand-made records."""

from __future__ import annotations

import pytest

from mat_dist.training.monitor import Watch, wait_shares


def test_the_slow_rank_is_named_once() -> None:
    watch = Watch(2)
    even = [{"attack": 1.0, "wait": 0.1}, {"attack": 0.9, "wait": 0.2}]
    slow = [{"attack": 1.0, "wait": 2.1}, {"attack": 3.0, "wait": 0.1}]
    assert watch.slow_rank(even) is None and watch.slow_rank([slow[1]]) is None
    line = watch.slow_rank(slow)
    assert line is not None and "rank 1 is slow" in line and "works 3 s" in line and "fastest 1 s" in line
    assert watch.slow_rank(slow) is None


def test_the_rank_that_is_waited_for_waits_least() -> None:
    phases = [{"attack": 1.0, "wait": 3.0}, {"attack": 4.0, "wait": 0.0}, {}]
    assert wait_shares(phases) == pytest.approx([0.75, 0.0, 0.0])


def test_a_jump_of_one_peers_loss_is_told_with_peer_and_step() -> None:
    watch = Watch(2)
    for step in range(5):
        assert watch.spikes(step, [1.0, 2.0]) == []
    assert watch.spikes(5, [1.0, 19.0]) == []
    (line,) = watch.spikes(6, [1.0, 200.0])
    assert "peer 1" in line and "step 6" in line and "100 times" in line
    assert watch.spikes(7, [1.0, 200.0]) == [] and watch.spikes(8, [1.0, 2.0]) == []
    assert len(watch.spikes(9, [1.0, 200.0])) == 1


def test_no_jump_is_told_before_there_is_a_usual_loss() -> None:
    assert Watch(1).spikes(1, [1.0]) == [] and Watch(1).spikes(2, [1e9]) == []


def test_catastrophic_overfitting_is_told_once_per_peer_that_trains() -> None:
    watch = Watch(3)
    record = {"loss": [1.0, 1.0, 1.0], "train_ae_acc": [0.8, 0.8, 0.9]}
    assert watch.overfitting([0.0, 0.0, 0.0]) == []  # before the first record nothing is known
    assert watch.lines(1, record, [{"wait": 0.0}]) == []
    (line,) = watch.overfitting([0.02, 0.5, None])
    assert "overfitting of peer 0: 80 % right on its own training AEs, 2.0 % under PGD" in line
    assert watch.overfitting([0.02, 0.5, None]) == []
    assert len(watch.overfitting([0.02, 0.02, None])) == 1
    assert watch.lines(2, {**record, "train_ae_acc": [0.3, 0.3, 0.3]}, [{"wait": 0.0}]) == []
    assert Watch(1).overfitting([0.0]) == []
