"""Whom to attack and how: from a request and a run's settings to modules, threats and attack plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from mat_dist.config.schema import Config
from mat_dist.errors import ConfigError
from mat_dist.evaluate.request import ENSEMBLE, PEERS, Request
from mat_dist.evaluator import AttackPlan
from mat_dist.models import Ensemble
from mat_dist.models.ensemble import RULES
from mat_dist.threats import Threat


@dataclass(frozen=True)
class Target:
    """What is evaluated.

    Attributes:
        name: of the peer, or ensemble:<rule>.
        model: the classifier as it would be deployed.
        attacked: the modules that gradient attacks use; each AE is replayed on `model`. The model itself, but for a
            vote, which has no gradient: then the mean-logit and the mean-probability ensemble.
    """

    name: str
    model: nn.Module
    attacked: tuple[nn.Module, ...]


def target_names(request: Request, config: Config) -> list[str]:
    """Resolved names of the targets, in the order asked for. Raises ConfigError for an unknown one."""
    peers = [str(p.name) for p in config.peers]
    rules = {ENSEMBLE: f"{ENSEMBLE}:{config.eval.ensemble}", **{f"{ENSEMBLE}:{r}": f"{ENSEMBLE}:{r}" for r in RULES}}
    found: list[str] = []
    for word in request.targets:
        if word == PEERS:
            found += peers
        elif word in peers or word in rules:
            found.append(word if word in peers else rules[word])
        else:
            raise ConfigError(f"there is no target {word[:80]!r}", "targets",
                              f"choose from {', '.join([PEERS, *peers, *rules])}")
    return list(dict.fromkeys(found))


def make_targets(names: Sequence[str], peers: Sequence[str], models: Sequence[nn.Module]) -> list[Target]:
    """The targets of resolved names, over the models of all peers."""
    targets = []
    for name in names:
        if name in peers:
            model = models[peers.index(name)]
            targets.append(Target(name, model, (model,)))
            continue
        rule = name.removeprefix(f"{ENSEMBLE}:")
        model = Ensemble(models, rule).eval()
        surrogates = (Ensemble(models, "logit").eval(), Ensemble(models, "prob").eval())
        targets.append(Target(name, model, surrogates if rule == "vote" else (model,)))
    return targets


def attack_plans(request: Request, config: Config) -> dict[str, AttackPlan]:
    """The plan of each gradient attack of our own, by name. `fgsm` is one step of length eps from the clean image."""
    steps = request.steps or config.eval.test_steps
    restarts = request.restarts or config.eval.restarts
    size = request.step_size or config.eval.step_size
    plans = {"fgsm": FGSM, "pgd": AttackPlan(steps, restarts, size), "cw": AttackPlan(steps, restarts, size, "margin")}
    return {name: plans[name] for name in request.attacks if name in plans}


# size() of one step is 2.5 eps, which the projection cuts to eps: the corner of the ball that FGSM takes.
FGSM = AttackPlan(1, start="zero")


def threats_asked(request: Request, trained: Sequence[Threat]) -> list[Threat]:
    """The threats to attack with: those of the peers unless others are asked for.

    Raises ConfigError for a threat that cannot be read, a radius that is no radius, or an attack that cannot do it.
    """
    threats = [_threat(text) for text in request.threats] or list(trained)
    if request.eps is not None:
        norms = list(dict.fromkeys(t.norm for t in threats))
        if len(norms) > 1:
            raise ConfigError(f"one eps for the norms {', '.join(norms)}", "eps", "write threats=linf:8/255,l2:1/2")
        threats = [Threat(norms[0], request.eps)]
    for threat in threats:
        if threat.norm == "linf" and threat.eps > 1:
            raise ConfigError(f"a linf radius of {threat.eps:g} is more than the whole range of a pixel", "eps",
                              f"write {threat.eps:g}/255 for pixels in [0, 1]")
    return threats


def _threat(text: str) -> Threat:
    norm, colon, eps = text.partition(":")
    try:
        value = float(Fraction(eps.strip()))
    except (ValueError, ZeroDivisionError, OverflowError):
        value = 0.0
    if norm not in ("linf", "l2", "l1") or not colon or not 1e-6 <= value <= 1e4:
        raise ConfigError(f"{text[:80]!r} is not a threat", "threats", "write norm:eps, such as linf:8/255 or l2:1/2")
    return Threat(norm, value)
