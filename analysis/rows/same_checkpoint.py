"""One point, one artefact: what may stand together in a table or figure.

Every row says by its content hash which weights and masks were measured. Rows from before there was one say nothing;
they may stand together as they always did, but not with what was measured of a packed checkpoint, whose point is the
promise that accuracy and speed are those of the same file.
"""

from collections.abc import Sequence

import pandas as pd

from analysis.rows.format import PACKED_STAGES
from patch.errors import UserError


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
