"""Every table of a study."""

import pandas as pd

from analysis.accuracy import accuracy_table
from analysis.joined import carried_shapes, carried_table, speed_table
from analysis.tables import Table


def study_tables(frame: pd.DataFrame, beside_published: bool = False) -> dict[str, Table]:
    """The tables that the rows have something for, by name: ``accuracy``, ``speed``, ``carried-<model>``.

    Args:
        frame: as from `analysis.rows.load_rows`.
        beside_published: as `analysis.accuracy.accuracy_table`.

    Raises:
        UserError: if there are no rows, or they contradict each other.
    """
    found = {"accuracy": accuracy_table(frame, beside_published)}
    if (frame.stage == "pack").any():
        found["speed"] = speed_table(frame)
    for shape in carried_shapes(frame):
        found[f"carried-{shape}"] = carried_table(frame, shape)
    return found


def title(name: str) -> str:
    """What a table of `study_tables` shows, in a line."""
    if name.startswith("carried-"):
        return f"Tile statistics carried onto the shapes of {name.removeprefix('carried-')}"
    return {"accuracy": "Accuracy", "speed": "Size and speed of the same checkpoints"}[name]
