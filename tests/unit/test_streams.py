"""Keyed randomness against an independent SplitMix64 and against plain statistics."""

from __future__ import annotations

import torch

from mat_dist import rng

MASK = (1 << 64) - 1


def splitmix64(state: int, count: int) -> list[int]:
    """The sequential generator of Steele, Lea and Flood (2014), in Python integers."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def test_bits_are_the_published_splitmix64_sequence() -> None:
    # First outputs for seed 1234567, as in the Rosetta Code task of that generator.
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]
    ours = rng.bits(1234567, (40,)).tolist()
    assert [word & MASK for word in ours] == splitmix64(1234567, 40)


def test_a_replicas_rows_are_the_rows_of_the_whole_draw() -> None:
    key = rng.key(3, "noise", 5)
    for draw in (rng.uniform, rng.normal):
        whole = draw(key, (8, 3, 5, 5))
        assert torch.equal(draw(key, (3, 3, 5, 5), first_row=4), whole[4:7])


def test_keys_separate_seed_purpose_and_every_index() -> None:
    indices: list[tuple[int, ...]] = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (10,), (1, 0, 0)]
    keys = {rng.key(seed, purpose, *i) for seed in (0, 1) for purpose in ("a", "b") for i in indices}
    assert len(keys) == 2 * 2 * len(indices)
    assert all(-(1 << 63) <= k < 1 << 63 for k in keys)


def test_uniform_numbers_have_the_moments_of_the_uniform_law() -> None:
    for dtype in (torch.float32, torch.float64):
        u = rng.uniform(rng.key(0, "u"), (200_000,), dtype=dtype)
        assert u.dtype == dtype and u.min() >= 0 and u.max() < 1
        assert abs(u.double().mean() - 0.5) < 4 * (1 / 12 / 200_000) ** 0.5
        counts = torch.histc(u.float(), 20, 0, 1)
        assert ((counts - 10_000) ** 2 / 10_000).sum() < 50  # chi-squared, 19 degrees: P < 2e-4


def test_normal_numbers_have_the_moments_of_the_normal_law() -> None:
    z = rng.normal(rng.key(0, "z"), (200_000,)).double()
    assert abs(z.mean()) < 4 / 200_000**0.5
    assert abs(z.var() - 1) < 4 * (2 / 200_000) ** 0.5
    assert abs((z**4).mean() - 3) < 0.1
    assert torch.isfinite(z).all()


def test_a_permutation_holds_every_index_once_and_depends_on_the_key() -> None:
    first, second = (rng.permutation(rng.key(0, "order", epoch), 1000) for epoch in (0, 1))
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert (first == second).float().mean() < 0.02


def test_keyed_rng_seeds_inside_and_leaves_the_global_generator_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with rng.keyed_rng(7):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with rng.keyed_rng(7):
        assert torch.equal(torch.rand(3), inside)
