"""What an evaluation is asked for: attacks by name, settings, the words of the command line. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from mat_dist.config import config_folders, load_config
from mat_dist.config.fields import Integer, Number, Section
from mat_dist.config.help import Options, setting
from mat_dist.config.load import find_config
from mat_dist.config.norms import UNIONS
from mat_dist.config.schema import Config
from mat_dist.config.tree import COMMAND_LINE, joined
from mat_dist.errors import ConfigError, OutputError, nearest
from mat_dist.evaluation.results import ENSEMBLE
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import RunLock

# ------------------------------------------------------------------------------------------------ attacks


@dataclass(frozen=True)
class Kind:
    """One attack. Its maker: `package` is pyautoattack, the others are ours (mat_dist/attacks/)."""

    maker: Literal["pgd", "noise", "search", "relaxation", "package"]
    meaning: str  # in a few words
    # Of PGD, what differs from `AttackPlan` with the request's steps, restarts and step size.
    plan: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    white_box: bool = True  # it follows gradients, so that nothing else should break more
    # With fewer it cannot be made: the DLR loss divides by the gap to the third largest logit, its targeted form by the
    # fourth's.
    fewest_classes: int = 2
    norm: str = ""  # the only one that it knows, or empty


# From the clean image a second start would repeat the first.
_FROM_CLEAN = {"start": "zero", "restarts": 1}

MENU: Mapping[str, Kind] = MappingProxyType({
    "uniform": Kind("noise", "uniform noise in the ball", white_box=False),
    "gaussian": Kind("noise", "Gaussian noise cut to the ball", white_box=False),
    # 2.5 eps, which the projection cuts to eps: the corner of the ball that FGSM takes.
    "fgsm": Kind("pgd", "one step to the edge of the ball", {**_FROM_CLEAN, "steps": 1, "step_size": None}),
    # Dong et al., CVPR 2018: decay 1.0, steps of eps / steps from the clean image.
    "mifgsm": Kind("pgd", "FGSM in steps with momentum", {**_FROM_CLEAN, "momentum": 1.0, "reach": 1.0}),
    "pgd": Kind("pgd", "PGD on the cross-entropy"),
    "cw": Kind("pgd", "PGD on the margin", {"loss": "margin"}),
    "targeted": Kind("pgd", "PGD towards the most likely wrong classes", {"loss": "ce_targeted"}),
    "apgd": Kind("pgd", "Auto-PGD on the cross-entropy, ours", {"reach": None}),
    "cr": Kind("relaxation", "constraint relaxation, some 50 passes", norm="linf"),
    "search": Kind("search", "random search with square patches", white_box=False),
    "apgd-ce": Kind("package", "Auto-PGD on the cross-entropy"),
    "apgd-dlr": Kind("package", "Auto-PGD on the DLR loss", fewest_classes=3),
    "apgd-t": Kind("package", "Auto-PGD on the targeted DLR loss", fewest_classes=4),
    "fab": Kind("package", "FAB, the smallest perturbation"),
    "fab-t": Kind("package", "FAB towards single classes"),
    "square": Kind("package", "Square, without gradients", white_box=False),
    "autoattack": Kind("package", "several of the six above, see version"),
})
AUTOATTACK, SQUARE, SEARCH, TARGETED, RELAXATION = "autoattack", "square", "search", "targeted", "cr"
PARTS = tuple(name for name, kind in MENU.items() if kind.maker == "package" and name != AUTOATTACK)  # of AutoAttack


def made_by(names: Iterable[str], *makers: str) -> list[str]:
    """Those of `names` that one of the makers makes, in order."""
    return [name for name in names if MENU[name].maker in makers]


def stand_in(names: Iterable[str]) -> str | None:
    """The gradient-free attack that a target without gradient gets where the request names none; None where it does.

    Square where pyautoattack is asked for anything, else our own search.
    """
    names = list(names)
    if SQUARE in names or SEARCH in names:
        return None
    return SQUARE if made_by(names, "package") else SEARCH


# ------------------------------------------------------------------------------------------------ settings

PEERS = "peers"
READERS = {"targets_per_image": TARGETED, "queries": SEARCH, "version": AUTOATTACK}  # the attack that reads a setting
# Settings of the run that change neither its models nor its images.
FREE_SETTINGS = ("run.device", "run.threads", "run.deterministic", "comm.", "data.root", "data.cache",
                 "data.download", "data.residency", "eval.chunk")


def _words(value: Any) -> Any:
    """`a,b` or `[a, b]` as a list."""
    return [word.strip(" \"'") for word in value.strip("[]").split(",")] if isinstance(value, str) else value


Words = BeforeValidator(_words)


def _among(known: Collection[str]) -> AfterValidator:
    def check(names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in known:
                near = nearest(name, known)
                raise ValueError(f"there is no attack {name[:40]!a}{f'; did you mean {near}?' if near else ''}")
        return names
    return AfterValidator(check)


def _checkpoint(word: str) -> str:
    if not re.fullmatch(r"best|latest|step_\d{1,18}", word):
        raise ValueError(f"there is no checkpoint {word[:40]!a}")
    return word


class Request(Section):
    """The evaluation's own settings."""

    targets: Annotated[tuple[str, ...], Words] = Field(
        (PEERS, ENSEMBLE), min_length=1, description="peers, names of peers, ensemble (the run's rule), "
                                                     "ensemble:prob, ensemble:logit, ensemble:vote")
    weights: Literal["auto", "raw", "ema"] = Field("auto", description="auto: averaged weights where they are kept")
    checkpoint: Annotated[str, BeforeValidator(lambda word: "latest" if word == "last" else word),
                          AfterValidator(_checkpoint)] = Field(
        "best", description="best, latest or step_N; best is latest where no evaluation chose one")
    split: Literal["test", "val", "train"] = Field("test", description="images to attack")
    images: Integer | None = Field(None, ge=1, description="a random subset of so many images; default all")
    attacks: Annotated[tuple[str, ...], Words, _among(MENU)] = Field(
        ("pgd", "cw", "autoattack"), min_length=1, description=f"{', '.join(MENU)}; the worst counts per image")
    steps: Integer | None = Field(None, ge=1, le=100000, description="steps of pgd, cw, targeted, mifgsm and apgd; "
                                                                     "default eval.test_steps, or 20 where that is 0")
    restarts: Integer | None = Field(None, ge=1, le=1000, description="random starts; default 1, in l1 5")
    step_size: Number | None = Field(None, gt=0, description="length of a step; default 2.5 eps / "
                                                             "steps, for mifgsm eps / steps; of apgd, and in l1, "
                                                             "of the first step: 2 eps, in l1 eps")
    targets_per_image: Integer = Field(3, ge=1, le=1000, description="classes that targeted leads an image to")
    queries: Integer = Field(1000, ge=1, le=10**6, description="model calls of search")
    version: Literal["standard", "plus", "rand", "custom"] = Field("standard", description="version of AutoAttack")
    custom: Annotated[tuple[str, ...], Words, _among(PARTS)] = Field(
        (), description=f"attacks of version=custom, in order: {', '.join(PARTS)}")
    threats: Annotated[tuple[str, ...], Words] = Field(
        (), description="norm:eps, such as linf:8/255,l2:1/2; norm or norm:DATA for a data set's radius; "
                        f"standard; union: and one of {', '.join(UNIONS)}; default: those of the peers")
    eps: Number | None = Field(None, gt=0, le=1e4, description="radius of all threats; for one norm only")
    seed: Integer | None = Field(None, ge=0, lt=2**63, description="seed of the attacks; default run.seed")
    transfer: bool = Field(True, description="replay each target's AEs on all others")
    sources: Annotated[tuple[str, ...], Words] = Field(
        (), description="other runs (RUN or RUN:peer; a file with model=...) whose AEs every target must withstand too")
    save: bool = Field(False, description="save the AEs as float32 and as bytes, and measure the bytes too")
    checks: Integer = Field(256, ge=0, description="images that the soundness checks look at, in whole chunks; 0: no "
                                                   "checks, and the numbers are not called reportable")

    @property
    def idle(self) -> list[str]:
        """The settings that were given, and that none of the attacks reads."""
        more = stand_in(self.attacks) if f"{ENSEMBLE}:vote" in self.targets else None
        made = [*self.attacks, *([more] if more else [])]
        read = {name for name, attack in READERS.items() if attack in made}
        read |= {name for name in ("steps", "restarts", "step_size")
                 if any(name not in MENU[attack].plan for attack in made_by(made, "pgd"))}
        return [name for name in ("steps", "restarts", "step_size", *READERS)
                if name in self.model_fields_set and name not in read]

    @model_validator(mode="after")
    def _together(self) -> Request:
        if "ensemble:weights" in self.targets:
            raise ValueError("targets: ensemble:weights, the mean of the peers' weights, went after version 0.1; ask "
                             "for ensemble, which averages what the peers say")
        if (self.version == "custom") != bool(self.custom):
            raise ValueError("version=custom and custom=... belong together")
        if self.custom and AUTOATTACK not in self.attacks:
            raise ValueError("custom=... needs attacks=autoattack")
        for name in ("attacks", "custom", "targets", "threats", "sources"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names something twice")
        return self


# ------------------------------------------------------------------------------------------------ state dicts

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".safetensors")
TEXTS = (".yaml", ".yml", ".json", ".jsonl", ".csv", ".py", ".txt", ".log", ".html")  # of a run, given by mistake
# Settings of the run that a file becomes.
MODEL_SETTINGS = ("model", "model.")
RUN_SETTINGS = ("data.", "run.seed", "run.root", "step.precision")
OF_ALL_FILES = ("mean", "std", "normalise")  # of `FileOptions`; the others are for a file that is evaluated
AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class Known:
    """An accuracy that a user knows, in [0, 1], and half a unit of its last digit."""

    share: float
    rounding: float

    @classmethod
    def read(cls, value: Any) -> Known | None:
        """0.8492, 84.92 or 84.92% -> 0.8492. Raises ValueError."""
        found = re.fullmatch(r"(\d+)(?:\.(\d*))?\s*(%?)", str(value).strip())
        number = float(found[0].rstrip("% ")) if found else 0.0
        percent = found is not None and (number > 1 or bool(found[3]))
        if found is None or not 0 < number <= (100 if percent else 1):
            raise ValueError("write an accuracy such as 0.8492 or 84.92%")
        scale = 100 if percent else 1
        return cls(number / scale, 0.5 * 10 ** -len(found[2] or "") / scale)


