"""``hts``: its commands put together, and how it ends when something is wrong."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import typer

from experiments.cli import bench, doctor, model, study
from patch.errors import UserError, one_line

HELP = """Hybrid tile sparsity: learn which tiles of a language model stay dense and which become 2:4.

Run a whole study with [bold]hts run[/bold], or one step with [bold]hts prune[/bold], [bold]learn[/bold],
[bold]eval[/bold] and [bold]audit[/bold]. Everything that was measured lies under the results directory as JSON rows;
[bold]hts table[/bold] and [bold]hts plot[/bold] read nothing else."""

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
        "eval": model.evaluate,
        "audit": model.audit,
        "export": model.export,
        "restore": model.restore,
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


def answer(app: typer.Typer) -> None:
    """Run the command of this process: bad input and full disks end in one line, not in a traceback."""
    try:
        app()
    except (UserError, OSError) as error:
        print(f"hts: error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


def main() -> None:
    """Entry point of ``python -m experiments``."""
    answer(build())
