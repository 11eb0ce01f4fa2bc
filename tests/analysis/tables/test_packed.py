"""The tables of a joined study: what they show of packed checkpoints, and what they leave out."""

import io
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from analysis.figures.speed_frontier import draw_speed_frontier
from analysis.page.origins import origins
from analysis.tables.packed import projected_shapes, projected_table, speed_table, workloads
from analysis.tables.render import MISSING, Table, render, rich_table, shown_cells
from analysis.tables.speed_frontier import placed
from analysis.tables.study import study_tables, title
from patch.errors import UserError

Row = dict[str, Any]
Make = Callable[..., Any]

WORKS: list[Row] = [{"kind": "decode", "batch": batch, "length": 1} for batch in (1, 16)]
TRIALS = {
    "d" * 12: ("dense", "dense", 0.0, 20.0),
    "1" * 12: ("wanda", "unstructured", 0.5, 30.0),
    "2" * 12: ("patch-joint", "hybrid", 0.25, 24.0),
    "3" * 12: ("patch-joint", "hybrid", 0.45, 33.0),
}
BYTES = {"d" * 12: 1000, "1" * 12: 590, "2" * 12: 780, "3" * 12: 610}


def facts(trial: str, method: str, structure: str, wrong: bool) -> list[Row]:
    """The packed stages of a trial, without what the rows have in common."""

    def row(stage: str, metric: str, value: float, **labels: Any) -> Row:
        return {"stage": stage, "metric": metric, "value": value, "labels": labels}

    found = [
        row("pack", "packed_bytes", BYTES[trial]),
        row("pack", "masked_bytes", 1000),
        row("pack", "disk_bytes", 3e6),
    ]
    if method != "dense":
        labels = {"source": "wikitext2/test", "length": 2048, "agrees": not wrong}
        found.append(row("packed:wikitext2/test@2048", "packed_perplexity", 33.5, **labels))
    if structure == "unstructured":
        return found
    for work in WORKS:
        stage = f"speed:decode@{work['batch']}x1"
        packed = 1.0 if method == "dense" else 1.2 + work["batch"] / 100
        found.append(row(stage, "speedup", packed, **work))
        found.append(row(stage, "peak_memory", 200, implementation="dense", **work))
        if method != "dense":
            found.append(row(stage, "peak_memory", 150, implementation="packed", **work))
    if structure == "hybrid":
        for work in WORKS:
            about = {"shape": "llama-2-7b", "tile": [64, 64]} | work
            found.append(row("carried:llama-2-7b", "speedup", 1.5 + work["batch"] / 100, **about))
            for name, size in (("dense", 100), ("packed", 60)):
                found.append(row("carried:llama-2-7b", "peak_memory", size, implementation=name, **about))
        found.append(row("carried:llama-2-7b", "packed_bytes", 640, shape="llama-2-7b"))
        found.append(row("carried:llama-2-7b", "masked_bytes", 1000, shape="llama-2-7b"))
    return found


@pytest.fixture
def frame(study: Make, make_pruning: Make, make_trial: Make) -> pd.DataFrame:
    trials: dict[str, list[Row]] = {}
    for trial, (method, structure, sparsity, perplexity) in TRIALS.items():
        rows = make_trial(trial, make_pruning("m", method, structure, sparsity), perplexity)
        more = [rows[-1] | fact for fact in facts(trial, method, structure, wrong=trial == "3" * 12)]
        measured = {"provenance": rows[-1]["provenance"] | {"checkpoint": trial * 4, "gpu": "NVIDIA H200"}}
        trials[trial] = [row | measured for row in (*rows, *more)]
    return study(trials)


def column(table: Table, heading: str) -> list[str]:
    place = [column.heading for column in table.columns].index(heading)
    return [line[place] for line in shown_cells(table)]


def test_a_checkpoint_is_a_line_of_accuracy_size_and_speed(frame: pd.DataFrame) -> None:
    table = speed_table(frame)
    assert column(table, "Method") == ["Dense", "Wanda", "PATCH joint", "PATCH joint"]
    assert column(table, "Target (%)") == ["0", "50", "45", "25"]
    assert column(table, "Packed PPL") == ["—", "33.50", "33.50", "33.50"]
    assert column(table, "Masked weights (x dense)") == ["1.00", "0.59", "0.61", "0.78"]
    assert column(table, "On disk (MB)") == ["3.000"] * 4
    assert column(table, "Peak memory, decoding, batch 1 (x dense)") == ["1.00", "—", "0.75", "0.75"]
    assert column(table, "Decoding, batch 1 (x)") == ["1.00", "—", "1.21", "1.21"]
    assert column(table, "Decoding, batch 16 (x)") == ["1.00", "—", "1.36", "1.36"]
    assert workloads(frame) == ["decode@1x1", "decode@16x1"]


def test_a_model_that_does_not_agree_is_said_to_be_no_result(frame: pd.DataFrame) -> None:
    (note,) = [note for note in speed_table(frame).notes if "no result" in note]
    assert "3" * 12 in note and "2" * 12 not in note


