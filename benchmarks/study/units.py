"""How much of its width a network uses: the units that no image moves, after steps that were too long."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks.command import Watch
from benchmarks.study.reasons import loaded, opened
from mat_dist.checkpoints.load import FinishedRun
from mat_dist.cli import tell
from mat_dist.config import load_plugins
from mat_dist.config.tree import COMMAND_LINE
from mat_dist.distributed.arithmetic import strict_arithmetic
from mat_dist.errors import ConfigError
from mat_dist.evaluation.chunks import chosen_images, pixels
from mat_dist.runs.console import show_table
from mat_dist.runs.files import reported, write_json
from mat_dist.runs.record import git_revision, versions


def main(options: Namespace) -> None:
    """The command, by the options of `__main__.py`; its settings are those of `mat_dist.evaluate`.

    Raises ConfigError, CheckpointError, DataError, OutputError.
    """
    load_plugins(options.plugin)
    runs = [word for word in options.words if "=" not in word]
    settings = [word for word in options.words if "=" in word]
    if not runs:
        raise ConfigError("no run is named", COMMAND_LINE, "give folders of finished runs, e.g. runs/NAME")
    watch, found = Watch(tell=tell), {}
    for run, images in [opened([word, *settings]) for word in runs]:
        watch.now(f"{run.folder.name}, step {run.manifest.step}")
        if run.folder.name in found:
            raise ConfigError(f"two runs are called {run.folder.name}", COMMAND_LINE, "give each a --json of its own")
        found[run.folder.name] = {"step": run.manifest.step, "weights": run.weights, "images": images,
                                  "unused": measured(run, images)}
    if options.json is not None:
        with reported(options.json.parent):
            known = {name: one for name, one in versions().items() if name != "system"}
            write_json(options.json, {"git": git_revision(), "versions": known, "runs": found})
    show(found)


def show(found: Mapping[str, Mapping[str, Any]]) -> None:
    """A line per run."""
    table = Table("run", "weights", "images", "unused units of each peer, %", title_justify="left",
                  title="Inputs of the last linear layer that are 0 on all validation images")
    for name, one in found.items():
        shares = ("-" if share is None else f"{100 * share:.0f}" for share in one["unused"].values())
        table.add_row(name, one["weights"], str(one["images"]), ", ".join(shares))
    show_table(table)


def measured(run: FinishedRun, images: int) -> dict[str, float | None]:
    """Peer -> share of its `unused_units` on so many clean images of the validation split."""
    data, device = loaded(run)
    config, models = run.config, run.models(device)
    samples = chosen_images(len(data.val), images)
    shares = {}
    for name, model in zip(run.peers, models, strict=True):
        with strict_arithmetic(), torch.no_grad(), unused_units(model) as share:
            for first in range(0, len(samples), config.eval.chunk):
                model(pixels(data.val, samples[first:first + config.eval.chunk], device, config)[0])
            shares[name] = share()
    return shares


@contextmanager
def unused_units(model: nn.Module) -> Iterator[Callable[[], float | None]]:
    """Watches the inputs of a network's last linear layer -> a function for the share of them that have been 0 on every
    image since then; None where the network has no such layer. A ReLU that lets nothing through learns no more."""
    used: list[Tensor] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        used[:] = [torch.stack([*used, (inputs[0].detach() != 0).flatten(0, -2).any(0)]).any(0)]

    last: Any = [one for one in model.modules() if isinstance(one, nn.Linear)][-1:]
    handles = [layer.register_forward_pre_hook(note) for layer in last]
    try:
        yield lambda: round(1 - used[0].double().mean().item(), 6) if used else None
    finally:
        for handle in handles:
            handle.remove()
