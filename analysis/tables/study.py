"""Every table of a study."""

import pandas as pd

from analysis.tables.accuracy import accuracy_table
from analysis.tables.kernels import from_rows, kernel_table, model_table
from analysis.tables.packed import carried_shapes, carried_table, speed_table
from analysis.tables.render import Table

GRID_STAGES = ("kernels:", "model:")


def study_tables(frame: pd.DataFrame, beside_published: bool = False) -> dict[str, Table]:
    """The tables that the rows have something for, by name.

    Of pruned models ``accuracy``, ``speed``, ``carried-<model>``; of grids ``kernels-<model>``, ``model-<model>``.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        beside_published: as `analysis.tables.accuracy.accuracy_table`.

    Raises:
        UserError: if there are no rows, or they contradict each other.
    """
    found: dict[str, Table] = {}
    for kind, table in (("kernels", kernel_table), ("model", model_table)):
        timed = from_rows(frame, kind)
        for model in sorted(set(timed.model)) if len(timed) else ():
            found[f"{kind}-{model}"] = table(timed[timed.model == model])
    if frame.stage.str.startswith(GRID_STAGES).all():
        # Where nothing could be timed there is nothing to show either.
        return found
    found["accuracy"] = accuracy_table(frame, beside_published)
    if (frame.stage == "pack").any():
        found["speed"] = speed_table(frame)
    for shape in carried_shapes(frame):
        found[f"carried-{shape}"] = carried_table(frame, shape)
    return found


def title(name: str) -> str:
    """What a table of `study_tables` shows, in a line."""
    if name.startswith("carried-"):
        return f"Tile statistics carried onto the shapes of {name.removeprefix('carried-')}"
    if name.startswith("kernels-"):
        model = name.removeprefix("kernels-")
        return f"{model}: its linears, speedup over dense by sparsity, 128x128 tiles, geometric mean"
    if name.startswith("model-"):
        return f"{name.removeprefix('model-')}: end to end, speedup over dense by sparsity"
    return {"accuracy": "Accuracy", "speed": "Size and speed of the same checkpoints"}[name]
