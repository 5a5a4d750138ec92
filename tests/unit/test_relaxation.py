"""The constraint-relaxation attack: where it searches, what it finds, and that images do not meet each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.attacks.pgd import pgd
from mat_dist.attacks.relaxation import PART, PGD_STEPS, SIZES, Relaxation

THREAT, CLASSES, COUNT = Threat("linf", 0.12), 6, 48


class Net(nn.Module):
    """Two layers in fp64; `seen` gets what it is asked about."""

    def __init__(self, scale: float = 4.0) -> None:
        super().__init__()
        self.one, self.two = rng.normal(1, (16, 24), dtype=torch.float64), rng.normal(2, (24, CLASSES)).double()
        self.scale, self.seen = scale, list[Tensor]()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self.seen.append(x_BCHW.detach())
        return self.scale * torch.sin(2 * x_BCHW.flatten(1) @ self.one) @ self.two


def images() -> tuple[Tensor, Tensor]:
    x = rng.uniform(3, (COUNT, 1, 4, 4), dtype=torch.float64)
    return x, Net()(x).argmax(1)


def attack(model: nn.Module, x: Tensor, y: Tensor, open_B: Tensor | None = None, eps: float = THREAT.eps) -> Tensor:
    return Relaxation(model, x, y, Threat("linf", eps), 5, torch.ones_like(y) > 0 if open_B is None else open_B).run()


def test_aes_lie_in_ball_and_box_and_are_the_same_again() -> None:
    x, y = images()
    adv = attack(Net(), x, y)
    assert adv.min() >= 0 and adv.max() <= 1 and (THREAT.distance(adv, x) <= THREAT.eps * (1 + 1e-6)).all()
    assert torch.equal(adv, attack(Net(), x, y))


def test_an_image_is_attacked_alone_as_among_others() -> None:
    x, y = images()
    whole, every_third = attack(Net(), x, y), torch.arange(COUNT) % 3 == 0
    part = attack(Net(), x, y, every_third)
    assert torch.equal(part[every_third], whole[every_third])
    assert torch.equal(part[~every_third], attack(Net(), x, y, torch.zeros_like(every_third))[~every_third])


def test_a_cycle_searches_in_a_larger_ball_then_in_the_ball() -> None:
    """One image that holds: the first search, then cycles of three parts; the first part looks at each cut point."""
    x, model = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64), Net()
    y = model(x).argmax(1)
    model.scale = 1e-3  # no class is ever farther off than is allowed, and none is so near
    model.seen.clear()
    attack(model, x, y, eps=1e-4)
    radii = torch.stack([(seen - x).abs().amax() / 1e-4 for seen in model.seen])
    assert (radii[:PGD_STEPS + 1] <= 1 + 1e-6).all()
    at = PGD_STEPS + 1
    for size in SIZES:
        points, looks = radii[at:at + 2 * PART:2], radii[at + 1:at + 2 * PART:2]
        assert (looks <= 1 + 1e-6).all() and 1 + 0.9 * size < points.max() <= 1 + size * (1 + 1e-6)
        rest = radii[at + 2 * PART:at + 4 * PART]
        assert (rest <= 1 + 1e-6).all() and rest[PART] <= 1
        at += 4 * PART


def test_it_breaks_what_pgd_on_two_losses_breaks_in_fewer_passes() -> None:
    (x, y), threat = images(), Threat("linf", 0.03)
    region, held, passes = threat.region(x), torch.ones(COUNT, dtype=torch.bool), 0
    for loss, start in (("ce", 0), ("ce", 1), ("margin", 2), ("margin", 3)):
        model, point = Net(), region.start("uniform", stream=start)
        adv = pgd(model, x, y, region=region, start_BCHW=point, loss=loss, steps=100, step_size=threat.eps / 40)
        passes += sum(map(len, model.seen))
        held &= model(adv).argmax(1) == y
    model = Net()
    adv = attack(model, x, y, eps=threat.eps)
    few = sum(map(len, model.seen))
    ours = model(adv).argmax(1) == y
    assert 5 < held.sum() < COUNT - 5 and (ours & ~held).sum() <= 1
    assert few < passes / 10


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_images_without_hope_are_given_up(scale: float) -> None:
    """Logits that are far apart end a class after two parts of its first cycle, and its later starts."""
    x, model = torch.full((4, 1, 4, 4), 0.5, dtype=torch.float64), Net(scale)
    y = model(x).argmax(1)
    model.seen.clear()
    attack(model, x, y, eps=1e-4)
    cycle, classes = 3 * PART, 2  # ceil(log(6)) classes
    if scale > 1:
        assert sum(map(len, model.seen)) == 4 * (PGD_STEPS + 1 + classes * (cycle))
    else:
        assert sum(map(len, model.seen)) > 4 * classes * len(SIZES) * cycle * 4
