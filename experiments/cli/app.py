"""``hts``: its commands put together, and how it ends when something is wrong."""

import errno
import io
import logging
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import typer

from experiments.cli import bench, doctor, model, share, study
from patch.errors import UserError, one_line

# Of typer, or in older versions of click: what was typed is no command line of ours.
_UsageError: Any = typer.BadParameter.__base__
# What the system says of a disk that takes no more, and of one that may not be written.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_WRITING = (errno.EROFS, errno.EACCES, errno.EPERM)
# The exit code after Ctrl-C.
_INTERRUPTED = 130
HELP = """Hybrid tile sparsity: learn which tiles of a language model stay dense and which become 2:4.

Run a whole study with [bold]hts run[/bold], or one step with [bold]hts prune[/bold], [bold]learn[/bold],
[bold]quantise[/bold], [bold]eval[/bold] and [bold]audit[/bold]. Everything that was measured lies under the results
directory as rows, which [bold]hts table[/bold], [bold]plot[/bold] and [bold]report[/bold] read and
[bold]publish[/bold] makes flat tables of."""

Panels = Mapping[str, Mapping[str, Callable[..., Any]]]
# Every command by the panel of --help that it stands in.
PANELS: Panels = {
    "Studies": {
        "run": study.run,
        "studies": study.studies,
        "table": study.table,
        "plot": study.plot,
        "compare": study.compare,
        "report": study.report,
        "publish": study.publish,
    },
    "One model": {
        "models": model.list_models,
        "prune": model.prune,
        "learn": model.learn,
        "recover": model.recover,
        "quantise": model.quantise,
        "eval": model.evaluate,
        "audit": model.audit,
        "export": model.export,
        "restore": model.restore,
        "import": model.import_masks,
        "pack": share.pack,
        "push": share.push,
    },
    "This machine": {"doctor": doctor.doctor, "tune": bench.tune},
}


def build(panels: Panels = PANELS) -> typer.Typer:
    """The command with these subcommands."""
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        help=HELP,
    )
    for panel, commands in panels.items():
        for name, command in commands.items():
            app.command(name=name, rich_help_panel=panel)(command)
    app.add_typer(bench.bench, name="bench", rich_help_panel="This machine")
    return app


class OnceUnanswered(logging.Filter):
    """Of what the hub's client says of each try, which are two lines every time, one line for all."""

    _said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "Retrying in" not in str(record.msg) and "thrown while requesting" not in str(record.msg):
            return True
        first, self._said = not self._said, True
        record.msg, record.args = "the Hugging Face hub does not answer: trying again for up to half a minute", ()
        return first


def answer(app: typer.Typer) -> None:
    """Run the command of this process; whatever goes wrong is one line, and the traceback of a fault of ours a file."""
    logging.getLogger("huggingface_hub.utils._http").addFilter(OnceUnanswered())
    for stream in (sys.stdout, sys.stderr):
        # What a terminal's encoding has no sign for is escaped: it must not end hours of work.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        # Of Ctrl-C and `typer.Exit`; commands themselves return nothing.
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except _UsageError as error:
        command = getattr(error.ctx, "command_path", "hts")
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(error.exit_code)
        said = " ".join(error.format_message().split()).rstrip(".")
        _end(f"{said}{'' if said.endswith('?') else ':'} see `{command} --help`", error.exit_code)
    except OSError as error:
        _end(_system_said(error))
    except UserError as error:
        _end(one_line(error))
    except Exception as error:
        # Typer takes the end of any file for that of what is typed.
        fault = error.__cause__ if isinstance(error, typer.Abort) and isinstance(error.__cause__, Exception) else error
        _end(f"{type(fault).__name__}: {one_line(fault)}; {_kept(fault)}")
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            again = shlex.join(["hts", *sys.argv[1:]])
            print(f"hts: interrupted; what is done is kept, and the same command goes on: {again}", file=sys.stderr)
        raise


def _system_said(error: OSError) -> str:
    """What the system said, and of what; of a disk that takes no more, what to do."""
    if error.strerror is None:
        return one_line(error)
    said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if error.errno in _NO_ROOM:
        said += ": make room, or name another place; what is done is kept"
    elif error.errno in _NO_WRITING:
        said += ": name another place, or ask for the right to this one"
    return said


def _end(said: str, code: int = 1) -> NoReturn:
    print(f"hts: error: {said}", file=sys.stderr)
    sys.exit(code)


def _kept(error: Exception) -> str:
    """Where the whole traceback is; the traceback, if no file can be written."""
    whole = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="hts-", suffix=".txt", delete=False) as file:
            file.write(whole)
    except OSError:
        return f"its traceback:\n{whole}"
    return f"its traceback is {file.name}"


def main() -> None:
    """Entry point of ``python -m experiments``."""
    answer(build())
