"""`mat_dist.attack`: adversarial examples for any model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mat_dist.api.inputs import TRIED, asked, borrowed, checked_images, checked_labels, home
from mat_dist.attacks.norms import Threat
from mat_dist.errors import ConfigError, EnvironmentFault
from mat_dist.evaluation.attacks import Target, attack_one
from mat_dist.evaluation.command import check_package
from mat_dist.evaluation.settings import SEARCH, SQUARE
from mat_dist.evaluation.targets import make_job
from mat_dist.models.registry import try_images

NEEDLESS = ("images", "split", "checks", "transfer")


def attack(model: nn.Module, x: Tensor, y: Tensor, threat: str | Threat = "linf:8/255", method: str = "pgd", *,
           steps: int | None = None, restarts: int | None = None, **settings: Any) -> Tensor:
    """Adversarial examples of a batch -> (B, C, H, W), in [0, 1] and in the ball, of x's type and device.

    Args:
        model: any module over images in [0, 1] -> raw logits (B, K), over normalised ones with `mean` and `std`;
            attacked in eval mode, and left as it was.
        x, y: images (B, C, H, W), float32 or float64 in [0, 1], and labels (B,), 0 to K - 1.
        threat, method: norm:radius or a `Threat`, and an attack of `python -m mat_dist.evaluate --help`.
        steps, restarts: of restarts the first one counts that the model gets wrong, image by image.
        settings: mean, std (a value per channel), step_size, seed, queries, ... of that command.

    Raises ConfigError, DataError, EnvironmentFault for what cannot be used; NotReportable for a model without gradient.
    """
    x_BCHW = checked_images(x, "x")
    request, config, options = asked(threat, method, x_BCHW.dtype, {"steps": steps, "restarts": restarts, **settings},
                                     NEEDLESS)
    job = make_job(request, config)
    if len(job.threats) != 1 or len(job.attacks) != 1:
        raise ConfigError(f"{len(job.threats)} threats and {len(job.attacks)} methods", "threat, method",
                          "give one of each; mat_dist.evaluate takes several")
    with borrowed(model, options, x_BCHW.shape[1]) as lent:
        device = home(lent)[0] or x_BCHW.device
        if device != x_BCHW.device:
            raise EnvironmentFault(f"the model is on {device}, the images are on {x_BCHW.device}", "model, x",
                                   f"write model.to({str(x_BCHW.device)!r}) or x.to({str(device)!r})")
        x_BCHW = x_BCHW.clone()  # which an inference mode around this call has not seen
        classes = try_images(lent, x_BCHW[:TRIED], "model").shape[1]
        y_B = checked_labels(y, len(x_BCHW), classes, "y").to(device)
        check_package(job, classes, config)
        searches = method in (SEARCH, SQUARE)
        found = attack_one(Target("model", lent, () if searches else (lent,)), x_BCHW, y_B, y_B, job.threats[0], job, 0)
    return found.advs[method].detach()
