"""Telemetry: metrics and summary files, console, per-rank logs, device memory."""

from mat_dist.telemetry.device import device_memory
from mat_dist.telemetry.ranklog import close_logger, rank_logger
from mat_dist.telemetry.rates import eta_seconds, images_per_second
from mat_dist.telemetry.reporter import JsonlReporter, NullReporter, Reporter
from mat_dist.telemetry.results import Result, results_table

__all__ = ["JsonlReporter", "NullReporter", "Reporter", "Result", "close_logger", "device_memory", "eta_seconds",
           "images_per_second", "rank_logger", "results_table"]
