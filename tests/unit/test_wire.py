"""How adversarial examples travel in fewer bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mat_dist.attacks.compression import decode, encode
from mat_dist.attacks.norms import Threat
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from tests.cohorts import build, cohort_config, local, nets

SHAPE = (6, 3, 8, 8)
THREATS = [Threat("linf", 8 / 255), Threat("l2", 0.5), Threat("l1", 12.0)]


def some_aes(threat: Threat) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.rand(SHAPE)
    region = threat.region(x)
    return x, region.start("uniform", stream=1)


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)
@pytest.mark.parametrize(("form", "size", "error"), [("fp16", 2 * 192, 2**-11), ("int8", 192 + 4, 0.5 / 127)])
def test_the_error_is_that_of_the_format_and_the_bytes_are_counted(threat: Threat, form: str, size: int,
                                                                  error: float) -> None:
    """fp16 has 11 significant bits; int8 errs by half a step of a 127th of the largest change. fp32 has 768 bytes."""
    x, aes = some_aes(threat)
    sent = encode(form, aes, x)
    assert sent.dtype == torch.uint8 and sent.shape == (6, size)
    largest = (aes - x).abs().flatten(1).amax(1)
    if threat.norm == "l1":  # the projection moves every changed value by their mean error once more
        error *= 2
    off = (decode(form, sent, x, threat) - aes).abs().flatten(1).amax(1)
    assert (off <= error * largest + 2e-7).all()  # 2e-7: x + delta and the l2 rescaling round too
    assert (off > 0).any()


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)
@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_what_is_received_lies_in_the_region(threat: Threat, form: str) -> None:
    x, _ = some_aes(threat)
    region = threat.region(x)
    corner = region.inside(x + threat.eps * torch.randn(SHAPE).sign())  # on the edge of the ball
    got = decode(form, encode(form, corner, x), x, threat)
    assert (threat.distance(got, x) <= threat.eps * (1 + 1e-6)).all()
    assert got.min() >= 0 and got.max() <= 1


@pytest.mark.parametrize("form", ["full", "fp16", "int8"])
def test_an_unchanged_image_arrives_unchanged(form: str) -> None:
    x, _ = some_aes(THREATS[0])
    assert torch.equal(decode(form, encode(form, x, x), x, THREATS[0]), x)


@pytest.mark.parametrize("form", ["fp16", "int8"])
@pytest.mark.parametrize("strategy", ["random", "eat", "msd"])
def test_aes_of_several_norms_stay_those_of_their_norm(strategy: str, form: str) -> None:
    """A peer that draws or mixes its threats sends one view, and l2 or l1 AEs do not fit into the ball of the first."""
    config = cohort_config("mat", 2, entry={"union": {"strategy": strategy, "threats": "linf:0.1,l2:1,l1:4"}},
                           step={"wire": form})
    cohort, largest = build(config, Mesh(Placement.place(2, 1, 0), torch.device("cpu")), nets(2)), 0.0
    for step in range(4):
        part = local(cohort, step)
        made = [peer.attack(part, cohort.makes(peer, False)) for peer in cohort.peers]
        views = cohort.unpacked(cohort.packed(made, part, False), made, part, False)
        for view, aes in made[0].items():
            change = (aes - part.x_BCHW).abs().flatten(1).amax(1)
            assert ((views[view] - aes).abs().flatten(1).amax(1) <= 2 / 127 * change + 2e-7).all()
            largest = max(largest, change.max().item())
    assert largest > 0.2
