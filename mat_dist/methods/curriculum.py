"""Attacks that grow: the number of steps (curriculum adversarial training; Cai, Liu and Song, IJCAI 2018) or the radius
(DAJAT; Addepalli et al., NeurIPS 2022)."""

from __future__ import annotations

from pydantic import Field

from mat_dist.config.fields import Number, Section
from mat_dist.config.methods import Method, register_method
from mat_dist.config.registry import entries
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.core.hooks import Hook
from mat_dist.errors import ConfigError


class CurriculumConfig(Section):
    """Attacks that grow; they run eagerly until they are full."""

    eps_epochs: Number = Field(0.0, ge=0, description="epochs in which radius and steps grow linearly from 0 (DAJAT: "
                                                      "all of them)")
    steps_epochs: Number = Field(0.0, ge=0, description="epochs in which the number of steps grows from 1; each is as "
                                                        "long as with all of them")


def attack_steps_at(step: int, steps: int, growing: int) -> int:
    """Gradient steps of the attack at training step `step` (0-based): they grow evenly from 1 to `steps` over the first
    `growing` training steps."""
    return steps if step >= growing else -(-steps * (step + 1) // growing)


class Curriculum(Hook):
    """A share of the radius, and fewer steps, for the first epochs."""

    name = "curriculum"

    def strength(self, step: int) -> tuple[float, int | None]:
        settings: CurriculumConfig = self.peer.spec.methods["curriculum"]  # type: ignore[assignment]
        per_epoch, steps = self.peer.steps_per_epoch, self.peer.spec.attack.steps
        radius, number = settings.eps_epochs * per_epoch, round(settings.steps_epochs * per_epoch)
        return (min(1.0, (step + 1) / radius) if radius else 1.0,
                attack_steps_at(step, steps, number) if step < number else None)


def _steps_at(spec: PeerConfig, step: int, per_epoch: int) -> int:
    settings: CurriculumConfig = spec.methods["curriculum"]  # type: ignore[assignment]
    return attack_steps_at(step, spec.attack.steps, round(settings.steps_epochs * per_epoch))


def attack_steps_grow(config: Config) -> list[ConfigError]:
    """One step cannot grow, and the full attack is reached within the training."""
    found = []
    for key, peer in entries(config):
        settings, where = peer.methods.get("curriculum"), f"{key}.methods.curriculum.steps_epochs"
        epochs = getattr(settings, "steps_epochs", 0.0)
        if epochs and peer.attack.steps == 1:
            found.append(ConfigError("the number of attack steps grows up to 1", where, "write 0, or more steps"))
        elif epochs > config.train.epochs:
            found.append(ConfigError(f"the number of attack steps grows for {epochs:g} of {config.train.epochs} epochs",
                                     where, "write train.epochs or fewer"))
    return found


register_method(Method("curriculum", "attacks that grow", section=CurriculumConfig, hook=Curriculum,
                       attack_steps=_steps_at,
                       rules=((attack_steps_grow, frozenset({"methods", "attack", "train"})),)))
