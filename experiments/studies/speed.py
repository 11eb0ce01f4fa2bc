"""Studies of speed: the kernels and whole models of known shapes, with random weights."""

from collections.abc import Mapping

from experiments.studies.build import Trials
from experiments.studies.trial import Evaluation, KernelGrid, ModelGrid, Pruning, Trial
from patch.tiles import TileShape

# Models whose kernels are timed, with the tile shapes of each.
TIMED: dict[str, tuple[TileShape, ...]] = {
    "llama-2-7b": ((128, 128), (64, 64), (256, 256)),
    "llama-3.1-8b": ((128, 128),),
    "llama-3.2-1b": ((128, 128),),
    "qwen2.5-0.5b": ((128, 128),),
}


def _grids(grids: Mapping[str, KernelGrid | ModelGrid]) -> Trials:
    return tuple(
        Trial(Pruning(model, "dense", "dense", 0.0), Evaluation((), grid=grid)) for model, grid in grids.items()
    )


def kernels() -> Trials:
    """Every linear of four models against dense and 2:4 libraries: by tokens, sparsity and tile shape."""
    return _grids({model: KernelGrid(tiles=tiles) for model, tiles in TIMED.items()})


def models() -> Trials:
    """Decoding and prefill of whole models, hybrid against dense, with random weights."""
    return _grids({model: ModelGrid() for model in ("llama-2-7b", "llama-3.1-8b")})
