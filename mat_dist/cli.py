"""What every command shares: errors become one line on the screen and an exit code."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from types import ModuleType

from mat_dist.distributed.agent import tell_agent
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.leaving import leave
from mat_dist.distributed.processes import keep_freed_memory, known_error
from mat_dist.errors import DONE, FINAL_CODES, ConfigError, HelpShown, MatError, StopRequested, described, error_line
from mat_dist.screens import steady

LOGGED = "the traceback is in the rank's log"


def tell(text: str) -> None:
    """A line for people, whole also where several threads tell something: `print` writes its end apart."""
    sys.stdout.write(f"mat_dist: {text}\n")
    sys.stdout.flush()


def also_function(module: str, place: str) -> None:
    """Let the module of a command be called too, as the function of its name in the module `place`, imported then:
    whoever has imported `mat_dist.train` has a module, and `mat_dist.train(...)` works all the same."""
    function = property(lambda one: getattr(importlib.import_module(place), module.rpartition(".")[2]))
    sys.modules[module].__class__ = type("Command", (ModuleType,), {
        "__wrapped__": function, "__call__": lambda one, *args, **settings: one.__wrapped__(*args, **settings)})


def run_entry(body: Callable[[], None]) -> int:
    """Run a command's body -> exit code. A screen that is lost ends nothing, see `screens`.

    No traceback reaches the screen for errors that a user can cause. An error that all ranks share is told by one of
    them, any other by whom it meets; under torchrun its own process tells it, as the last line: `distributed/agent`.
    torchrun restarts all ranks on any exit code but 0: where it has restarts left, a rank whose code says that a
    restart cannot help leaves with 0. The process groups of a rank that failed come after its words: `leave`.
    """
    with steady():
        return _code(body)


def as_main(body: Callable[[list[str]], None]) -> Callable[..., int]:
    """The `main` of a command: its words, by default those of the command line -> exit code, see `run_entry`."""
    return lambda argv=None: run_entry(lambda: body(list(sys.argv[1:] if argv is None else argv)))


def _code(body: Callable[[], None]) -> int:
    keep_freed_memory()
    launch, code = Launch(), DONE
    try:
        launch = Launch.from_environment()
        launch.follow_launcher()
        body()
    except KeyboardInterrupt:
        code = StopRequested.code
    except HelpShown:
        raise
    except (Exception, SystemExit) as error:  # SystemExit: of a plug-in or a library; its code may be 0
        known = known_error(error)
        code = _tell_error(known or error, launch)
        if known is None and LOGGED not in getattr(error, "__notes__", []):  # it failed before there was a rank_<r>.log
            traceback.print_exc()
        if launch.restarts_left and code in FINAL_CODES:
            code = DONE
    if launch.world > 1:
        leave(code)
    return code


def _tell_error(error: BaseException, launch: Launch) -> int:
    """One line for each problem, from one rank where all have it -> the error's code."""
    code = described(error)["code"]
    lines = [error_line(problem) for problem in (error.problems if isinstance(error, ConfigError) else [error])]
    handed = not launch.restarts_left and tell_agent(code, lines)  # what is tried again may come to another end
    if not handed and (not isinstance(error, MatError) or not error.shared or launch.speaks_for(error.guilty)):
        print(*lines, sep="\n", file=sys.stderr)
    return code
