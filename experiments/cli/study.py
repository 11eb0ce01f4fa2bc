"""Commands on studies: run one, and print, draw and compare what was measured."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from experiments.cli.options import (
    DEFAULT_RESULTS,
    Data,
    Device,
    Results,
    RunsCode,
    Stages,
    Study,
    Track,
    Where,
    console,
    machine_on,
    tracked,
    trials_of,
)
from patch.errors import UserError, check_name, one_line

if TYPE_CHECKING:
    from analysis.tables import render
    from experiments.run.store import Store
    from experiments.studies.trial import Trial

TableFormat = Annotated[
    str | None, typer.Option(help="terminal, md, csv or latex; by default terminal on one, md elsewhere.")
]


def run(
    study: Study,
    where: Where = None,
    stage: Stages = None,
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
    device: Device = None,
    track: Track = None,
    dry_run: Annotated[bool, typer.Option(help="Print the trials and what each still needs; run nothing.")] = False,
    runs_code: RunsCode = False,
) -> None:
    """Run a study: every trial that is not complete, then its table and figures.

    Safe to kill at any moment and to start again: finished stages are kept, learning resumes from its last checkpoint.
    Several processes may run the same study on one results directory and share the work;
    take times (--stage speed, --stage carried) where nothing else runs on the GPU.
    """
    from experiments.run import pipeline
    from experiments.run.store import Store

    tracked(track)
    kinds = stage or []
    trials = trials_of(study, where)
    chosen = pipeline.with_stages(trials, kinds)
    store = Store(results)
    if dry_run:
        with machine_on(device, data) as machine:
            can_time = machine.can_time
        for trial in chosen:
            missing = pipeline.missing_stages(trial, store, can_time, kinds)
            console.print(f"{trial.label}: {', '.join(missing) if missing else 'complete'}")
        return
    pipeline.validate(chosen, data, runs_code, kinds)
    store.make()
    console.print(f"{study}: {len(chosen)} trials, results in {results}", soft_wrap=True)
    ended: list[Exception | None] = []
    with machine_on(device, data, runs_code) as machine:

        def report(trial: "Trial", error: Exception | None) -> None:
            ended.append(error)
            state = ("done  ", "green") if error is None else ("failed", "red")
            reason = "" if error is None else f": {one_line(error)}"
            line = Text.assemble(state, f" {trial.label} ({len(ended)} of {len(chosen)}){reason}")
            console.print(line, soft_wrap=True)

        pipeline.run_trials(chosen, store, machine, report, kinds)
        can_time = machine.can_time
    _print_report(study, trials, store)
    if kinds:
        left = [len(missing) for trial in trials if (missing := pipeline.missing_stages(trial, store, can_time))]
        if left:
            told = f"{sum(left)} stages of {len(left)} trials"
            console.print(f"left for the same command without --stage: {told}", soft_wrap=True)
    if failed := len(list(filter(None, ended))):
        raise UserError(f"{failed} of {len(chosen)} trials failed; run again to retry them")


def studies() -> None:
    """List the studies: what each shows, and how many trials it has."""
    from experiments.studies.registry import STUDIES

    table = Table("study", "trials", "what it shows", box=None, pad_edge=False)
    for name, study in STUDIES.items():
        table.add_row(name, str(len(study.trials())), study.title)
    console.print(table)


def table(
    study: Study,
    about: Annotated[
        str, typer.Option(help="accuracy; where it was measured also speed, cost or carried-MODEL.")
    ] = "accuracy",
    format: TableFormat = None,
    published: Annotated[bool, typer.Option(help="What the PATCH paper reports, beside.")] = False,
    where: Where = None,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Print a table of the study from its rows."""
    from experiments.publish import measured
    from experiments.run.store import Store

    _print(measured.table(trials_of(study, where), Store(results), about, published), format)


def plot(
    study: Study,
    format: Annotated[str, typer.Option(help="png or pdf.")] = "png",
    where: Where = None,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Draw the study's figures from its rows."""
    from experiments.publish import reports
    from experiments.run.store import Store

    drawn = list(reports.figures(study, trials_of(study, where), Store(results), format))
    for path in drawn:
        console.print(f"wrote {path}", soft_wrap=True)
    if not drawn:
        told = f"no figure: the rows in {results} have too little to draw yet (hts status {study} says what is left)"
        console.print(told, soft_wrap=True)


def compare(
    study: Study,
    left: Annotated[
        str, typer.Argument(help="KEY=VALUE,... of model, method, structure, target, tile, variant; or a trial.")
    ],
    right: Annotated[str, typer.Argument(help="Likewise.")],
    against: Annotated[
        Path | None, typer.Option(help="Results directory of the right one, such as another revision's.")
    ] = None,
    format: TableFormat = None,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Compare two pruned models of a study: differences, and whether they exceed the noise."""
    import pandas as pd

    from analysis.rows.points import gather
    from analysis.tables.compare import comparison, select
    from analysis.tables.study import warned
    from experiments.publish.measured import frame
    from experiments.run.store import Store

    trials = trials_of(study, None)
    frames = [frame(trials, Store(root), parts=False) for root in (results, against or results)]
    chosen = [select(gather(rows), selector) for rows, selector in zip(frames, (left, right), strict=True)]
    shown = [rows[rows.trial.isin(point.trials)] for rows, point in zip(frames, chosen, strict=True)]
    (table,) = warned({"": comparison(*chosen)}, pd.concat(shown)).values()
    _print(table, format)


def _print(table: "render.Table", format: str | None) -> None:
    """A table in a format; without one, fitted to the terminal, or in Markdown where there is none."""
    from analysis.tables import render

    if format is not None:
        check_name("table format", format, ["terminal", *render.FORMATS])
    if format == "terminal" or (format is None and console.is_terminal):
        console.print(render.rich_table(table, console.width))
    else:
        print(render.render(table, format or "md"))


def report(
    studies: Annotated[list[str] | None, typer.Argument(help="Studies; without, all that have rows.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Write one HTML file of studies and speeds: tables that sort, figures, and the row behind every number."""
    from experiments.publish import reports
    from experiments.run.store import Store
    from patch.files import check_file, write_atomic

    check_file(out)
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no directory {out.parent}: make it, or name another place")
    write_atomic(out, reports.page(studies or (), Store(results)))
    console.print(f"wrote {out}", soft_wrap=True)


def publish(
    runs: Annotated[Path, typer.Argument(help="Results directory with the rows.")],
    into: Annotated[Path, typer.Option(help="Results directory to publish them in.")] = Path("results"),
    dirty: Annotated[
        bool, typer.Option("--dirty", help="Also rows of a working tree with changes; tables warn of them.")
    ] = False,
) -> None:
    """Publish rows as flat tables that any program opens: facts.csv, trials.jsonl and details/."""
    from experiments.publish.committed import consolidate_into

    for path in (changed := consolidate_into(runs, into, dirty)):
        console.print(f"wrote {path}", soft_wrap=True)
    if not changed:
        console.print(f"{into} has all of {runs} already", soft_wrap=True)


def _print_report(study: str, trials: "list[Trial]", store: "Store") -> None:
    """Print the tables, save them, and draw the figures."""
    from analysis.tables.render import rich_table
    from analysis.tables.study import study_tables
    from experiments.publish import measured, reports

    tables = study_tables(measured.frame(trials, store, parts=False))
    for table in tables.values():
        console.print(rich_table(table, console.width))
    if not tables:
        console.print("nothing was timed: speed is measured on a CUDA GPU")
    for path in reports.write(study, trials, store):
        console.print(f"wrote {path}", soft_wrap=True)
