"""The ``hts`` command."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from experiments.cli import bench
from patch.errors import UserError, check_name, one_line

if TYPE_CHECKING:
    from experiments.run.runtime import Machine
    from experiments.run.store import Store
    from experiments.studies.trial import Pruning, Trial

# torch and transformers take seconds to import: commands import what they need, so that --help answers at once.

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Hybrid tile sparsity: learn which tiles of a language model stay dense and which become 2:4.

Run a whole study with [bold]hts run[/bold], or one step with [bold]hts prune[/bold], [bold]learn[/bold],
[bold]eval[/bold] and [bold]audit[/bold]. Everything that was measured lies under the results directory as JSON rows;
[bold]hts table[/bold] and [bold]hts plot[/bold] read nothing else.""",
)
console = Console()

Study = Annotated[str, typer.Argument(help="A study; [bold]hts studies[/bold] lists them.")]
Results = Annotated[Path, typer.Option(envvar="HTS_RESULTS", help="Results directory.")]
Data = Annotated[
    Path | None,
    typer.Option(envvar="HTS_DATA", help="Directory with local texts and tasks; without it they come from the hub."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the GPU if there is one.")]
Where = Annotated[
    list[str] | None,
    typer.Option(help="Only trials with KEY=VALUE: model, method, structure, target, tile or seed. Repeatable."),
]
PerStage = Annotated[
    list[str] | None, typer.Option(help="For every stage, or STAGE=VALUE: prune, learn, evaluate, report. Repeatable.")
]
Model = Annotated[str, typer.Argument(help="A name of [bold]hts models[/bold], a path, or a Hugging Face hub id.")]
Tile = Annotated[str, typer.Option(help="Tile shape, rows x columns.")]
Refit = Annotated[
    bool,
    typer.Option(
        "--refit", help="Fit the kept weights to the dense outputs on the calibration text; for one-shot masks."
    ),
]

DEFAULT_RESULTS = Path("runs")


@app.command()
def run(
    study: Study,
    where: Where = None,
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option(help="Print the trials and what each still needs; run nothing.")] = False,
) -> None:
    """Run a study: every trial that is not complete, then its table and figures.

    Safe to kill at any moment and to start again: finished stages are kept, learning resumes from its last checkpoint.
    Several processes may run the same study on one results directory and share the work.
    """
    from experiments.run import pipeline
    from experiments.run.store import Store

    trials = _trials(study, where)
    store = Store(results)
    if dry_run:
        with _machine(device, data) as machine:
            can_time = machine.can_time
        for trial in trials:
            missing = pipeline.missing_stages(trial, store, can_time)
            console.print(f"{trial.label}: {', '.join(missing) if missing else 'complete'}", highlight=False)
        return
    pipeline.validate(trials, data)
    console.print(f"{study}: {len(trials)} trials, results in {results}", highlight=False, soft_wrap=True)
    ended: list[Exception | None] = []
    with _machine(device, data) as machine:

        def report(trial: "Trial", error: Exception | None) -> None:
            ended.append(error)
            state = f"[green]done[/green]   {trial.label}" if error is None else f"[red]failed[/red] {trial.label}"
            reason = "" if error is None else f": {one_line(error)}"
            console.print(f"{state} ({len(ended)} of {len(trials)}){reason}", highlight=False, soft_wrap=True)

        pipeline.run_trials(trials, store, machine, report)
    _report(study, trials, store)
    if failed := len(list(filter(None, ended))):
        raise UserError(f"{failed} of {len(trials)} trials failed; run again to retry them")


@app.command()
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
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
    device: Device = None,
) -> None:
    """Run a study as Slurm jobs, as processes of this machine, or in this process.

    Submits what is neither done, nor running, nor in the queue; say it again whenever jobs were lost. Jobs that are
    preempted or reach their time limit requeue themselves and go on from their last checkpoint.
    """
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
        raise UserError(f"sweeps need {error.name}: pip install 'hybrid-tile-sparsity[slurm]'") from error
    work = Work(results.absolute(), data.absolute() if data else None, device)
    wanted = Sweep(study, tuple(_trials(study, where)), chosen, work)
    if dry_run:
        commands.dry_run(wanted, retry_failed, console)
    else:
        commands.sweep(wanted, retry_failed, console)


