"""Progress: bars where there is a terminal, lines of the right number and content where there is none."""

import io

import pytest
from rich.console import Console

from experiments.run.progress import EVERY, lines, shown


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_a_stage_and_one_now_and_then() -> None:
    clock, written = Clock(), list[str]()
    progress = lines(written.append, clock)
    for done in range(1, 101):
        clock.now += EVERY / 5
        progress("learning", done, 100)
    assert written[:2] == ["learning: 1/100", "learning: 6/100, 5 min left"]
    assert written[-1] == "learning: 100/100 in 5 min"
    assert len(written) == 21
    progress("evaluating", 1, 1)
    assert written[-1] == "evaluating: 1/1 in 0 s"


def test_the_same_work_may_come_again() -> None:
    clock, written = Clock(), list[str]()
    progress = lines(written.append, clock)
    for _ in range(2):
        progress("pruning", 1, 2)
        clock.now += 2
        progress("pruning", 2, 2)
    assert written == ["pruning: 1/2", "pruning: 2/2 in 2 s", "pruning: 2/2 in 2 s"]


@pytest.mark.parametrize(
    "left", [(50, "50 s"), (3000, "50 min"), (36000, "10.0 h")], ids=["seconds", "minutes", "hours"]
)
def test_the_time_left_is_said_in_a_unit_that_fits(left: tuple[float, str]) -> None:
    clock, written = Clock(), list[str]()
    progress = lines(written.append, clock)
    progress("x", 0, 3)
    clock.now = left[0] / 2
    progress("x", 1, 3)
    assert written == ["x: 0/3", f"x: 1/3, {left[1]} left"]


def test_nothing_is_known_of_the_rate_before_something_is_done() -> None:
    clock, written = Clock(), list[str]()
    progress = lines(written.append, clock)
    progress("waiting", 0, 3)
    clock.now = EVERY
    progress("waiting", 0, 3)
    assert written == ["waiting: 0/3"] * 2


def test_a_terminal_gets_bars_and_a_file_lines(capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    with shown(Console(file=screen, force_terminal=True, width=80)) as progress:
        progress("pruning", 1, 2)
        progress("pruning", 2, 2)
    assert "pruning" in screen.getvalue() and "\x1b[" in screen.getvalue() and not capsys.readouterr().out
    with shown(Console(file=io.StringIO(), force_terminal=False)) as progress:
        progress("pruning", 2, 2)
    assert capsys.readouterr().out == "pruning: 2/2 in 0 s\n"


def test_the_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(Console(force_terminal=False), quiet=True) as progress:
        progress("learning", 2, 2)
    assert not capsys.readouterr().out
