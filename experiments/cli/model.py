"""Commands on one model: prune or learn, quantise, evaluate, audit, and share its masks."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from experiments.cli.options import (
    DEFAULT_RESULTS,
    Data,
    Device,
    Model,
    Partial,
    Precision,
    Refit,
    Results,
    RunsCode,
    Tile,
    Track,
    check_out,
    console,
    listed,
    machine_on,
    of_a_checkpoint,
    tile_shape,
    tracked,
    without_bars,
)
from experiments.cli.recipe import RECOVERY_SETTINGS, SETTINGS, changes, forecast, forecast_recovery, settings
from patch.errors import UserError, check_name
from patch.learn.recipe import CHANGES, GUIDED_PATTERNS, PUBLISHED
from patch.methods import METHODS, members, published_recipe
from patch.quantise.precisions import PRECISIONS
from patch.recover.recipe import RecoveryRecipe
from patch.structures import TILED

if TYPE_CHECKING:
    from experiments.run.runtime import Machine
    from experiments.studies.trial import Calibration, Pruning

WINDOW = 2048
_WINDOW = f"Tokens of a window; {WINDOW} unless the model takes fewer."


def prune(
    context: typer.Context,
    model: Model,
    method: Annotated[str, typer.Option(help=listed([*members("one-shot"), *members("smaller")]) + ".")],
    structure: Annotated[str, typer.Option(help="2:4, unstructured, or hybrid tiles.")] = "2:4",
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of zeros over all prunable weights, or of blocks dropped; 0.5 if nothing is said."),
    ] = None,
    tile: Tile = "128x128",
    calibration: Annotated[str, typer.Option(help="Text that Wanda, SparseGPT, ranking and --refit see.")] = "c4",
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    length: Annotated[int | None, typer.Option(min=1, help=_WINDOW)] = None,
    tile_ranking: Annotated[
        str, typer.Option(help="Which tiles stay dense: ranked within each weight, or over the model.")
    ] = "weight",
    seed: Annotated[int, typer.Option(help="Of the choice of windows.")] = 0,
    refit: Refit = False,
    precision: Precision = None,
    partial: Partial = False,
    out: Annotated[Path | None, typer.Option(help="Where to put a copy of the checkpoint.")] = None,
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
    device: Device = None,
) -> None:
    """Prune a model in one shot and write a hybrid checkpoint that plain transformers loads."""
    from experiments.studies import build
    from experiments.studies.trial import Calibration

    if method in members("smaller"):
        _check_not_given(context, f"{method} drops whole blocks", "structure", "tile", "tile_ranking")
        structure = "shallow"
    elif structure == "unstructured":
        _check_not_given(context, "unstructured pruning has no tiles", "tile")
    if method not in members("smaller"):
        check_name("structure", structure, (*TILED, "unstructured"))
    if sparsity is None:
        sparsity = 0.5
        if structure != "2:4":
            every = ", which makes every tile 2:4" if structure == "hybrid" else ""
            console.print(f"sparsity {sparsity}{every}: --sparsity sets another")
    seen = Calibration(calibration, windows, length or _window(model, data), seed)
    if method in members("smaller"):
        pruning = build.fewer_blocks(model, sparsity, seen)
    else:
        pruning = build.one_shot(model, method, structure, sparsity, tile_shape(tile), seen, tile_ranking)
    pruning = _then(pruning, seen, refit, precision, partial)
    _check_seen(context, pruning, "calibration", "windows", "length", "seed")
    _checkpoint(pruning, out, results, data, device)


def _then(pruning: "Pruning", seen: "Calibration", refit: bool, precision: str | None, partial: bool) -> "Pruning":
    """A pruning with what else is asked for."""
    from experiments.studies import build

    if refit:
        pruning = build.refitted(pruning, seen)
    if precision:
        pruning = build.quantised(pruning, precision, seen, sink_aware=_passes_on(precision))
    return build.in_part(pruning) if partial else pruning


def _passes_on(precision: str) -> bool:
    """Whether a precision is quantised on the calibration text unasked."""
    return PRECISIONS[check_name("precision", precision, PRECISIONS)].grouped


def _check_seen(context: typer.Context, pruning: "Pruning", *options: str) -> None:
    """Options of a text that nothing looks at are not passed over."""
    from experiments.studies.trial import lineage

    if not any(text for step in lineage(pruning) for text in step.texts):
        what = pruning.quantisation.precision if pruning.quantisation else pruning.method
        _check_not_given(context, f"{what} looks at no text", *options)


def _check_not_given(context: typer.Context, why: str, *options: str) -> None:
    for name in options:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(f"{why}: leave out --{name.replace('_', '-')}")


def learn(
    model: Model,
    method: Annotated[str, typer.Option(help=listed(members("learned")) + ".")] = "patch-joint",
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of zeros over all prunable weights, 0 to 0.5; 0.45 by default, of 2:4 masks 0.5."),
    ] = None,
    tile: Tile = "128x128",
    text: Annotated[str, typer.Option(help="Text to learn on.")] = "c4",
    calibration: Annotated[str, typer.Option(help="Text of the one-shot prior, and of --refit.")] = "c4",
    calibration_windows: Annotated[int, typer.Option(min=1, help="Its windows.")] = 128,
    calibration_length: Annotated[int | None, typer.Option(min=1, help=_WINDOW)] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help=listed([*CHANGES, *PUBLISHED])
            + "; published is the method's at its sparsity, guided learns from the dense model, which lowers PATCH's "
            "perplexity, the others are published runs by name."
        ),
    ] = "published",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help=f"A setting of the recipe, such as steps=400. Repeatable: {', '.join(SETTINGS)}.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial logits, noise and data order.")] = 0,
    refit: Refit = False,
    precision: Precision = None,
    partial: Partial = False,
    out: Annotated[Path | None, typer.Option(help="Where to put a copy of the checkpoint.")] = None,
    track: Track = None,
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
    device: Device = None,
) -> None:
    """Learn a mask with the weights frozen; stopped or killed, and started again, it resumes from its last checkpoint.

    On several GPUs: torchrun --nproc-per-node 8 -m experiments learn MODEL ...
    """
    tracked(track)
    from experiments.studies import build
    from experiments.studies.trial import Calibration

    seen = Calibration(calibration, calibration_windows, calibration_length or _window(model, data))
    if method in METHODS and method not in members("learned"):
        raise UserError(f"{method} is not learned but {METHODS[method].family}: take `hts prune --method {method}`")
    check_name("recipe", recipe, [*CHANGES, *PUBLISHED])
    tiled = METHODS[check_name("method", method, members("learned"))].structure != "2:4"
    usual = GUIDED_PATTERNS if recipe == "guided" and not tiled else CHANGES.get(recipe, {})
    given = usual | changes(set_ or [])
    if sparsity is None:
        sparsity = 0.45 if tiled else 0.5
    pruning = build.learned(
        model, method, sparsity, tile_shape(tile), text, seen, seed, recipe=PUBLISHED.get(recipe), **given
    )
    pruning = _then(pruning, seen, refit, precision, partial)
    _checkpoint(pruning, out, results, data, device)


def quantise(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A hybrid checkpoint, or a dense model: a name, a path, or a Hugging Face hub id.")
    ],
    precision: Annotated[str, typer.Option(help=f"{listed(PRECISIONS)}.")] = "fp8",
    sink_aware: Annotated[bool, typer.Option(help="Pass the errors of 8 bits on too, as those of INT4 are.")] = False,
    calibration: Annotated[str, typer.Option(help="Text on which errors are passed on.")] = "c4",
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    length: Annotated[int | None, typer.Option(min=1, help=_WINDOW)] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of windows.")] = 0,
    partial: Partial = False,
    out: Annotated[Path | None, typer.Option(help="Where to put a copy of the checkpoint.")] = None,
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
    device: Device = None,
) -> None:
    """Quantise a model or a checkpoint, whose masks stay, and write it as servers read it (compressed-tensors)."""
    from experiments.studies import build
    from experiments.studies.trial import Calibration

    seen = Calibration(calibration, windows, length or _window(model, data), seed)
    aware = sink_aware or _passes_on(precision)
    rounded = build.quantised(build.dense(model), precision, seen, sink_aware=aware)
    pruning = dataclasses.replace(rounded, partial=partial)
    _check_seen(context, pruning, "calibration", "windows", "length", "seed")
    _checkpoint(pruning, out, results, data, device)


def recover(
    checkpoint: Annotated[
        Path, typer.Argument(callback=of_a_checkpoint, help="A checkpoint of any method, not packed.")
    ],
    text: Annotated[str, typer.Option(help="Text to train on.")] = "c4",
    base: Annotated[
        str | None, typer.Option(help="The dense model: name, path or hub id; by default what the checkpoint says.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the recipe, such as steps=400; block_epochs=2 trains each block alone before, steps=0 "
            f"stops there. Repeatable: {', '.join(RECOVERY_SETTINGS)}.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the text.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where to put a copy of the checkpoint.")] = None,
    track: Track = None,
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
    device: Device = None,
) -> None:
    """Train the weights that a mask keeps by distillation, the mask as it is; if asked for, block by block before.

    Stopped or killed, and started again, it resumes from its last checkpoint.

    On several GPUs: torchrun --nproc-per-node 8 -m experiments recover CHECKPOINT ...
    """
    from analysis.rows import layout
    from analysis.rows.format import name_of
    from experiments.data import models
    from experiments.data import text as texts
    from experiments.run import checkpoints, recovered
    from experiments.run.origin import check_same_origin
    from experiments.run.store import Store
    from experiments.studies.trial import Recovery
    from patch.checkpoint import copy_checkpoint
    from patch.positions import check_length

    tracked(track)
    check_out(out, checkpoint)
    usual = RecoveryRecipe()
    recovery = Recovery(text, dataclasses.replace(usual, **changes(set_ or [], usual)), seed)
    source = recovered.opened(checkpoint, base)
    texts.check_source(text, data)
    check_length(source.model, models.longest_text(source.model, data), recovery.recipe.length, "recovery sequences")
    about, store = recovered.definition_of(source, recovery), Store(results)
    store.make()
    path = store.root / layout.CHECKPOINTS / name_of(about)
    label = f"{checkpoint.name} recovered"
    with machine_on(device, data) as machine:
        if not machine.ranks.rank and not path.exists():
            _show_settings(settings(recovery.recipe, usual), "usual")
            _say(forecast_recovery(source.model, recovery.recipe, 1 - source.info["sparsity"], machine))

        def make() -> None:
            recovered.recover_checkpoint(source, recovery, about, label, path, store, machine)

        checkpoints.made_once(path, make, store, machine, together=True)
        if machine.ranks.rank:
            return
    check_same_origin(checkpoint, path)
    same = recovered.check_same_masks(checkpoint, path)
    if out is not None:
        path = copy_checkpoint(path, out)
    console.print(f"{same} weights recovered, their masks unchanged: {path}", soft_wrap=True)


def evaluate(
    model: Model,
    perplexity: Annotated[list[str] | None, typer.Option(help=f"Text, or TEXT@LENGTH. {_WINDOW} Repeatable.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task of lm-eval-harness. Repeatable.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many items a task; for a quick look, not a result.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a forward pass.")] = 16,
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
    device: Device = None,
    runs_code: RunsCode = False,
) -> None:
    """Evaluate a model or a checkpoint: perplexity (WikiText-2 by default) and tasks."""
    from analysis.rows.load import records
    from experiments.publish.measured import frame
    from experiments.run import pipeline
    from experiments.run.store import Store
    from experiments.studies import build
    from experiments.studies.trial import Evaluation, Perplexity, Trial

    items = []
    for name in perplexity or ([] if task else ["wikitext2/test"]):
        source, length = text_and_length(name)
        items.append(Perplexity(source, length or _window(model, data)))
    trial = Trial(build.dense(model), Evaluation(tuple(items), tuple(task or ()), limit, batch))
    store = Store(results)
    pipeline.validate([trial], data, runs_code)
    store.make()
    with machine_on(device, data, runs_code) as machine:
        pipeline.run_trial(trial, store, machine)
    table = Table(box=None, pad_edge=False)
    table.add_column("measured on", overflow="fold")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for row in records(frame([trial], store)):
        # Parts of a task (the subjects of MMLU) and its other metrics stay in the rows.
        if row.stage != "prune" and row.labels.get("primary", True):
            name = row.task if row.stage.startswith("task:") else f"{row.labels['source']}@{row.labels['length']}"
            table.add_row(name, row.metric, f"{row.value:.4f}", f"{row.stderr:.4f}")
    console.print(table)


def audit(
    path: Annotated[
        Path,
        typer.Argument(
            callback=of_a_checkpoint, help="A hybrid checkpoint, or a foreign one whose zeros are its mask."
        ),
    ],
    tile: Annotated[str | None, typer.Option(help="Tile shape of a foreign checkpoint, rows x columns.")] = None,
) -> None:
    """Count each layer's tiles: dense, 2:4, violating. Exits with 1 if anything violates."""
    from patch.audit import audit as audit_checkpoint
    from patch.audit import dropped_blocks

    without_bars()
    rows = audit_checkpoint(path, tile_shape(tile) if tile else None)
    table = Table(box=None, pad_edge=False)
    # In a narrow terminal names are folded, not numbers cut off.
    table.add_column("layer", overflow="fold")
    quantised = any(row.bits for row in rows)
    for heading in ("shape", "tiles", "dense", "2:4", "violating", "sparsity", *["bits", "scales"] * quantised):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shape = f"{row.shape[0]}x{row.shape[1]}"
        cells = [str(count) for count in (row.tiles, row.dense, row.two_four, row.violating)]
        cells.append(f"{row.sparsity:.4f}")
        if row.scales:
            cells += [str(row.bits), "{:.1e}-{:.1e}".format(*row.scales[1:])]
        table.add_row(row.layer, shape, *cells, style="red" if row.violating else None)
    console.print(table)
    elements = sum(row.shape[0] * row.shape[1] for row in rows)
    sparsity = sum(row.sparsity * row.shape[0] * row.shape[1] for row in rows) / elements
    violating = sum(row.violating for row in rows)
    console.print(f"sparsity {sparsity:.6f} over {len(rows)} weights, {violating} violating tiles")
    shared = {(row.bits, row.scales[0] if row.scales[0] < row.shape[1] else 0) for row in rows if row.scales}
    for bits, inputs in sorted(shared):
        some = f"{inputs} inputs of an output feature" if inputs else "output feature"
        console.print(f"{bits} bits, a scale for each {some}")
    gone, share = dropped_blocks(path)
    if gone:
        console.print(f"{gone} decoder blocks are gone and not counted here: sparsity {share:.6f} with them")
    if violating:
        raise typer.Exit(1)


