"""Perturbations that outlive a step: of every training image for the next epoch, or of every row for the next batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mat_dist.attacks.norms import Region, per_image
from mat_dist.data.augment import AugmentedView

STORED = torch.float16  # an error of 2^-12 of a perturbation, which is a start and is projected again


@dataclass(frozen=True)
class WarmStart:
    """What is known of the rows of a batch: their perturbations, and whether there is one."""

    delta_BCHW: Tensor
    known_B: Tensor

    def start(self, start_BCHW: Tensor, region: Region) -> Tensor:
        """The perturbed images, brought into the region; `start_BCHW` for those of which nothing is known."""
        x_BCHW = region.x
        again_BCHW = region.inside(x_BCHW + self.delta_BCHW.to(x_BCHW.dtype))
        return torch.where(per_image(self.known_B, x_BCHW), again_BCHW, start_BCHW)


class PerturbationBuffer:
    """A perturbation for each of a number of images (or rows of a batch), in memory of one device.

    A step reads with `at`, proposes with `propose`, and ends with `commit` or `forget`. The content is a function of
    the committed steps alone: every replica commits what all have `proposed`. They are stored in `dtype`; None: as they
    come.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = STORED) -> None:
        self._device, self._dtype = device, dtype
        self._shown: AugmentedView | None = None
        self._first_row = 0
        self._frames: Tensor | None = None  # (N, C, H + 2 pad, W + 2 pad)
        self._known = torch.zeros(0, dtype=torch.bool, device=device)
        self._proposed: list[tuple[Tensor, Tensor]] = []  # image numbers, frames

    def begin(self, shown: AugmentedView, first_row: int, *, forget: bool) -> None:
        """Before each step: the images of this process's rows of the batch, where in the whole batch these begin, and
        whether all perturbations are dropped."""
        self._shown, self._first_row = shown, first_row
        if forget:
            self._known.zero_()

    def at(self, first_row: int, x_BCHW: Tensor) -> WarmStart | None:
        """What is known of these rows of the batch; None before the first commit, and of images that `begin` was not
        told of, as in a benchmark."""
        if self._shown is None or self._frames is None:
            return None
        shown = self._rows(first_row, len(x_BCHW))
        return WarmStart(shown.view(self._frames[shown.images_B]), self._known[shown.images_B])

    def propose(self, first_row: int, delta_BCHW: Tensor) -> None:
        """What these rows of the batch are to start from when their images come again."""
        if self._shown is None:
            return
        shown, views_BCHW = self._rows(first_row, len(delta_BCHW)), delta_BCHW.detach().to(self._dtype)
        if self._frames is None:
            count, channels, height, width = views_BCHW.shape
            before = views_BCHW.new_zeros(count, channels, height + 2 * shown.pad, width + 2 * shown.pad)
        else:
            before = self._frames[shown.images_B] * per_image(self._known[shown.images_B], self._frames)
        self._proposed.append((shown.images_B, shown.put(before, views_BCHW)))

    def proposed(self) -> list[Tensor]:
        """Image numbers (B,) and frames (B, ...) of each micro-batch, in turn."""
        return [tensor for pair in self._proposed for tensor in pair]

    def commit(self, shared: Sequence[Tensor]) -> None:
        """Keep what was `proposed`, by all replicas."""
        for images_B, frames_BCHW in zip(shared[::2], shared[1::2], strict=True):
            if self._frames is None:
                assert self._shown is not None
                self._frames = frames_BCHW.new_zeros(self._shown.count, *frames_BCHW.shape[1:])
                self._known = torch.zeros(self._shown.count, dtype=torch.bool, device=self._device)
            self._frames[images_B] = frames_BCHW
            self._known[images_B] = True
        self._proposed = []

    def forget(self) -> None:
        """Drop what was proposed."""
        self._proposed = []

    def state_dict(self) -> dict[str, Any]:
        """Tensors, for a checkpoint; empty where nothing is known yet."""
        return {} if self._frames is None else {"frames": self._frames, "known": self._known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._frames, self._known = None, torch.zeros(0, dtype=torch.bool, device=self._device)
        if state:
            self._frames = state["frames"].to(self._device, copy=True)
            self._known = state["known"].to(self._device, copy=True)

    def _rows(self, first_row: int, count: int) -> AugmentedView:
        assert self._shown is not None
        first = first_row - self._first_row
        return self._shown.rows(first, first + count)