@app.command()
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

    commands.status(_trials(study, where), Store(results.absolute()), console, watch=watch, each=trials)


@app.command()
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

    commands.logs(_trials(study, where), Store(results.absolute()), trial, lines, console)


@app.command()
def cancel(study: Study, results: Results = DEFAULT_RESULTS) -> None:
    """Cancel all jobs and processes that were submitted for a study; what is done stays."""
    from experiments.run.store import Store
    from experiments.studies.registry import STUDIES
    from slurm import commands

    commands.cancel(check_name("study", study, STUDIES), Store(results.absolute()), console)


@app.command()
def studies() -> None:
    """List the studies: what each shows, and how many trials it has."""
    from experiments.studies.registry import STUDIES

    table = Table("study", "trials", "what it shows", box=None, pad_edge=False)
    for name, study in STUDIES.items():
        table.add_row(name, str(len(study.trials())), study.title)
    console.print(table)


@app.command(name="models")
def list_models() -> None:
    """List the models of the registry; any path or hub id works too."""
    from experiments.data.models import REGISTRY

    table = Table("model", "blocks", "hidden", "intermediate", "source", box=None, pad_edge=False)
    for name, spec in REGISTRY.items():
        table.add_row(name, str(spec.blocks), str(spec.hidden), str(spec.intermediate), spec.source)
    console.print(table)


@app.command()
def prune(
    model: Model,
    method: Annotated[str, typer.Option(help="magnitude, wanda or sparsegpt.")],
    structure: Annotated[str, typer.Option(help="2:4, unstructured, or hybrid tiles.")] = "2:4",
    sparsity: Annotated[float, typer.Option(help="Share of zeros over all prunable weights.")] = 0.5,
    tile: Tile = "128x128",
    calibration: Annotated[str, typer.Option(help="Text that Wanda, SparseGPT, ranking and --refit see.")] = "c4",
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    tile_ranking: Annotated[
        str, typer.Option(help="Which tiles stay dense: ranked within each weight, or over the model.")
    ] = "weight",
    seed: Annotated[int, typer.Option(help="Of the choice of windows.")] = 0,
    refit: Refit = False,
    out: Annotated[Path | None, typer.Option(help="Where to put a copy of the checkpoint.")] = None,
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
    device: Device = None,
) -> None:
    """Prune a model in one shot and write a hybrid checkpoint that plain transformers loads."""
    from experiments.studies import build
    from experiments.studies.trial import Calibration

    seen = Calibration(calibration, windows, length, seed)
    pruning = build.one_shot(model, method, structure, sparsity, _tile(tile), seen, tile_ranking)
    if refit:
        pruning = build.refitted(pruning, seen)
    _checkpoint(pruning, out, results, data, device)


