"""The short tables of the benchmark, of one measurement and of a folder of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from mat_dist.config.tree import COMMAND_LINE
from mat_dist.errors import ConfigError
from mat_dist.runs.console import percent, rate, show_table

EPOCH = 50_000  # images of a CIFAR-10 epoch
COLUMNS = ("benchmark", "step s", "images/s", "50,000 images, s", "x naive", "x careful", "of the limit", "guards %",
           "peak MiB")
Rows = Iterable[tuple[str, str]]


def print_result(result: dict[str, Any]) -> None:
    """Print one benchmark's figures; all of them are in the JSON."""
    what = result["what"]
    table = Table(title=f"{result['command']}: {what}", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for row in _ROWS[result["command"]](result["figures"]):
        table.add_row(*row)
    show_table(table)
    for note in result["figures"].get("notes", []):
        print(note)


def _spread(spread: dict[str, float], unit: str = "", digits: int = 3) -> str:
    return f"{spread['median']:.{digits}g}{unit} ({spread['low']:.{digits}g} to {spread['high']:.{digits}g})"


def _share(spread: dict[str, float]) -> str:
    return f"{percent(spread['median'])} % ({percent(spread['low'])} to {percent(spread['high'])})"


def _step(figures: dict[str, Any]) -> Rows:
    yield "step", _spread(figures["step_s"], " s")
    yield "images per second", rate(figures["images_per_s"])
    whole = sum(figures["parts_s"].values())
    for phase, seconds in figures["parts_s"].items():
        yield f"  {phase}", f"{seconds:.4f} s  {percent(seconds / whole):>5} %"
    for kind in ("cpu", "wall"):
        yield f"of the limit, {kind} time", _spread(figures["of_limit"][kind])
    yield "headers, vote, finite checks (CPU time)", _share(figures["guards"]["cpu"])
    metrics, every = figures["log_step"]["cpu"], figures["log_every"]
    yield f"metrics, one log step in {every} (CPU time)", _share({k: v / every for k, v in metrics.items()})
    yield from _memory(figures)


def _naive(figures: dict[str, Any]) -> Rows:
    for name in ("step", "careful", "naive"):
        yield f"{name} (wall time)", _spread(figures[f"{name}_s"], " s")
    for name in ("naive", "careful"):
        for kind in ("cpu", "wall"):
            yield f"times faster than {name}, {kind} time", _spread(figures[f"{name}_over_step"][kind])
    yield "largest relative difference of a loss", f"{figures['equal']['loss']:.2g}"
    yield "of the cross-entropy after an attack", f"{figures['equal']['attack']:.2g}"
    yield from _memory(figures)


def _engines(figures: dict[str, Any]) -> Rows:
    yield "one launch", f"{figures['launch_us']:.1f} us"
    for name, one in figures["engines"].items():
        yield f"{name}: a step among others", f"{1e3 * one['step_s']:.2f} ms"
        yield "  with a wait after each", _spread({k: 1e3 * v for k, v in one["apart_s"].items()}, " ms")
        yield "  the first six", f"{one['ready_s']:.1f} s"
        if "busy_s" in one:
            yield "  the device is busy for", f"{1e3 * one['busy_s']:.2f} ms in {one['kernels']:.0f} kernels"
            for kind, seconds in one["classes_s"].items():
                yield f"    {kind}", f"{1e3 * seconds:.2f} ms"


def _scale(figures: dict[str, Any]) -> Rows:
    yield "measured points", str(len(figures["points"]))
    error = figures["held_out_error"]
    yield "error at held-out points, median and largest", f"{percent(error['median'])} %, {percent(error['largest'])} %"
    if figures["messages"]:
        yield "all-gather of 4 KiB per rank", f"{1e3 * figures['messages']['latency_s']:.2f} ms"
        yield "bandwidth of 16 MiB per rank", f"{figures['messages']['bandwidth_bytes_per_s'] / 1e9:.2f} GB/s"
    for row in figures["predictions"]:
        if row["gpus"] in (4, 64) and (row["gpus"] == row["peers"]):
            name = "ImageNet" if "ImageNet" in row["case"] else row["case"]
            yield (f"{name}, {row['gpus']} GPUs, {row['network']}",
                   f"{1e3 * (row['compute_s'] + row['exchange_s']):.1f} ms, {percent(row['share'])} % exchange"
                   + (" *" if row["matters"] else ""))
    yield "* communication takes more than 5 % of the step", ""


def _memory(figures: dict[str, Any]) -> Rows:
    first = figures["memory"][0]
    name = "device_peak_mib" if "device_peak_mib" in first else "host_peak_mib"
    yield (f"{name.removesuffix('_mib').replace('_', ' ')} memory",
           f"{max(one[name] for one in figures['memory']):,.0f} MiB")


def _peaks(figures: dict[str, Any]) -> Rows:
    for name, peak in figures["peak_mib"].items():
        yield name if name == "naive" else f"memory: {name}", f"{peak:,.0f} MiB"
    for name in ("recompute", "keep"):
        if f"{name}_over_naive" in figures:
            yield f"{name} over naive", f"{figures[f'{name}_over_naive']:.2f}"


_ROWS = {"step": _step, "naive": _naive, "scale": _scale, "memory": _peaks, "engines": _engines}


# ------------------------------------------------------------------------------------------------ a folder


def print_summary(folder: Path) -> None:
    """One table of the JSON files of a folder. Raises ConfigError where it has none."""
    results = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    results = {name: one for name, one in results.items() if "step_s" in one["figures"]}
    if not results:
        raise ConfigError(f"no results of steps in {folder}", COMMAND_LINE, "write the folder of benchmarks/gpu.sh")
    first = next(iter(results.values()))
    table = Table(*COLUMNS, title=f"{first['device']}, torch {first['versions']['torch']}", title_justify="left")
    for name, result in results.items():
        table.add_row(name, *_cells(result))
    show_table(table)
    for note in sorted({note for one in results.values() for note in one["figures"]["notes"]}):
        print(note)


def _cells(result: dict[str, Any]) -> list[str]:
    figures = result["figures"]
    step = figures["step_s"]["median"]
    batch = int(result["what"].split("batch ")[1].split(",")[0])
    memory = max(one.get("device_peak_mib", one["host_peak_mib"]) for one in figures["memory"])

    def of(key: str, kind: str = "wall", factor: float = 1.0, digits: int = 2) -> str:
        return f"{factor * figures[key][kind]['median']:.{digits}f}" if key in figures else ""

    return [f"{step:.3f}", f"{batch / step:,.0f}", f"{EPOCH * step / batch:.1f}", of("naive_over_step"),
            of("careful_over_step"), of("of_limit"), of("guards", "cpu", 100.0, 1), f"{memory:,.0f}"]