def export(
    checkpoint: Annotated[Path, typer.Argument(callback=of_a_checkpoint, help="A hybrid checkpoint.")],
    archive: Annotated[Path, typer.Argument(help="The archive to write (.tar.xz).")],
) -> None:
    """Write the masks of a checkpoint without its weights, to share them."""
    from experiments.publish.card import origin
    from experiments.run import mask_archive

    if "packed" in origin(checkpoint):
        raise UserError(f"{checkpoint}: packed, so not what masks restore: export the checkpoint that it was made of")
    mask_archive.export(checkpoint, archive)
    console.print(archive, soft_wrap=True)


def restore(
    archive: Annotated[Path, typer.Argument(help="Masks that [bold]hts export[/bold] wrote.")],
    results: Results = DEFAULT_RESULTS,
    data: Data = None,
) -> None:
    """Make a checkpoint again from its masks and the dense model; studies then take it instead of learning it."""
    from experiments.run import mask_archive
    from experiments.run.store import Store

    with machine_on("cpu", data) as machine:
        path = mask_archive.restore(archive, Store(results), machine)
    console.print(path, soft_wrap=True)


def import_masks(
    archive: Annotated[Path, typer.Argument(help="Masks that PATCH's authors released (mask.npz).")],
    base: Annotated[str, typer.Option(help="The dense model that they are for: name, path or hub id.")],
    out: Annotated[Path, typer.Option(help="Where to write the checkpoint.")],
    tile: Tile = "128x128",
    data: Data = None,
) -> None:
    """Make a hybrid checkpoint of masks that others released, to audit, evaluate and pack as our own."""
    from experiments.run import foreign_masks

    with machine_on("cpu", data) as machine:
        path, sparsity = foreign_masks.import_masks(archive, base, tile_shape(tile), out, machine)
    console.print(f"{path}, sparsity {sparsity:.4f}", soft_wrap=True, highlight=False)


