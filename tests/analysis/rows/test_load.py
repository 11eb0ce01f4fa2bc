"""Rows are read exactly as they were written, or refused with the place and the reason."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.rows.format import SCHEMA
from analysis.rows.jsonl import to_lines
from analysis.rows.load import COLUMNS, load_rows
from patch.errors import UserError

Row = dict[str, Any]


@pytest.fixture
def rows(make_pruning: Callable[..., Row], make_trial: Callable[..., list[Row]]) -> list[Row]:
    about = make_pruning("smollm2-135m", "patch-joint", "hybrid", 0.45, 3)
    layers = [("model.layers.0.mlp.down_proj", 96, 160)]
    return make_trial("0a1b2c3d4e5f", about, 23.5, {"piqa": (0.68, 1838)}, layers=layers, steps=2, limit=100)


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def only(frame: pd.DataFrame, metric: str) -> Any:
    (row,) = frame[frame.metric == metric].itertuples()
    return row


def test_definition_labels_and_provenance_become_columns(tmp_path: Path, rows: list[Row]) -> None:
    frame = load_rows(write(tmp_path / "rows.jsonl", rows))
    assert tuple(frame.columns) == COLUMNS and len(frame) == len(rows)
    text = only(frame, "perplexity")
    assert (text.model, text.method, text.structure, text.sparsity) == ("smollm2-135m", "patch-joint", "hybrid", 0.45)
    assert (text.tile, text.seed, text.limit) == ("64x64", 3, 100)
    assert (text.source, text.length, text.value, text.unit) == ("wikitext2/test", 2048, 23.5, "ppl")
    assert (text.git, text.gpu, text.time) == ("a4530ba", None, "2026-01-01T00:00:00Z")
    assert only(frame, "acc").task == "piqa" and only(frame, "layer_sparsity").layer == "model.layers.0.mlp.down_proj"
    assert frame[frame.metric == "loss"].step.tolist() == [1, 2]
    assert math.isnan(only(frame, "tile_map").value) and len(only(frame, "tile_map").labels["tile_map"]) == 2


def test_achieved_sparsity_stands_beside_every_row_of_its_trial(
    tmp_path: Path, make_pruning: Callable[..., Row], make_trial: Callable[..., list[Row]], rows: list[Row]
) -> None:
    other = make_trial("ffffffffffff", make_pruning("smollm2-135m", "dense", "dense", 0.0), 21.5)
    pruned_only_partly = [row for row in other if row["stage"] != "prune"]
    frame = load_rows(write(tmp_path / "rows.jsonl", rows + pruned_only_partly))
    assert set(frame[frame.trial == "0a1b2c3d4e5f"].achieved) == {0.45012}
    assert frame[frame.trial == "ffffffffffff"].achieved.isna().all()


def test_origin_leads_back_to_the_line(tmp_path: Path, rows: list[Row]) -> None:
    write(tmp_path / "rows" / "0a1b2c3d4e5f" / "all.jsonl", rows)
    frame = load_rows(tmp_path / "rows")
    for row in frame.itertuples():
        name, number = row.origin.rsplit(":", 1)
        original = json.loads((tmp_path / "rows" / name).read_text().splitlines()[int(number) - 1])
        assert (original["metric"], original["stage"]) == (row.metric, row.stage)


def test_only_the_trials_asked_for_are_read(tmp_path: Path, rows: list[Row]) -> None:
    write(tmp_path / "0a1b2c3d4e5f" / "prune.jsonl", rows)
    (tmp_path / "bbbbbbbbbbbb").mkdir()
    (tmp_path / "bbbbbbbbbbbb" / "prune.jsonl").write_text("broken\n")
    assert set(load_rows(tmp_path, {"0a1b2c3d4e5f"}).trial) == {"0a1b2c3d4e5f"}
    assert load_rows(tmp_path, {"cccccccccccc"}).empty
    with pytest.raises(UserError, match="not a whole JSON row"):
        load_rows(tmp_path)


def test_a_damaged_file_is_told_and_its_trial_left_out_while_others_are_read(tmp_path: Path, rows: list[Row]) -> None:
    for trial in ("0a1b2c3d4e5f", "bbbbbbbbbbbb", "cccccccccccc"):
        write(tmp_path / trial / "prune.jsonl", [row | {"trial": trial} for row in rows])
    (tmp_path / "bbbbbbbbbbbb" / "task-piqa.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "cccccccccccc" / "task-piqa.jsonl").write_bytes(b"")
    told: list[str] = []
    assert set(load_rows(tmp_path, on_damage=told.append).trial) == {"0a1b2c3d4e5f"}
    assert ["bbbbbbbbbbbb/task-piqa.jsonl:1: " in told[0], "cccccccccccc/task-piqa.jsonl: " in told[1]] == [True, True]
    with pytest.raises(UserError, match=r"task-piqa\.jsonl"):
        load_rows(tmp_path)


def test_the_spread_of_runs_among_labels_becomes_columns(tmp_path: Path, rows: list[Row]) -> None:
    timed = rows[0] | {"metric": "dense_time", "labels": {"batch": 1, "p20": 1.5, "p80": 2.5, "runs": 10}}
    (row,) = load_rows(write(tmp_path / "rows.jsonl", [timed])).itertuples()
    assert (row.p20, row.p80, row.runs, row.labels) == (1.5, 2.5, 10, {"batch": 1})


@pytest.mark.parametrize("schema", [0, -1, True, "2", None])
def test_an_unknown_schema_is_refused(tmp_path: Path, rows: list[Row], schema: object) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*schema"):
        load_rows(write(tmp_path / "rows.jsonl", [rows[0] | {"schema": schema}]))


def test_one_file_may_hold_many_trials(tmp_path: Path, rows: list[Row]) -> None:
    moved = [row | {"trial": "cccccccccccc"} for row in rows]
    path = write(tmp_path / "rows.jsonl", rows + moved)
    assert set(load_rows(path, ["cccccccccccc"]).trial) == {"cccccccccccc"}
    assert len(load_rows(path)) == 2 * len(rows)


def test_an_empty_directory_gives_an_empty_table_with_all_columns(tmp_path: Path) -> None:
    frame = load_rows(tmp_path)
    assert frame.empty and tuple(frame.columns) == COLUMNS


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        load_rows(tmp_path / "nowhere")


def test_a_newer_schema_is_refused_with_both_versions(tmp_path: Path, rows: list[Row]) -> None:
    path = write(tmp_path / "rows.jsonl", [rows[0], rows[1] | {"schema": SCHEMA + 1}])
    with pytest.raises(UserError) as caught:
        load_rows(path)
    message = str(caught.value)
    assert f"{path}:2" in message and f"schema {SCHEMA + 1}" in message and f"schema {SCHEMA}:" in message
    assert "update" in message and "\n" not in message


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.99])
def test_a_truncated_line_is_refused_with_its_place(tmp_path: Path, rows: list[Row], keep: float) -> None:
    path = write(tmp_path / "rows.jsonl", rows[:3])
    content = path.read_text()
    last = content.splitlines()[-1]
    path.write_text(content[: len(content) - len(last) - 1 + int(keep * len(last))])
    with pytest.raises(UserError, match=r"rows\.jsonl:3: not a whole JSON row") as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda row: [row], id="not an object"),
        pytest.param(lambda row: {name: row[name] for name in row if name != "value"}, id="no value"),
        pytest.param(lambda row: row | {"value": "12.3"}, id="value is text"),
        pytest.param(lambda row: row | {"labels": None}, id="no labels"),
        pytest.param(lambda row: row | {"definition": {"pruning": {}}}, id="half a definition"),
    ],
)
def test_a_damaged_row_is_refused_with_its_place(tmp_path: Path, rows: list[Row], damage: Callable[[Row], Any]) -> None:
    path = write(tmp_path / "rows.jsonl", [rows[0], damage(rows[1])])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: "):
        load_rows(path)


def test_a_first_row_without_a_schema_is_refused(tmp_path: Path, rows: list[Row]) -> None:
    path = write(tmp_path / "rows.jsonl", [{name: rows[0][name] for name in rows[0] if name != "schema"}])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*names no schema"):
        load_rows(path)


def test_a_row_inherits_what_it_leaves_out(tmp_path: Path, rows: list[Row]) -> None:
    whole, brief = write(tmp_path / "whole.jsonl", rows), tmp_path / "brief.jsonl"
    brief.write_text(to_lines(rows))
    assert len(brief.read_text()) < len(whole.read_text())
    left, right = (load_rows(path).drop(columns="origin") for path in (whole, brief))
    assert left.equals(right)


@pytest.mark.parametrize("value", [23.5, math.inf, math.nan, None])
def test_identical_duplicates_count_once(tmp_path: Path, rows: list[Row], value: float | None) -> None:
    row = rows[0] | {"value": value}
    assert len(load_rows(write(tmp_path / "rows.jsonl", [row, row]))) == 1


@pytest.mark.parametrize("change", [{"value": 23.6}, {"stderr": 0.5}], ids=str)
def test_rows_that_contradict_each_other_are_refused(tmp_path: Path, rows: list[Row], change: Row) -> None:
    write(tmp_path / "a.jsonl", [rows[0]])
    write(tmp_path / "b.jsonl", [rows[0] | change])
    with pytest.raises(UserError, match=r"b\.jsonl:1.*a\.jsonl:1"):
        load_rows(tmp_path)


def test_contradicting_tile_maps_are_refused(tmp_path: Path, rows: list[Row]) -> None:
    (row,) = [row for row in rows if row["metric"] == "tile_map"]
    other = row | {"labels": row["labels"] | {"tile_map": ["000", "000"]}}
    with pytest.raises(UserError, match="tile_map"):
        load_rows(write(tmp_path / "rows.jsonl", [row, other]))


def test_one_trial_cannot_have_two_definitions(tmp_path: Path, rows: list[Row]) -> None:
    changed = json.loads(json.dumps(rows[1]))
    changed["definition"]["pruning"]["sparsity"] = 0.25
    with pytest.raises(UserError, match="another definition"):
        load_rows(write(tmp_path / "rows.jsonl", [rows[0], changed]))
