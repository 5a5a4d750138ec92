"""The part of the command line that describes a checkpoint which is not ours. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from mat_dist.config import load_config
from mat_dist.config.schema import Config, Number, Section
from mat_dist.config.tree import COMMAND_LINE, joined
from mat_dist.errors import ConfigError
from mat_dist.evaluation.request import FREE_SETTINGS, Words

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".safetensors")
TEXTS = (".yaml", ".yml", ".json", ".jsonl", ".csv", ".py", ".txt", ".log", ".html")  # of a run, given by mistake
# Settings of the run that an imported checkpoint gets. For a file beside a run, the run gives the data.
MODEL_SETTINGS = ("model", "model.")
RUN_SETTINGS = ("data.", "run.seed", "run.root", "step.precision")


class Options(Section):
    """What a state dict does not tell about itself."""

    mean: Annotated[tuple[Number, ...] | None, Words] = Field(
        None, description="FILE.pt: mean per channel that the weights were trained with, for pixels in [0, 1]")
    std: Annotated[tuple[Number, ...] | None, Words] = Field(None, description="FILE.pt: deviation per channel")
    normalise: Literal["data", "none"] | None = Field(
        None, description="FILE.pt, instead of mean and std: data: those of the training images; none")
    out: str | None = Field(None, min_length=1, description="FILE.pt: folder for the results; default "
                                                            "runs/<file>-<digest>")

    @model_validator(mode="after")
    def _together(self) -> Options:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean=... and std=... belong together")
        if self.mean is not None and self.normalise is not None:
            raise ValueError("give mean=... and std=..., or normalise=..., not both")
        if not all(0 <= m <= 1 for m in self.mean or ()) or not all(0 < s <= 1 for s in self.std or ()):
            raise ValueError("mean or std is not for pixels in [0, 1]: divide those for bytes by 255")
        return self


@dataclass(frozen=True)
class Importing:
    """How files are to be read: options and settings. `subject`: the file that is evaluated, None for a run."""

    subject: Path | None
    options: Options
    settings: tuple[str, ...]

    def config(self, free: Sequence[str], run: Config | None = None, beside: Path | None = None) -> Config:
        """The settings of the run folder that a file becomes: one peer.

        Args:
            free: settings that every evaluation may set.
            run: settings of the run that is evaluated, where the file is a source; they give the data.
            beside: the folder of that run.

        Raises ConfigError.
        """
        words = [*self.settings, *(word for word in free if word.startswith(("data.", "run.", "comm.")))]
        owner = self.subject.absolute().parents[2:3] if self.subject is not None else []  # <run>/checkpoints/step_N/
        ours = f"; or evaluate its run: {owner[0]}" if owner and (owner[0] / "config.yaml").is_file() else ""
        lacking = [(key, how + ours) for key, how in (
            ("model", "write model=resnet18 or another architecture"),
            ("data.name", "write data.name=cifar10 or another data set")) if not self._has(key, words, run)]
        if lacking:
            raise joined([ConfigError("a state dict does not tell it", key, how) for key, how in lacking], COMMAND_LINE)
        config = load_config("base", ["peers=1", "loss=at", "train.batch_size=2", *words])
        if run is None or beside is None:
            return config
        where = run.run.model_copy(update={"root": str(beside.resolve().parent)})
        return config.model_copy(update={"data": run.data, "run": where, "step": run.step})

    @staticmethod
    def _has(key: str, words: Sequence[str], run: Config | None) -> bool:
        return (run is not None and key.startswith("data")) or any(
            word.startswith((f"{key}=", f"{key}.name=")) for word in words)


def is_file(word: str) -> bool:
    """Whether a word of the command line means a checkpoint file, not the folder of a run."""
    path = Path(word)
    return (path.is_file() and path.suffix not in TEXTS) or (path.suffix in SUFFIXES and not path.is_dir())


def split_words(words: Sequence[str]) -> tuple[Importing | None, list[str]]:
    """What the command line says about files, and all other words; None where it names no file, or compares runs.

    A file is evaluated alone unless targets=... says more: its ensemble has one member.
    """
    names, sources, skip = [], [], False
    for word in words:
        key, equals, value = word.partition("=")
        if skip:
            skip = False
        elif word == "--plugin":
            skip = True
        elif key == "sources":
            sources += value.strip("[]").split(",")
        elif not word.startswith("-") and (not equals or "/" in key):
            names.append(word)
    subject = Path(names[0]) if names and is_file(names[0]) else None
    if "--compare" in words or (subject is None and not any(is_file(source.strip()) for source in sources)):
        return None, list(words)
    mine = {key for key in Options.model_fields if subject is not None or key != "out"}
    owned = (*MODEL_SETTINGS, *(RUN_SETTINGS if subject is not None else ()))
    own: dict[str, str] = {}
    settings, rest = [], []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in mine:
            own[key] = value
        elif equals and not key.startswith(FREE_SETTINGS) and any(
                key.startswith(name) if name.endswith(".") else key == name for name in owned):
            settings.append(word)
        else:
            rest.append(word)
    if subject is not None and not any(word.startswith("targets=") for word in words):
        rest.append("targets=peers")
    try:
        options = Options(**own)
    except ValidationError as error:
        raise joined([_problem(one) for one in error.errors()], COMMAND_LINE) from None
    return Importing(subject, options, tuple(settings)), rest


def _problem(error: Any) -> ConfigError:
    text = str(error["msg"]).removeprefix("Value error, ")
    key = str(error["loc"][0]) if error["loc"] else ""
    if not key:
        return ConfigError(text, COMMAND_LINE, "see --help")
    found = str(error["input"])[:80]
    return ConfigError(f"{key}: {text}, found {found!r}", COMMAND_LINE, str(Options.model_fields[key].description))
