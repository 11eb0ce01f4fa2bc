"""The whole ``hts`` command: what `experiments.cli.app` has, and the commands that spread a study over a cluster."""

from typing import Annotated, Any

import typer

from experiments.cli import app
from experiments.cli.options import (
    DEFAULT_RESULTS,
    Data,
    Device,
    Results,
    Study,
    Track,
    Where,
    console,
    tracked,
    trials_of,
)
from patch import install
from patch.errors import UserError, check_name

PerStage = Annotated[
    list[str] | None, typer.Option(help="For every stage, or STAGE=VALUE: prune, learn, evaluate, report. Repeatable.")
]


def sweep(
    study: Annotated[str | None, typer.Argument(help="A study; [bold]--list[/bold] shows them.")] = None,
    cluster: Annotated[
        str, typer.Option(help="slurm, local, debug, the name of a file in ~/.config/hts, or the path of one (.toml).")
    ] = "slurm",
    where: Where = None,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm's quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Features that nodes must have.")] = None,
    gpus: PerStage = None,
    nodes: PerStage = None,
    cpus: PerStage = None,
    time: PerStage = None,
    mem: Annotated[list[str] | None, typer.Option(help="GiB of main memory, likewise.")] = None,
    parallel: Annotated[int | None, typer.Option(help="Tasks of an array (local: processes) at a time.")] = None,
    setup: Annotated[list[str] | None, typer.Option(help="A shell line before each job's work. Repeatable.")] = None,
    retry_failed: Annotated[bool, typer.Option(help="Also what failed before.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything and print what would be submitted.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the studies with trials and estimated cost.")] = False,
    track: Track = None,
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
    device: Device = None,
) -> None:
    """Run a study as Slurm jobs, as processes of this machine, or in this process.

    Submits what is neither done, nor running, nor in the queue; say it again whenever jobs were lost. Jobs that are
    preempted or reach their time limit requeue themselves and go on from their last checkpoint.
    """
    tracked(track)
    from slurm import cluster as clusters
    from slurm import commands

    options: dict[str, Any] = {"partition": partition, "account": account, "qos": qos, "constraint": constraint}
    options |= {"parallel": parallel, "setup": tuple(setup or ())}
    resources = {"gpus": gpus or [], "nodes": nodes or [], "cpus": cpus or [], "time": time or [], "memory": mem or []}
    chosen = clusters.override(clusters.load(cluster), options, resources)
    if list_:
        console.print(commands.studies_table(chosen))
        return
    if study is None:
        raise UserError("name a study, or --list them")
    try:
        from slurm.submit import Sweep
        from slurm.task import Work
    except ModuleNotFoundError as error:
        raise UserError(f"sweeps need {error.name}: {install.how('slurm')}") from error
    work = Work(results.absolute(), data.absolute() if data else None, device)
    wanted = Sweep(study, tuple(trials_of(study, where)), chosen, work)
    if dry_run:
        commands.dry_run(wanted, retry_failed, console)
    else:
        commands.sweep(wanted, retry_failed, console)


def status(
    study: Study,
    where: Where = None,
    watch: Annotated[bool, typer.Option(help="Show it again every few seconds, until nothing runs or waits.")] = False,
    trials: Annotated[bool, typer.Option(help="One line per trial.")] = False,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Show what is done, running, waiting, failed and missing of a study, and how long it will take."""
    from experiments.run.store import Store
    from slurm import commands

    commands.status(trials_of(study, where), Store(results.absolute()), console, watch=watch, each=trials)


def logs(
    study: Study,
    where: Where = None,
    trial: Annotated[str | None, typer.Option(help="Only the trial of this id.")] = None,
    lines: Annotated[int, typer.Option(help="How many, from the end.")] = 20,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Print the logs of the trials that run, failed, or ended without a result."""
    from experiments.run.store import Store
    from slurm import commands

    commands.logs(trials_of(study, where), Store(results.absolute()), trial, lines, console)


def cancel(study: Study, results: Results = DEFAULT_RESULTS) -> None:
    """Cancel all jobs and processes that were submitted for a study; what is done stays."""
    from experiments.run.store import Store
    from experiments.studies.registry import STUDIES
    from slurm import commands

    commands.cancel(check_name("study", study, STUDIES), Store(results.absolute()), console)


PANELS: app.Panels = {**app.PANELS, "On a cluster": {"sweep": sweep, "status": status, "logs": logs, "cancel": cancel}}


def main() -> None:
    """Entry point of ``hts``."""
    app.answer(app.build(PANELS))


if __name__ == "__main__":
    main()
