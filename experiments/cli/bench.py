"""``hts tune`` and ``hts bench``: which kernel configuration is fastest on this GPU, and how fast that is."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from experiments.cli.options import console
from patch.errors import UserError

bench = typer.Typer(help="Time kernels and models on this GPU, side by side with dense and 2:4 libraries.")
Models = Annotated[list[str] | None, typer.Option("--model", help="A model of the registry; may be repeated.")]
Results = Annotated[Path, typer.Option(help="Results directory.")]
Rounds = Annotated[int | None, typer.Option(help="Timed runs of each implementation.")]


def tune(
    model: Models = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Token counts; may be repeated. All by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Table to add to; by default the user's own.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that compile.")] = max(1, (os.cpu_count() or 2) - 2),
) -> None:
    """Find the fastest kernel configuration for every linear of the models, at 1 to 8192 tokens."""
    import torch

    from experiments.bench.kernels import fused_linears
    from experiments.run.provenance import provenance
    from experiments.studies.speed import TIMED
    from stoicc import configs
    from stoicc.tune import compile_candidates, measure_shape

    device = _gpu()
    started = time.time()
    with console.status("compiling all candidates"):
        compile_candidates(device, workers)
    shapes = dict.fromkeys((linear.n, linear.k) for name in model or TIMED for linear in fused_linears(name))
    # Tiles of 64 rows allow fewer configurations; their choice varies little with the shape.
    both = [(n, k, band) for n, k in shapes for band in (2, 1) if band == 2 or n >= 4096]
    work = [(*shape, count) for shape in both for count in tokens or configs.TOKENS]
    entries = []
    with Progress(console=console) as progress:
        for shape in progress.track(work, description="tuning"):
            entries.append(measure_shape(device, *shape))
    name = torch.cuda.get_device_name(device)
    path = out or configs.user_table(name)
    configs.remember(path, entries, provenance(time.time() - started))
    console.print(f"{len(entries)} shapes in {time.time() - started:.0f} s: {path}")


@bench.command()
def kernels(
    model: Models = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Token counts; may be repeated.")] = None,
    quick: Annotated[
        bool, typer.Option(help="LLaMA-2-7B, tiles of 128x128, 1, 16 and 4096 tokens; less than two minutes.")
    ] = False,
    compiled: Annotated[bool, typer.Option(help="Also time torch.compile in max-autotune mode (slow).")] = False,
    rounds: Rounds = None,
    again: Annotated[bool, typer.Option(help="Measure linears again whose rows are there.")] = False,
    results: Results = Path("results"),
) -> None:
    """Time every linear of the models at several sparsities, and print the speedup over dense."""
    import torch

    from analysis.tables.kernels import kernel_table, load_bench
    from analysis.tables.render import markdown
    from analysis.tables.study import title
    from experiments.bench import kernels
    from experiments.studies.speed import TIMED
    from experiments.studies.trial import KernelGrid
    from stoicc.timing import measure_roof

    _gpu()
    gpu, grid = torch.cuda.get_device_name(), KernelGrid()
    names = model or (("llama-2-7b",) if quick else tuple(TIMED))
    counts = tuple(tokens or ((1, 16, 4096) if quick else grid.tokens))
    linears = [linear for name in names for linear in kernels.fused_linears(name)]
    paths = [kernels.bench_file(results, gpu, linear) for linear in linears]
    missing = [(linear, path) for linear, path in zip(linears, paths, strict=True) if again or not path.exists()]
    with Progress(console=console) as progress:
        task = progress.add_task("timing", total=len(missing) * len(counts))
        for linear, path in missing:
            started = time.time()
            tiles = ((128, 128),) if quick else TIMED.get(linear.model, ((128, 128),))
            rows = kernels.bench_linear(
                linear,
                counts,
                tiles,
                grid.sparsities,
                rounds or grid.rounds,
                compiled,
                lambda _: progress.advance(task),
            )
            kernels.write_rows(path, rows, measure_roof(), started)
    frame = load_bench(paths)
    for name in dict.fromkeys(frame.model):
        table = markdown(kernel_table(frame[frame.model == name]))
        console.print(f"{title(f'kernels-{name}')}\n\n{table}\n", soft_wrap=True)


@bench.command(name="model")
def whole_model(
    model: Annotated[str, typer.Option(help="A model of the registry.")] = "llama-2-7b",
    sparsity: Annotated[list[float] | None, typer.Option(help="Target sparsity; may be repeated.")] = None,
    rounds: Rounds = None,
    results: Results = Path("results"),
) -> None:
    """Time decoding and prefill of a whole model, hybrid against dense, and print the speedup."""
    import torch

    from analysis.tables.kernels import load_bench, model_table
    from analysis.tables.render import markdown
    from experiments.bench.kernels import write_rows
    from experiments.bench.model import bench_file, bench_model
    from experiments.studies.trial import WORKLOADS, ModelGrid
    from stoicc.timing import measure_roof

    _gpu()
    started = time.time()
    sparsities = tuple(sparsity or ModelGrid.sparsities)
    path = bench_file(results, torch.cuda.get_device_name(), model)
    with Progress(console=console) as progress:
        task = progress.add_task("timing", total=len(sparsities) * len(WORKLOADS))
        rows = bench_model(
            model, sparsities, ModelGrid.tile, WORKLOADS, rounds or ModelGrid.rounds, lambda *_: progress.advance(task)
        )
    write_rows(path, rows, measure_roof(), started)
    console.print(markdown(model_table(load_bench([path]))), soft_wrap=True)


@bench.command()
def report(
    gpu: Annotated[
        str | None, typer.Option(help="A folder of <results>/bench, such as nvidia-h200; all by default.")
    ] = None,
    results: Results = Path("results"),
) -> None:
    """Print the tables of what was measured, GPU by GPU, and draw their figures."""
    from analysis.figures.style import save_figure
    from analysis.tables.render import markdown
    from experiments.publish import reports

    folders = sorted(path.name for path in (results / "bench").glob("*") if path.is_dir())
    for name in [gpu] if gpu else folders:
        measured = reports.speed(results / "bench" / name)
        for title, table in measured.tables:
            console.print(f"{name}: {title}\n\n{markdown(table)}\n", soft_wrap=True)
        for drawing in measured.figures:
            for path in save_figure(drawing.figure, results / "reports" / f"speed-{name}" / drawing.name):
                console.print(str(path))
    if not gpu and not folders:
        raise UserError(f"{results / 'bench'} has no rows of any GPU: run `hts bench kernels` on one")


def _gpu() -> "torch.device":  # type: ignore[name-defined]  # noqa: F821
    import torch

    if not torch.cuda.is_available():
        raise UserError("this needs a CUDA GPU: torch sees none")
    return torch.device("cuda", torch.cuda.current_device())
