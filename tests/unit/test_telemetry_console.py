"""Console of the reporter, results table, timing arithmetic, device memory."""

from __future__ import annotations

import io
import math
import re

import pytest
import torch
from rich.console import Console
from rich.table import Table

from mat_dist.runs import console as forms
from mat_dist.runs.console import (
    LiveScreen,
    PlainScreen,
    Screen,
    choose_screen,
    epoch_lines,
    new_table,
    show_table,
)
from mat_dist.runs.metrics import RunReporter, device_memory, eta_seconds, images_per_second

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


def results(*rows: tuple[str, ...], numbers: tuple[str, ...] = ("clean %", "n")) -> Table:
    table = new_table("Accuracy on the test set", ("target", "weights", "checkpoint"), numbers)
    for row in rows:
        table.add_row(*row)
    return table


EPOCH = {"epoch": 5, "step": 150, "attack": "PGD-10", "clean_acc": [0.91, 0.92, 0.93], "robust_acc": [0.5, 0.6, None],
         "threat_acc": {"linf 8/255": [0.51, 0.61, None], "l2 1/2": [0.7, 0.8, None]},
         "ema_clean_acc": [0.94, 0.95, 0.96], "ema_robust_acc": [0.1, 0.2, 0.3],
         "ema_threat_acc": {"linf 8/255": [0.11, 0.21, 0.31], "l2 1/2": [0.12, 0.22, 0.32]},
         "ensemble": {"clean_acc": 0.97, "robust_acc": 0.4, "threat_acc": {"linf 8/255": 0.41, "l2 1/2": 0.42}},
         "best": {"step": 90, "score": 0.655}}


# 512 images in 0.25 s; 40 of 100 steps took 20 s, so 60 steps take 30 s; resumed at 30, 10 steps took 5 s
@pytest.mark.parametrize(("images", "seconds", "expected"), [(512, 0.25, 2048.0), (0, 2.0, 0.0), (512, 0.0, None)])
def test_images_per_second_by_hand(images, seconds, expected):
    assert images_per_second(images, seconds) == expected


@pytest.mark.parametrize(("step", "first", "elapsed", "expected"), [
    (40, 0, 20.0, 30.0), (40, 30, 5.0, 30.0), (100, 0, 50.0, 0.0), (101, 0, 50.0, 0.0), (30, 30, 5.0, None)])
def test_remaining_time_by_hand(step, first, elapsed, expected):
    assert eta_seconds(step, 100, first, elapsed) == expected


def test_evaluations_to_come_count_as_many_steps_until_one_was_timed_and_then_as_it_took():
    assert eta_seconds(40, 100, 0, 20.0, {50: 10.0, 100: 30.0}) == 30.0 + 0.5 * 40
    assert eta_seconds(40, 100, 0, 20.0, {100: 30.0}, (10.0, 40.0)) == 30.0 + 4.0 * 30


def test_the_remaining_time_of_a_run_counts_its_evaluations_and_not_twice(tmp_path):
    clock, screen = Clock(), pipe()
    out = RunReporter(tmp_path, console="plain", screen=screen, clock=clock)
    out.start(300, ["a"], evaluations={150: 100.0, 300: 200.0})
    clock.now += 15.0  # 150 steps at 0.1 s, and as much time for what counts as 300 more
    out.log({"step": 150})
    clock.now += 30.0  # three times as long as was thought
    out.epoch({"epoch": 1, "step": 150, "eval_s": 30.0})
    clock.now += 5.0
    out.log({"step": 200})
    assert re.findall(r"eta (\S+)", screen.file.getvalue()) == ["0:00:45", "0:01:10"]


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


def test_plain_lines_name_the_peers_the_attack_each_threat_and_the_union(tmp_path):
    clock, screen = Clock(), pipe()
    out = RunReporter(tmp_path, console="plain", screen=screen, clock=clock)
    out.start(300, ["a", "b", "c"], first_step=100)
    clock.now += 14.0  # 50 steps in 14 s: 150 steps take 42 s
    out.log({**STEP, "lr": [0.1, 0.1, 0.01]})
    out.epoch(EPOCH)
    out.note("saved [step 150]")
    out.close()
    lead = "epoch 5, PGD-10"
    assert screen.file.getvalue().splitlines() == [
        "step 150/300  epoch 5.0  3,210 images/s  lr 0.1 0.01  loss a 1.234 b 1.198 c 1.300  eta 0:00:42",
        f"{lead}  a  clean 91.0  linf 8/255 51.0  l2 1/2 70.0  union 50.0 %",
        f"{lead}  b  clean 92.0  linf 8/255 61.0  l2 1/2 80.0  union 60.0 %",
        f"{lead}  c  clean 93.0  linf 8/255 -  l2 1/2 -  union - %",
        f"{lead}  ensemble  clean 97.0  linf 8/255 41.0  l2 1/2 42.0  union 40.0 %",
        f"{lead}  a EMA  clean 94.0  linf 8/255 11.0  l2 1/2 12.0  union 10.0 %",
        f"{lead}  b EMA  clean 95.0  linf 8/255 21.0  l2 1/2 22.0  union 20.0 %",
        f"{lead}  c EMA  clean 96.0  linf 8/255 31.0  l2 1/2 32.0  union 30.0 %",
        f"{lead}  best so far: step 90, mean 65.5 %", "saved [step 150]"]


