"""50 random interrupts, wherever they fall: the resumed run ends bit-equal, with the same records. The first and the
last call of each place and ten more are part of every test run; the others are thorough ones (launch/test.sh --all)."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from mat_dist import checkpoints
from mat_dist.core.peer import Peer
from mat_dist.data import Batches
from mat_dist.evaluation import chunks
from tests.small_runs import Finished, run_small

# 12 steps in 3 epochs, an evaluation after each: some 40 places where a signal can come.
RUN = ("train.epochs=3", "eval.every=1", "eval.size=40", "log.every=1", "optim.ema_decay=0.9")
PLACES: dict[str, tuple[Any, str]] = {
    "batch": (Batches, "at"), "attack": (Peer, "attack"), "forward": (Peer, "learn"),
    "update": (Peer, "update"), "evaluation": (chunks, "attack_chunk"), "save": (checkpoints, "write_peer"),
    "commit": (checkpoints, "commit")}
CALLS = {"batch": 12, "attack": 24, "forward": 48, "update": 24, "evaluation": 12, "save": 6, "commit": 3}


def draws() -> list[tuple[str, int]]:
    """50 places and calls; the first and the last call of each place are among them."""
    draw = random.Random(11)
    chosen = [(place, call) for place, count in CALLS.items() for call in (1, count)]
    while len(chosen) < 50:
        place = draw.choice(sorted(CALLS))
        chosen.append((place, draw.randint(1, CALLS[place])))
    return chosen


def facts(run: Finished) -> tuple[list[str], list[Any]]:
    """Hashes of all peers, and the losses and accuracies of all steps and epochs, the newest attempt counting."""
    steps = {one["step"]: (one["loss"], one["transfer"]) for one in run.records("step")}
    epochs = {one["step"]: (one["robust_acc"], one["ema_robust_acc"]) for one in run.records("epoch")}
    return run.hashes(), [sorted(steps.items()), sorted(epochs.items())]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[Any]]:
    run = run_small(tmp_path_factory.mktemp("undisturbed"), "run", *RUN)
    assert run.code == 0
    return facts(run)


@pytest.mark.slow
@pytest.mark.parametrize("place,call", [
    one if number < 24 else pytest.param(*one, marks=pytest.mark.thorough) for number, one in enumerate(draws())])
def test_a_run_that_is_interrupted_anywhere_ends_bit_equal(place: str, call: int, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch,
                                                            undisturbed: tuple[list[str], list[Any]]) -> None:
    owner, name = PLACES[place]
    real, calls = getattr(owner, name), [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        first = run_small(tmp_path, "run", *RUN)
    assert calls[0] >= call, f"{place} is called {calls[0]} times only"
    assert first.code in (0, 75)  # 0: too late, the run was over
    run = first if first.code == 0 else run_small(tmp_path, "run", *RUN)
    assert run.code == 0
    assert facts(run) == undisturbed
