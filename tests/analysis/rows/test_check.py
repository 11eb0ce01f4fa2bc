"""Rows that lack a field, whatever its type."""

import copy
from pathlib import Path
from typing import Any

import pytest

from analysis.rows.format import Damaged, check_row
from analysis.rows.load import stored_rows

RESULTS = Path(__file__).parents[3] / "results" / "bench" / "nvidia-h100-80gb-hbm3"


@pytest.fixture(scope="module")
def row() -> Any:
    return next(row for row in stored_rows(RESULTS) if "pruning" in row["definition"])


@pytest.mark.parametrize("part", ["", "definition", "definition.pruning"])
def test_every_field_that_is_missing_is_named(part: str, row: Any) -> None:
    check_row(row, "rows.jsonl:1")
    names = part.split(".") if part else []
    found = row
    for name in names:
        found = found[name]
    missed = 0
    for field in list(found):
        damaged = copy.deepcopy(row)
        inner = damaged
        for name in names:
            inner = inner[name]
        del inner[field]
        try:
            check_row(damaged, "rows.jsonl:1")
        except Damaged as error:
            assert f"no field '{field}'" in str(error) or field == "schema"
            missed += 1
    # What newer versions added may be absent.
    assert missed >= {"": 10, "definition": 1, "definition.pruning": 5}[part]
    for field in ("labels", "provenance", "definition"):
        with pytest.raises(Damaged, match=f"no field '{field}'"):
            check_row({name: value for name, value in row.items() if name != field}, "rows.jsonl:1")