class FileOptions(Section):
    """What a state dict does not tell about itself."""

    mean: Annotated[tuple[Number, ...] | None, Words] = Field(
        None, description="FILE.pt: mean per channel that the weights were trained with, for pixels in [0, 1]")
    std: Annotated[tuple[Number, ...] | None, Words] = Field(None, description="FILE.pt: deviation per channel")
    normalise: Literal["data", "none"] | None = Field(
        None, description="FILE.pt, instead of mean and std: data: those of the training images; none")
    entry: str | None = Field(None, min_length=1, description="FILE.pt: which of several networks in it, such as "
                                                              "state_dict_ema; . is the top")
    clean: Annotated[Known | None, BeforeValidator(Known.read)] = Field(
        None, description="FILE.pt: an accuracy without attack that is known, such as 0.8492; it must come out again. "
                          "Without it, or confirmed=true, the numbers are not reportable")
    confirmed: bool = Field(False, description="FILE.pt: you know that the network computes what the weights were "
                                               "trained for")
    out: str | None = Field(None, min_length=1, description="FILE.pt: folder for the results; default "
                                                            "runs/<file>-<digest>")

    @model_validator(mode="after")
    def _together(self) -> FileOptions:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean=... and std=... belong together")
        if self.mean is not None and self.normalise is not None:
            raise ValueError("give mean=... and std=..., or normalise=..., not both")
        if not all(0 <= m <= 1 for m in self.mean or ()) or not all(0 < s <= 1 for s in self.std or ()):
            raise ValueError("mean or std is not for pixels in [0, 1]: divide those for bytes by 255")
        return self


