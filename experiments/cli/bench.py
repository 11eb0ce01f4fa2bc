"""``hts tune`` and ``hts bench``: which kernel configuration is fastest on this GPU, and how fast that is."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress

from experiments.cli.options import Results, console
from patch.errors import UserError, check_name

bench = typer.Typer(help="Time kernels and models on this GPU, side by side with dense and 2:4 libraries.")
Models = Annotated[list[str] | None, typer.Option("--model", help="A model of the registry; may be repeated.")]
DEFAULT_RESULTS = Path("results")
Again = Annotated[bool, typer.Option(help="Measure again what has rows.")]
Base = Annotated[
    str | None,
    typer.Option(help="A git revision to compare with on this machine: this one, it, this one again. Writes no rows."),
]
Sparsities = Annotated[list[float] | None, typer.Option(help="Share of zeros; may be repeated.")]
Rounds = Annotated[int | None, typer.Option(help="Timed runs of each implementation.")]


def tune(
    model: Models = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Token counts; may be repeated. All by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Table to add to; by default the user's own.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Of the weights: bfloat16, float8_e4m3fn, int8, int4; may be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that compile.")] = max(1, (os.cpu_count() or 2) - 2),
) -> None:
    """Find the fastest kernel configuration for every linear of the models, at 1 to 8192 tokens."""
    import torch

    from experiments.bench.kernels import fused_linears
    from experiments.data.registry import REGISTRY
    from experiments.run.provenance import provenance
    from experiments.studies.speed import TIMED
    from stoicc import configs
    from stoicc.format import GROUPED, SCALE_GROUP, SCALED
    from stoicc.tune import compile_candidates, measure_shape

    names = dtype or ["bfloat16"]
    known = ("bfloat16", *(str(kind).removeprefix("torch.") for kind in (*SCALED, GROUPED)))
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--dtype {unknown[0]}: weights are {', '.join(known)}")
    if strange := [count for count in tokens or () if count not in configs.TOKENS]:
        made = ", ".join(map(str, configs.TOKENS))
        raise UserError(f"--tokens {strange[0]}: tables are of {made}, and others run as the nearest does")
    dtypes: list[torch.dtype] = [getattr(torch, name) for name in names]
    shapes = dict.fromkeys(
        (linear.n, linear.k) for name in model or TIMED for linear in fused_linears(check_name("model", name, REGISTRY))
    )
    # Tiles of 64 rows allow fewer configurations; their choice varies little with the shape.
    both = [(n, k, band) for n, k in shapes for band in (2, 1) if band == 2 or n >= 4096]
    work = [
        (n, k, band, count, kind)
        for kind in dtypes
        for n, k, band in both
        if kind != GROUPED or k % SCALE_GROUP == 0
        for count in tokens or configs.TOKENS
    ]
    if not work:
        raise UserError(f"--dtype int4: no linear of these models has inputs in whole groups of {SCALE_GROUP}")
    device = _gpu()
    started = time.time()
    with console.status("compiling all candidates"):
        for kind in dtypes:
            compile_candidates(device, workers, kind)
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
    context: typer.Context,
    model: Models = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Token counts; may be repeated.")] = None,
    sparsity: Sparsities = None,
    quick: Annotated[
        bool, typer.Option(help="LLaMA-2-7B, tiles of 128x128, 1, 16 and 4096 tokens; a few minutes.")
    ] = False,
    compiled: Annotated[bool, typer.Option(help="Also time torch.compile in max-autotune mode (slow).")] = False,
    rounds: Rounds = None,
    again: Again = False,
    results: Results = DEFAULT_RESULTS,
    base: Base = None,
) -> None:
    """Time every linear of the models, hybrid, dense of several precisions and 2:4, and print the speedups."""
    from experiments.studies.build import dense
    from experiments.studies.speed import TIMED
    from experiments.studies.trial import Evaluation, KernelGrid, Trial

    grid = KernelGrid()
    trials = []
    for name in model or (("llama-2-7b",) if quick else tuple(TIMED)):
        own = KernelGrid(
            tokens=tuple(tokens or ((1, 16, 4096) if quick else grid.tokens)),
            tiles=((128, 128),) if quick else TIMED.get(name, ((128, 128),)),
            sparsities=tuple(sparsity or grid.sparsities),
            rounds=rounds or grid.rounds,
            compiled=compiled,
        )
        trials.append(Trial(dense(name), Evaluation((), grid=own)))
    _run("kernels", trials, results, again, base, context)


@bench.command(name="model")
def whole_model(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A model of the registry.")] = "llama-2-7b",
    sparsity: Sparsities = None,
    workload: Annotated[
        list[str] | None, typer.Option(help="Such as decode@16x1 or prefill@8x2048; may be repeated.")
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="Fewer decoder blocks than the model has.")] = None,
    rounds: Rounds = None,
    again: Again = False,
    results: Results = DEFAULT_RESULTS,
    base: Base = None,
) -> None:
    """Time decoding and prefill of a whole model, hybrid and dense of several precisions, with energy and memory."""
    from experiments.studies.build import dense
    from experiments.studies.trial import WORKLOADS, Evaluation, ModelGrid, Trial, Workload

    grid = ModelGrid(
        sparsities=tuple(sparsity or ModelGrid.sparsities),
        workloads=tuple(map(Workload.named, workload)) if workload else WORKLOADS,
        rounds=rounds or ModelGrid.rounds,
        blocks=blocks,
    )
    _run("model", [Trial(dense(model), Evaluation((), grid=grid))], results, again, base, context)


@bench.command(name="soft_mask")
def soft_masks(
    context: typer.Context, again: Again = False, results: Results = DEFAULT_RESULTS, base: Base = None
) -> None:
    """Time the soft masks of LLaMA-3.2-1B, fused and eager, and steps of learning with each."""
    from experiments.bench.soft_mask import Bench

    _run("soft_mask", [Bench()], results, again, base, context)


@bench.command()
def learning(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model of the registry.")],
    blocks: Annotated[int | None, typer.Option(help="Fewer decoder blocks than the model has.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    microbatch: Annotated[int, typer.Option(help="Sequences a forward pass, of all processes together.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 4096,
    logits: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Dtype of logits.")] = "float32",
    checkpointing: Annotated[bool, typer.Option(help="Recompute each block in the backward pass.")] = False,
    again: Again = False,
    results: Results = DEFAULT_RESULTS,
    base: Base = None,
) -> None:
    """Time steps of learning PATCH joint, on one GPU or, under torchrun, on several."""
    from experiments.bench.learning import bench_of

    wanted = bench_of(model, blocks, batch, microbatch, length, logits, checkpointing)
    _run("learning", [wanted], results, again, base, context)


@bench.command()
def serving(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A model of the registry.")] = "llama-2-7b",
    sparsity: Annotated[float, typer.Option(help="Share of zeros.")] = 0.45,
    precision: Annotated[
        list[str] | None, typer.Option(help="bf16, fp8, int4; may be repeated. All by default.")
    ] = None,
    load: Annotated[
        list[str] | None, typer.Option(help="Such as latency@8x32+128 or throughput@64x512+128; may be repeated.")
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="Fewer decoder blocks than the model has.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed runs of each engine.")] = 3,
    again: Again = False,
    results: Results = DEFAULT_RESULTS,
    base: Base = None,
) -> None:
    """Output tokens a second in vLLM by its own benchmarks, packed and dense, in an environment that has vLLM."""
    from experiments.bench.serving import PRECISIONS, bench_of

    wanted = bench_of(model, blocks, sparsity, precision or list(PRECISIONS), load or (), rounds)
    _run("serving", [wanted], results, again, base, context)


def _run(
    name: str, definitions: Sequence[Any], results: Path, again: bool, base: str | None, context: typer.Context
) -> None:
    """Measure what is missing of a bench's definitions, and print the tables of all its rows; or compare revisions."""
    from analysis.tables.kernels import measurements
    from analysis.tables.render import markdown
    from experiments.bench import harness, rows
    from experiments.bench.registry import BENCHES
    from experiments.publish.measured import bench_frames, bench_tables
    from experiments.run.progress import shown

    _gpu()
    if base is not None:
        from experiments.bench.base import compare

        console.print(markdown(compare(base, [name, *_arguments(context)])), soft_wrap=True)
        return
    bench, gpu = BENCHES[name], _gpu_name()
    # Under torchrun all processes work, and the first one tells.
    first = os.environ.get("RANK", "0") == "0"
    with shown(console, quiet=not first) as progress:
        lab = harness.Lab("cuda", progress=progress)
        for wanted in definitions:
            parts = bench.parts(wanted) if again else rows.missing(bench, wanted, results, gpu)
            for part, facts, seconds in harness.measure(bench, wanted, parts, lab):
                if first:
                    rows.write(bench, wanted, part, facts, seconds, rows.path_of(bench, wanted, part, results, gpu))
    paths = {rows.path_of(bench, wanted, part, results, gpu) for wanted in definitions for part in bench.parts(wanted)}
    measured = [row for path in sorted(paths) for row in measurements(path)] if first else []
    for title, table in bench_tables(measured, bench_frames(measured)).items():
        console.print(f"{title}\n\n{markdown(table)}\n", soft_wrap=True)
    for path in sorted(paths) if first else ():
        console.print(str(path), soft_wrap=True)


