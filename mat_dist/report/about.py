"""Sections about the run itself: what it was, what is missing, its settings and surroundings."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime
from typing import Any

from mat_dist.attacks.norms import Threat
from mat_dist.config import dump_config
from mat_dist.errors import DONE
from mat_dist.report.files import RunFiles
from mat_dist.report.html import Markup, folded, section, tag
from mat_dist.runs.console import duration


def _several(values: list[str]) -> str:
    """Equal values counted: 3 x resnet18, wrn_28_10."""
    return ", ".join(f"{n} × {value}" if n > 1 else value for value, n in Counter(values).items())


def status(run: RunFiles) -> str:
    """How the last attempt ended, in words."""
    attempts = run.exit.get("attempts")
    last: Any = attempts[-1] if isinstance(attempts, list) and attempts else None
    if not isinstance(last, dict):
        return "unknown: there is no record of its end"
    if last.get("code") == DONE:
        return "done"
    return f"{last.get('state')}, exit code {last.get('code')}: {last.get('what')} ({last.get('where')})"


def _took(run: RunFiles) -> str:
    """Wall time of the last attempt."""
    try:
        begun = datetime.fromisoformat(run.environment["attempts"][-1]["started"])
        return duration((datetime.fromisoformat(run.exit["attempts"][-1]["time"]) - begun).total_seconds())
    except (KeyError, IndexError, TypeError, ValueError):
        return "-"


def facts(run: RunFiles) -> Markup:
    """The run in a dozen words."""
    config, peers = run.config, run.config.peers
    threats = list(dict.fromkeys(Threat(p.threat.norm, p.threat.eps).label for p in peers))
    placement = run.environment.get("placement")
    ranks = placement.get("ranks", "-") if isinstance(placement, dict) else "-"
    devices = run.environment.get("devices")
    versions = run.environment.get("versions")
    done = run.steps[-1]["step"] if run.steps else 0
    pairs = {
        "state": status(run), "data": config.data.name, "peers": _several([p.model.name for p in peers]),
        "loss": _several([p.loss.preset for p in peers]), "threat": ", ".join(threats),
        "training attack": _several([f"{p.attack.method.upper()}-{p.attack.steps}" for p in peers]),
        "training": f"{config.train.epochs} epochs of batches of {config.train.batch_size}, {done} steps",
        "seed": config.run.seed, "ranks": f"{ranks}, {_several([str(d) for d in devices])}"
        if isinstance(devices, list) and devices else ranks,
        "wall time": _took(run) + (f" (attempt {n})" if (n := len(run.environment.get("attempts", []))) > 1 else ""),
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("mat_dist", "torch") if name in versions)
        if isinstance(versions, dict) else "-",
    }
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs.items()), class_="facts")


def notices(notes: list[str]) -> Markup | None:
    """What is missing."""
    return tag("div", tag("strong", "Not in this report"), tag("ul", *(tag("li", note) for note in notes)),
               class_="notice", role="note") if notes else None


def settings_section(run: RunFiles) -> Markup:
    """Configuration and environment, folded."""
    def text(document: dict[str, Any]) -> Markup:
        return tag("pre", json.dumps(document, indent=1, ensure_ascii=False))

    attempts = {"exit": run.exit.get("attempts", [])}
    environment = {key: value for key, value in run.environment.items() if key != "attempts"}
    return section("settings", "Settings and environment",
                   folded("Configuration (config.yaml)", tag("pre", dump_config(run.config))),
                   folded("Environment (environment.json)", text(environment)),
                   folded("Attempts (exit.json)", text(attempts)))
