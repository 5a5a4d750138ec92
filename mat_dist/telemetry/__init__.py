"""Telemetry: metrics and summary files, console, per-rank logs, device memory."""

from mat_dist.telemetry.device import device_memory
from mat_dist.telemetry.ranklog import close_logger, rank_logger
from mat_dist.telemetry.rates import eta_seconds, images_per_second
from mat_dist.telemetry.reporter import JsonlReporter, NullReporter, Reporter
from mat_dist.telemetry.results import Result, results_table
from mat_dist.telemetry.tracked import TrackedReporter, open_reporter
from mat_dist.telemetry.trackers import Picture, require_trackers

__all__ = ["JsonlReporter", "NullReporter", "Picture", "Reporter", "Result", "TrackedReporter", "close_logger",
           "device_memory", "eta_seconds", "images_per_second", "open_reporter", "rank_logger", "require_trackers",
           "results_table"]
