"""Values that are not finite, in each peer and place: the others are bit-equal to before. Ranks are threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mat_dist.core.cohort import Cohort
from mat_dist.distributed.agreement import Agreement, batch_checksum
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import MatError, NonFinite, PeerFailed
from tests.cohorts import batch, build, cohort_config, exploding, nets, one_step, state_hashes
from tests.ranks.conftest import run_ranks  # noqa: F401  a fixture

Run = Callable[..., list[Any]]
AT = 2


def spoil(cohort: Cohort, peer_index: int, place: str) -> None:
    """Put NaN or infinity into one place of one peer, from now on."""
    for peer in cohort.peers:
        if peer.index != peer_index:
            continue
        if place == "weights":
            next(peer.model.parameters()).data.view(-1)[3] = float("nan")
        elif place == "logits":
            exploding(peer)
        elif place == "AE":
            peer.attack = lambda *args, real=peer.attack: {  # type: ignore[method-assign]
                view: adv * float("nan") for view, adv in real(*args).items()}
        else:
            peer.backward = lambda *args, real=peer.backward: real(*args) * float("nan")  # type: ignore[method-assign]


@pytest.mark.parametrize("place", ["weights", "logits", "loss", "AE"])
@pytest.mark.parametrize("guilty", range(4))
def test_the_other_peers_are_bit_equal_to_before(guilty: int, place: str, run_ranks: Run) -> None:  # noqa: F811
    models = nets(4)

    def one(mesh: Mesh) -> tuple[MatError, dict[int, bool]]:
        cohort = build(cohort_config("mat", 4, optim={"ema_decay": 0.9}), mesh, models)
        for step in range(AT):
            one_step(cohort, step)
        before = state_hashes(cohort)
        spoil(cohort, guilty, place)
        with pytest.raises(NonFinite) as caught:
            one_step(cohort, AT)
        return caught.value, {index: found == before[index] for index, found in state_hashes(cohort).items()}

    ends = run_ranks(one, 4, 4)
    texts = {str(error) for error, _ in ends}
    assert len(texts) == 1 and f"peer {guilty} produced" in texts.pop()
    kept = {index: same for _, part in ends for index, same in part.items()}
    assert all(kept[index] for index in range(4) if index != guilty)
    assert kept[guilty] == (place != "weights")  # its own weights are as they were, unless they are the fault


def test_100_changed_batches_are_found_at_the_header(run_ranks: Run) -> None:  # noqa: F811
    def one(mesh: Mesh) -> int:
        found = 0
        for trial in range(100):
            x, y = batch(trial)
            if mesh.placement.rank == 1:  # a pixel by one level, two images exchanged, or a label
                if trial % 3 == 0:
                    x = x.clone()
                    x.view(-1)[trial] += 1 / 255
                elif trial % 3 == 1:
                    x = x[torch.tensor([1, 0, *range(2, len(x))])]
                else:
                    y = torch.where(torch.arange(len(y)) == trial % len(y), y + 1, y)
            agree = Agreement(mesh, f"step {trial}", trial)
            try:
                agree.header("AEs", x, int(batch_checksum(x, y)))
            except PeerFailed as error:
                found += "in the batch" in str(error)
        return found

    assert run_ranks(one, 2, 2) == [100, 100]


def test_equal_batches_raise_no_alarm(run_ranks: Run) -> None:  # noqa: F811
    def one(mesh: Mesh) -> None:
        for trial in range(1000):
            x, y = batch(trial % 7)
            Agreement(mesh, f"step {trial}", trial).header("AEs", x, int(batch_checksum(x, y)))

    run_ranks(one, 2, 2)
