"""Console of the reporter, results table, timing arithmetic, device memory."""

from __future__ import annotations

import io
import math
import re

import pytest
import torch
from rich.console import Console

from mat_dist.runs import console as forms
from mat_dist.runs.console import LiveScreen, PlainScreen, Screen, TableRow, choose_screen, results_table
from mat_dist.runs.metrics import JsonlReporter, device_memory, eta_seconds, images_per_second

STEP = {"step": 150, "epoch": 5.0, "loss": [1.2341, 1.1979, 1.3], "images_per_s": 3210.4}


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40, _environ={})


def pipe(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=width, _environ={})


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def result(target: str = "peer0", **changes) -> TableRow:
    values = {"weights": "EMA", "checkpoint": "best", "clean_acc": 0.98765, "robust_acc": 0.8, "pgd_steps": 20,
              "images": 360, **changes}
    return TableRow(target=target, **values)


# 512 images in 0.25 s; 40 of 100 steps took 20 s, so 60 steps take 30 s; resumed at 30, 10 steps took 5 s
@pytest.mark.parametrize(("images", "seconds", "expected"), [(512, 0.25, 2048.0), (0, 2.0, 0.0), (512, 0.0, None)])
def test_images_per_second_by_hand(images, seconds, expected):
    assert images_per_second(images, seconds) == expected


@pytest.mark.parametrize(("step", "first", "elapsed", "expected"), [
    (40, 0, 20.0, 30.0), (40, 30, 5.0, 30.0), (100, 0, 50.0, 0.0), (101, 0, 50.0, 0.0), (30, 30, 5.0, None)])
def test_remaining_time_by_hand(step, first, elapsed, expected):
    assert eta_seconds(step, 100, first, elapsed) == expected


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0:00:00"), (42.4, "0:00:42"), (59.6, "0:01:00"), (3599.7, "1:00:00"), (100_000, "27:46:40"),
    (None, "-:--:--"), (math.inf, "-:--:--")])
def test_durations_are_hours_minutes_seconds(seconds, text):
    assert forms.duration(seconds) == text


def test_numbers_are_short():
    assert [forms.rate(value) for value in (3210.4, 8.254, None, math.nan)] == ["3,210", "8.25", "-", "-"]
    assert [forms.number(value) for value in (1.2341, 12345.0, math.nan, None)] == ["1.234", "1.23e+04", "nan", "-"]
    assert (forms.percent(0.98765), forms.percent(0.98765, 2), forms.percent(None)) == ("98.8", "98.77", "-")


def test_many_peers_are_summed_up_on_one_line():
    assert forms.on_one_line([0.1 * k for k in range(1, 10)], forms.number) == "0.100..0.900 (mean 0.500 of 9 peers)"
    assert forms.on_one_line([1.0] * 9 + [math.nan], forms.number) == "not finite or unknown for 1 of 10 peers"


def test_plain_lines_hold_step_epoch_losses_speed_and_remaining_time(tmp_path):
    clock, screen = Clock(), pipe()
    out = JsonlReporter(tmp_path, console="plain", screen=screen, clock=clock)
    out.start(300, ["a", "b", "c"], first_step=100)
    clock.now += 14.0  # 50 steps in 14 s: 150 steps take 42 s
    out.log(STEP)
    out.epoch({"epoch": 5, "step": 150, "clean_acc": [0.9, 0.8, 0.7], "robust_acc": [0.5, None, 0.4]})
    out.note("saved [step 150]")
    out.close()
    assert screen.file.getvalue().splitlines() == [
        "step 150/300  epoch 5.0  loss 1.234 1.198 1.300  3,210 images/s  eta 0:00:42",
        "epoch 5  clean 90.0 80.0 70.0 %  robust 50.0 - 40.0 %",
        "saved [step 150]"]