@app.command()
def learn(
    model: Model,
    method: Annotated[str, typer.Option(help="patch-joint, patch-tile or maskllm.")] = "patch-joint",
    sparsity: Annotated[float, typer.Option(help="Share of zeros over all prunable weights, 0 to 0.5.")] = 0.45,
    tile: Tile = "128x128",
    text: Annotated[str, typer.Option(help="Text to learn on.")] = "c4",
    calibration: Annotated[str, typer.Option(help="Text of the SparseGPT prior, and of --refit.")] = "c4",
    calibration_windows: Annotated[int, typer.Option(help="Its windows.")] = 128,
    calibration_length: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    recipe: Annotated[
        str, typer.Option(help="published, or guided: by the dense model, which lowers PATCH joint's perplexity.")
    ] = "published",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; as all that follows, the recipe's.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    microbatch: Annotated[int | None, typer.Option(help="Sequences a forward pass.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    distillation: Annotated[
        float | None, typer.Option(help="Share of the loss that is the divergence from the dense model, 0 to 1.")
    ] = None,
    block_distillation: Annotated[
        float | None, typer.Option(help="Factor of the distance of each block's outputs from the dense model's.")
    ] = None,
    tile_ranking: Annotated[
        str | None, typer.Option(help="Which tiles start as dense: ranked within each weight, or over the model.")
    ] = None,
    tile_prior: Annotated[
        float | None, typer.Option(help="How far their logits start from zero, in standard deviations.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial logits, noise and data order.")] = 0,
    refit: Refit = False,
    out: Annotated[Path | None, typer.Option(help="Where to put a copy of the checkpoint.")] = None,
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
    device: Device = None,
) -> None:
    """Learn a mask with the weights frozen; stopped or killed, and started again, it resumes from its last checkpoint.

    On several GPUs: torchrun --nproc-per-node 8 -m experiments learn MODEL ...
    """
    from experiments.studies import build
    from experiments.studies.trial import Calibration
    from patch.learn.recipe import CHANGES

    given: dict[str, Any] = {"steps": steps, "batch": batch, "microbatch": microbatch, "length": length, "lr": lr}
    given |= {"distillation": distillation, "block_distillation": block_distillation}
    given |= {"tile_ranking": tile_ranking, "tile_prior": tile_prior}
    seen = Calibration(calibration, calibration_windows, calibration_length)
    check_name("recipe", recipe, CHANGES)
    changes = CHANGES[recipe] | {name: value for name, value in given.items() if value is not None}
    pruning = build.learned(model, method, sparsity, _tile(tile), text, seen, seed, **changes)
    if refit:
        pruning = build.refitted(pruning, seen)
    _checkpoint(pruning, out, results, data, device)


@app.command(name="eval")
def evaluate(
    model: Model,
    perplexity: Annotated[
        list[str] | None, typer.Option(help="Text, or TEXT@LENGTH for another window than 2048 tokens. Repeatable.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task of lm-eval-harness. Repeatable.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only so many items a task; for a quick look, not a result.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences a forward pass.")] = 16,
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
    device: Device = None,
) -> None:
    """Evaluate a model or a checkpoint: perplexity (WikiText-2 by default) and tasks."""
    from analysis.rows.load import records
    from experiments.publish import reports
    from experiments.run import pipeline
    from experiments.run.store import Store
    from experiments.studies import build
    from experiments.studies.trial import Evaluation, Perplexity, Trial

    items = []
    for name in perplexity or ([] if task else ["wikitext2/test"]):
        source, _, window = name.partition("@")
        items.append(Perplexity(source, int(window or 2048)))
    trial = Trial(build.dense(model), Evaluation(tuple(items), tuple(task or ()), limit, batch))
    store = Store(results)
    pipeline.validate([trial], data)
    with _machine(device, data) as machine:
        pipeline.run_trial(trial, store, machine)
    table = Table(box=None, pad_edge=False)
    table.add_column("measured on", overflow="fold")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for row in records(reports.frame([trial], store)):
        # Parts of a task (the subjects of MMLU) and its other metrics stay in the rows.
        if row.stage != "prune" and row.labels.get("primary", True):
            name = row.task if row.stage.startswith("task:") else f"{row.labels['source']}@{row.labels['length']}"
            table.add_row(name, row.metric, f"{row.value:.4f}", f"{row.stderr:.4f}")
    console.print(table)


