"""AutoAttack (Croce and Hein, ICML 2020) through pyautoattack, the optional extra `eval`.

A thin adapter: what it returns is what a direct call of pyautoattack returns on the same chunk with the same seed.
It only keeps torch's global generator as it was, fits the number of target classes to the data, and counts what
the attacks find.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.errors import ConfigError, optional
from mat_dist.evaluation.settings import MENU
from mat_dist.models.modes import frozen

# Warnings of pyautoattack that are judged elsewhere: Square's drop over all chunks, classes before the attack.
_JUDGED_ELSEWHERE = ("Square Attack has decreased", "classes it is not possible", "target classes")


@dataclass(frozen=True)
class AutoAttacked:
    """What AutoAttack did on one chunk."""

    adv_BCHW: Tensor  # AEs; the clean image where none was found or the image was wrong without an attack
    square_broke: int  # number of images that withstood all attacks before Square and not Square
    attacks: tuple[str, ...]  # what was run, in order
    warnings: tuple[str, ...]  # texts of pyautoattack's own checks of the model


def require() -> Any:
    """The module pyautoattack. Raises EnvironmentFault where the extra is not installed."""
    return optional("pyautoattack", "attacks", "pip install 'mat_dist[eval]', or choose other attacks such as "
                    "attacks=pgd,cw")


def chunk_seed(seed: int, norm: str, chunk: int) -> int:
    """The seed of a chunk's AutoAttack, 0 <= seed < 2^31."""
    return rng.key(seed, f"eval-autoattack-{norm}", chunk) & ((1 << 31) - 1)


def check_classes(names: Iterable[str], classes: int) -> None:
    """Raises ConfigError where one of the attacks asked for by name needs more classes than there are."""
    for name in names:
        if classes < MENU[name].fewest_classes:
            raise ConfigError(f"{name} needs {MENU[name].fewest_classes} classes, the model has {classes}", "attacks",
                              "leave it out")


def make(model: nn.Module, threat: Threat, *, version: str, custom: Sequence[str], seed: int, classes: int,
         device: torch.device, alone: str | None = None) -> Any:
    """pyautoattack's AutoAttack for a model of `classes` classes; with `alone` that one of its attacks.

    Attacks of a named version that need more classes than there are, are left out; targeted attacks have at most
    classes - 1 targets.
    """
    module = require()
    attack = module.AutoAttack(model, attacks=list(custom) if version == "custom" else None, device=device,
                               eps=threat.eps, norm=threat.info.autoattack, seed=seed, version=version)
    names = attack.attacks_to_run if alone is None else [alone]
    attack.attacks_to_run = [name for name in names if classes >= MENU[name].fewest_classes]
    for part in (attack.apgd_targeted, attack.fab):
        part.n_target_classes = min(part.n_target_classes, classes - 1)
    return attack


def autoattack(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, *, version: str, custom: Sequence[str],
               seed: int, alone: str | None = None) -> AutoAttacked:
    """Run AutoAttack, or one of its attacks, on one chunk, the chunk being one batch.

    Args:
        model: images in [0, 1] -> logits.
        version: standard, plus, rand or custom.
        custom: attacks of version custom, in order.
        seed: of the chunk, see `chunk_seed`.
        alone: only this attack, with the parameters that it has in `version`.

    Raises EnvironmentFault where pyautoattack is missing.
    """
    checks = require().checks
    cuda = [x_BCHW.device] if x_BCHW.is_cuda else []
    # pyautoattack seeds torch's global generators.
    with frozen(model), torch.random.fork_rng(devices=cuda), _warnings_kept(checks) as texts:
        with torch.no_grad():
            classes = model(x_BCHW[:1]).shape[-1]
        attack = make(model, threat, version=version, custom=custom, seed=seed, classes=classes, device=x_BCHW.device,
                      alone=alone)
        broke: list[int] = []
        attack.square.perturb = _counting(attack.square.perturb, model, broke)
        adv, _ = attack.run_standard_evaluation(x_BCHW, y_B, batch_size=len(y_B))
    warnings = dict.fromkeys(text for text in texts if not any(part in text for part in _JUDGED_ELSEWHERE))
    return AutoAttacked(adv.detach(), sum(broke), tuple(attack.attacks_to_run), tuple(warnings))


def _counting(perturb: Callable[..., Tensor], model: nn.Module, broke: list[int]) -> Callable[..., Tensor]:
    """`perturb`, which also appends how many images it broke: pyautoattack tells the total of all attacks only."""
    def counted(x: Tensor, y: Tensor) -> Tensor:
        adv = perturb(x, y)
        with torch.no_grad():
            broke.append(int((model(adv).argmax(1) != y).sum()))
        return adv
    return counted


@contextmanager
def _warnings_kept(checks: Any) -> Iterator[list[str]]:
    """pyautoattack's warnings as a list; nothing that it says reaches the screen."""
    logger, texts = logging.getLogger("auto-attack"), list[str]()

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            texts.append(record.getMessage().partition(" See flags_doc")[0])
        return False

    # Counted over the life of the process there: one dynamic model would make all later ones dynamic.
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    logger.addFilter(keep)
    try:
        yield texts
    finally:
        logger.removeFilter(keep)
