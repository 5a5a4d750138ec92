"""Whom to attack and how: from a request and a run's settings to modules, threats and attack plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mat_dist.attacks.norms import Threat
from mat_dist.config.fields import NORMS, parse_threats
from mat_dist.config.schema import Config
from mat_dist.errors import ConfigError
from mat_dist.evaluation import radii
from mat_dist.evaluation.attacks import AttackPlan
from mat_dist.evaluation.menu import MENU, TARGETED, made_by
from mat_dist.evaluation.request import ENSEMBLE, PEERS, Request
from mat_dist.models import Ensemble, soup
from mat_dist.models.ensemble import RULES, WEIGHTS


@dataclass(frozen=True)
class Target:
    """What is evaluated.

    Attributes:
        name: of the peer, or ensemble:<rule>; ensemble:weights is one network, the mean of the peers' weights.
        model: the classifier as it would be deployed.
        attacked: the modules that gradient attacks use; each AE is replayed on `model`. The model itself, but for a
            vote, which has no gradient: then the mean-logit and the mean-probability ensemble.
        members: of an ensemble, whose AEs join the candidates.
    """

    name: str
    model: nn.Module
    attacked: tuple[nn.Module, ...]
    members: tuple[Target, ...] = ()

    @property
    def surrogates(self) -> bool:
        """Whether gradient attacks use other modules than the model itself."""
        return self.model not in self.attacked


def target_names(request: Request, config: Config) -> list[str]:
    """Resolved names of the targets, in the order asked for. Raises ConfigError for an unknown one."""
    peers = [str(p.name) for p in config.peers]
    ruled = [f"{ENSEMBLE}:{rule}" for rule in (*RULES, WEIGHTS)]
    rules = {ENSEMBLE: f"{ENSEMBLE}:{config.eval.ensemble}", **dict(zip(ruled, ruled, strict=True))}
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


def make_targets(names: Sequence[str], peers: Sequence[str], models: Sequence[nn.Module],
                 frozen: Sequence[str] = ()) -> list[Target]:
    """The targets of resolved names, over the models of all peers.

    Args:
        frozen: names of the peers that did not train: they are no members of the ensemble.
    """
    single = {name: Target(name, model, (model,)) for name, model in zip(peers, models, strict=True)}
    members = tuple(one for name, one in single.items() if name not in frozen)
    voters = [one.model for one in members]
    targets = []
    for name in names:
        if name in single:
            targets.append(single[name])
            continue
        rule = name.removeprefix(f"{ENSEMBLE}:")
        if rule == WEIGHTS:
            mean = soup(voters)
            targets.append(Target(name, mean, (mean,)))
            continue
        model = Ensemble(voters, rule).eval()
        surrogates = (Ensemble(voters, "logit").eval(), Ensemble(voters, "prob").eval())
        targets.append(Target(name, model, surrogates if rule == "vote" else (model,), members))
    return targets


def attack_plans(request: Request, config: Config) -> dict[str, AttackPlan]:
    """The plan of each gradient attack of our own, by name."""
    asked: dict[str, Any] = {"steps": request.steps or config.eval.test_steps,
                             "restarts": request.restarts or config.eval.restarts,
                             "step_size": request.step_size or config.eval.step_size}
    plans = {name: AttackPlan(**asked | dict(MENU[name].plan)) for name in made_by(request.attacks, "pgd")}
    if TARGETED in plans:
        plans[TARGETED] = replace(plans[TARGETED], targets=request.targets_per_image)
    return plans


FGSM = AttackPlan(**MENU["fgsm"].plan)


def threats_asked(request: Request, trained: Sequence[Threat], data: str) -> list[Threat]:
    """The threats to attack with: those of the peers unless others are asked for.

    Args:
        data: name of the data set, for standard radii.

    Raises ConfigError for a threat that cannot be read, a radius that is no radius, or an attack that cannot do it.
    """
    norms = list(dict.fromkeys(t.norm for t in trained))
    threats = [threat for text in request.threats for threat in _threats(text, norms, data)] or list(trained)
    if len(set(threats)) < len(threats):
        raise ConfigError("a threat is asked for twice", "threats", "leave one out")
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


def _threats(text: str, trained: Sequence[str], data: str) -> list[Threat]:
    """norm:eps, norm:standard, norm:DATA, standard (the peers' norms) or union:NAME -> its threats."""
    norm, _, eps = (part.strip() for part in text.partition(":"))
    if norm == radii.UNION:
        return [Threat(*one) for one in radii.union(eps).items()]
    if text == radii.STANDARD:
        return [Threat(*one) for one in radii.standard(data, trained).items()]
    if norm in NORMS and (eps == radii.STANDARD or eps in radii.DATA_SETS):
        return [Threat(*one) for one in radii.standard(data if eps == radii.STANDARD else eps, [norm]).items()]
    try:
        return [Threat(*one) for one in parse_threats(text)]
    except ValueError as error:
        raise ConfigError(str(error), "threats",
                          f"write norm:eps, such as linf:8/255, norm:standard, standard, or union: and one of "
                          f"{', '.join(radii.UNIONS)}") from error
