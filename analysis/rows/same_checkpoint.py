"""One point, one artefact: what may stand together in a table or figure.

Every row says by its content hash which weights and masks were measured. Rows from before there was one say nothing;
they may stand together as they always did, but not with what was measured of a packed checkpoint, whose point is the
promise that accuracy and speed are those of the same file. What was rounded, trained or fitted within a mask stands
beside that mask, of which it must have been made.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.rows.format import PACKED_STAGES
from analysis.rows.variants import canonical
from patch.errors import UserError

# What may be done within a mask, the last first.
_WITHIN = ("quantisation", "recovery", "refit")


def check_one_artefact(rows: pd.DataFrame, trials: Sequence[str]) -> None:
    """Check that the rows of one pruned model are all of the same weights and masks.

    Args:
        rows: as from `analysis.rows.load.load_rows`, those of ``trials`` only.
        trials: their hashes, for the message.

    Raises:
        UserError: if they are of two checkpoints, or some are of an unknown one and others of a packed one.
    """
    known = rows.dropna(subset="checkpoint")
    hashes = list(dict.fromkeys(known.checkpoint))
    names = ", ".join(trials)
    if len(hashes) > 1:
        first, second = (known[known.checkpoint == content].iloc[0] for content in hashes[:2])
        raise UserError(
            f"rows of {names} are of different checkpoints: {hashes[0][:12]} at {first.origin}, {hashes[1][:12]} at "
            f"{second.origin}: remove the older rows and run the study again"
        )
    unknown = rows[rows.checkpoint.isna()]
    packed = rows[rows.stage.str.partition(":")[0].isin(PACKED_STAGES)]
    if len(unknown) and len(packed):
        raise UserError(
            f"rows of {names}: {packed.iloc[0].origin} was measured of a packed checkpoint, but which one "
            f"{unknown.iloc[0].origin} was measured of is unknown: select one of them"
        )


def timed_on(frame: pd.DataFrame) -> str | None:
    """The kind of GPU that everything was timed on; None if nothing was timed.

    Args:
        frame: as from `analysis.rows.load.load_rows`.

    Raises:
        UserError: if it was two kinds, which no table or figure may mix.
    """
    timed = frame[frame.metric == "speedup"]
    kinds = timed.drop_duplicates("gpu")
    if len(kinds) > 1:
        first, second = kinds.iloc[0], kinds.iloc[1]
        raise UserError(
            f"speeds are of different GPUs: {first.gpu} at {first.origin}, {second.gpu} at {second.origin}: remove the "
            "rows of one and time these trials on the other"
        )
    return None if kinds.empty else str(kinds.iloc[0].gpu)


def masked_as(pruning: Mapping[str, Any]) -> dict[str, Any] | None:
    """The definition of the pruning whose mask this one has (`experiments.studies.trial.Pruning.masked_as`), if any."""
    for step in _WITHIN:
        if pruning.get(step) and not (step == "quantisation" and pruning[step].get("joint")):
            return {name: value for name, value in pruning.items() if name != step}
    return None


def of_other_masks(frame: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Trials that were made of another checkpoint of their mask than the frame has measured, each with one of that.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
    """
    made = frame[frame.base.notna()].drop_duplicates("trial")
    if made.empty:
        return
    measured: dict[str, dict[str, str]] = {}
    known = frame[frame.checkpoint.notna()].drop_duplicates(["trial", "checkpoint"])
    for trial, definition, content in zip(known.trial, known.definition, known.checkpoint, strict=True):
        measured.setdefault(canonical(definition.get("pruning")), {})[content] = trial
    for trial, definition, base in zip(made.trial, made.definition, made.base, strict=True):
        contents = measured.get(canonical(masked_as(definition["pruning"])), {})
        if contents and base not in contents:
            yield trial, next(iter(contents.values()))