def test_tile_statistics_on_other_shapes_are_labelled_as_such(frame: pd.DataFrame) -> None:
    assert projected_shapes(frame) == ["llama-2-7b"]
    table = projected_table(frame, "llama-2-7b")
    assert column(table, "Target (%)") == ["45", "25"]
    assert column(table, "Masked weights (x dense)") == ["0.64", "0.64"]
    assert column(table, "Peak memory, decoding, batch 1 (x dense)") == ["0.60", "0.60"]
    assert column(table, "Decoding, batch 16 (x)") == ["1.66", "1.66"]
    assert any("random weights" in note and "64x64" in note for note in table.notes)
    with pytest.raises(UserError, match="shapes of llama-3"):
        projected_table(frame, "llama-3.1-8b")


def test_speeds_of_two_kinds_of_gpu_do_not_stand_in_one_table(frame: pd.DataFrame) -> None:
    assert speed_table(frame).notes[-2].endswith("on one NVIDIA H200.")
    frame.loc[(frame.trial == "2" * 12) & (frame.stage == "speed:decode@1x1"), "gpu"] = "NVIDIA A100"
    for show in (speed_table, lambda frame: projected_table(frame, "llama-2-7b"), draw_speed_frontier):
        with pytest.raises(UserError, match=r"NVIDIA H200 at .*, NVIDIA A100 at .*: remove the rows of one"):
            show(frame)


def test_a_study_has_the_tables_that_its_rows_allow(frame: pd.DataFrame) -> None:
    tables = study_tables(frame)
    assert list(tables) == ["accuracy", "speed", "front", "carried-llama-2-7b"]
    for name, table in tables.items():
        assert title(name) and all(render(table, format) for format in ("md", "csv", "latex"))
    plain = frame[~frame.stage.str.startswith(("pack", "speed", "carried"))]
    assert list(study_tables(plain)) == ["accuracy"]
    with pytest.raises(UserError, match="nothing was packed"):
        speed_table(plain)


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        (["prune"], ["accuracy"]),
        (["prune", "speed"], ["accuracy", "speed"]),
        (["prune", "pack", "speed"], ["accuracy", "speed"]),
        (["prune", "perplexity", "speed"], ["accuracy", "speed", "front"]),
        (["prune", "carried"], ["accuracy", "carried-llama-2-7b"]),
    ],
    ids="-".join,
)
def test_stages_that_were_run_alone_are_shown(frame: pd.DataFrame, kinds: list[str], names: list[str]) -> None:
    tables = study_tables(frame[frame.stage.str.partition(":")[0].isin(kinds)])
    assert list(tables) == names
    if "speed" in names:
        timed = [cell for cell in column(tables["speed"], "Decoding, batch 1 (x)") if cell != MISSING]
        assert timed == ["1.00", "1.21", "1.21"]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_narrow_terminal_leaves_columns_out_in_full_and_says_so(frame: pd.DataFrame, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(rich_table(speed_table(frame), width))
    text = console.export_text()
    assert "…" not in text and "PATCH joint" in text
    assert ("too narrow for" in text) == (width < 160)
    assert ("1.36" in text) == ("Decoding, batch 16 (x)" not in " ".join(text.partition("too narrow for")[2].split()))


def test_without_a_gpu_it_says_that_nothing_was_timed(frame: pd.DataFrame) -> None:
    table = speed_table(frame[~frame.stage.str.startswith(("speed", "carried"))])
    assert "Packed PPL" in [column.heading for column in table.columns]
    assert any("Nothing was timed" in note for note in table.notes)


@pytest.mark.parametrize("name", ["accuracy", "speed", "carried-llama-2-7b"])
def test_every_measured_number_has_its_row(frame: pd.DataFrame, name: str) -> None:
    table = study_tables(frame)[name]
    found = origins(table, frame)
    for place, about in enumerate(table.columns):
        measured = about.kind == "perplexity" or about.name.startswith(("speedup", "peak", "disk"))
        for row, values in enumerate(table.rows):
            dense = values[[each.name for each in table.columns].index("method")] == "Dense"
            derived = dense and about.name.startswith("peak")
            if measured and not derived:
                assert ((row, place) in found) == (values[place] is not None), about.name
    rows = {row.origin: row for row in frame.itertuples()}
    for (row, place), origin in found.items():
        for each in origin.split(", "):
            assert rows[each].trial in table.trials[row]
        if table.columns[place].name.startswith("speedup"):
            assert shown_cells(table)[row][place] == f"{rows[origin].value:.2f}"


def test_the_dense_model_has_its_place_among_carried_points(frame: pd.DataFrame) -> None:
    found = {each.point.sparsity: each.speedup for each in placed(frame, "decode@16x1", "llama-2-7b")}
    assert found == pytest.approx({0.0: 1.0, 0.45: 1.66, 0.25: 1.66})
    figure = draw_speed_frontier(frame, shape="llama-2-7b")
    assert "tile statistics on llama-2-7b shapes" in figure.get_suptitle()
