"""What studies are made of: prunings and trials, with the usual settings filled in."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from experiments.data import registry
from experiments.studies.trial import (
    WORKLOADS,
    Calibration,
    Evaluation,
    Learning,
    Packed,
    Pruning,
    Quantisation,
    Recovery,
    Trial,
    Workload,
    needs_calibration,
)
from patch.errors import check_name
from patch.learn.recipe import EARLIER, GUIDED, HOW_IT_RUNS, Recipe
from patch.methods import METHODS, members, published_recipe
from patch.quantise.precisions import GROUPS, PRECISIONS, group_size
from patch.recover.recipe import RecoveryRecipe
from patch.tiles import TileShape

Trials = tuple[Trial, ...]

TARGETS = (0.45, 0.35, 0.25)

# Guided by the dense model, but for its hidden states.
RANKED = GUIDED | {"block_distillation": 0.0}


@dataclass(frozen=True)
class Study:
    """A named set of trials."""

    title: str
    trials: Callable[[], Trials]


def dense(model: str) -> Pruning:
    """The model as it is."""
    return Pruning(model, "dense", "dense", 0.0, revision=registry.local_revision(model))


def fewer_blocks(model: str, sparsity: float, calibration: Calibration) -> Pruning:
    """The model without the blocks that are missed least, ``sparsity`` of all."""
    (method,) = members("smaller")
    revision = registry.local_revision(model)
    return Pruning(model, method, METHODS[method].structure, sparsity, calibration=calibration, revision=revision)


def one_shot(
    model: str,
    method: str,
    structure: str,
    sparsity: float,
    tile: TileShape | None,
    calibration: Calibration,
    tile_ranking: str = "weight",
    weight_update: bool = True,
) -> Pruning:
    """A one-shot method; where no calibration text is needed, the hash ignores it."""
    check_name("one-shot method", method, members("one-shot"))
    return Pruning(
        model,
        method,
        structure,
        sparsity,
        None if structure == "unstructured" else tile,
        calibration=calibration if needs_calibration(method, tile_ranking) else None,
        revision=registry.local_revision(model),
        tile_ranking=tile_ranking,
        weight_update=weight_update,
    )


def learned(
    model: str,
    method: str,
    sparsity: float,
    tile: TileShape,
    text: str,
    calibration: Calibration,
    seed: int = 0,
    recipe: Recipe | None = None,
    start: str | None = "usual",
    earlier: bool = False,
    **changes: Any,
) -> Pruning:
    """A method that learns, from the mask of its usual prior; one-shot priors are found on ``calibration``.

    As published, MaskLLM starts from a sweep that leaves weights as they are, and the tiles that start as dense are
    those of which the unstructured mask of the same one-shot method, at the target, keeps most; over patterns that were
    learned, Wanda's.

    Args:
        start: another method whose 2:4 mask it starts from, or None for random logits.
        recipe: the published one of the method, at this sparsity, by default.
        earlier: as the first studies' rows were defined, which was not quite as published: `EARLIER` recipes, weights
            updated, tiles by the 2:4 mask's own scores.
        changes: fields of the recipe to replace.
    """
    published = published_recipe(method, sparsity)
    usual = EARLIER[method] if earlier else published
    chosen = dataclasses.replace(recipe or usual, **changes)
    start = METHODS[method].prior if start == "usual" else start
    prior: Pruning | None
    if start is None:
        prior = None
    elif start in members("learned"):
        # Both stages run alike, on the same steps, batches, text and objective; rates and penalties stay their own.
        common = ("steps", "batch", "microbatch", "length", "distillation", "block_distillation", *HOW_IT_RUNS)
        shared = {name: getattr(chosen, name) for name in common}
        prior = learned(model, start, 0.5, tile, text, calibration, seed, earlier=earlier, **shared)
    else:
        frozen = published.mode == "maskllm" and not earlier and METHODS[start].changes_weights
        prior = one_shot(model, start, "2:4", 0.5, tile, calibration, weight_update=not frozen)
    tile_prior = None
    if start and not earlier and chosen.mode != "maskllm" and chosen.tile_ranking == "weight":
        ranking = "wanda" if start in members("learned") else start
        tile_prior = one_shot(model, ranking, "unstructured", sparsity, None, calibration)
    return Pruning(
        model,
        method,
        METHODS[method].structure,
        sparsity,
        tile,
        seed,
        learning=Learning(text, chosen),
        prior=prior,
        revision=registry.local_revision(model),
        tile_prior=tile_prior,
    )


def in_part(pruning: Pruning) -> Pruning:
    """The same, and all that it stands on, of a model of which some matrices cannot be pruned: those stay dense."""
    return dataclasses.replace(
        pruning,
        partial=True,
        prior=pruning.prior and in_part(pruning.prior),
        tile_prior=pruning.tile_prior and in_part(pruning.tile_prior),
    )


def refitted(pruning: Pruning, text: Calibration) -> Pruning:
    """The same mask, and what it keeps fitted to the dense outputs on ``text``."""
    return dataclasses.replace(pruning, refit=text)


def recovered(pruning: Pruning, text: str, seed: int = 0, **changes: Any) -> Pruning:
    """The same mask, and what it keeps trained on ``text``.

    Args:
        changes: fields of `patch.recover.recipe.RecoveryRecipe` to replace.
    """
    return dataclasses.replace(pruning, recovery=Recovery(text, RecoveryRecipe(**changes), seed))


def quantised(
    pruning: Pruning, precision: str, text: Calibration, joint: bool = False, sink_aware: bool = False
) -> Pruning:
    """The same in fewer bits; errors are passed on on ``text``, those of INT4 always.

    Args:
        joint: prune and round in one sweep (SparseGPT, INT4); otherwise the mask is what it is without.
        sink_aware: pass errors on in every precision, the first token of each window in regard.
    """
    grouped = PRECISIONS[check_name("precision", precision, PRECISIONS)].grouped
    seen = text if grouped or sink_aware else None
    return dataclasses.replace(pruning, quantisation=Quantisation(precision, seen, joint, sink_aware))


def in_fewer_bits(
    prunings: Iterable[Pruning], text: Calibration, sink_aware: bool = False, precisions: Iterable[str] = PRECISIONS
) -> list[Pruning]:
    """Each pruning as it is, then in each precision."""
    names = tuple(precisions)
    return [
        each
        for plain in prunings
        for each in (plain, *(quantised(plain, name, text, sink_aware=sink_aware) for name in names))
    ]


def rounded_and_recovered(
    masks: Iterable[Pruning], precision: str, text: str, calibration: Calibration, **changes: Any
) -> list[Pruning]:
    """Each mask, itself recovered, both in a precision, and recovered as it will be rounded to that.

    Args:
        text: what is recovered on.
        calibration: on which errors of rounding are passed on.
        changes: as `recovered`.
    """
    each = []
    for mask in masks:
        plain, as_rounded = (recovered(mask, text, precision=name, **changes) for name in (None, precision))
        rounded = (quantised(some, precision, calibration, sink_aware=True) for some in (mask, plain, as_rounded))
        each += [mask, plain, *rounded]
    return each


def trials(prunings: Iterable[Pruning], evaluation: Evaluation) -> Trials:
    """Each pruning, evaluated alike."""
    return tuple(Trial(pruning, evaluation) for pruning in prunings)


def joined(
    prunings: Iterable[Pruning],
    evaluation: Evaluation,
    projected_on: tuple[str, ...] = (),
    workloads: tuple[Workload, ...] = WORKLOADS,
) -> Trials:
    """Accuracy and speed of the same artefacts: each pruning evaluated, packed, evaluated again, and timed.

    Args:
        projected_on: models of the registry on whose shapes the tile statistics of learned hybrid masks are timed too.
        workloads: what is timed.
    """
    both, plain = (
        dataclasses.replace(evaluation, packed=Packed(workloads, carried=shapes)) for shapes in (projected_on, ())
    )

    def about(pruning: Pruning) -> Evaluation:
        if pruning.quantisation is not None:
            # What is carried to other shapes is of 16 bits.
            int4 = PRECISIONS[pruning.quantisation.precision].grouped
            return plain if pruning.keeps_all or not int4 or _packs_groups(pruning.model) else evaluation
        return both if pruning.method in members("learned") else plain

    return tuple(Trial(pruning, about(pruning)) for pruning in prunings)


def _packs_groups(model: str) -> bool:
    """Whether INT4 of a model of the registry is packed: in groups of 128 inputs alone, which not every one has."""
    shapes = registry.REGISTRY[model].linear_shapes()
    return group_size({name: inputs for name, (_, inputs) in shapes.items()}) == GROUPS[0]


def one_shot_frontier(model: str, tile: TileShape, calibration: Calibration) -> list[Pruning]:
    """Wanda and SparseGPT: 2:4, hybrid at three sparsities, and unstructured 50%, whose speed is the contrast."""
    structures = [("2:4", 0.5), *(("hybrid", target) for target in TARGETS), ("unstructured", 0.5)]
    return [
        one_shot(model, method, structure, sparsity, tile, calibration)
        for method in ("wanda", "sparsegpt")
        for structure, sparsity in structures
    ]