def _arguments(context: typer.Context) -> list[str]:
    """What this command was given, for another revision: all but where results go and what to compare with."""
    found: list[str] = []
    for parameter in context.command.params:
        value, name = context.params.get(parameter.name or ""), parameter.opts[-1]
        if parameter.name in ("results", "base", "again") or value in (None, False, [], ()):
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            named = [] if parameter.param_type_name == "argument" else [name]
            found += [*named, *([] if each is True else [str(each)])]
    return found


@bench.command()
def report(
    gpu: Annotated[
        str | None, typer.Option(help="A folder of <results>/bench, such as nvidia-h200; all by default.")
    ] = None,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Print the tables of what was measured, GPU by GPU, and draw their figures."""
    from analysis.figures.style import save_figure
    from analysis.rows import layout
    from analysis.tables.render import markdown
    from experiments.publish import reports

    folders = sorted(path.name for path in (results / layout.BENCH).glob("*") if path.is_dir())
    for name in [gpu] if gpu else folders:
        measured = reports.speed(results / layout.BENCH / name)
        for title, table in measured.tables:
            console.print(f"{name}: {title}\n\n{markdown(table)}\n", soft_wrap=True)
        for drawing in measured.figures:
            for path in save_figure(drawing.figure, results / layout.REPORTS / f"speed-{name}" / drawing.name):
                console.print(str(path))
    if not gpu and not folders:
        raise UserError(f"{results / layout.BENCH} has no rows of any GPU: run `hts bench kernels` on one")


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _gpu() -> "torch.device":  # type: ignore[name-defined]  # noqa: F821
    import torch

    if not torch.cuda.is_available():
        raise UserError("this needs a CUDA GPU: torch sees none")
    return torch.device("cuda", torch.cuda.current_device())