def list_models() -> None:
    """List the models of the registry; any path or hub id works too."""
    from experiments.data.registry import REGISTRY

    table = Table("model", "blocks", "hidden", "intermediate", "source", box=None, pad_edge=False)
    for name, spec in REGISTRY.items():
        table.add_row(name, str(spec.blocks), str(spec.hidden), str(spec.intermediate), spec.source)
    console.print(table)


def text_and_length(name: str) -> tuple[str, int | None]:
    """``TEXT@LENGTH`` in its two parts; a text, which may be a path, without a length is all of it.

    Raises:
        UserError: if the length is no whole number from 2.
    """
    source, mark, length = name.rpartition("@")
    # An @ inside a path is part of it.
    if not mark or "/" in length or "." in length:
        return name, None
    if not length.isdecimal() or int(length) < 2:
        raise UserError(
            f"--perplexity {name}: {length!r} is no length of windows: give TEXT@LENGTH, such as {source}@2048"
        )
    return source, int(length)


def _window(model: str, data: Path | None) -> int:
    """Tokens of a window where none is asked for."""
    from experiments.data.models import longest_text

    return min(WINDOW, longest_text(model, data) or WINDOW)


def _checkpoint(pruning: "Pruning", out: Path | None, results: Path, data: Path | None, device: str | None) -> None:
    """Make the checkpoint of one pruning, copy it to ``out``, and say where it is."""
    from experiments.run import checkpoints, pipeline
    from experiments.run.store import Store
    from experiments.studies.trial import Evaluation, Trial
    from patch.checkpoint import copy_checkpoint, load_info

    check_out(out, pruning.model)
    store = Store(results)
    if pruning.method != "dense":
        checkpoints.check_unpruned(pruning.model)
    pipeline.validate([Trial(pruning, Evaluation(perplexity=()))], data)
    checkpoints.check_linears(pruning)
    store.make()
    with machine_on(device, data) as machine:
        if pruning.learning and not machine.ranks.rank and not store.checkpoint_path(pruning).exists():
            _say_what_it_takes(pruning, machine)
        path = checkpoints.ensure_checkpoint(pruning, store, machine)
        if machine.ranks.rank:
            return
    assert path is not None
    info = load_info(path)
    if out is not None:
        path = copy_checkpoint(path, out)
    rounded = f", {PRECISIONS[info['precision']].label}" if "precision" in info else ""
    console.print(f"sparsity {info['sparsity']:.6f} (target {info['target']:g}){rounded}: {path}", soft_wrap=True)


def _say_what_it_takes(pruning: "Pruning", machine: "Machine") -> None:
    from experiments.data import registry
    from experiments.studies import cost

    assert pruning.learning is not None
    if cost.memory(pruning) is None:
        # The configuration of a hub model, which this fetches, says what it takes.
        registry.fingerprint(pruning.model)
    _show_settings(settings(pruning.learning.recipe, published_recipe(pruning.method, pruning.sparsity)), "published")
    _say(forecast(pruning, machine))


def _show_settings(rows: Iterable[tuple[str, str, str]], beside: str) -> None:
    table = Table("setting", "value", beside, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, style="yellow" if line.startswith("warning") else None, soft_wrap=True)
