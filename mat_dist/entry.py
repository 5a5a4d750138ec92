"""What every command shares: errors become one line on the screen and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from mat_dist.errors import BUG, DONE, ConfigError, MatError, StopRequested, error_line
from mat_dist.mesh.launch import Launch


LOGGED = "the traceback is in the rank's log"


def run_entry(body: Callable[[], None]) -> int:
    """Run a command's body -> exit code. No traceback reaches the screen for errors that a user can cause.

    Errors with a known cause reach all ranks with one text, so rank 0 alone prints them.
    """
    speaks = True
    try:
        speaks = Launch.from_environment().rank == 0
        body()
    except ConfigError as error:
        for problem in error.problems if speaks else []:
            print(error_line(problem), file=sys.stderr)
        return error.code
    except MatError as error:
        if speaks:
            print(error_line(error), file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return StopRequested.code
    except BrokenPipeError:  # `| head` closed the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        print(error_line(error), file=sys.stderr)
        if LOGGED not in getattr(error, "__notes__", []):  # it failed before there was a rank_<r>.log
            traceback.print_exc()
        return BUG
    return DONE
