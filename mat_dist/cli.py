"""What every command shares: errors become one line on the screen and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from mat_dist.distributed.launch import Launch
from mat_dist.errors import BUG, DONE, FINAL_CODES, HelpShown, MatError, StopRequested, error_line
from mat_dist.screens import steady

LOGGED = "the traceback is in the rank's log"


def tell(text: str) -> None:
    """A line for people, whole also where several threads tell something: `print` writes its end apart."""
    sys.stdout.write(f"mat_dist: {text}\n")
    sys.stdout.flush()


def run_entry(body: Callable[[], None]) -> int:
    """Run a command's body -> exit code. A screen that is lost ends nothing, see `screens`.

    No traceback reaches the screen for errors that a user can cause. Errors with a known cause reach all ranks with one
    text, so one rank prints them. torchrun restarts all ranks on any exit code but 0: where it has restarts left, a
    rank whose code says that a restart cannot help leaves with 0.
    """
    with steady():
        return _code(body)


def _code(body: Callable[[], None]) -> int:
    launch = Launch()
    try:
        launch = Launch.from_environment()
        body()
    except MatError as error:
        if launch.speaks_for(getattr(error, "guilty", ())):
            for problem in getattr(error, "problems", [error]):
                print(error_line(problem), file=sys.stderr)
        return DONE if launch.restarts_left and error.code in FINAL_CODES else error.code
    except KeyboardInterrupt:
        return StopRequested.code
    except HelpShown:
        raise
    except (Exception, SystemExit) as error:  # SystemExit: of a plug-in or a library; its code may be 0
        print(error_line(error), file=sys.stderr)
        if LOGGED not in getattr(error, "__notes__", []):  # it failed before there was a rank_<r>.log
            traceback.print_exc()
        return BUG
    return DONE
