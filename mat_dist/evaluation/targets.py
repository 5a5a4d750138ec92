"""Whom to attack and how: from a request and a run's settings to modules, threats and attack plans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mat_dist.attacks.norms import Threat
from mat_dist.checkpoints.load import ENSEMBLE, open_run, split_peer
from mat_dist.config import load_config
from mat_dist.config.fields import parse_threats
from mat_dist.config.norms import UNIONS, data_sets, known_norms, standard_radii, union_radii
from mat_dist.config.schema import Config, EvalConfig, PeerConfig
from mat_dist.errors import ConfigError
from mat_dist.evaluation.attacks import AttackPlan, Job, Target
from mat_dist.evaluation.settings import MENU, PEERS, TARGETED, Request, find_run, made_by, refuse_unfinished
from mat_dist.models import Ensemble
from mat_dist.models.ensemble import RULES
from mat_dist.models.registry import Images, of_plugins

# ------------------------------------------------------------------------------------------------ targets


def target_names(request: Request, config: Config) -> list[str]:
    """Resolved names of the targets, in the order asked for. Raises ConfigError for an unknown one."""
    peers = [str(p.name) for p in config.peers]
    ruled = [f"{ENSEMBLE}:{rule}" for rule in RULES]
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

    def ensemble(rule: str) -> Ensemble:
        return Ensemble([one.model for one in members], rule).eval()

    def target(name: str) -> Target:
        if name in single:
            return single[name]
        rule = name.removeprefix(f"{ENSEMBLE}:")
        model = ensemble(rule)
        return Target(name, model, (ensemble("logit"), ensemble("prob")) if rule == "vote" else (model,), members)

    return [target(name) for name in names]


# ------------------------------------------------------------------------------------------------ attacks


def make_job(request: Request, config: Config) -> Job:
    """The attacks that are asked for, on the threats that are asked for. Raises ConfigError where they do not fit."""
    seed = config.run.seed if request.seed is None else request.seed
    threats = threats_asked(request, threats_of(config.peers), config.data.name)
    for name, threat in ((name, threat) for name in request.attacks for threat in threats):
        if MENU[name].norm not in ("", threat.norm):
            raise ConfigError(f"{name} knows {MENU[name].norm} alone, not {threat.norm}", "attacks",
                              f"leave {name} out, or ask for threats in {MENU[name].norm}")
    return Job(tuple(threats), attack_plans(request, config), tuple(request.attacks), request.version,
               tuple(request.custom), request.transfer, seed, request.queries)


def attack_plans(request: Request, config: Config) -> dict[str, AttackPlan]:
    """The plan of each gradient attack of our own, by name."""
    asked: dict[str, Any] = {"steps": request.steps or test_steps(config),
                             "restarts": request.restarts, "step_size": request.step_size}
    plans = {name: AttackPlan(**asked | dict(MENU[name].plan)) for name in made_by(request.attacks, "pgd")}
    if TARGETED in plans:
        plans[TARGETED] = replace(plans[TARGETED], targets=request.targets_per_image)
    return plans


def test_steps(config: Config) -> int:
    """PGD steps on test images; the default where the training was told to make no test (0)."""
    return config.eval.test_steps or EvalConfig().test_steps


def threats_of(peers: Sequence[PeerConfig]) -> list[Threat]:
    """The distinct threats of a cohort, in peer order; every target is attacked with each."""
    union = [parse_threats(p.union.threats) if p.union.threats else [] for p in peers]
    return list(dict.fromkeys(Threat(*pair) for p, more in zip(peers, union, strict=True)
                              for pair in ((p.threat.norm, p.threat.eps), *more)))


def threats_asked(request: Request, trained: Sequence[Threat], data: str) -> list[Threat]:
    """The threats to attack with: those of the peers unless others are asked for.

    Args:
        data: name of the data set, for standard radii.

    Raises ConfigError for a threat that cannot be read, a radius that is no radius, or an attack that cannot do it.
    """
    found = list(dict.fromkeys(t.norm for t in trained))
    threats: list[Threat] = []
    for text in request.threats:
        if request.eps is not None and text in known_norms():  # its radius is given beside it
            threats.append(Threat(text, request.eps))
        else:
            threats += _threats(text, found, data)
    threats = threats or list(trained)
    if len(set(threats)) < len(threats):
        raise ConfigError("a threat is asked for twice", "threats", "leave one out")
    if request.eps is not None:
        found = list(dict.fromkeys(t.norm for t in threats))
        if len(found) > 1:
            raise ConfigError(f"one eps for the norms {', '.join(found)}", "eps", "write threats=linf:8/255,l2:1/2")
        threats = [Threat(found[0], request.eps)]
    for threat in threats:
        if threat.eps > threat.info.largest:
            raise ConfigError(f"a {threat.norm} radius of {threat.eps:g} is more than the whole range of a pixel",
                              "eps", f"write {threat.eps:g}/255 for pixels in [0, 1]")
    return threats


def _threats(text: str, trained: Sequence[str], data: str) -> list[Threat]:
    """norm:eps, norm (its standard radius), norm:DATA, standard (the peers' norms) or union:NAME -> its threats."""
    norm, _, eps = (part.strip() for part in text.partition(":"))
    found: Iterable[tuple[str, float]]
    try:
        if norm == "union":
            found = union_radii(eps).items()
        elif text == "standard":
            found = standard_radii(data, trained).items()
        elif norm in known_norms() and eps in ("", "standard", *data_sets()):
            found = standard_radii(data if eps in ("", "standard") else eps, [norm]).items()
        else:
            found = parse_threats(text)
        return [Threat(*one) for one in found]
    except ValueError as error:
        raise ConfigError(str(error), "threats",
                          f"write norm:eps, such as linf:8/255, norm for its standard radius, standard, or union: and "
                          f"one of {', '.join(UNIONS)}") from error


# ------------------------------------------------------------------------------------------------ sources


def load_sources(words: Sequence[str], images: Images, config: Config,
                 device: torch.device) -> tuple[list[Target], list[dict[str, Any]]]:
    """The peers of other runs as attackers, and what the result file says about each run.

    Of each run the checkpoint that the validation split chose, else the latest; averaged weights where they are kept.

    Args:
        words: RUN or RUN:peer.
        images: what the targets take; the sources must take the same.
        config: of the evaluation, whose precision they get.

    Raises:
        ConfigError: no such run or peer, or models for other images or classes.
        OutputError: a run is still being written.
        CheckpointError: a run without a checkpoint, or with a damaged one.
    """
    found: dict[str, Target] = {}
    about: dict[Path, dict[str, Any]] = {}
    for word in words:
        run_word, peer = split_peer(word)
        folder = find_run(run_word, "sources")
        refuse_unfinished(folder)
        # The normalisation is a layer: what it was built with does not matter, the checkpoint's values are loaded.
        theirs = load_config(str(folder.config)).model_copy(update={"step": config.step})
        run = open_run(folder.path, config=theirs)
        if peer is not None and peer not in run.peers:
            raise ConfigError(f"there is no peer {peer[:80]!r}", f"sources={word[:200]}",
                              f"choose from {', '.join(run.peers)}")
        told = run.images
        if (told.shape, told.classes) != (images.shape, images.classes):
            raise ConfigError(f"models for images {told.shape} of {told.classes} classes, the targets take "
                              f"{images.shape} of {images.classes}", f"sources={word[:200]}",
                              "give a run on images of the same size and classes")
        path = folder.path.resolve()
        taken = any(one["run"] == path.name for one in about.values())  # by a run of that name in another place
        name = about[path]["run"] if path in about else str(folder.path) if taken else path.name
        chosen = [one for one in run.peers if peer in (None, one)]
        for one in chosen:
            model = run.peer(one, device)
            found[f"{name}/{one}"] = Target(f"{name}/{one}", model, (model,))
        about[path] = {"run": name, "peers": [*about.get(path, {"peers": []})["peers"], *chosen],
                       "step": run.manifest.step, "weights": run.weights,
                       "files": {entry.name: entry.sha256 for entry in run.manifest.files}, **of_plugins(theirs.peers)}
    return list(found.values()), list(about.values())
