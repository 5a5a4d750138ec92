"""Pictures of adversarial examples for TensorBoard and W&B, after an evaluation in the training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mat_dist.attacks.norms import Threat
from mat_dist.checkpoints import Manifest
from mat_dist.config.schema import Config
from mat_dist.core.cohort import Images
from mat_dist.data import ImageSet
from mat_dist.evaluation.during_training import (
    EMA,
    RAW,
    AttackPlan,
    Result,
    load_models,
    pixels,
    restarts,
    strict_arithmetic,
)
from mat_dist.runs.reporter import Reporter
from mat_dist.runs.trackers import Picture

PICTURES = 6
LOOKED_AT = 64  # images of which the pictures are chosen


def show_gallery(reporter: Reporter, group: str, config: Config, manifest: Manifest, images: Images, data: ImageSet,
                 plan: AttackPlan, results: Sequence[Result], device: torch.device) -> None:
    """Send pictures of a checkpoint's evaluation where they are wanted. What goes wrong is a note, not an error."""
    if not reporter.wants_pictures:
        return
    try:
        found = gallery(config, manifest, images, data, plan, results, device)
    except Exception as error:  # an extra of rank 0 alone: the other ranks would wait for it in vain
        reporter.note(f"warning: no pictures of step {manifest.step}: {type(error).__name__}: {error}")
        return
    reporter.pictures(manifest.step, f"gallery_{group}", found)


def gallery(config: Config, manifest: Manifest, images: Images, data: ImageSet, plan: AttackPlan,
            results: Sequence[Result], device: torch.device) -> list[Picture]:
    """Of the first images of a split: up to half whose AE fools the most robust peer, then others, in their order.

    Perturbations are scaled: 0 is grey, the largest pixel of each is white or black.
    """
    weights = EMA if any(r.weights == EMA for r in results) else RAW
    trained = [str(p.name) for p in config.peers if not p.frozen]
    best = max((r for r in results if r.weights == weights and r.target in trained), key=lambda r: r.robust)
    index = [str(p.name) for p in config.peers].index(best.target)
    model = load_models(config, manifest, images, weights, device)[index]
    spec = config.peers[index].threat
    x_BCHW, y_B = pixels(data, torch.arange(min(LOOKED_AT, len(data))), device, config)
    with strict_arithmetic():
        adv_BCHW = next(restarts(model, x_BCHW, y_B, Threat(spec.norm, spec.eps), plan, seed=config.run.seed, chunk=0))
        with torch.no_grad():
            clean_B, attacked_B = model(x_BCHW).argmax(-1), model(adv_BCHW).argmax(-1)
    fooled = ((clean_B == y_B) & (attacked_B != y_B)).nonzero()[:, 0].tolist()[:PICTURES // 2]
    rest = [row for row in range(len(y_B)) if row not in fooled][:PICTURES - len(fooled)]
    found = []
    for row in (*fooled, *rest):
        change = adv_BCHW[row] - x_BCHW[row]
        grey = 0.5 + change / (2 * (float(change.abs().amax()) or 1.0))
        found.append(Picture(x_BCHW[row], grey, adv_BCHW[row], f"class {int(y_B[row])}, {best.target} says "
                             f"{int(clean_B[row])}, under attack {int(attacked_B[row])}"))
    return found
