"""The options of a command, by argparse. Nothing here imports torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from mat_dist.config.help import WIDTH, nearest, settings, settings_help
from mat_dist.config.tree import COMMAND_LINE, joined, printable
from mat_dist.errors import ConfigError


class Options(argparse.ArgumentParser):
    """What a command understands. Other words, such as settings and folders of runs, are left to it as `words`.

    `--help` shows the usage, the text (the command's docstring), the options and `epilog`.

    Args:
        command: its name behind `python -m mat_dist.`.
        text: what it does.
        words: what its other words are, for the usage.
        needs_words: without any word the help is shown.
    """

    def __init__(self, command: str, text: str | None, words: str, *, needs_words: bool = True,
                 epilog: str | None = None) -> None:
        self.needs_words = needs_words
        self.known: list[argparse.Action] = []
        formatter: Any = partial(argparse.RawDescriptionHelpFormatter, width=WIDTH, max_help_position=28)
        super().__init__(f"python -m mat_dist.{command}", usage=f"%(prog)s {words} [options]", description=text,
                         epilog=epilog, formatter_class=formatter, allow_abbrev=False, exit_on_error=False)

    def add_argument(self, *names: Any, **more: Any) -> argparse.Action:
        """An option; see argparse. `known` holds them all."""
        self.known.append(super().add_argument(*names, **more))
        return self.known[-1]

    def add_plugin(self) -> None:
        """`--plugin FILE.py`, as often as needed, as `plugin`."""
        self.add_argument("--plugin", metavar="FILE.py", action="append", default=[], type=_given,
                          help="a file of yours that registers models, norms, methods or data; may be given again")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The values of the options, and `words`: all words that are none. Help raises SystemExit(0).

        Raises:
            ConfigError: an unknown option, or one without its value; `problems` has all of them.
        """
        if {"-h", "--help"} & set(words) or (self.needs_words and not words):
            self.print_help()
            raise SystemExit(0)
        try:
            found, rest = self.parse_known_args(words)
        except argparse.ArgumentError as error:
            option = str(error.argument_name).rpartition("/")[2]
            metavar = next((action.metavar for action in self.known if option in action.option_strings), None)
            raise ConfigError(f"{option}: {error.message}", COMMAND_LINE,
                              f"write {option} {metavar}" if metavar else f"write {option} alone") from None
        problems = self.unknown(rest)
        if problems:
            raise joined(problems, COMMAND_LINE)
        found.words = tuple(rest)
        return found

    def unknown(self, words: Sequence[str]) -> list[ConfigError]:
        """The problems of words that this command cannot use."""
        names = [name for action in self.known for name in action.option_strings if name.startswith("--")]
        problems = []
        for word in words:
            if word.startswith("-"):
                near = nearest(word.partition("=")[0], names)
                how = f"did you mean {near}?" if near else f"options are {', '.join(names)}; {self.other(word)}"
                problems.append(ConfigError(f"unknown option {printable(word)}", COMMAND_LINE, how))
        return problems

    def other(self, word: str) -> str:
        """What else an unknown word may be meant for."""
        return f"see {self.prog} --help"


class TrainingOptions(Options):
    """Options of a command that needs the settings of a training: `config`, `plugin`, and the settings as `words`."""

    def __init__(self, command: str, text: str | None) -> None:
        super().__init__(command, text, "[KEY=VALUE ...]", needs_words=False)
        self.add_argument("-c", "--config", metavar="FILE", action="append", default=[], type=_given,
                          help="a YAML file, or the name of one in configs/; without it digits: 4 peers, embedded data")
        self.add_plugin()

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """As for all options; `config` is None where no file is given."""
        found = super().read(words)
        if len(found.config) > 1:
            raise ConfigError(f"--config is given {len(found.config)} times", COMMAND_LINE,
                              "give it once; a file builds on others with `defaults: [FILE]`")
        found.config = found.config[0] if found.config else None
        return found

    def unknown(self, words: Sequence[str]) -> list[ConfigError]:
        """Only settings may be left."""
        return [*super().unknown(words), *(
            ConfigError(f"unknown option {printable(word)}", COMMAND_LINE, self._meant(word))
            for word in words if "=" not in word and not word.startswith("-"))]

    def _meant(self, word: str) -> str:
        """How to mend a word that is neither an option nor a setting."""
        if word.endswith((".yaml", ".yml")):
            return f"did you mean --config {printable(word)}?"
        hints = {name[2:]: name for action in self.known for name in action.option_strings if name.startswith("--")}
        hints |= {key: f"{key}=VALUE" for key in settings()}
        near = nearest(word, hints)
        return f"did you mean {hints[near]}?" if near else "settings are written key=value; --help lists them"

    def other(self, word: str) -> str:
        """A setting that was given dashes."""
        bare, equals, value = word.lstrip("-").partition("=")
        key = bare if bare in settings() or bare.startswith("peers.") else nearest(bare, settings())
        if key is None:
            return "settings are written key=value"
        return f"did you mean {key}={printable(value) if equals else 'VALUE'}? Settings have no dashes"

    def format_help(self) -> str:
        """Also all settings, and examples."""
        module = self.prog.removeprefix("python -m ")
        examples = (self.prog, f"{self.prog} -c cifar10_resnet18 attack.eps=4/255",
                    f"{self.prog} peers.2.model=wrn_28_10 peers.2.threat=l2",
                    f"{self.prog} -c my.yaml --plugin my_model.py model=my_model",
                    f"torchrun --standalone --nproc_per_node=4 -m {module} -c cifar10_resnet18 data.root=DATA")
        lines = [super().format_help(), settings_help(), "", "Examples", *(f"  {line}" for line in examples)]
        return "\n".join([*lines, ""])


def count(text: str) -> int:
    """A number of things, 1 to 9,999,999, for `type`."""
    if not (text.isascii() and text.isdigit() and len(text) <= 7 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 1")
    return int(text)


def _given(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("no value")
    return text
