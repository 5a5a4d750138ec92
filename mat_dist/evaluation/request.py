"""What an evaluation is asked for: the command line of `python -m mat_dist.evaluate`. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from mat_dist.config.fields import Integer, Number, Section
from mat_dist.config.help import nearest
from mat_dist.config.options import Options as CommandOptions
from mat_dist.config.tree import COMMAND_LINE, joined
from mat_dist.errors import ConfigError
from mat_dist.evaluation.menu import AUTOATTACK, MENU, PARTS
from mat_dist.evaluation.radii import UNIONS

PEERS, ENSEMBLE = "peers", "ensemble"
# Settings of the run that change neither its models nor its images.
FREE_SETTINGS = ("run.device", "run.threads", "run.deterministic", "comm.", "data.root", "data.cache",
                 "data.download", "data.residency", "eval.chunk")


def _words(value: Any) -> Any:
    """`a,b` or `[a, b]` as a list."""
    return [word.strip() for word in value.strip("[]").split(",")] if isinstance(value, str) else value


Words = BeforeValidator(_words)


def _among(known: Collection[str]) -> AfterValidator:
    def check(names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in known:
                near = nearest(name, known)
                raise ValueError(f"there is no attack {name[:40]!r}{f', did you mean {near}?' if near else ''}")
        return names
    return AfterValidator(check)


class Request(Section):
    """The evaluation's own settings."""

    targets: Annotated[tuple[str, ...], Words] = Field(
        (PEERS, ENSEMBLE), min_length=1, description="peers, names of peers, ensemble (the run's rule), "
                                                     "ensemble:prob, ensemble:logit, ensemble:vote, "
                                                     "ensemble:weights")
    weights: Literal["auto", "raw", "ema"] = Field("auto", description="auto: averaged weights where they are kept")
    checkpoint: str = Field("best", pattern=r"^(best|last|step_\d{1,18})$",
                            description="best, last or step_N; best is last where no evaluation chose one")
    split: Literal["test", "val", "train"] = Field("test", description="images to attack")
    images: Integer | None = Field(None, ge=1, description="a random subset of so many images; default all")
    attacks: Annotated[tuple[str, ...], Words, _among(MENU)] = Field(
        ("pgd", "cw", "autoattack"), min_length=1, description=f"{', '.join(MENU)}; the worst counts per image")
    steps: Integer | None = Field(None, ge=1, le=100000, description="steps of pgd, cw, targeted and mifgsm; default "
                                                                     "eval.test_steps")
    restarts: Integer | None = Field(None, ge=1, le=1000, description="random starts; default eval.restarts")
    step_size: Number | None = Field(None, gt=0, description="length of a step; default eval.step_size, else "
                                                             "2.5 eps / steps, for mifgsm eps / steps")
    targets_per_image: Integer = Field(3, ge=1, le=1000, description="classes that targeted leads an image to")
    queries: Integer = Field(1000, ge=1, le=10**6, description="model calls of search")
    version: Literal["standard", "plus", "rand", "custom"] = Field("standard", description="version of AutoAttack")
    custom: Annotated[tuple[str, ...], Words, _among(PARTS)] = Field(
        (), description=f"attacks of version=custom, in order: {', '.join(PARTS)}")
    threats: Annotated[tuple[str, ...], Words] = Field(
        (), description="norm:eps, such as linf:8/255,l2:1/2; norm:standard or norm:DATA for a data set's radius; "
                        f"standard; union: and one of {', '.join(UNIONS)}; default: those of the peers")
    eps: Number | None = Field(None, gt=0, le=1e4, description="radius of all threats; for one norm only")
    seed: Integer | None = Field(None, ge=0, lt=2**63, description="seed of the attacks; default run.seed")
    transfer: bool = Field(True, description="replay each target's AEs on all others")
    sources: Annotated[tuple[str, ...], Words] = Field(
        (), description="other runs (RUN or RUN:peer; a file with model=...) whose AEs every target must withstand too")
    save: bool = Field(False, description="save the AEs as float32 and as bytes, and measure the bytes too")
    checks: Integer = Field(256, ge=0, description="images that the soundness checks look at, in whole chunks; 0: no "
                                                   "checks, and the numbers are not called reportable")

    @model_validator(mode="after")
    def _together(self) -> Request:
        if (self.version == "custom") != bool(self.custom):
            raise ValueError("version=custom and custom=... belong together")
        if self.custom and AUTOATTACK not in self.attacks:
            raise ValueError("custom=... needs attacks=autoattack")
        for name in ("attacks", "custom", "targets", "threats", "sources"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names something twice")
        return self


@dataclass(frozen=True)
class Arguments:
    """The command line: runs, the evaluation's settings, and what is passed on."""

    runs: tuple[str, ...]
    request: Request
    settings: tuple[str, ...]
    plugins: tuple[str, ...]
    compare: bool


def parse(words: Sequence[str]) -> Arguments:
    """Read the command line. Raises ConfigError; `problems` has all of them."""
    runs: list[str] = []
    own: dict[str, str] = {}
    settings: list[str] = []
    asked = options("").read(words)
    problems: list[ConfigError] = []
    for word in asked.words:
        key, equals, value = word.partition("=")
        if not equals or "/" in key or not key:
            runs.append(word)
        elif key in Request.model_fields:
            own[key] = value
        elif key.startswith(FREE_SETTINGS):
            settings.append(word)
        else:
            problems.append(_unknown(key))
    request = Request()
    try:
        request = Request(**own)
    except ValidationError as error:
        problems += [_problem(one) for one in error.errors()]
    if asked.compare and (own or settings):
        problems.append(ConfigError("settings with --compare", COMMAND_LINE, "leave them out: results are only read"))
    if not runs or (len(runs) > 1 and not asked.compare):
        problems.append(ConfigError(f"{len(runs)} runs", COMMAND_LINE, "give the folder of one run, e.g. runs/NAME"))
    if problems:
        raise joined(problems, COMMAND_LINE)
    return Arguments(tuple(runs), request, tuple(settings), tuple(asked.plugin), asked.compare)


def options(text: str | None, epilog: str | None = None) -> CommandOptions:
    """The options of the command, with its help."""
    found = CommandOptions("evaluate", text, "RUN [key=value ...]", epilog=epilog)
    found.add_argument("--compare", action="store_true", help="compare the results of several runs")
    found.add_plugin()
    return found


def _unknown(key: str) -> ConfigError:
    shown = ascii(key)[1:-1][:80]
    if "." in key:
        return ConfigError(f"{shown} cannot be changed for a run that is there", COMMAND_LINE,
                           f"what may change: {', '.join(FREE_SETTINGS)}")
    near = nearest(key, Request.model_fields)
    return ConfigError(f"unknown setting {shown}", COMMAND_LINE,
                       f"did you mean {near}?" if near else f"settings are {', '.join(Request.model_fields)}")


def _problem(error: Any) -> ConfigError:
    key = str(error["loc"][0]) if error["loc"] else "settings"
    text = str(error["msg"]).removeprefix("Value error, ")
    how = Request.model_fields[key].description if key in Request.model_fields else "see --help"
    return ConfigError(f"{key}: {text}, found {str(error['input'])[:80]!r}" if error["loc"] else text, COMMAND_LINE,
                       str(how))