def test_one_threat_has_no_union_and_many_peers_are_summed_up_in_one_line():
    many = [0.1 * k for k in range(1, 11)]
    names = [f"p{k}" for k in range(10)]
    record = {"epoch": 1, "clean_acc": many, "robust_acc": many, "threat_acc": {"linf 0.1": many},
              "ensemble": {"clean_acc": 1.0, "robust_acc": 0.5, "threat_acc": {"linf 0.1": 0.5}}}
    assert epoch_lines(record, names) == [
        "epoch 1  ensemble  clean 100.0  linf 0.1 50.0 %",
        "epoch 1  10 peers  clean 10.0..100.0 (mean 55.0 of 10 peers)  linf 0.1 10.0..100.0 (mean 55.0 of 10 peers) %"]


def test_what_goes_on_is_told_on_plain_lines_now_and_then_and_less_often_the_longer_it_takes():
    clock, console = Clock(), pipe()
    screen = PlainScreen(console, clock)
    for second in range(1, 1001):
        clock.now += 1.0
        screen.status(f"chunk {second}", float(second), 1000.0 - second)
    screen.status("")
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "chunk 5  0:00:05, eta 0:16:35" and lines[1].startswith("chunk 10 ")
    told = [int(line.split()[1]) for line in lines]
    assert len(told) < 80 and told[-1] - told[-2] >= 45


@pytest.mark.parametrize("width", [20, 24, 30, 40, 60, 80, 200])
def test_no_terminal_is_so_narrow_that_it_loses_or_cuts_a_number(width):
    table = results(("north", "EMA", "best", "98.77", "51.00", "70.10", "40.00", "360"),
                    ("a-peer-with-a-name-of-32-letters", "EMA", "best", "98.77", "20.00", "30.00", "80.00", "12345"),
                    numbers=("clean %", "linf 8/255 %", "l2 1/2 %", "union %", "n"))
    console = terminal(width)
    show_table(table, console)
    screen = LiveScreen(console)
    screen.start(300, ["north", "south", "west"], 0)
    screen.epoch(EPOCH)
    screen.step({**STEP, "lr": 0.1}, 42.0)
    screen.status("evaluation of step_00000150: north, linf 8/255, pgd: 61 of 128 hold", 5.0, 20.0)
    console.print(screen.render())
    screen.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    lines = text.replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= width
    words = set(re.split(r"[^\w.,:/%-]+", "\n".join(lines)))
    assert words >= {"98.77", "51.00", "70.10", "40.00", "12345", "360", "1.234", "97.0", "41.0", "3,210", "150/300",
                     "61", "128", "65.5"} and ("eta 0:00:20" in "\n".join(lines))


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


def test_the_live_view_has_what_goes_on_the_best_and_a_row_per_peer_and_kind_of_weights_and_the_ensemble():
    clock, console = Clock(), terminal()
    screen = LiveScreen(console, clock)
    screen.start(300, ["north", "south", "west"], 0)
    try:
        screen.epoch(EPOCH)
        screen.step({**STEP, "clean_acc": [0.0, 0.0, 0.0]}, 42.0)
        screen.status("evaluation: west, l2 1/2, pgd: 3 of 4 hold", 10.0, 30.0)
        clock.now += 2.0
        text = drawn(screen)
    finally:
        screen.close()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    rows = {name: values for name, *values in cells}
    assert rows["north"] == ["1.234", "91.0", "51.0", "70.0", "50.0"] and rows["west"][2:] == ["-", "-", "-"]
    assert rows["north EMA"] == ["", "94.0", "11.0", "12.0", "10.0"]
    assert rows["ensemble"] == ["", "97.0", "41.0", "42.0", "40.0"]
    assert "step 150/300" in text and "epoch 5.0" in text and "eta 0:00:40" in text  # 42 s, 2 s ago
    assert "3 of 4 hold  0:00:12  eta 0:00:28" in text and "best so far: step 90, mean 65.5 %" in text
    assert console.file.getvalue().count("ensemble  clean 97.0") == 1  # the history of epochs


def test_results_stand_below_the_live_table():
    console = terminal()
    screen = LiveScreen(console)
    screen.start(10, ["north"], 0)
    screen.table(results(("south", "EMA", "best", "98.77", "360")))
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
    out = RunReporter(tmp_path, console="off")
    out.start(300, ["a", "b", "c"])
    out.log(STEP)
    out.note("text")
    out.table(results(("a", "EMA", "best", "98.77", "360")))
    out.close()
    assert capsys.readouterr() == ("", "")


def test_results_go_to_a_pipe_wide_and_without_ansi_codes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    name = "a-peer-with-a-name-of-32-letters"
    out = RunReporter(tmp_path, console="plain")
    out.start(1, [name])
    out.table(results((name, "EMA", "best", "98.77", "80.00", "360"),
                      ("ensemble", "raw", "last", "98.77", "-", "360"), numbers=("clean %", "robust %", "n")))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    wanted = [line for line in text.splitlines() if any(word in line for word in ("target", name, "ensemble"))]
    heading, first, second = wanted
    assert re.split(r"\s*[│┃|]\s*", heading)[1:-1] == ["target", "weights", "checkpoint", "clean %", "robust %", "n"]
    assert re.split(r"\s*[│┃|]\s*", first)[1:-1] == [name, "EMA", "best", "98.77", "80.00", "360"]
    assert re.split(r"\s*[│┃|]\s*", second)[1:-1] == ["ensemble", "raw", "last", "98.77", "-", "360"]


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
