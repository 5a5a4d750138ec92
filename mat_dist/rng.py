"""Keyed randomness: every draw is a function of (seed, purpose, indices), never of a rank or of the past.

Tensor draws come from the SplitMix64 sequence (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), evaluated at a counter: element n of a stream is mix(key + (n + 1) * gamma).
Integer tensor operations give the same bits on every device, any slice can be computed alone, and nothing
has state, so the draws are safe inside CUDA graphs. Code that knows only global generators, such as models,
runs inside `keyed_rng`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >= 1 << 63 else word


class KeyTable:
    """The keys of a captured step, on the device: each is filled in anew before the step is launched again.

    Args:
        device: where the numbers are drawn.
    """

    SIZE = 1024

    def __init__(self, device: torch.device) -> None:
        self._make: list[Callable[[int], int]] = []
        self._host = torch.zeros(self.SIZE, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = self._host.to(device, copy=True)

    def slot(self, make: Callable[[int], int]) -> Slot:
        """A key by what it is at a step. Raises RuntimeError where the table is full."""
        if len(self._make) == self.SIZE:
            raise RuntimeError(f"a step with more than {self.SIZE} keys")
        self._make.append(make)
        return Slot(self, make, self._device[len(self._make) - 1])

    def fill(self, step: int) -> None:
        """Let all keys be those of a step."""
        self._host[:len(self._make)] = torch.tensor([make(step) for make in self._make], dtype=torch.int64)
        self._device.copy_(self._host, non_blocking=True)


class Slot(NamedTuple):
    """A key of a captured step: takes the place of the number in `key`, `bits`, `uniform` and `normal`."""

    table: KeyTable
    make: Callable[[int], int]
    value: Tensor

    def changed(self, change: Callable[[int], int]) -> Slot:
        """A key that follows from this one."""
        return self.table.slot(lambda step: change(self.make(step)))


Key = int | Slot


@overload
def key(seed: int, purpose: str, *indices: int) -> int: ...


@overload
def key(seed: Slot, purpose: str, *indices: int) -> Slot: ...


def key(seed: Key, purpose: str, *indices: int) -> Key:
    """The 64-bit key (as a signed integer) of the stream for `purpose` and `indices` (step, peer, ...)."""
    if isinstance(seed, Slot):
        return seed.changed(lambda value: key(value, purpose, *indices))
    text = f"{seed}/{purpose}/" + "/".join(str(int(i)) for i in indices)
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def _other(word: int) -> int:
    """The key of the second of a pair of streams."""
    return _signed(word ^ _GAMMA)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def bits(stream: Key, shape: Sequence[int], *, first_row: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Random int64 words of `shape`; rows [first_row, first_row + shape[0]) of the whole stream.

    A replica that holds rows 64..127 of a batch asks for them with first_row=64 and gets the bits that a
    process with the whole batch would see in those rows.
    """
    count = 1
    for size in shape:
        count *= int(size)
    row = count // int(shape[0]) if len(shape) and shape[0] else 1
    first = first_row * row + 1
    x = torch.arange(first, first + count, dtype=torch.int64, device=device)
    x.mul_(_signed(_GAMMA)).add_(stream.value if isinstance(stream, Slot) else stream)
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(_MIX_1))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(_MIX_2))
    x.bitwise_xor_(_shift_right(x, 31))
    return x.reshape(tuple(shape))


def uniform(stream: Key, shape: Sequence[int], *, first_row: int = 0, device: torch.device | str = "cpu",
            dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1): 24 random bits for float32, 53 for float64."""
    digits = 53 if dtype == torch.float64 else 24
    words = _shift_right(bits(stream, shape, first_row=first_row, device=device), 64 - digits)
    return words.to(dtype).mul_(2.0**-digits)


def normal(stream: Key, shape: Sequence[int], *, first_row: int = 0, device: torch.device | str = "cpu",
           dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers by the Box-Muller transform of two uniform streams."""
    radius = 1 - uniform(stream, shape, first_row=first_row, device=device, dtype=torch.float64)  # in (0, 1]
    other = stream.changed(_other) if isinstance(stream, Slot) else _other(stream)
    angle = uniform(other, shape, first_row=first_row, device=device, dtype=torch.float64)
    return (radius.log_().mul_(-2).sqrt_() * angle.mul_(2 * torch.pi).cos_()).to(dtype)


def permutation(stream: int, count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """A random order of 0..count-1 (int64)."""
    return bits(stream, (count,), device=device).argsort(stable=True)


@contextmanager
def keyed_rng(stream: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU and CUDA), numpy and Python with `stream` inside, restore them after.

    For code that only knows global generators: weight initialisation, and all that a model draws in its forward. It
    takes 0.1 ms, a third of torch's fork_rng, so that nobody has to know whether a model draws.
    """
    generators = [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]
    with _seeded(generators, stream):
        yield


@contextmanager
def undrawn(stream: int) -> Iterator[None]:
    """In place of `keyed_rng` while a GPU's operations are captured, which forbids to seed its generators.

    Raises RuntimeError where something was drawn from a global generator of the host, since a captured step would
    repeat it. What is drawn on the GPU shows in its generator's offset when the graph runs.
    """
    with _seeded([torch.default_generator], stream):
        before = _host_states()
        yield
        if _host_states() != before:
            raise RuntimeError("the model draws random numbers")


def _host_states() -> tuple[Any, ...]:
    numpys: Any = np.random.get_state()
    return torch.default_generator.get_state().numpy().tobytes(), numpys[1].tobytes(), numpys[2:], random.getstate()


@contextmanager
def _seeded(generators: Sequence[torch.Generator], stream: int) -> Iterator[None]:
    states, numpys, pythons = [one.get_state() for one in generators], np.random.get_state(), random.getstate()
    seed = stream & ((1 << 63) - 1)
    try:
        for one in generators:
            one.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)
        yield
    finally:
        for one, state in zip(generators, states, strict=True):
            one.set_state(state)
        np.random.set_state(numpys)
        random.setstate(pythons)
