"""A recipe on the command line: its fields set by name, and what learning by it takes, said before it starts."""

import types
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from patch.errors import UserError, check_name
from patch.learn.recipe import PATCH_JOINT, Recipe, Span, learning_rate, spelled
from patch.recover.recipe import RecoveryRecipe

if TYPE_CHECKING:
    from experiments.run.runtime import Machine
    from experiments.studies.trial import Pruning

SETTINGS = tuple(get_type_hints(Recipe))
RECOVERY_SETTINGS = tuple(get_type_hints(RecoveryRecipe))
# More than this on a CPU is worth a warning, in hours.
_LONG = 1.0


def changes(assignments: Iterable[str], of: Recipe | RecoveryRecipe = PATCH_JOINT) -> dict[str, Any]:
    """Fields of a recipe by name, each of its type, from texts: ``steps=400``, ``tau=4,0.05``, ``clip=none``.

    A value that is not of the field's type stays text, for the recipe to refuse with what it wants.

    Args:
        of: a recipe of the kind whose fields these are.

    Raises:
        UserError: if there is no such field, or no value.
    """
    kinds = get_type_hints(type(of))
    given = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        check_name("setting of a recipe", name, kinds)
        if not value:
            example = f"{name}={spelled(getattr(of, name))}"
            raise UserError(f"--set {assignment}: give NAME=VALUE, such as {example}")
        given[name] = _typed(kinds[name], value)
    return given


def _typed(kind: Any, text: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind == Span:
        return tuple(_typed(float, part) for part in text.split(","))
    if get_origin(kind) is types.UnionType:
        return None if text.lower() == "none" else _typed(get_args(kind)[0], text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def settings(recipe: Recipe | RecoveryRecipe, published: Recipe | RecoveryRecipe) -> list[tuple[str, str, str]]:
    """Every field of a recipe: name, value, and the published one where that is another, as ``--set`` has them."""
    rows = []
    for name in get_type_hints(type(recipe)):
        value, usual = getattr(recipe, name), getattr(published, name)
        rows.append((name, spelled(value), "" if value == usual else spelled(usual)))
    return rows


def forecast(pruning: "Pruning", machine: "Machine") -> Iterator[str]:
    """Lines on what making a learned mask takes here, its priors included, and warnings of what it had better not."""
    from experiments.studies import cost
    from experiments.studies.trial import lineage

    size, width = machine.ranks.size, 4 if machine.device == "cpu" else 2
    steps = lineage(pruning)
    tokens = sum(cost.learning_tokens(step) for step in steps)
    flops = [cost.pruning_flops(step) for step in steps]
    needs = [cost.memory(step, processes=size, width=width) for step in steps]
    yield from _said(f"learning takes {tokens:,} tokens", ", priors included", flops, needs, pruning.model, machine)
    if pruning.learning:
        yield from _cold(pruning.learning.recipe)
        if pruning.refit and pruning.learning.recipe.distillation:
            yield "warning: what follows the dense model already had better not be refitted: it loses by it"


def forecast_recovery(model: str, recipe: RecoveryRecipe, kept: float, machine: "Machine") -> Iterator[str]:
    """The same of recovering a checkpoint that keeps so much of what is prunable."""
    from experiments.studies import cost

    size, width = machine.ranks.size, 4 if machine.device == "cpu" else 2
    flops = [cost.recovery_flops(model, recipe)]
    needs = [cost.recovery_memory(model, recipe, kept, size, width)]
    yield from _said(f"recovery takes {recipe.tokens:,} tokens", "", flops, needs, model, machine)
    yield from _cold(recipe)


def _cold(recipe: Recipe | RecoveryRecipe) -> Iterator[str]:
    """A warning of a warm-up that steps do not outlast."""
    if 0 < recipe.steps <= recipe.warmup:
        highest = spelled(learning_rate(recipe.steps - 1, recipe.steps, recipe.warmup, recipe.lr, recipe.lr_end))
        yield (
            f"warning: {recipe.steps} steps end within the warm-up of {recipe.warmup}: the learning rate comes to "
            f"{highest} of {spelled(recipe.lr)}: more steps, or --set warmup={recipe.steps // 10}"
        )


def _said(
    tokens: str,
    included: str,
    flops: Sequence[float | None],
    needs: Sequence[float | None],
    model: str,
    machine: "Machine",
) -> Iterator[str]:
    from experiments.run.runtime import memory, product_rate
    from experiments.studies import cost

    size = machine.ranks.size
    if None in flops or None in needs:
        yield f"{tokens}; how long and how much memory cannot be told before the configuration of {model} is here"
        return
    share = cost.SHARE_OF_PRODUCT["cpu" if machine.device == "cpu" else "cuda"]
    hours = sum(filter(None, flops)) / (share * product_rate(machine) * size) / 3600
    gib = max(filter(None, needs))
    where = f"{size} x {machine.device}" if size > 1 else machine.device
    yield f"{tokens}, about {_duration(hours)} and {gib:.2g} GiB here ({where}){included}"
    if machine.device == "cpu" and hours > _LONG:
        yield (
            f"warning: {_duration(hours)} on a CPU: learn on a GPU, or on fewer tokens, such as "
            "--set steps=200 --set batch=16 --set microbatch=16 --set length=128"
        )
    if gib > (there := memory(machine)):
        yield (
            f"warning: about {gib:.3g} GiB are needed and {there:.3g} are there: take a smaller microbatch, "
            "activation_checkpointing=true or, of a mask, logit_dtype=bfloat16"
        )


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{round(60 * hours)} minutes" if 60 * hours >= 1.5 else "a minute"
    return f"{float(f'{hours:.2g}'):,g} hours" if hours < 100 else f"{float(f'{hours / 24:.2g}'):,g} days"
