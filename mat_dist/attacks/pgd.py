"""Projected gradient descent (Madry et al., ICLR 2018): one loop for every norm.

FGSM with a random start (Wong et al., "Fast is better than free", ICLR 2020) is steps=1 of the same loop, and
MI-FGSM (Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018) is the loop with a momentum of 1.
N-FGSM (de Jorge et al., "Make some noise", NeurIPS 2022) is one step from strong noise, not cut to the ball.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.norms import Region, per_image

Model = Callable[[Tensor], Tensor]
NOISE = 2.0  # half-width of the uniform noise in units of eps (the paper's k)


def margin(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Largest wrong logit minus the true one -> (B,); positive where misclassified.

    The untargeted loss f_6 of Carlini and Wagner (2017), without their confidence clamp.
    """
    true_B = logits_BK.gather(1, y_B[:, None])[:, 0]
    wrong_BK = logits_BK.scatter(1, y_B[:, None], -torch.inf)
    return wrong_BK.amax(1) - true_B


def _kl_clean(adv_BK: Tensor, clean_BK: Tensor, y_B: Tensor) -> Tensor:
    """KL(clean prediction || adversarial prediction)."""
    return F.kl_div(adv_BK.log_softmax(-1), clean_BK.log_softmax(-1), reduction="none", log_target=True).sum(-1)


# (adversarial logits, clean logits where the name begins with kl, labels) -> (B,), to be raised
ATTACK_LOSSES: dict[str, Callable[..., Tensor]] = {
    "ce": lambda adv_BK, _, y_B: F.cross_entropy(adv_BK, y_B, reduction="none"),
    "kl_clean": _kl_clean,  # the inner problem of TRADES (Zhang et al., ICML 2019)
    "kl_teacher": _kl_clean,  # that of RSLAD (Zi et al., ICCV 2021); the clean logits are the teacher's
    "margin": lambda adv_BK, _, y_B: margin(adv_BK, y_B),
    # Log probability of a target class, which takes the labels' place. Its gradient does not vanish with saturated
    # logits, as that of the label's cross-entropy does.
    "ce_targeted": lambda adv_BK, _, target_B: -F.cross_entropy(adv_BK, target_B, reduction="none"),
}


def attack_loss(model: Model, x_BCHW: Tensor, y_B: Tensor, loss: str,
                teacher_BK: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The loss `loss` of the clean batch x_BCHW as a function: adversarial logits (B, K) -> (B,).

    Args:
        y_B: labels; for all losses but `margin` and `ce_targeted` also mixed ones (B, K).
        teacher_BK: a teacher's logits (or log-probabilities) of x_BCHW, for `kl_teacher`; without one that loss is
            `kl_clean`.
    """
    clean_BK = teacher_BK
    if loss == "kl_clean" or (loss == "kl_teacher" and teacher_BK is None):
        with torch.no_grad():
            clean_BK = model(x_BCHW).to(x_BCHW.dtype)
    return lambda adv_BK: ATTACK_LOSSES[loss](adv_BK, clean_BK, y_B)


def likeliest(y_B: Tensor) -> Tensor:
    """One class of each image (B,): its label, or the one with the largest share of mixed labels (B, K)."""
    return y_B if y_B.ndim == 1 else y_B.argmax(-1)


def likely_wrong(model: Model, x_BCHW: Tensor, y_B: Tensor, count: int) -> list[Tensor]:
    """The most likely wrong class of each image, the next one, ... -> at most `count` (and classes - 1) of (B,)."""
    with torch.no_grad():
        logits_BK = model(x_BCHW).scatter(1, y_B[:, None], -torch.inf)
    return list(logits_BK.topk(min(count, logits_BK.shape[1] - 1)).indices.unbind(1))


def loss_and_gradient(model: Model, objective: Callable[[Tensor], Tensor], adv_BCHW: Tensor, *,
                      gradient: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K), loss (B,) and the gradient of its sum (B, C, H, W) at a batch, detached, in the batch's dtype.

    A sum, not a mean, so that no image's gradient depends on the batch that it is in. Zeros without `gradient`.
    """
    leaf = adv_BCHW.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        logits_BK = model(leaf).to(adv_BCHW.dtype)
        value_B = objective(logits_BK)
    grad = torch.autograd.grad(value_B.sum(), leaf)[0] if gradient else torch.zeros_like(leaf)
    return logits_BK.detach(), value_B.detach(), grad


def pgd(model: Model, x_BCHW: Tensor, y_B: Tensor, *, region: Region, start_BCHW: Tensor, loss: str, steps: int,
        step_size: float, teacher_BK: Tensor | None = None, momentum: float | None = None,
        right: list[Tensor] | None = None) -> Tensor:
    """The last iterate of projected gradient ascent -> adversarial batch (B, C, H, W), detached, x's dtype.

    Gradients are taken with respect to the input only; the caller freezes the model (eval-mode BN, parameters without
    grad).

    Args:
        model: images in [0, 1] -> logits.
        region: feasible set of x_BCHW.
        start_BCHW: first iterate, inside the region.
        loss: `ce`, `kl_clean`, `kl_teacher`, `margin`, or `ce_targeted`, for which y_B are the classes to reach.
        steps: number of gradient steps, >= 1.
        step_size: length of a step in the region's norm.
        teacher_BK: a teacher's logits of x_BCHW, for `kl_teacher`.
        momentum: decay of the sum of gradients that is followed, each divided by its mean absolute value; None
            follows the newest gradient as it is.
        right: takes, for each point from the start to the result, whether each image is classified correctly (bool
            (B,)); the result costs a forward of its own.
    """
    objective = attack_loss(model, x_BCHW, y_B, loss, teacher_BK)
    adv, gathered = start_BCHW.detach(), None
    for _ in range(steps):
        logits_BK, _, grad = loss_and_gradient(model, objective, adv)
        if right is not None:
            right.append(logits_BK.argmax(-1) == likeliest(y_B))
        if momentum is not None:
            # A zero gradient adds nothing, not NaN.
            size_B = grad.flatten(1).abs().mean(1).clamp_(min=torch.finfo(grad.dtype).tiny)
            grad = grad / per_image(size_B, grad)
            gathered = grad = grad if gathered is None else momentum * gathered + grad
        adv = region.project(region.step(adv, grad, step_size))
    found = region.round_inward(adv)
    if right is not None:
        with torch.no_grad():
            right.append(model(found).argmax(-1) == likeliest(y_B))
    return found


def n_fgsm(model: Model, x_BCHW: Tensor, y_B: Tensor, *, eps: float, step_size: float, loss: str, stream: rng.Key,
           first_row: int, teacher_BK: Tensor | None = None) -> Tensor:
    """x + noise + step_size sign(gradient there), in [0, 1]; up to (NOISE + step_size / eps) eps from x in linf.

    Args:
        model: frozen by the caller as for `pgd`.
        eps: the linf radius that the noise is scaled with.
        step_size: length of the step; the paper's is eps.
        loss, teacher_BK: as for `pgd`.
        stream, first_row: key of the noise, and the row of the global batch at which x_BCHW starts.
    """
    u = rng.uniform(stream, x_BCHW.shape, first_row=first_row, device=x_BCHW.device, dtype=x_BCHW.dtype)
    noisy = (x_BCHW + (2 * u - 1) * (NOISE * eps)).clamp_(0, 1)
    _, _, grad = loss_and_gradient(model, attack_loss(model, x_BCHW, y_B, loss, teacher_BK), noisy)
    return (noisy + step_size * grad.sign()).clamp_(0, 1)