@cache
def one_peer(*words: str) -> Config:
    """The settings around a model that is there already."""
    base = find_config("base", config_folders())  # the project's, whatever lies in the working directory
    return load_config(str(base), ["peers=1", "loss=at", "train.batch_size=2", *words])


@dataclass(frozen=True)
class Importing:
    """How files are to be read: options and settings. `subject`: the file that is evaluated, None for a run."""

    subject: Path | None
    options: FileOptions
    settings: tuple[str, ...]

    def config(self, free: Sequence[str], run: Config | None = None, beside: Path | None = None, *,
               threats: bool = True) -> Config:
        """The settings of the run folder that a file becomes: one peer.

        Args:
            free: settings that every evaluation may set.
            run: settings of the run that is evaluated, where the file is a source; they give the data.
            beside: the folder of that run.
            threats: whether the request names them.

        Raises ConfigError, which names all that the file does not tell.
        """
        words = [*self.settings, *(word for word in free if word.startswith(("data.", "run.", "comm.")))]
        owner = self.subject.absolute().parents[2:3] if self.subject is not None else []  # <run>/checkpoints/step_N/
        ours = f"; or evaluate its run: {owner[0]}" if owner and (owner[0] / "config.yaml").is_file() else ""
        given, lacking = {word.partition("=")[0] for word in words}, []
        if not given & {"model", "model.name"}:
            lacking.append(("model", f"write model=resnet18 or another architecture{ours}"))
        if run is None and "data.name" not in given:
            lacking.append(("data.name", f"write data.name=cifar10 or another data set{ours}"))
        if not threats:
            lacking.append(("threats", "write threats=linf:8/255, or those that it was trained for"))
        if lacking and run is None and self.options.mean is None and self.options.normalise is None:
            lacking.append(("mean, std", "where the file has none, mean=M,M,M std=S,S,S or normalise=data (or none)"))
        if lacking:
            raise joined([ConfigError("a state dict does not tell it", key, how) for key, how in lacking], COMMAND_LINE)
        config = one_peer(*words)
        if run is None or beside is None:
            return config
        where = run.run.model_copy(update={"root": str(beside.resolve().parent)})
        return config.model_copy(update={"data": run.data, "run": where, "step": run.step})