@app.command()
def audit(
    path: Annotated[Path, typer.Argument(help="A hybrid checkpoint, or a foreign one whose zeros are its mask.")],
    tile: Annotated[str | None, typer.Option(help="Tile shape of a foreign checkpoint, rows x columns.")] = None,
) -> None:
    """Count each layer's tiles: dense, 2:4, violating. Exits with 1 if anything violates."""
    from patch.audit import audit as audit_checkpoint

    rows = audit_checkpoint(path, _tile(tile) if tile else None)
    table = Table("layer", box=None, pad_edge=False)
    for heading in ("shape", "tiles", "dense", "2:4", "violating", "sparsity"):
        table.add_column(heading, justify="right")
    for row in rows:
        shape = f"{row.shape[0]}x{row.shape[1]}"
        counts = [str(count) for count in (row.tiles, row.dense, row.two_four, row.violating)]
        table.add_row(row.layer, shape, *counts, f"{row.sparsity:.4f}", style="red" if row.violating else None)
    console.print(table)
    elements = sum(row.shape[0] * row.shape[1] for row in rows)
    sparsity = sum(row.sparsity * row.shape[0] * row.shape[1] for row in rows) / elements
    violating = sum(row.violating for row in rows)
    console.print(f"sparsity {sparsity:.6f} over {len(rows)} weights, {violating} violating tiles", highlight=False)
    if violating:
        raise typer.Exit(1)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A hybrid checkpoint.")],
    archive: Annotated[Path, typer.Argument(help="The archive to write (.tar.xz).")],
) -> None:
    """Write the masks of a checkpoint without its weights, to share them."""
    from experiments.run import mask_archive

    mask_archive.export(checkpoint, archive)
    console.print(archive, soft_wrap=True)


@app.command()
def restore(
    archive: Annotated[Path, typer.Argument(help="Masks that [bold]hts export[/bold] wrote.")],
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
) -> None:
    """Make a checkpoint again from its masks and the dense model; studies then take it instead of learning it."""
    from experiments.run import mask_archive
    from experiments.run.store import Store

    with _machine("cpu", data) as machine:
        path = mask_archive.restore(archive, Store(results), machine)
    console.print(path, soft_wrap=True)


