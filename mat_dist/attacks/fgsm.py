"""N-FGSM (de Jorge et al., "Make some noise", NeurIPS 2022): one step from strong noise, not cut to the ball."""

from __future__ import annotations

from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.pgd import Model, attack_loss, loss_and_gradient

NOISE = 2.0  # half-width of the uniform noise in units of eps (the paper's k)


def n_fgsm(model: Model, x_BCHW: Tensor, y_B: Tensor, *, eps: float, step_size: float, loss: str, stream: int,
           first_row: int) -> Tensor:
    """x + noise + step_size sign(gradient there), in [0, 1]; up to (NOISE + step_size / eps) eps from x in linf.

    Args:
        model: images in [0, 1] -> logits, frozen by the caller as for `pgd`.
        eps: the linf radius that the noise is scaled with.
        step_size: length of the step; the paper's is eps.
        stream, first_row: key of the noise, and the row of the global batch at which x_BCHW starts.
    """
    u = rng.uniform(stream, x_BCHW.shape, first_row=first_row, device=x_BCHW.device, dtype=x_BCHW.dtype)
    noisy = (x_BCHW + (2 * u - 1) * (NOISE * eps)).clamp_(0, 1)
    _, _, grad = loss_and_gradient(model, attack_loss(model, x_BCHW, y_B, loss), noisy)
    return (noisy + step_size * grad.sign()).clamp_(0, 1)
