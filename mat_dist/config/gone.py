"""Settings that this version no longer has: what a user is told, and what becomes of runs that used them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mat_dist.config.help import canonical, settings
from mat_dist.config.tree import COMMAND_LINE, SHARED, Layer, Node, Path, both_names, cut, over
from mat_dist.errors import CheckpointError, ConfigError

VERSION = "0.2"  # the one in which they went
_OLD = "or train with version 0.1 of mat_dist"


Sibling = Callable[[str], Any]  # key within the same peer or at the same level -> its value, None where it is not given


def _never(value: Any, sibling: Sibling) -> bool:
    return False


@dataclass(frozen=True)
class Gone:
    """A setting, or some values of one, that went.

    Attributes:
        key: as in `--help`: loss.attackers, peers.N.name, step.pull.
        how: what to do instead, for the message.
        neutral: values with which a run of the old version did the same as without the setting; None: all.
        unused: (value, the other settings) -> whether it changed nothing beside them.
        values: only these values went; empty: the setting went.
        moved: its new key (of the same peer, or at the same level); it is still understood under the old one.
        put: the value of the new key, where it is not that of the old one, or (value, the other settings) -> it.
        unfit: (value, the other settings) -> whether the new key cannot say the same.
    """

    key: str
    how: str = ""
    neutral: tuple[Any, ...] | None = (None,)
    unused: Callable[[Any, Sibling], bool] = _never
    values: tuple[Any, ...] = ()
    moved: str = ""
    put: Any = None
    unfit: Callable[[Any, Sibling], bool] = _never

    def tells(self, value: Any) -> bool:
        """Whether this version does not know the setting, or this value of it."""
        known = settings().get(self.key)
        if known is None:
            return not self.values or value in self.values
        return bool(self.values) and value in self.values and value not in known.choices

    def new_value(self, value: Any, sibling: Sibling) -> Any:
        """What the new key is given; None: nothing."""
        if callable(self.put):
            return self.put(value, sibling)
        return value if self.put is None else None if value in (self.neutral or ()) else self.put


def _no_mart(value: Any, sibling: Sibling) -> bool:
    """MART is the boosted cross-entropy on own AEs with the weight of labels, and its KL: not one of them alone."""
    boosted = value if isinstance(value, str) else sibling("loss.hard_loss")
    boosted = boosted or ("bce" if sibling("loss.preset") == "mart" else "ce")
    beta = sibling("methods.mart.beta")  # loss.mart_beta has moved there
    if value == "bce" and (beta == 0 or (beta is None and sibling("loss.preset") != "mart")):
        return True
    given, share = sibling("loss.hard_weight"), 1 - (sibling("loss.kd_weight") or 0)
    return value not in (0, None, "ce") and (boosted != "bce" or given not in (None, share)
                                             or sibling("loss.hard_own") not in (None, 1))


def _tracker(name: str) -> Callable[[Any, Sibling], str | None]:
    """`log.trackers` with this one, or without it."""
    def put(value: Any, sibling: Sibling) -> str | None:
        others = [one for one in (sibling("log.trackers") or "").split(",") if one and one.partition(":")[0] != name]
        mine = [] if value in (False, None) else [name if value is True else f"{name}:{value}"]
        return ",".join([*others, *mine]) or None
    return put


GONE = (
    Gone("loss.attackers", f"every peer learns from the AEs of all others: leave it out, {_OLD}", ("all", None)),
    Gone("loss.gate", f"teachers are not weighed by confidence: leave it out or use loss.kd_where, {_OLD}", (0, None)),
    Gone("loss.teacher_agg", f"distillation is the mean of the divergences: leave it out, {_OLD}", ("mean_kl", None)),
    Gone("loss.t2_scale", f"distillation counts T squared times: leave it out, {_OLD}", (True, None)),
    Gone("loss.base_scale", f"scale the weights of the loss themselves, {_OLD}", (1, None)),
    Gone("loss.trades_beta", moved="loss.pair_kl"),
    Gone("loss.trades_temperature", f"loss.temperature holds for loss.pair_kl too: leave it out, {_OLD}", (None,),
         unused=lambda value, sibling: not sibling("loss.pair_kl") or value == (sibling("loss.temperature") or 1)),
    Gone("loss.pair_weight", moved="loss.pair_mse"),
    Gone("loss.mart_beta", f"use loss.preset: mart, {_OLD}", moved="methods.mart.beta", unfit=_no_mart,
         unused=lambda value, sibling: not value and sibling("loss.hard_loss") != "bce"),
    Gone("loss.hard_loss", f"use loss.preset: mart, {_OLD}", ("ce", None), moved="loss.hard_weight", put=0.0,
         unfit=_no_mart),
    Gone("union.ramp_weight", moved="methods.ramp.weight",
         unused=lambda value, sibling: value == 5 or sibling("union.strategy") != "ramp"),
    Gone("union.projection_beta", neutral=(0, None), moved="methods.ramp.projection"),
    Gone("attack.split_batch", f"every peer attacks the whole batch: leave it out, {_OLD}", (False,)),
    Gone("attack.l1_share", f"the norm says how many values a step moves: leave it out, {_OLD}", (None,),
         unused=lambda value, sibling: value == (0.05 if sibling("attack.method") == "apgd" else 0.01)),
    Gone("attack.start", values=("previous",), neutral=(), moved="methods.warm_start.reset_epochs",
         put=lambda value, sibling: sibling("methods.warm_start.reset_epochs") or 0),
    # Images without a perturbation began at uniform noise, whatever the preset's start.
    Gone("attack.start", values=("previous",), neutral=(), moved="attack.start", put="uniform"),
    Gone("attack.reset_epochs", neutral=(0, None), moved="methods.warm_start.reset_epochs"),
    Gone("attack.eps_warmup_epochs", f"attacks have their whole radius: leave it out, {_OLD}", (0, None)),
    Gone("attack.steps_warmup_epochs", f"attacks have all their steps from the start: leave it out, {_OLD}", (0, None)),
    Gone("optim.momentum", neutral=(0.9, None), moved="optim.args.momentum"),
    Gone("optim.nesterov", neutral=(False, None), moved="optim.args.nesterov"),
    Gone("optim.decay_norm_bias", neutral=(True, None), moved="optim.args.decay_norm_bias"),
    Gone("optim.gamma", f"piecewise divides the rate by 10: leave it out, {_OLD}", (0.1, None)),
    Gone("optim.awp_gamma", neutral=(0, None), moved="methods.awp.gamma"),
    Gone("optim.awp_warmup_epochs", f"weights are perturbed from the start: leave it out, {_OLD}", (0, None),
         unused=lambda value, sibling: not sibling("methods.awp.gamma")),
    Gone("optim.swa_start", neutral=(None,), moved="methods.swa.start"),
    Gone("step.opinions", f"every peer's logits travel: leave it out, {_OLD}", ("all",)),
    Gone("step.bn", f"batch statistics are per source of AEs: leave it out, {_OLD}", ("separate",)),
    Gone("step.channels_last", f"images lie channels last: leave it out, {_OLD}", (True,)),
    Gone("step.attack_copy", "attacks run on a copy that is checked: leave it out", None),
    Gone("step.attack_engine", neutral=(None,), moved="step.engine", put=lambda value, sibling: {
        "cuda_graph": "graph", "compile": "compile"}.get(value)),  # eager and model: the same AEs but for rounding
    Gone("step.microbatches", moved="train.accumulate"),
    Gone("step.pull", f"weights of peers are not pulled together: leave it out, {_OLD}", (0,)),
    Gone("step.pull_every", "leave it out together with step.pull", None),
    Gone("step.on_nonfinite", "use skip", values=("quarantine",)),
    Gone("peers.N.init_stream", "use stream, which keys the initial weights too", (None,)),
    Gone("eval.test", neutral=(True, None), moved="eval.test_steps", put=0),
    Gone("eval.ensemble", "use prob or logit", values=("weights",)),
    Gone("eval.restarts", "attacks start once; python -m mat_dist.evaluate takes restarts=", (1, None)),
    Gone("eval.step_size", "steps are 2.5 eps / steps long; python -m mat_dist.evaluate takes step_size=", (None,)),
    Gone("checkpoint.background", "checkpoints are always written while training goes on: leave it out", None),
    Gone("log.tensorboard", neutral=(False, None), moved="log.trackers", put=_tracker("tensorboard")),
    Gone("log.wandb", moved="log.trackers", put=_tracker("wandb")),
    Gone("data.augment.cutout", f"use data.augment.idbh, which erases too, or leave it out, {_OLD}", (0, None)),
    Gone("data.poison", "write a data set in a plug-in: docs/examples/poisoned_data.py", (None,)),
)


def is_gone(path: Path) -> bool:
    """Whether a setting, or one of its values, may have gone."""
    return canonical(path) in {gone.key for gone in GONE}


def without_gone(layer: Layer, problems: list[ConfigError], *, run: str | None) -> Layer:
    """`layer` (with `peers` as a list) without settings that went; what was asked for in vain is added to `problems`.

    Args:
        run: the file of `layer`, where it is the `config.yaml` of a run. An older version wrote every setting there:
            those that changed nothing are left out. Settings that moved are moved wherever they are given.

    Raises:
        CheckpointError: the run was trained with settings that went.
    """
    lost = []
    for gone, path, node in list(_found(layer)):
        layer = layer.changed(path, cut)
        ours = path[:2] if path[0] == "peers" else ()
        sibling = partial(_sibling, layer, ours)
        old = run is not None and node.source.startswith(run)
        unused = gone.neutral is None or node.value in gone.neutral or gone.unused(node.value, sibling)
        if old and unused:
            continue
        if gone.moved and not gone.unfit(node.value, sibling):
            layer = _moved(layer, gone, (*ours, *gone.moved.split(".")), node, problems)
        elif old:
            lost.append(f"{node.key}={node.value}")
        else:
            problems.append(_problem(gone, node))
    if lost:
        raise CheckpointError(f"version {VERSION} no longer has settings of this run: {', '.join(lost[:8])}", str(run),
                              "use version 0.1 of mat_dist for it")
    return layer


def _moved(layer: Layer, gone: Gone, path: Path, node: Node, problems: list[ConfigError]) -> Layer:
    """`layer` with `node` under its new key. Of both names the command line's counts, else the new one."""
    there, depth = layer.locate(path)
    if depth == len(path) and there.key.endswith(gone.moved):  # else it came from another old name
        by_command = node.source == COMMAND_LINE, there.source == COMMAND_LINE
        if gone.put is None and _origin(there) == _origin(node):
            problems.append(both_names(node, there))
            return layer
        if by_command == (False, True) or (gone.put is None and not by_command[0]):
            return layer
    if gone.put is None and path[-3:-2] == ("methods",) and node.value in (gone.neutral or ()):
        path, value = path[:-1], None  # what switched a method off
    else:
        value = gone.new_value(node.value, partial(_sibling, layer, path[:2] if path[0] == "peers" else ()))
        if value is None:
            return layer if gone.put is not None and not callable(gone.put) else layer.changed(path, cut)
    return layer.changed(path, lambda tree, inside: over(tree, {inside: replace(node, value=value)}))


def _origin(node: Node) -> str:
    """The file without the line, or the command line."""
    return node.source.rpartition(":")[0] or node.source


def _sibling(layer: Layer, ours: Path, key: str) -> Any:
    path = (*ours, *key.split("."))
    node, depth = layer.locate(path)
    return node.value if depth == len(path) else None


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
    what = f"{node.key}={node.value}" if gone.values else node.key
    return ConfigError(f"{what} went in version {VERSION}", node.where, gone.how)
