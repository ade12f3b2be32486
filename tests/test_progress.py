"""What a person sees of a run: figures that are right, and no control characters where there is no terminal."""

import io

import pytest
from rich.console import Console

import pgjax.run.progress
from pgjax.run.progress import Progress, format_seconds

METRICS = {"objective/scores": 0.25, "objective/kl": 1.5, "perf/tokens_per_second": 1234.5, "lr": 1e-5}


@pytest.fixture
def clock(monkeypatch):
    """Give a clock that the test moves by hand."""
    now = [100.0]
    monkeypatch.setattr(pgjax.run.progress.time, "monotonic", lambda: now[0])
    return now


def plain():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def text_of(console):
    return console.file.getvalue()


def test_pipe_gets_plain_lines_without_control_characters(clock):
    console = plain()
    with Progress(3, console=console, every=0.0) as progress:
        for step in (1, 2, 3):
            progress.update(step, METRICS)
            clock[0] += 5.0
        progress.samples(3, [{"prompt": "p", "completion": "c", "score": 1.0}])
    text = text_of(console)
    assert text.startswith("step 1/3  score 0.250  kl 1.500  tok/s 1,234\nstep 2/3")
    assert all(c.isprintable() or c == "\n" for c in text)


def test_plain_lines_come_now_and_then_and_at_the_end(clock):
    console = plain()
    with Progress(100, console=console, every=10.0) as progress:
        for step in range(1, 101):
            progress.update(step, METRICS)
            clock[0] += 1.0
    steps = [line.split()[1] for line in text_of(console).splitlines()]
    assert steps == [f"{s}/100" for s in (*range(1, 100, 10), 100)]


def test_time_left_does_not_count_the_first_step(clock):
    console = plain()
    with Progress(10, console=console, every=0.0) as progress:
        clock[0] += 300.0  # compiling
        progress.update(1, {})
        clock[0] += 4.0
        progress.update(2, {})
        clock[0] += 6.0
        progress.update(3, {})
    assert text_of(console).splitlines() == ["step 1/10", "step 2/10  left 0:32", "step 3/10  left 0:35"]


def test_time_left_of_a_resumed_run_counts_its_own_steps_only(clock):
    console = plain()
    with Progress(100, start=90, console=console, every=0.0) as progress:
        progress.update(91, {})
        clock[0] += 10.0
        progress.update(92, {})
    assert text_of(console).splitlines()[-1] == "step 92/100  left 1:20"


def test_terminal_shows_one_bar_with_the_figures(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with Progress(4, console=console) as progress:
        progress.update(1, METRICS)
        clock[0] += 30.0
        progress.update(2, METRICS)
        progress.print("saved")
    text = text_of(console)
    assert "2/4" in text and "score 0.250  kl 1.500  tok/s 1,234  left 1:00" in text and "saved" in text


def test_samples_are_shown_as_they_are(clock):
    console = plain()
    completion = "Robots [bold]dream[/bold]\nin [/] copper\x1b[2J light\n\u4fb3\u53e5"
    Progress(1, console=console).samples(7, [{"prompt": "Write", "completion": completion, "score": -0.5}])
    text = text_of(console)
    assert "samples at step 7" in text and "-0.500" in text
    assert "Robots [bold]dream[/bold]" in text and "in [/] copper" in text and "\u4fb3\u53e5" in text
    assert "\x1b" not in text
    first, second = (next(i for i, line in enumerate(text.splitlines()) if w in line) for w in ("Robots", "copper"))
    assert second == first + 1


def test_long_completion_is_folded_not_cut(clock):
    console = plain()
    Progress(1, console=console).samples(0, [{"prompt": "p", "completion": "x" * 300, "score": 0.0}])
    assert text_of(console).count("x") == 300
    assert max(len(line) for line in text_of(console).splitlines()) <= 80


def test_letters_that_the_terminal_has_not_do_not_stop_the_run():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), force_terminal=False, width=80)
    progress = Progress(1, console=console)
    progress.samples(0, [{"prompt": "p", "completion": "caf\u00e9 \U0001f916", "score": 0.0}])
    progress.print("\u00e9")
    console.file.flush()
    assert b"caf? ?" in raw.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599.7, "1:00:00"), (86400, "24:00:00")])
def test_seconds_round_up_into_minutes(seconds, text):
    assert format_seconds(seconds) == text
