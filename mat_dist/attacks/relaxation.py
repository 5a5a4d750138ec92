"""The constraint-relaxation attack on linf balls: few passes, for a look at a model before AutoAttack.

It is that of "Efficient Robustness Evaluation via Constraint Relaxation" (AAAI 2025). The text of the paper was not at
hand: what it does and its figures are told by the authors' public program (fzjcdt/constraint-relaxation-attack). This
is written anew.

A short PGD tells the likeliest wrong classes. The logit of each is then raised above the true one's, in cycles whose
steps get shorter. A cycle searches first in a larger ball, which leads past local optima, then in the ball itself, and
at last from random points round what it found. An image leaves as soon as it is broken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.norms import Threat, per_image
from mat_dist.attacks.open_rows import OpenRows
from mat_dist.attacks.pgd import ATTACK_LOSSES, likely_wrong, loss_and_gradient, margin

PGD_STEPS, PGD_SIZE = 10, 0.5  # of the first search, and the length of its steps in eps
SIZES = (0.5, 0.25, 0.125, 0.0625, 0.05)  # of each cycle, in eps: its steps, how much larger the ball is, the noise
PART = 10  # steps in each of a cycle's three parts
STARTS = 5
NEAR = 0.05  # logits: starts after the first are for classes that came so near
FAR = 1.0  # logits, times the size: a class that is farther off after two parts of a cycle is given up


class Relaxation:
    """One attack on a batch.

    Args:
        model: images in [0, 1] -> logits, frozen by the caller.
        y_B: labels.
        stream: key of the noise, which belongs to rows.
        open_B: images to attack (bool (B,)); each is cleared as it is broken.

    Attributes:
        adv_BCHW: what broke each image, else the end of the first search.
    """

    def __init__(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, stream: int,
                 open_B: Tensor) -> None:
        self._model, self._x, self._y_B, self._threat = model, x_BCHW, y_B, threat
        self._ball, self._stream, self._open_B = threat.region(x_BCHW), stream, open_B.clone()
        self.adv_BCHW = x_BCHW

    def run(self) -> Tensor:
        """Search as long as an image is open -> `adv_BCHW`."""
        classes = self._first()
        near = [self._open_B] * len(classes)
        for start in range(STARTS):
            for rank, class_B in enumerate(classes):
                near[rank] = self._towards(class_B, self._open_B & near[rank], start, rank)
        return self.adv_BCHW

    def _first(self) -> list[Tensor]:
        """PGD on the cross-entropy -> the likeliest wrong classes at its end, log(classes) of them, (B,) each."""
        point = self._start("first")
        for _ in range(PGD_STEPS):
            logits_BK, _, grad = loss_and_gradient(
                OpenRows(self._model, self._open_B), lambda logits: ATTACK_LOSSES["ce"](logits, None, self._y_B), point)
            self._look(point, logits_BK, self._open_B)
            point = self._ball.project(self._ball.step(point, grad, PGD_SIZE * self._threat.eps))
        with torch.no_grad():
            logits_BK = OpenRows(self._model, self._open_B)(point)
        self._look(point, logits_BK, self._open_B)
        self.adv_BCHW = torch.where(per_image(self._open_B, point), point, self.adv_BCHW)
        return likely_wrong(lambda _: logits_BK, point, self._y_B, math.ceil(math.log(logits_BK.shape[1])))

    def _towards(self, class_B: Tensor, on_B: Tensor, *number: int) -> Tensor:
        """One start of the images `on_B` towards one class of each -> those that came near it."""
        near_B, point = torch.zeros_like(on_B), self._start("towards", *number)

        def lead(logits_BK: Tensor) -> Tensor:
            return (logits_BK.gather(1, class_B[:, None]) - logits_BK.gather(1, self._y_B[:, None]))[:, 0]

        for cycle, size in enumerate(SIZES):
            wide = self._threat.scaled(1 + size).region(self._x)
            for step in range(3 * PART):
                if not on_B.any():
                    return near_B
                region = wide if step < PART else self._ball
                if step == 2 * PART:
                    point = self._beside(point, size, *number, cycle)
                logits_BK, lead_B, grad = loss_and_gradient(OpenRows(self._model, on_B), lead, point)
                if step >= PART:
                    near_B = near_B | self._look(point, logits_BK, on_B)
                if step == 2 * PART - 1:
                    on_B = on_B & (lead_B >= -FAR * size)
                point = region.project(region.step(point, grad, size * self._threat.eps))
                if step < PART:
                    cut = self._ball.project(point)
                    with torch.no_grad():
                        near_B = near_B | self._look(cut, OpenRows(self._model, on_B)(cut), on_B)
                    point = cut if step == PART - 1 else point
                on_B = on_B & self._open_B
        return near_B

    def _look(self, point_BCHW: Tensor, logits_BK: Tensor, on_B: Tensor) -> Tensor:
        """Keep the points that break their image -> the images `on_B` whose point is near the border, or beyond."""
        margin_B = margin(logits_BK, self._y_B)
        broken_B = on_B & self._open_B & (margin_B > 0)
        self.adv_BCHW = torch.where(per_image(broken_B, point_BCHW), point_BCHW, self.adv_BCHW)
        self._open_B &= ~broken_B
        return on_B & (margin_B > -NEAR)

    def _start(self, *purpose: str | int) -> Tensor:
        return self._ball.start("uniform", stream=self._key(*purpose))

    def _beside(self, point_BCHW: Tensor, size: float, *number: int) -> Tensor:
        """A random point of the ball round one that is drawn back by the width of the noise."""
        stream, device, dtype = self._key("beside", *number), point_BCHW.device, point_BCHW.dtype
        u = rng.uniform(stream, point_BCHW.shape, device=device, dtype=dtype)
        drawn = self._threat.scaled(1 - size).region(self._x).project(point_BCHW)
        return self._ball.project(drawn + (2 * u - 1) * size * self._threat.eps)

    def _key(self, purpose: str | int, *number: str | int) -> int:
        return rng.key(self._stream, str(purpose), *map(int, number))