def is_file(word: str) -> bool:
    """Whether a word of the command line means a checkpoint file, not the folder of a run."""
    path = Path(word)
    text = path.suffix in TEXTS or path.parent.name == "checkpoints"  # the pointers best and latest
    return (path.is_file() and not text) or (path.suffix in SUFFIXES and not path.is_dir())


# ------------------------------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class Arguments:
    """The command line: runs or a file, the evaluation's settings, what is passed on, and how files are to be read."""

    runs: tuple[str, ...]
    request: Request
    settings: tuple[str, ...]
    plugins: tuple[str, ...]
    compare: bool
    importing: Importing | None = None


def parse(words: Sequence[str], text: str | None = None) -> Arguments:
    """Read the command line; `text` is for its help. Raises ConfigError; `problems` has all of them.

    A file is evaluated alone unless targets=... says more: its ensemble has one member.
    """
    options = Options("evaluate", text, "RUN [key=value ...]", epilog=settings_text())
    options.add_argument("--compare", action="store_true", help="compare the results of several runs")
    options.add_plugin()
    asked = options.read(words)
    runs: list[str] = []
    given: list[tuple[str, str]] = []
    for word in asked.words:
        key, equals, value = word.partition("=")
        if equals and key and "/" not in key:
            given.append((key, value))
        else:
            runs.append(word)
    subject = Path(runs[0]) if runs and not asked.compare and is_file(runs[0]) else None
    sources = [name.strip() for key, value in given if key == "sources" for name in value.strip("[]").split(",")]
    importing = not asked.compare and (subject is not None or any(map(is_file, sources)))
    own: dict[str, str] = {} if subject is None else {"targets": PEERS}
    about: dict[str, str] = {}
    settings: list[str] = []
    model: list[str] = []
    problems: list[ConfigError] = []
    for key, value in given:
        if key in Request.model_fields:
            own[key] = value
        elif importing and key in FileOptions.model_fields and (subject is not None or key in OF_ALL_FILES):
            about[key] = value
        elif key.startswith(FREE_SETTINGS):
            settings.append(f"{key}={value}")
        elif importing and _of_a_file(key, subject is not None):
            model.append(f"{key}={value}")
        else:
            problems.append(_unknown(key, runs))
    request, told = _checked(Request, own, problems), _checked(FileOptions, about, problems)
    if asked.compare and (own or settings):
        problems.append(ConfigError("settings with --compare", COMMAND_LINE, "leave them out: results are only read"))
    if not runs or (len(runs) > 1 and not asked.compare):
        problems.append(ConfigError(f"{len(runs)} runs", COMMAND_LINE, "give the folder of one run, e.g. runs/NAME"))
    if problems:
        raise joined(problems, COMMAND_LINE)
    return Arguments(tuple(runs), request, tuple(settings), tuple(asked.plugin), asked.compare,
                     Importing(subject, told, tuple(model)) if importing else None)


def _of_a_file(key: str, subject: bool) -> bool:
    """Whether a setting belongs to the run that a file becomes; beside a run, the run gives the data."""
    owned = (*MODEL_SETTINGS, *(RUN_SETTINGS if subject else ()))
    return any(key.startswith(name) if name.endswith(".") else key == name for name in owned)


