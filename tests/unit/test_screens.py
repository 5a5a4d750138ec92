"""A screen that is lost ends no command, and nobody is asked anything."""

from __future__ import annotations

import errno
import getpass
import io
import json
import os
import subprocess
import sys

import pytest
from rich.table import Table

from mat_dist import train
from mat_dist.cli import run_entry, tell
from mat_dist.errors import NotReportable
from mat_dist.runs.console import show_table
from mat_dist.screens import arrived


class Broken(io.StringIO):
    """A stream whose place does not take what is written."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str = "") -> int:
        raise OSError(self.number, "lost")

    flush = write  # type: ignore[assignment]


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def ascii_only() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


LOST = {"closed before the start": lambda: None, "closed": closed, "full": lambda: Broken(errno.ENOSPC),
        "cut by its reader": lambda: Broken(errno.EPIPE), "hung up": lambda: Broken(errno.EIO)}


def all_words() -> None:
    """Every way in which commands write."""
    print("räksmörgås \udcfc", flush=True)
    tell("räksmörgås")
    table = Table("naïve", title="ä")
    table.add_row("±")
    show_table(table)
    print("error", file=sys.stderr, flush=True)
    sys.stdout.writelines(["a", "b"])


@pytest.mark.parametrize("stream", [*LOST.values(), ascii_only], ids=[*LOST, "not encodable"])
def test_whatever_is_lost_of_the_screen_a_command_goes_on_to_its_end_and_its_code(monkeypatch, stream):
    done = []

    def body() -> None:
        all_words()
        done.append(True)
        if len(done) == 2:
            raise NotReportable("what", "where", "how")

    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr(sys, "stderr", stream())
    before = sys.stdout, sys.stderr
    assert [run_entry(body), run_entry(body)] == [0, NotReportable.code]
    assert len(done) == 2 and (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(("stream", "code"), [*((LOST[name], 5 if "reader" not in name else 0) for name in LOST),
                                              (ascii_only, 0), (io.StringIO, 0)])
def test_a_result_that_is_only_shown_and_did_not_arrive_is_a_failure(monkeypatch, stream, code):
    monkeypatch.setattr(sys, "stdout", stream())
    assert run_entry(lambda: (print("result"), arrived())) == code


def test_what_an_encoding_lacks_is_written_in_other_words(monkeypatch):
    stream = ascii_only()
    monkeypatch.setattr(sys, "stdout", stream)
    run_entry(lambda: print("rüns/\udcfc"))
    assert stream.buffer.getvalue() == b"r\\xfcns/\\udcfc\n"


@pytest.mark.parametrize(("ending", "code"), [("> /dev/full", 0), (">&-", 0), (">&- 2>&- <&-", 0), ("| head -c 1", 0),
                                              ("> /dev/full 2> /dev/full", 0)])
def test_the_exit_code_of_a_process_is_that_of_its_work_whatever_became_of_its_screen(ending, code):
    script = ("import sys; from mat_dist.cli import run_entry, tell; sys.exit(run_entry(lambda: ["
              "open('/dev/null').fileno() > 2 or sys.exit(9), [tell('x' * 999) for _ in range(99)], print('x')]))")
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "$0" {ending}; exit ${{PIPESTATUS[0]}}', script],
                          check=False, timeout=60, capture_output=True)
    assert done.returncode == code, done.stderr


def test_a_training_whose_screen_is_full_ends_well_and_its_files_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC))
    code = train.main(["peers=1", "loss=at", "attack.steps=1", "train.max_steps=2", "eval.every=0", "eval.test_steps=0",
                       f"run.root={tmp_path}", "run.name=one"])
    told = json.loads((tmp_path / "one" / "exit.json").read_text())
    assert (code, told["code"], told["state"]) == (0, 0, "done")
    assert "the screen did not show all lines: [Errno 28] lost" in (tmp_path / "one" / "rank_0.log").read_text()


def test_somebody_elses_exit_in_the_middle_is_a_failure(capsys):
    assert run_entry(lambda: sys.exit(0)) == 70
    assert "SystemExit" in capsys.readouterr().err


@pytest.mark.parametrize("ask", [lambda: input("Login? "), lambda: getpass.getpass("API key: "),
                                 lambda: sys.stdin.readline(), lambda: sys.stdin.read(),
                                 lambda: sys.stdin.buffer.read()])
def test_a_question_of_a_library_ends_the_command_and_does_not_wait(monkeypatch, capsys, ask):
    monkeypatch.setattr(sys, "stdin", open("/dev/zero"))  # noqa: SIM115
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    assert run_entry(ask) == 6
    assert "asks a question, which nobody answers here (standard input)" in capsys.readouterr().err
    assert run_entry(lambda: sys.exit(9) if sys.stdin.isatty() else None) == 0  # libraries look before they ask


def test_a_question_past_the_interpreters_streams_finds_no_input(monkeypatch):
    real, kept, (theirs, ours) = os.fstat(0), os.dup(0), os.openpty()
    heard: list[bytes] = []

    def ask() -> None:
        heard.append(os.read(0, 1))
        heard.append(subprocess.run(["cat"], stdout=subprocess.PIPE, check=True, timeout=20).stdout)

    try:
        os.dup2(ours, 0)  # a terminal on which nobody writes
        assert run_entry(ask) == 0 and heard == [b"", b""] and os.isatty(0)
    finally:
        os.dup2(kept, 0)
        for number in (kept, theirs, ours):
            os.close(number)
    assert os.path.samestat(os.fstat(0), real)


def test_a_debugger_may_still_ask(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("c\n"))
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    heard = []
    assert run_entry(lambda: heard.append(input())) == 0 and heard == ["c"]
