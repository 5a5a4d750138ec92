"""Exchanges that block or fail, as doubles: what their rank raises, whichever exchange it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.errors import MatError, PeerFailed, PeerSilent

GLOO_SAYS = "[/torch/gloo/pair.cc:534] Connection closed by peer [10.0.0.2]:7. This may indicate a crash.\n#0 C++"


class Work:
    """An exchange: it blocks for some looks, and then ends, or fails with `error`."""

    def __init__(self, looks: float = 0, error: str = "") -> None:
        self.looks, self.error = looks, error

    def wait(self, limit: Any = None) -> bool:
        if self.is_completed() and not self.error:
            return True
        self.looks -= 1
        raise RuntimeError(self.error if self.looks < 0 else "Operation timed out!")

    def is_completed(self) -> bool:
        return self.looks <= 0


class Beat:
    """Of a rank whose others are healthy, or one of which has failed in its work; it notes whom it blames."""

    def __init__(self, failed: MatError | None = None) -> None:
        self.failed, self.blamed = failed, ""

    def arrive(self, where: str, *, replicas: bool = False) -> None: ...

    def word(self, where: str) -> str:
        return ""

    def failure(self) -> MatError | None:
        return self.failed

    def blame(self, what: str, symptom: str = "") -> MatError:
        self.blamed = symptom
        return PeerSilent("rank 1 ended", what, "start again")


class Group:
    def size(self) -> int:
        return 2


TENSOR = torch.ones(1, 2)
VERBS: dict[str, tuple[Callable[[Mesh], Any], Any]] = {  # a verb, and what it gives where both ranks send the same
    "gather_peers": (lambda mesh: mesh.gather_peers(TENSOR).tolist(), [[1, 1]] * 2),
    "gather_world": (lambda mesh: mesh.gather_world([7]), [[7]] * 2),
    "gather_json": (lambda mesh: mesh.gather_json("text"), ["text"] * 2),
    "barrier": (lambda mesh: mesh.barrier(), None),
    "gather_replicas": (lambda mesh: mesh.gather_replicas(TENSOR).tolist(), [[1, 1]] * 2),
    "gather_statistics": (lambda mesh: mesh.gather_statistics(TENSOR).tolist(), [[1, 1]] * 2),
    "average_replicas": (lambda mesh: mesh.average_replicas([TENSOR.clone()]), None)}


@pytest.fixture(params=VERBS)
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """exchange(work, beat): whether one verb gives what it should where each exchange is such work."""
    def run(looks: float, error: str, beat: Beat | None) -> bool:
        def gather(out: Tensor, sent: Tensor, **_: Any) -> Work:
            out.copy_(torch.cat([sent, sent]))
            return Work(looks, error)

        monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: Work(looks, error))
        for name in ("all_gather_single", "all_gather_into_tensor"):
            monkeypatch.setattr(dist, name, gather, raising=False)
        mesh = Mesh(Placement.place(2, 4, 0), torch.device("cpu"), world=Group(), peer=Group(), replica=Group(),
                    beat=beat, timeout=0.01)  # type: ignore[arg-type]
        mesh.where = "step 3"
        verb, result = VERBS[request.param]
        return verb(mesh) == result
    return run


def test_an_exchange_that_ends_after_some_looks_is_waited_for(exchange: Callable[..., bool]) -> None:
    beat = Beat()
    assert exchange(2, "", beat) and beat.blamed == ""


@pytest.mark.parametrize(("looks", "error", "symptom"), [
    (float("inf"), "", "no answer within 0.01 s"),
    (0, GLOO_SAYS, "Connection closed by peer [10.0.0.2]:7"),
    (2, "NCCL error: unhandled system error", "NCCL error: unhandled system error")])
def test_an_exchange_that_blocks_or_fails_is_blamed_on_a_rank_with_its_symptom(
        looks: float, error: str, symptom: str, exchange: Callable[..., bool]) -> None:
    beat = Beat()
    with pytest.raises(PeerSilent, match=r"rank 1 ended \(.* of step 3\)"):
        exchange(looks, error, beat)
    assert beat.blamed == symptom


@pytest.mark.parametrize(("looks", "error"), [(float("inf"), ""), (0, GLOO_SAYS)])
def test_a_failure_that_a_rank_has_told_of_comes_before_any_blame(looks: float, error: str,
                                                                  exchange: Callable[..., bool]) -> None:
    beat = Beat(PeerFailed("the cat sat on the cable", "rank 1", "mend it"))
    with pytest.raises(PeerFailed, match="the cat sat on the cable"):
        exchange(looks, error, beat)
    assert beat.blamed == ""


def test_without_heartbeats_the_symptom_itself_is_told(exchange: Callable[..., bool]) -> None:
    with pytest.raises(PeerSilent, match=r"a peer stopped answering: Connection closed by peer \[10.0.0.2\]:7 \("):
        exchange(0, GLOO_SAYS, None)
