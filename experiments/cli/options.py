"""What the commands of ``hts`` share: their options, the console, and the machine that they run on."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from analysis.rows.format import STAGE_KINDS
from patch.errors import UserError, check_name, one_line
from patch.quantise.precisions import PRECISIONS

if TYPE_CHECKING:
    from experiments.run.runtime import Machine
    from experiments.studies.trial import Trial

# torch and transformers take seconds to import: commands import what they need, so that --help answers at once.


def new_console() -> Console:
    """Where commands print. A pipe has no width: lines there are as long as what they say, so that `grep` finds names.

    What users and files bring is printed as it is: `[bold]` in a path is no markup.
    """
    made = Console(markup=False, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 10_000
    return made


console = new_console()


def listed(names: Iterable[str]) -> str:
    """Names as a sentence has them: ``magnitude, wanda or sparsegpt``."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


Study = Annotated[str, typer.Argument(help="A study; [bold]hts studies[/bold] lists them.")]


def _of_a_directory(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise UserError(f"results directory {path}: is a file: name another with --results")
    return path


Results = Annotated[Path, typer.Option(envvar="HTS_RESULTS", callback=_of_a_directory, help="Results directory.")]
Data = Annotated[
    Path | None,
    typer.Option(envvar="HTS_DATA", help="Directory with local texts and tasks; without it they come from the hub."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the GPU if there is one.")]
Where = Annotated[
    list[str] | None,
    typer.Option(help="Only trials with KEY=VALUE: model, method, structure, target, tile or seed. Repeatable."),
]
Stages = Annotated[
    list[str] | None,
    typer.Option(
        "--stage",
        help=f"Only stages of this kind now, the others later: {listed(STAGE_KINDS)}, of those that the study has. "
        "A checkpoint that they need is made first. Repeatable.",
    ),
]
Model = Annotated[str, typer.Argument(help="A name of [bold]hts models[/bold], a path, or a Hugging Face hub id.")]
Tile = Annotated[str, typer.Option(help="Tile shape, rows x columns.")]
Partial = Annotated[
    bool,
    typer.Option("--partial", help="Prune a model of which some matrices cannot be pruned, and leave those dense."),
]
Refit = Annotated[
    bool,
    typer.Option(
        "--refit", help="Fit the kept weights to the dense outputs on the calibration text; for one-shot masks."
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(help=f"Quantise what the mask keeps: {listed(PRECISIONS)}; INT4 on the calibration text."),
]
Track = Annotated[
    str | None,
    typer.Option(envvar="HTS_TRACK", help="Where the curves of learning go beside TensorBoard: wandb or mlflow."),
]

RunsCode = Annotated[
    bool,
    typer.Option(
        "--run-generated-code",
        envvar="HTS_RUN_GENERATED_CODE",
        help="Let humaneval run programs that the model writes, in a sandbox.",
    ),
]

DEFAULT_RESULTS = Path("runs")


def of_a_checkpoint(path: Path) -> Path:
    """A path that must be a checkpoint's, not a file, the name of a model or a directory of something else.

    Raises:
        UserError: if it is such a file, name or directory.
    """
    if path.is_file():
        raise UserError(f"{path} is a file, and this takes the directory of a checkpoint")
    if not (path / "config.json").is_file():
        from experiments.data.registry import REGISTRY, check_directory

        if path.is_dir():
            check_directory(path)
        if str(path) in REGISTRY:
            raise UserError(
                f"{path} is a model, and this takes a checkpoint that was made of one: make it with "
                f"`hts prune {path}` or `hts learn {path}`, which say where it lies"
            )
        if not path.exists():
            raise UserError(f"{path}: no such directory")
    return path


def check_out(out: Path | None, source: str | Path) -> None:
    """Raise if something cannot be made new at ``out``, or would be in the directory that it is made of."""
    if out is None:
        return
    if out.exists():
        raise UserError(f"{out} is already there: choose another place or remove it")
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"{out}: lies in {source}, which it is made of: choose another place")


def tracked(track: str | None) -> None:
    """Have this process, and those that it starts, send the curves of learning to a tracker.

    Raises:
        UserError: if it is unknown or not installed.
    """
    from patch.learn.tracking import TRACK, check_tracker

    if track:
        os.environ[TRACK] = check_tracker(track)


def tile_shape(text: str) -> tuple[int, int]:
    from patch.tiles import check_tile

    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"tile '{text}': give rows x columns, such as 64x64")
    return check_tile([int(side) for side in sides])


def trials_of(study: str, where: list[str] | None) -> "list[Trial]":
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


def without_bars() -> None:
    """Keep libraries from bars of their own, which would stand in pipes and draw over ours."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


@contextmanager
def machine_on(device: str | None, data: Path | None, runs_code: bool = False) -> "Iterator[Machine]":
    """The machine that trials run on, and progress on the console while they do."""
    import torch

    from experiments.run.progress import shown
    from experiments.run.provenance import revision
    from experiments.run.runtime import Machine, leave_threads
    from patch.learn.distributed import joined

    # What names no commit is refused before anything is made.
    revision()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device '{device}' is not known: give cpu, cuda, or one of several as cuda:1")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' cannot be used: {one_line(error)}") from error
    if data is not None and not data.is_dir():
        raise UserError(f"data directory {data} is not there")
    without_bars()
    leave_threads(device)
    with joined(device) as ranks, shown(console, quiet=ranks.rank > 0) as progress:
        yield Machine(device, data, progress, ranks, runs_code)
