"""What learning costs: the committed rows as tables, and damaged files."""

from pathlib import Path

import pytest

from analysis.tables.kernels import measurements
from analysis.tables.learning import learning_tables
from analysis.tables.render import shown_cells
from patch.errors import UserError

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "results" / "bench" / "nvidia-h200"


def test_the_committed_rows_are_tables() -> None:
    masks, steps, rates = learning_tables(measurements(FOLDER)).values()
    assert [line[:2] for line in shown_cells(masks)] == [
        ["joint", "float32"],
        ["joint", "bfloat16"],
        ["tile", "float32"],
        ["maskllm", "float32"],
    ]
    assert len(steps.rows) == 7 and len(rates.rows) == 2


def test_a_folder_without_them_has_no_tables(tmp_path: Path) -> None:
    assert learning_tables(measurements(tmp_path)) == {}


@pytest.mark.parametrize("text", ["{", "", "[1]", '{"metric": "time"}'], ids=["cut", "empty", "list", "other"])
def test_damaged_files_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "soft_mask.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"soft_mask\.jsonl"):
        learning_tables(measurements(tmp_path))


def test_a_cut_off_bench_is_named(tmp_path: Path) -> None:
    kept = [row for row in measurements(FOLDER) if row["metric"] != "time_with_host"]
    with pytest.raises(UserError, match="cut off"):
        learning_tables(kept)
