"""A model that is asked about some images of a batch alone."""

from __future__ import annotations

from torch import Tensor, nn


class OpenRows(nn.Module):
    """A model that is asked about the rows `open_B` (bool (B,)), one at least. The others get zeros, and gradients of
    zero: an attack passes by images that are decided, and the noise of the rest, keyed by rows, stays theirs."""

    def __init__(self, model: nn.Module, open_B: Tensor) -> None:
        super().__init__()
        rows = open_B.nonzero()[:, 0]
        self.model, self.rows = model, rows if len(rows) else rows.new_zeros(1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        some = len(self.rows) < len(x_BCHW)
        found: Tensor = self.model(x_BCHW[self.rows] if some else x_BCHW)
        return found.new_zeros(len(x_BCHW), found.shape[1]).index_copy(0, self.rows, found) if some else found
