"""Rows of a bench to tables: the README's are the committed rows', and damaged files are named."""

import json
from pathlib import Path
from typing import Any

import pytest

from analysis.figures.study import kernel_drawings
from analysis.figures.style import png_bytes
from analysis.tables.kernels import kernel_table, load_bench
from analysis.tables.render import shown_cells
from patch.errors import UserError

ROOT = Path(__file__).parents[3]
GPUS = ("nvidia-h200", "nvidia-h100-80gb-hbm3")
HEADER: dict[str, Any] = {
    "schema": 1,
    "roof": {"copy": 4.0, "matmul": 700.0},
    "provenance": {"gpu": "none", "git": "none"},
}


def kernels(gpu: str) -> list[Path]:
    return sorted((ROOT / "results" / "bench" / gpu / "kernels").glob("*.jsonl"))


@pytest.mark.parametrize("gpu", GPUS)
def test_every_committed_product_was_right(gpu: str) -> None:
    frame = load_bench(kernels(gpu))
    hybrid = frame[frame.implementation == "hybrid"]
    measured = hybrid[hybrid.fallback.isna()]
    assert len(measured) > 900
    assert (measured.status == "ok").all()


def row(implementation: str, value: float, **more: Any) -> dict[str, Any]:
    cell = {"model": "m", "linear": "o", "n": 64, "k": 64, "tokens": 1} | more
    return {"metric": "time", "unit": "us", "cell": cell, "implementation": implementation, "value": value}


def test_speedup_is_over_the_fastest_dense(tmp_path: Path) -> None:
    variant = {"sparsity": 0.5, "tile": [128, 128], "tiles": "even"}
    rows = [
        HEADER,
        row("cublas", 12.0),
        row("compiled", 10.0),
        row("hybrid", 8.0, **variant),
        row("cusparselt", 20.0, **variant),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert shown_cells(kernel_table(load_bench([path]))) == [["1", "1.25", "0.50"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "line 1"), ('{"schema": 9}\n', "schema 1"), ("", "schema 1"), (None, "no such bench file")],
    ids=["cut", "other-schema", "empty", "missing"],
)
def test_what_is_not_a_bench_file_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"rows\.jsonl.*{message}"):
        load_bench([path])


def test_figures_are_drawn_of_every_model() -> None:
    drawings = list(kernel_drawings(load_bench(kernels(GPUS[0]))))
    assert [drawing.name for drawing in drawings][:2] == ["speedup-llama-2-7b", "speedup-llama-3.1-8b"]
    assert drawings[-1].name == "roof" and all("128x128" in drawing.caption for drawing in drawings)
    assert all("H200" in drawing.caption for drawing in drawings)
    assert len(png_bytes(drawings[0].figure)) > 5000
