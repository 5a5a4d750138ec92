"""The constraint-relaxation attack on linf balls: few passes, for a look at a model before AutoAttack.

That of "Efficient Robustness Evaluation via Constraint Relaxation" (AAAI 2025), written anew. The paper was not at
hand: the search and its figures are those of the authors' public program (fzjcdt/constraint-relaxation-attack).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.norms import Threat, per_image
from mat_dist.attacks.open_rows import OpenRows
from mat_dist.attacks.pgd import ATTACK_LOSSES, likely_wrong, loss_and_gradient, margin

PGD_STEPS, PGD_SIZE = 10, 0.5  # of the first search, and the length of its steps in eps
SIZES = (0.5, 0.25, 0.125, 0.0625, 0.05)  # of each cycle, in eps: its steps, how much larger the ball is, the noise
PART, STARTS = 10, 5  # steps in each of a cycle's three parts; starts towards each class
NEAR = 0.05  # logits: starts after the first are for classes that came so near
FAR = 1.0  # logits, times the size: a class that is farther off after two parts of a cycle is given up


class Relaxation:
    """One attack on the images `open_B` (bool (B,)) of a batch; the model is frozen by the caller. `stream` keys the
    noise, which belongs to rows."""

    def __init__(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, stream: int,
                 open_B: Tensor) -> None:
        self._model, self._y_B, self._threat, self._stream = model, y_B, threat, stream
        self._ball, self._adv, self._open_B = threat.region(x_BCHW), x_BCHW, open_B.clone()

    def run(self) -> Tensor:
        """Search as long as an image is open -> what broke each image, else the end of the first search."""
        classes = self._first()
        near = [self._open_B] * len(classes)
        for start in range(STARTS):
            for rank, class_B in enumerate(classes):
                near[rank] = self._towards(class_B, self._open_B & near[rank], start, rank)
        return self._adv

    def _first(self) -> list[Tensor]:
        """PGD on the cross-entropy -> the likeliest wrong classes at its end, log(classes) of them, (B,) each."""
        point, y_B = self._ball.start("uniform", stream=rng.key(self._stream, "first")), self._y_B
        for _ in range(PGD_STEPS):
            logits_BK, _, grad = self._ask(point, self._open_B, lambda logits: ATTACK_LOSSES["ce"](logits, 0, y_B))
            self._look(point, logits_BK, self._open_B)
            point = self._ball.project(self._ball.step(point, grad, PGD_SIZE * self._threat.eps))
        logits_BK, _, _ = self._ask(point, self._open_B)
        self._look(point, logits_BK, self._open_B)
        self._adv = torch.where(per_image(self._open_B, point), point, self._adv)
        return likely_wrong(lambda _: logits_BK, point, self._y_B, math.ceil(math.log(logits_BK.shape[1])))

    def _towards(self, class_B: Tensor, on_B: Tensor, *number: int) -> Tensor:
        """One start of the images `on_B` towards one class of each -> those that came near it."""
        near_B, pair_B2 = torch.zeros_like(on_B), torch.stack([self._y_B, class_B], 1)
        point = self._ball.start("uniform", stream=rng.key(self._stream, "towards", *number))
        for cycle, size in enumerate(SIZES):
            wide, narrow = (self._threat.scaled(1 + way * size).region(self._ball.x) for way in (1, -1))
            for step in range(3 * PART):
                if not on_B.any():
                    return near_B
                if step == 2 * PART:
                    u = rng.uniform(rng.key(self._stream, "beside", *number, cycle), point.shape, device=point.device,
                                    dtype=point.dtype)
                    point = self._ball.project(narrow.project(point) + (2 * u - 1) * size * self._threat.eps)
                logits_BK, lead_B, grad = self._ask(point, on_B, lambda logits: logits.gather(1, pair_B2).diff()[:, 0])
                if step >= PART:
                    near_B = near_B | self._look(point, logits_BK, on_B)
                if step == 2 * PART - 1:
                    on_B = on_B & (lead_B >= -FAR * size)
                moved = self._ball.step(point, grad, size * self._threat.eps)
                point = cut = self._ball.project(moved)
                if step < PART:
                    near_B = near_B | self._look(cut, self._ask(cut, on_B)[0], on_B)
                    point = wide.project(moved) if step < PART - 1 else cut
                on_B = on_B & self._open_B
        return near_B

    def _ask(self, point_BCHW: Tensor, on_B: Tensor,
             loss: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the images `on_B`, the loss and its gradient."""
        asked = OpenRows(self._model, on_B)
        return loss_and_gradient(asked, loss or (lambda logits: logits[:, 0]), point_BCHW, gradient=loss is not None)

    def _look(self, point_BCHW: Tensor, logits_BK: Tensor, on_B: Tensor) -> Tensor:
        """Keep the points that break their image -> the images `on_B` whose point is near the border, or beyond."""
        margin_B = margin(logits_BK, self._y_B)
        broken_B = on_B & self._open_B & (margin_B > 0)
        self._adv = torch.where(per_image(broken_B, point_BCHW), point_BCHW, self._adv)
        self._open_B &= ~broken_B
        return on_B & (margin_B > -NEAR)