def _checked(section: type[AnySection], values: dict[str, str], problems: list[ConfigError]) -> AnySection:
    """The settings of a section, null for those that are empty by default; the defaults where `problems` gets what is
    wrong."""
    fields = section.model_fields
    try:
        return section.model_validate({name: value for name, value in values.items()
                                       if value != "null" or fields[name].default is not None})
    except ValidationError as error:
        problems += [_problem(one, section) for one in error.errors()]
        return section()


def settings_text() -> str:
    """Every setting with its default and meaning, and every attack."""
    lines = ["Settings: key=default, meaning"]
    for name, one in [*Request.model_fields.items(), *FileOptions.model_fields.items()]:
        default = one.default
        shown = ",".join(default) if isinstance(default, tuple) else "" if default is None else str(default).lower()
        lines.append(f"  {f'{name}={shown}':<30} {one.description}")
    lines.append(f"  Settings of the run that may change: {', '.join(FREE_SETTINGS)}")
    return "\n".join([*lines, "Attacks:", *(f"  {name:<12} {kind.meaning}" for name, kind in MENU.items())])


def _unknown(key: str, runs: Sequence[str]) -> ConfigError:
    shown = ascii(key)[1:-1][:80]
    if key in FileOptions.model_fields or _of_a_file(key, False):
        return ConfigError(f"{shown} is for a file of weights", f"{COMMAND_LINE}, {shown}",
                           f"leave it out: {' and '.join(runs)[:200] or 'a run'} knows its own")
    if "." in key:
        what, more = ("set for a file of weights", (*RUN_SETTINGS, *MODEL_SETTINGS)) if runs and is_file(runs[0]) else (
            "changed for a run that is there", ())
        return ConfigError(f"{shown} cannot be {what}", COMMAND_LINE,
                           f"what may be: {', '.join((*FREE_SETTINGS, *more))}")
    near = nearest(key, Request.model_fields)
    return ConfigError(f"unknown setting {shown}", COMMAND_LINE,
                       f"did you mean {near}?" if near else f"settings are {', '.join(Request.model_fields)}")


def _problem(error: Any, section: type[Section]) -> ConfigError:
    """One of pydantic's errors in our words."""
    text = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:
        return ConfigError(text, COMMAND_LINE, "see --help")
    key = str(error["loc"][0])
    where, known = f"{COMMAND_LINE}, {key}", setting(key, section.model_fields[key])
    if error["type"] == "value_error" and text.startswith("there is no"):
        what, _, hint = text.partition("; ")
        return ConfigError(what, where, f"{hint} {known.description}")
    value = str(error["input"])[:80]
    return ConfigError(f"{value!a} cannot be used for {key}", where, known.allowed(value) if known.kind else text)


# ------------------------------------------------------------------------------------------------ run folders

_HOW = "give the folder of a run, e.g. runs/NAME (evaluate also takes a state dict: FILE.pt model=...)"


def find_run(word: str, where: str = "command line") -> RunFolder:
    """The folder of a run. Raises ConfigError where it is none."""
    folder = RunFolder(Path(word))
    inside = [above for above in folder.path.parents[:3] if (above / "config.yaml").is_file()]
    if inside and not folder.config.is_file():
        choice = f" checkpoint={folder.path.name}" if folder.path.parent.name == "checkpoints" else ""
        raise ConfigError(f"{word[:200]!r} lies in the folder of a run", where, f"write {inside[0]}{choice}")
    if not folder.path.is_dir():
        raise ConfigError(f"there is no run folder {word[:200]!r}", where, _HOW)
    if not folder.config.is_file():
        raise ConfigError(f"{word[:200]!r} is not the folder of a run: it has no config.yaml", where, _HOW)
    return folder


def find_runs(words: Sequence[str]) -> list[RunFolder]:
    """The folders of runs that a command line names. Raises ConfigError where it names none, or something else."""
    if not words:
        raise ConfigError("no run is given", "command line", _HOW)
    return [find_run(word) for word in words]


def refuse_unfinished(folder: RunFolder) -> None:
    """Raises OutputError while a process writes the run."""
    holder = RunLock(folder, None).held_by()
    if holder is not None:
        raise OutputError(f"the run is still being written by {holder}", str(folder.path), "wait until it ends")
