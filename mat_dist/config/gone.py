"""Settings that this version no longer has: what a user is told, and what becomes of runs that used them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from mat_dist.config.help import canonical, settings
from mat_dist.config.tree import SHARED, Layer, Node, Path, Tree, cut, over
from mat_dist.errors import CheckpointError, ConfigError

VERSION = "0.2"  # the one in which they went
_OLD = "or train with version 0.1 of mat_dist"


@dataclass(frozen=True)
class Gone:
    """A setting, or some values of one, that went.

    Attributes:
        key: as in `--help`: loss.attackers, peers.N.name, step.pull.
        how: what to do instead, for the message.
        neutral: values with which a run of the old version did the same as without the setting; None: all.
        values: only these values went; empty: the setting went.
        moved: its new key (of the same peer, or at the same level); its values are still understood.
    """

    key: str
    how: str = ""
    neutral: tuple[Any, ...] | None = (None,)
    values: tuple[Any, ...] = ()
    moved: str = ""

    def tells(self, value: Any) -> bool:
        """Whether this version does not know the setting, or this value of it."""
        known = settings().get(self.key)
        if known is None:
            return not self.values or value in self.values
        return bool(self.values) and value in self.values and value not in known.choices


GONE = (
    Gone("loss.attackers", f"every peer learns from the AEs of all others: leave it out, {_OLD}", ("all", None)),
    Gone("attack.split_batch", f"every peer attacks the whole batch: leave it out, {_OLD}", (False,)),
    Gone("step.opinions", f"every peer's logits travel: leave it out, {_OLD}", ("all",)),
    Gone("step.bn", f"batch statistics are per source of AEs: leave it out, {_OLD}", ("separate",)),
    Gone("step.pull", f"weights of peers are not pulled together: leave it out, {_OLD}", (0,)),
    Gone("step.pull_every", "leave it out together with step.pull", None),
    Gone("peers.N.init_stream", "use stream, which keys the initial weights too", (None,)),
    Gone("step.on_nonfinite", "use skip", values=("quarantine",)),
    Gone("eval.ensemble", "use prob or logit", values=("weights",)),
    Gone("data.poison", "write a data set in a plug-in: docs/examples/poisoned_data.py", (None,)),
)


def is_gone(path: Path) -> bool:
    """Whether a setting, or one of its values, may have gone."""
    return canonical(path) in {gone.key for gone in GONE}


def without_gone(layer: Layer, problems: list[ConfigError], *, run: str | None) -> Layer:
    """`layer` (with `peers` as a list) without settings that went; what was asked for in vain is added to `problems`.

    Args:
        run: the file of `layer`, where it is the `config.yaml` of a run. An older version wrote every setting there:
            those that changed nothing are left out, those that moved are moved.

    Raises:
        CheckpointError: the run was trained with settings that went.
    """
    lost = []
    for gone, path, node in list(_found(layer)):
        layer = layer.changed(path, cut)
        if run is None or not node.source.startswith(run):
            problems.append(_problem(gone, node))
        elif gone.neutral is None or node.value in gone.neutral:
            continue
        elif gone.moved:
            new = (*(path[:2] if path[0] == "peers" else ()), *gone.moved.split("."))
            layer = layer.changed(new, partial(_put, node))
        else:
            lost.append(f"{node.key}={node.value}")
    if lost:
        raise CheckpointError(f"version {VERSION} no longer has settings of this run: {', '.join(lost[:8])}", str(run),
                              "use version 0.1 of mat_dist for it")
    return layer


def _put(node: Node, tree: Tree, path: Path) -> Tree:
    return over(tree, {path: node})


def _found(layer: Layer) -> Iterator[tuple[Gone, Path, Node]]:
    """Each setting of `layer` that went, with its path."""
    for gone in GONE:
        section, *rest = gone.key.split(".")
        paths: list[Path] = [] if section == "peers" else [(section, *rest)]
        if section == "peers" or section in SHARED:
            own = rest[1:] if section == "peers" else [section, *rest]
            paths += [("peers", index, *own) for index in range(len(layer.peers or ()))]
        for path in paths:
            node, depth = layer.locate(path)
            if depth == len(path) and gone.tells(node.value):
                yield gone, path, node


def _problem(gone: Gone, node: Node) -> ConfigError:
    if gone.moved:
        section, count = node.key, gone.key.removeprefix("peers.N.").count(".") + 1
        new = ".".join([*section.split(".")[:-count], gone.moved])
        return ConfigError(f"{node.key} has another name since version {VERSION}", node.where, f"write {new}")
    what = f"{node.key}={node.value}" if gone.values else node.key
    return ConfigError(f"{what} went in version {VERSION}", node.where, gone.how)
