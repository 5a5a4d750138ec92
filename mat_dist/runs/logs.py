"""The log file of one rank: tracebacks and notes that do not belong on the console."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from mat_dist.errors import OutputError


class _QuietFileHandler(logging.FileHandler):
    """A full disk is reported once, by the writer of metrics or checkpoints, not by every log line of every rank."""

    def handleError(self, record: logging.LogRecord) -> None:
        return None


def rank_logger(folder: Path | str, rank: int) -> logging.Logger:
    """A logger that appends to `<folder>/rank_<rank>.log` from level INFO and to nothing else.

    It is not registered with the `logging` module, so it has no parent, leaves the application's own logging alone,
    and two runs in one process do not share handlers. Times are UTC.

    Raises:
        OutputError: the file cannot be opened.
    """
    path = Path(folder) / f"rank_{rank}.log"
    try:
        handler = _QuietFileHandler(path, mode="a", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot open the log file: {error.strerror}", str(path),
                          "make the run folder writable or choose another run.root") from error
    form = logging.Formatter(f"%(asctime)s.%(msecs)03dZ [rank {rank}] %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    form.converter = time.gmtime
    handler.setFormatter(form)
    logger = logging.Logger(f"mat_dist.rank_{rank}", level=logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    return logger


def close_logger(logger: logging.Logger) -> None:
    """Close the files of `logger`."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
