"""How a pruning differs from others of its model, method and structure, or from what is usual, and what that is called.

All that is compared is a pruning's definition, as plain data: the fields of its parts by dotted names. Where several
are compared (a table, a figure), what most of them have is usual (`variants_of`); a trial's label is of one alone, and
what is published is usual there.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from patch.learn.recipe import ADDED_DEFAULTS, CHANGES, EARLIER, OURS, spelled
from patch.methods import label_of, published_recipe
from patch.quantise.precisions import PRECISIONS

RECIPE = "learning.recipe."
# Fields of a definition that have a place of their own in tables and figures, its prior's likewise.
_SHOWN_ANYHOW = ("sparsity", "tile")
# Settings that no published method has; a definition leaves them out where they are as published.
_DEPARTURES = {"recipe", "tile_ranking", "refit.source", "recovery.source"}
_DEPARTURES |= {"quantisation.precision", "quantisation.sink_aware", "recovery.recipe.precision"}
_DEPARTURES |= {RECIPE + name for name in OURS}
# Said wherever it is not so of all.
_ALWAYS_SAID = _DEPARTURES | {"earlier"}
# The one setting that is said of a part of a definition, where it tells that part from others.
_SAID_OF_PARTS = {"prior": "prior.method", "tile_prior": "tile_prior.method", "refit": "refit.source"}
_SAID_OF_PARTS["quantisation"] = "quantisation.precision"
_ALSO_SAID = {"quantisation.joint", "quantisation.sink_aware"}
_SAID_OF_PARTS |= {"recovery": "recovery.source"}
_RECOVERY = "recovery.recipe."


def variants_of(definitions: Collection[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Each definition with what tells it apart from others of its model, method and structure, sparsity and tile aside.

    Of what differs between any two of these, the value that most of them have goes without saying; any other is said
    at every sparsity, so that a line through several is of one recipe. Departures from every published recipe are said
    even where nothing differs.
    """
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for about in definitions:
        alike.setdefault((about["model"], about["method"], about["structure"]), []).append(about)
    result = []
    for members in alike.values():
        flat = [_named(_without_published(member)) for member in members]
        differing = [
            name
            for name in {name for fields in flat for name in fields}
            if len({canonical(fields.get(name)) for fields in _having(name, flat)}) > 1 or name in _DEPARTURES
        ]
        # Priors of different methods differ in all their settings: the methods say it, where they tell them apart.
        brief = [
            name for name in differing if name in _ALSO_SAID or _SAID_OF_PARTS.get(name.partition(".")[0], name) == name
        ]
        if _distinct(flat, brief) == _distinct(flat, differing):
            differing = brief
        usual = {}
        for name in differing:
            value, count = Counter(canonical(fields.get(name)) for fields in flat).most_common(1)[0]
            if 2 * count > len(flat) and name not in _ALWAYS_SAID:
                usual[name] = json.loads(value)
        for member, fields in zip(members, flat, strict=True):
            result.append((member, ", ".join(differences(fields, usual, differing))))
    return result


def _having(name: str, flat: Collection[dict[str, Any]]) -> Collection[dict[str, Any]]:
    """The definitions that a field tells apart: settings of recovery say nothing of what was not recovered."""
    return [fields for fields in flat if name in fields] if name.startswith(_RECOVERY) else flat


def settings(about: Mapping[str, Any]) -> dict[str, Any]:
    """A definition's fields by dotted name; settings that together have a name go by it, as ``recipe``."""
    return _named(_fields(about))


def _fields(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in _flatten(about).items() if name.rpartition(".")[2] not in _SHOWN_ANYHOW}


def _named(fields: dict[str, Any]) -> dict[str, Any]:
    for recipe, changes in CHANGES.items():
        named = {RECIPE + name: value for name, value in changes.items()}
        if named and named.items() <= fields.items():
            return {"recipe": recipe} | {name: value for name, value in fields.items() if name not in named}
    return fields