@pytest.mark.parametrize(("mode", "console", "kind"), [
    ("auto", terminal(), LiveScreen), ("auto", pipe(), PlainScreen), ("live", terminal(), LiveScreen),
    ("live", pipe(), PlainScreen), ("plain", terminal(), PlainScreen), ("off", terminal(), Screen),
    ("auto", Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"}), PlainScreen)])
def test_the_screen_fits_what_standard_output_is(mode, console, kind):
    assert type(choose_screen(mode, console)) is kind


def drawn(screen: LiveScreen) -> str:
    plain = pipe(width=100)
    plain.print(screen.render())
    return plain.file.getvalue()


def test_the_live_table_has_a_row_per_peer_with_the_evaluators_accuracy():
    clock, console = Clock(), terminal()
    screen = LiveScreen(console, clock)
    screen.start(300, ["north", "south", "west"], 0)
    try:
        screen.epoch({"epoch": 5, "clean_acc": [0.91, 0.92, 0.93], "robust_acc": [0.5, 0.6, None]})
        screen.step({**STEP, "clean_acc": [0.0, 0.0, 0.0]}, 42.0)
        clock.now += 2.0
        text = drawn(screen)
    finally:
        screen.close()
    cells = [line.split() for line in text.splitlines()]
    rows = {words[1]: re.findall(r"[\d.,]+|-", " ".join(words)) for words in cells if {"north", "west"} & set(words)}
    assert rows["north"] == ["1.234", "3,210", "91.0", "50.0"]
    assert rows["west"] == ["1.300", "3,210", "93.0", "-"]
    assert "step 150/300" in text and "epoch 5.0" in text and "eta 0:00:40" in text  # 42 s, 2 s ago


def test_results_stand_below_the_live_table():
    console = terminal()
    screen = LiveScreen(console)
    screen.start(10, ["north"], 0)
    screen.table(results_table([result("south")]))
    text = console.file.getvalue()
    assert text.rindex("north") < text.rindex("\x1b[?25h") < text.rindex("south")


def test_closing_the_live_screen_gives_the_cursor_back_and_may_be_repeated():
    console = terminal()
    screen = LiveScreen(console)
    screen.start(10, ["a"], 0)
    screen.note("a line [not markup]")
    screen.close()
    screen.close()
    text = console.file.getvalue()
    assert text.count("\x1b[?25l") == 1 and text.count("\x1b[?25h") == 1  # hide, show
    assert "a line [not markup]" in text


def test_off_prints_nothing(tmp_path, capsys):
    out = JsonlReporter(tmp_path, console="off")
    out.start(300, ["a", "b", "c"])
    out.log(STEP)
    out.note("text")
    out.table([result()])
    out.close()
    assert capsys.readouterr() == ("", "")


def test_results_go_to_a_pipe_wide_and_without_ansi_codes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    name = "a-peer-with-a-name-of-32-letters"
    out = JsonlReporter(tmp_path, console="plain")
    out.start(1, [name])
    out.table([result(name), result("ensemble", weights="raw", checkpoint="last", robust_acc=None)])
    text = capsys.readouterr().out
    assert "\x1b" not in text
    wanted = [line for line in text.splitlines() if any(word in line for word in ("target", name, "ensemble"))]
    heading, first, second = wanted
    assert re.split(r"\s*[│┃|]\s*", heading)[1:-1] == ["target", "weights", "checkpoint", "clean %", "PGD-20 %", "n"]
    assert re.split(r"\s*[│┃|]\s*", first)[1:-1] == [name, "EMA", "best", "98.77", "80.00", "360"]
    assert re.split(r"\s*[│┃|]\s*", second)[1:-1] == ["ensemble", "raw", "last", "98.77", "-", "360"]


def test_one_table_cannot_mix_attacks():
    with pytest.raises(ValueError, match=r"\[10, 20\]"):
        results_table([result(), result(pgd_steps=10)])


def test_the_cpu_tells_its_largest_resident_set():
    with open("/proc/self/status") as file:
        high_kib = int(re.search(r"VmHWM:\s+(\d+) kB", file.read()).group(1))
    values = device_memory("cpu")
    assert set(values) == {"host_peak_mib"}
    assert values["host_peak_mib"] == pytest.approx(high_kib / 1024, rel=0.02)


@pytest.mark.parametrize("busy", [37, ModuleNotFoundError("no management library"), RuntimeError("not supported")])
def test_a_gpu_tells_memory_and_load_where_it_can(monkeypatch, busy):
    def utilization(device: torch.device) -> int:
        if isinstance(busy, Exception):
            raise busy
        return busy

    for name, mib in (("memory_allocated", 3), ("max_memory_allocated", 5), ("memory_reserved", 8)):
        monkeypatch.setattr(torch.cuda, name, lambda device, mib=mib: mib << 20)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    values = device_memory("cuda:0")
    assert [values[f"device_{name}_mib"] for name in ("allocated", "peak", "reserved")] == [3.0, 5.0, 8.0]
    assert values.get("device_busy_percent") == (37.0 if busy == 37 else None)


@pytest.mark.gpu
def test_the_peak_on_a_real_gpu_covers_a_tensor_of_known_size():
    before = device_memory("cuda")["device_allocated_mib"]
    held = torch.zeros(64, 1 << 20, dtype=torch.uint8, device="cuda")  # 64 MiB
    values = device_memory("cuda")
    assert values["device_allocated_mib"] - before == pytest.approx(64, abs=2)
    assert values["device_peak_mib"] >= values["device_allocated_mib"] and held.is_cuda