@app.command()
def table(
    study: Study,
    about: Annotated[str, typer.Option(help="accuracy, speed, or carried-MODEL.")] = "accuracy",
    format: Annotated[str, typer.Option(help="md, csv or latex.")] = "md",
    published: Annotated[bool, typer.Option(help="What the PATCH paper reports, beside.")] = False,
    where: Where = None,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Print a table of the study from its rows."""
    from experiments.publish import reports
    from experiments.run.store import Store

    print(reports.table(_trials(study, where), Store(results), format, about, published))


@app.command()
def plot(study: Study, where: Where = None, results: Results = DEFAULT_RESULTS) -> None:
    """Draw the study's figures from its rows."""
    from experiments.publish import reports
    from experiments.run.store import Store

    for path in reports.figures(study, _trials(study, where), Store(results)):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


@app.command()
def compare(
    study: Study,
    left: Annotated[
        str, typer.Argument(help="KEY=VALUE,... of model, method, structure, target, tile, variant; or a trial.")
    ],
    right: Annotated[str, typer.Argument(help="Likewise.")],
    against: Annotated[
        Path | None, typer.Option(help="Results directory of the right one, such as another revision's.")
    ] = None,
    format: Annotated[str, typer.Option(help="terminal, md, csv or latex.")] = "terminal",
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Compare two pruned models of a study: differences, and whether they exceed the noise."""
    from analysis.rows.points import gather
    from analysis.tables import render
    from analysis.tables.compare import comparison, select
    from experiments.publish import reports
    from experiments.run.store import Store

    trials = _trials(study, None)
    chosen = [
        select(gather(reports.frame(trials, Store(root))), selector)
        for root, selector in ((results, left), (against or results, right))
    ]
    table = comparison(*chosen)
    if format == "terminal":
        console.print(render.rich_table(table, console.width))
    else:
        print(render.render(table, format))


@app.command()
def report(
    studies: Annotated[list[str] | None, typer.Argument(help="Studies; without, all that have rows.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Write one HTML file of studies and speeds: tables that sort, figures, and the row behind every number."""
    from experiments.publish import reports
    from experiments.run.store import Store
    from patch.files import write_atomic

    write_atomic(out, reports.page(studies or (), Store(results)))
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)


@app.command()
def doctor(results: Results = DEFAULT_RESULTS, data: Data = None) -> None:
    """Say what this machine can run, and why not."""
    from experiments.cli.doctor import examine

    table = Table("", "what", "found", box=None, pad_edge=False, show_header=False)
    for finding in examine(results, data):
        table.add_row("[green]ok[/green]" if finding.ok else "[yellow]--[/yellow]", finding.subject, finding.detail)
    console.print(table)


app.command()(bench.tune)
app.add_typer(bench.bench, name="bench")


def main() -> None:
    """Entry point: bad input and full disks end in one line and a non-zero exit, not in a traceback."""
    try:
        app()
    except (UserError, OSError) as error:
        print(f"hts: error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _tile(text: str) -> tuple[int, int]:
    from patch.mask import check_tile

    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"tile '{text}': give rows x columns, such as 64x64")
    return check_tile([int(side) for side in sides])


def _trials(study: str, where: list[str] | None) -> "list[Trial]":
    """The study's trials that match every KEY=VALUE."""
    from experiments.studies.registry import STUDIES

    trials = list(STUDIES[check_name("study", study, STUDIES)].trials())
    for condition in where or []:
        name, _, wanted = condition.partition("=")
        check_name("--where key", name, _FIELDS)
        found = {_FIELDS[name](trial.pruning) for trial in trials}
        trials = [trial for trial in trials if _FIELDS[name](trial.pruning) == wanted]
        if not trials:
            raise UserError(f"no trial of {study} has {name}={wanted}: there are {', '.join(sorted(found))}")
    return trials


_FIELDS = {
    "model": lambda pruning: pruning.model,
    "method": lambda pruning: pruning.method,
    "structure": lambda pruning: pruning.structure,
    "target": lambda pruning: f"{pruning.sparsity:g}",
    "tile": lambda pruning: "{}x{}".format(*pruning.tile) if pruning.tile else "none",
    "seed": lambda pruning: str(pruning.seed),
}


@contextmanager
def _machine(device: str | None, data: Path | None) -> "Iterator[Machine]":
    """The machine that trials run on, and progress on the console while they do."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from experiments.run.progress import shown
    from experiments.run.runtime import Machine
    from patch.learn.distributed import joined

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' cannot be used: {one_line(error)}") from error
    if data is not None and not data.is_dir():
        raise UserError(f"data directory {data} is not there")
    # Libraries' own bars would draw over this one.
    disable_progress_bar()
    with joined(device) as ranks, shown(console, quiet=ranks.rank > 0) as progress:
        yield Machine(device, data, progress, ranks)


def _checkpoint(pruning: "Pruning", out: Path | None, results: Path, data: Path | None, device: str | None) -> None:
    """Make the checkpoint of one pruning, copy it to ``out``, and say where it is."""
    from experiments.run import pipeline
    from experiments.run.store import Store
    from experiments.studies.trial import Evaluation, Trial
    from patch.checkpoint import copy_checkpoint, load_info

    if out is not None and out.exists():
        raise UserError(f"{out} is already there: choose another --out or remove it")
    store = Store(results)
    pipeline.validate([Trial(pruning, Evaluation(perplexity=()))], data)
    with _machine(device, data) as machine:
        path = pipeline.ensure_checkpoint(pruning, store, machine)
        if machine.ranks.rank:
            return
    assert path is not None
    sparsity = load_info(path)["sparsity"]
    if out is not None:
        path = copy_checkpoint(path, out)
    console.print(f"sparsity {sparsity:.6f} (target {pruning.sparsity:g}): {path}", highlight=False, soft_wrap=True)


def _report(study: str, trials: "list[Trial]", store: "Store") -> None:
    """Print the tables, save them, and draw the figures."""
    from analysis.tables.render import rich_table
    from analysis.tables.study import study_tables
    from experiments.publish import reports

    tables = study_tables(reports.frame(trials, store))
    for table in tables.values():
        console.print(rich_table(table, console.width))
    if not tables:
        console.print("nothing was timed: speed is measured on a CUDA GPU")
    for path in reports.write(study, trials, store):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