def _without_published(about: Mapping[str, Any]) -> dict[str, Any]:
    """A learned definition's fields without the start and the settings that are as published at its sparsity.

    ``earlier`` stands for those that the first studies had instead (`patch.learn.recipe.EARLIER`).
    """
    fields = _fields(about)
    method, recipe = about["method"], (about.get("learning") or {}).get("recipe")
    if recipe is None or method not in EARLIER:
        return fields
    at_each = [published_recipe(method, sparsity).substance() for sparsity in (about["sparsity"], 0.25, 0.5)]
    before, now = EARLIER[method].substance(), at_each[0]
    told = {name for name in now if any(other[name] != now[name] for other in (before, *at_each))}
    mine = {name: canonical(recipe.get(name, ADDED_DEFAULTS.get(name))) for name in told}
    # Of what recipes with a name change, too.
    usual = {RECIPE + name for changes in CHANGES.values() for name in changes if recipe.get(name) == now[name]}
    left = {name: value for name, value in fields.items() if name not in usual and not name.startswith("tile_prior.")}
    for known, said in ((now, {}), (before, {"earlier": "earlier"})):
        if all(mine[name] == canonical(known[name]) for name in told):
            names = {RECIPE + name for name in told}
            return {name: value for name, value in left.items() if name not in names} | said
    return left


def differences(
    fields: Mapping[str, Any], usual: Mapping[str, Any], among: Iterable[str], equals: str = "="
) -> list[str]:
    """What is said of settings that are not as usual, or of which none is: the recipe by its name first."""
    # Not as they come: fields that a definition leaves out would move when another one has them.
    # The text of recovery before its settings.
    names = sorted(among, key=lambda name: (name != "recipe", name.replace("recovery.source", "recovery.")))
    odd = [name for name in names if name not in usual or canonical(fields.get(name)) != canonical(usual[name])]
    return [words for name in odd if (words := _said(name, fields, equals))]


def _said(name: str, fields: Mapping[str, Any], equals: str) -> str:
    """One setting in words; nothing for one that is left out, as published."""
    if name not in fields:
        return "no prior" if name == "prior.method" else ""
    value = fields[name]
    if name in ("recipe", "earlier"):
        return str(value)
    if name == "prior.method":
        return f"from {label_of(value)}"
    if name == "tile_prior.method":
        return f"tiles from {label_of(value)}"
    if name == "learning.source":
        return f"learned on {value}"
    if name == "refit.source":
        return f"refitted on {value}"
    if name == "quantisation.precision":
        return PRECISIONS[value].label if value in PRECISIONS else str(value)
    if name == "quantisation.joint":
        return "pruned and rounded in one sweep" if value else ""
    if name == "quantisation.sink_aware":
        return "sink-aware" if value else ""
    if name == "recovery.source":
        return f"recovered on {value}"
    if name.startswith(_RECOVERY):
        return _recovery_said(name.removeprefix(_RECOVERY), value, equals)
    if name == "weight_update" and not value:
        return "weights not updated"
    return f"{name.removeprefix(RECIPE)}{equals}{spelled(value)}"


def _recovery_said(name: str, value: Any, equals: str) -> str:
    """A setting of recovery, in words where its number alone says little."""
    if name == "block_epochs":
        return f"blocks for {value} epochs" if value else "no blocks"
    if name == "steps" and not value:
        return "blocks alone"
    if name == "distillation":
        return {0: "loss of the text", 1: "distilled"}.get(value, f"{spelled(value)} distilled")
    if name == "precision":
        return f"trained as {PRECISIONS[value].label if value in PRECISIONS else value}" if value else ""
    if name == "block_targets" and value == "sparse":
        return "blocks towards dense ones on the same inputs"
    return f"recovery {name.replace('_', ' ')}{equals}{spelled(value)}"


def _distinct(flat: Collection[Mapping[str, Any]], names: Collection[str]) -> int:
    """How many of the definitions the fields of these names tell apart."""
    return len({tuple(canonical(fields.get(name)) for name in names) for fields in flat})


def canonical(value: Any) -> str:
    """Equal text for equal plain data."""
    return json.dumps(value, sort_keys=True)


def _flatten(about: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in about.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
