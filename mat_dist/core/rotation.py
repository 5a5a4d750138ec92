"""Whose AEs a peer learns from, where that changes with every step (`loss.attackers`): pure functions of the step."""

from __future__ import annotations

from collections.abc import Sequence


def attacker(index: int, heard: Sequence[int], turn: int) -> int:
    """`one`: the only peer that attacks at a turn; each in its turn, in peer order.

    Where all listen to all, everyone names the same one. With trained, frozen peers it resembles ensemble adversarial
    training (Tramer et al., ICLR 2018), which draws the model that attacks in each batch.

    Args:
        index: the peer that learns.
        heard: the others that it learns from.
        turn: number of the step.
    """
    taking = sorted({index, *heard})
    return taking[turn % len(taking)]


def partner(index: int, heard: Sequence[int], turn: int) -> int:
    """`partner`: the other peer whose AEs are learnt at a turn: the next ones in a ring, so that where all listen to
    all each peer is the partner of exactly one."""
    ring = [i for i in heard if i > index] + [i for i in heard if i < index]
    return ring[turn % len(ring)]


def period(mode: str, heard: Sequence[int]) -> int:
    """After how many steps a peer's sources are the same again."""
    return {"all": 1, "partner": max(1, len(heard)), "one": 1 + len(heard)}[mode]
