"""How the command ends: one line, whatever happens."""

import errno
import re
from pathlib import Path

import pytest
import typer

from experiments.cli import app
from patch.errors import UserError


def end(error: BaseException, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> tuple[object, str]:
    """The exit code and what was printed, of a command that raises."""
    command = typer.Typer(pretty_exceptions_enable=False)

    @command.command()
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["hts", "two words"])
    with pytest.raises(SystemExit) as stop:
        app.answer(command)
    return stop.value.code, capsys.readouterr().err.strip()


def test_what_a_user_can_mend_is_one_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed = end(UserError("no\nsuch [/x]"), capsys, monkeypatch)
    assert code == 1 and printed == "hts: error: no such [/x]"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device: make room, or name"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "a/b: Read-only file system: name another place"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), "a/b: No such file or directory"),
        (OSError("of a library"), "of a library"),
    ],
    ids=["full", "read-only", "missing", "unnumbered"],
)
def test_what_the_system_refuses_names_the_place(
    error: OSError, said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed = end(error, capsys, monkeypatch)
    assert code == 1 and printed.startswith(f"hts: error: {said}")


def test_a_fault_is_one_line_and_its_traceback_a_file(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, printed = end(AttributeError("no such\nthing"), capsys, monkeypatch)
    found = re.fullmatch(r"hts: error: AttributeError: no such thing; its traceback is (\S+)", printed)
    assert code == 1 and found
    written = Path(found[1]).read_text(encoding="utf-8")
    assert "Traceback" in written and "in fail" in written


def test_the_end_of_a_file_is_a_fault_of_its_own(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, printed = end(EOFError("Ran out of input"), capsys, monkeypatch)
    assert code == 1 and printed.strip().startswith("hts: error: EOFError: Ran out of input; its traceback")


def test_ctrl_c_says_how_to_go_on(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed = end(KeyboardInterrupt(), capsys, monkeypatch)
    assert code == 130 and "goes on: hts 'two words'" in printed


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["two", "words"], "Got unexpected extra argument(s) (words): see"),
        ([], "Missing argument 'name': see"),
        (["--nme"], "No such option: --nme"),
    ],
    ids=["too-much", "too-little", "unknown"],
)
def test_what_is_no_command_line_is_one_line(
    typed: list[str], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = typer.Typer(pretty_exceptions_enable=False)
    command.command()(lambda name: None)
    monkeypatch.setattr("sys.argv", ["hts", *typed])
    with pytest.raises(SystemExit) as stop:
        app.answer(command)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith(f"hts: error: {said}") and printed.count("\n") == 1
    assert printed.rstrip().endswith("--help`")


@pytest.mark.parametrize("code", [0, 1])
def test_a_command_ends_with_its_own_code(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    command = typer.Typer(pretty_exceptions_enable=False)

    @command.command()
    def stop() -> None:
        raise typer.Exit(code)

    monkeypatch.setattr("sys.argv", ["hts"])
    with pytest.raises(SystemExit) as ended:
        app.answer(command)
    assert ended.value.code == code
