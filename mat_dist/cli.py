"""What every command shares: errors become one line on the screen and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from mat_dist.distributed.launch import Launch
from mat_dist.errors import BUG, DONE, FINAL_CODES, MatError, StopRequested, error_line

LOGGED = "the traceback is in the rank's log"


def tell(text: str) -> None:
    """A line for people, whole also where several threads tell something: `print` writes its end apart."""
    sys.stdout.write(f"mat_dist: {text}\n")
    sys.stdout.flush()


def run_entry(body: Callable[[], None]) -> int:
    """Run a command's body -> exit code. No traceback reaches the screen for errors that a user can cause.

    Errors with a known cause reach all ranks with one text, so one rank prints them. torchrun restarts all ranks
    on any exit code but 0: where it has restarts left, a rank whose code says that a restart cannot help leaves with 0.
    """
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
    except BrokenPipeError:  # `| head` closed the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        print(error_line(error), file=sys.stderr)
        if LOGGED not in getattr(error, "__notes__", []):  # it failed before there was a rank_<r>.log
            traceback.print_exc()
        return BUG
    return DONE
