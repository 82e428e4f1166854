"""A bar for people, plain lines for log files, and a remaining time that a resumed run can trust."""

import io

import pytest

from fulmen.run.progress import Progress


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def test_plain_lines_now_and_then_and_at_the_end(clock):
    file = io.StringIO()
    with Progress("train", 100, done=60, file=file, interval=10, clock=clock) as progress:
        for step in range(25):
            clock.now += 1
            progress.advance(loss=2.34567, **{"tokens/s": 12345})
            if step == 14:
                progress.print("held-out [2.5]")
    assert file.getvalue().splitlines() == [
        "train  70/100 (70%)  elapsed 0:00:10  remaining 0:00:30  loss 2.346  tokens/s 12,345",
        "held-out [2.5]",
        "train  80/100 (80%)  elapsed 0:00:20  remaining 0:00:20  loss 2.346  tokens/s 12,345",
        "train  85/100 (85%)  elapsed 0:00:25  remaining 0:00:15  loss 2.346  tokens/s 12,345",
    ]


def test_finished_run_writes_its_last_line_once(clock):
    file = io.StringIO()
    with Progress("eval", 2, file=file, interval=1, clock=clock) as progress:
        for _ in range(2):
            clock.now += 1
            progress.advance()
    assert file.getvalue().splitlines() == ["eval  1/2 (50%)  elapsed 0:00:01", "eval  2/2 (100%)  elapsed 0:00:02"]


def test_unknown_total(clock):
    file = io.StringIO()
    with Progress("read", None, file=file, clock=clock) as progress:
        clock.now += 3
        progress.advance(7, rate=1234.5, name="[bold]x")
    assert file.getvalue() == "read  7  elapsed 0:00:03  rate 1,234  name [bold]x\n"


def test_bar_on_a_terminal(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    file = Terminal()
    with Progress("train", 100, done=60, file=file, clock=clock) as progress:
        progress.advance(loss=2.34567)
        progress.print("a line [of] its own")
    text = file.getvalue()
    assert "━" in text
    assert "61/100" in text
    assert "loss 2.346" in text
    assert "a line [of] its own" in text
    assert "\x1b[?25h" in text, "the cursor is shown again"


def test_narrow_terminal_cuts_the_fields_only(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    file = Terminal()
    with Progress("train", 100, done=60, file=file, clock=clock) as progress:
        progress.advance(loss=2.34567, **{"a very long name": "a very long value"})
    assert "61/100" in file.getvalue()
    assert "long value" not in file.getvalue()


def test_dumb_terminal_gets_plain_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    with Progress("train", 2, file=file, clock=clock) as progress:
        progress.advance()
    assert file.getvalue() == "train  1/2 (50%)  elapsed 0:00:00\n"


def test_stdout_is_the_default(capsys):
    with Progress("train", 1) as progress:
        progress.advance()
    assert capsys.readouterr().out == "train  1/1 (100%)  elapsed 0:00:00\n"
