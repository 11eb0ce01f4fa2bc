"""Rows of a bench to tables: the README's are the committed rows', and damaged files are named."""

import json
from pathlib import Path
from typing import Any

import pytest

from analysis.figures.study import kernel_drawings, model_drawings
from analysis.figures.style import png_bytes
from analysis.tables.kernels import SUPERSEDED, kernel_table, load_bench, speed_tables
from analysis.tables.render import shown_cells
from analysis.tables.study import title
from patch.errors import UserError

kind = "kernels"
ROOT = Path(__file__).parents[3]
GPUS = ("nvidia-h200", "nvidia-h100-80gb-hbm3")
HEADER: dict[str, Any] = {
    "schema": 1,
    "roof": {"copy": 4.0, "matmul": 700.0},
    "provenance": {"gpu": "none", "git": "none"},
}


def folder(gpu: str) -> Path:
    return ROOT / "results" / "bench" / gpu


@pytest.mark.parametrize("gpu", GPUS)
def test_every_committed_product_was_right(gpu: str) -> None:
    frame = load_bench([folder(gpu)], "kernels")
    hybrid = frame[(frame.implementation == "hybrid") & (frame.metric == "time")]
    measured = hybrid[hybrid.fallback.isna()]
    assert len(measured) > 900
    # Newer rows tell it of each product in a row of its own, and what is wrong is not timed.
    checked = frame[(frame.implementation == "hybrid") & frame.status.notna()]
    assert len(checked) > 900 and (checked.status == "ok").all()


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
    path = tmp_path / kind / "rows.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, rows)))
    assert shown_cells(kernel_table(load_bench([path], kind))) == [["1", "1.25", "0.50"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a whole"), ('{"schema": 9}\n', "schema 9"), ("", "end is missing"), (None, "no such bench file")],
    ids=["cut", "other-schema", "empty", "missing"],
)
def test_what_is_not_a_bench_file_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / kind / "rows.jsonl"
    path.parent.mkdir()
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"rows\.jsonl.*{message}"):
        load_bench([path], kind)


def test_figures_are_drawn_of_every_model() -> None:
    drawings = list(kernel_drawings(load_bench([folder(GPUS[0])], "kernels")))
    named = ["speedup-llama-2-7b", "precisions-llama-2-7b", "speedup-llama-3.1-8b"]
    assert [drawing.name for drawing in drawings][:3] == named
    assert drawings[-1].name == "roof" and all("128x128" in drawing.caption for drawing in drawings)
    assert all("H200" in drawing.caption for drawing in drawings)
    assert len(png_bytes(drawings[0].figure)) > 5000


def test_a_figure_of_whole_models_has_a_line_a_precision_and_the_dense_models_across() -> None:
    drawing, other = model_drawings(load_bench([folder(GPUS[1])], "model"))
    assert [drawing.name, other.name] == ["end-to-end-llama-2-7b", "end-to-end-llama-3.1-8b"]
    assert "H100" in drawing.caption
    panels = [axis for axis in drawing.figure.axes if axis.get_visible()]
    assert [axis.get_title("left") for axis in panels][:2] == ["Decoding, batch 1", "Decoding, batch 16"]
    names = {text.get_text() for text in panels[0].texts}
    assert names == {"bfloat16 tiles", "FP8 tiles", "dense bfloat16", "dense FP8", "dense INT4"}
    assert len(png_bytes(drawing.figure)) > 5000
    assert not list(model_drawings(load_bench([folder(GPUS[1])], "nothing")))


def test_speedups_are_over_dense_of_the_same_precision_and_over_bfloat16(tmp_path: Path) -> None:
    variant = {"sparsity": 0.5, "tile": [128, 128], "tiles": "even"}
    eight = {"precision": "fp8"}
    rows = [
        HEADER,
        row("cublas", 12.0),
        row("fp8_rowwise", 8.0, **eight),
        row("fp8_tensorwise", 6.0, **eight),
        row("hybrid", 8.0, **variant),
        row("hybrid", 4.0, **variant, **eight),
        row("cusparselt_fp8", 5.0, **variant, **eight),
    ]
    path = tmp_path / kind / "rows.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, rows)))
    tables = speed_tables(load_bench([path], kind))
    assert {name: shown_cells(table) for name, table in tables.items()} == {
        "kernels-m": [["1", "1.50", "2.00"]],
        "kernels fp8-m": [["1", "1.50", "1.20", "2.00"]],
    }
    assert title("kernels fp8-m").startswith("m: its linears FP8, speedup over dense FP8 by sparsity")


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp8_precise"])
def test_dense_of_eight_bits_that_runs_in_place_of_slower_tiles_is_compared_with_too(
    precision: str, tmp_path: Path
) -> None:
    dense = {"bf16": "cublas"}.get(precision, f"{precision}_rowwise")
    tiles = {"tile": [128, 128], "tiles": "even", "precision": precision}
    left = {"fallback": "predicted slower than dense"}
    rows = [
        HEADER,
        row("cublas", 12.0),
        row(dense, 12.0, precision=precision),
        row("hybrid", 10.0, **tiles, **left, sparsity=0.0),
        # With zeros, which take less power; and of another shape, the same product once more.
        row("hybrid", 9.0, **tiles, **left, sparsity=0.25),
        row("hybrid", 9.0, **tiles | {"tile": [64, 64]}, **left, sparsity=0.0),
        row("hybrid", 8.0, **tiles, sparsity=0.5),
    ]
    path = tmp_path / kind / "rows.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, rows)))
    expected = ["1", "1.20", "1.33", "1.50"] if precision == "bf16" else ["1", "1.00", "1.11", "1.25", "1.20"]
    assert shown_cells(kernel_table(load_bench([path], kind), precision=precision)) == [expected]


@pytest.mark.parametrize("autotuned", [None, 6.0, 20.0], ids=["cublas-alone", "faster-elsewhere", "slower-elsewhere"])
def test_of_what_was_measured_again_the_newest_counts_over_what_was_timed_beside_it(
    autotuned: float | None, tmp_path: Path
) -> None:
    variant = {"sparsity": 0.5, "tile": [128, 128], "tiles": "even"}
    paths = []
    for day, times in enumerate(((9.0, 8.0), (12.0, 6.0))):
        header = HEADER | {"provenance": HEADER["provenance"] | {"time": f"2026-11-2{day}T00:00:00Z"}}
        rows = [header, row("cublas", times[0]), row("hybrid", times[1], **variant)]
        if day == 0 and autotuned:
            rows.append(row("compiled", autotuned))
        paths.append(tmp_path / kind / f"{2 - day}.jsonl")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_text("\n".join(map(json.dumps, rows)))
    # Where another bench found max-autotune to take two thirds of cuBLAS's time, so it would have here.
    expected = "1.33" if autotuned == 6.0 else "2.00"
    assert shown_cells(kernel_table(load_bench(paths, kind))) == [["1", expected]]


@pytest.mark.parametrize("times", [(6.0, 8.0), (8.0, 6.0)], ids=["late-wins", "early-wins"])
def test_of_what_begins_early_or_late_the_faster_counts(times: tuple[float, float], tmp_path: Path) -> None:
    eight, variant = {"precision": "fp8"}, {"sparsity": 0.5, "tile": [128, 128], "tiles": "even"}
    rows = [HEADER, row("cublas", 12.0), row("hybrid", 4.0, **variant, **eight)]
    for early, value in zip((False, True), times, strict=True):
        rows.append(row("fp8_tensorwise", value, **eight, early=early))
        rows.append(row("cusparselt_fp8", value, **variant, **eight, early=early))
    path = tmp_path / kind / "rows.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, rows)))
    assert shown_cells(kernel_table(load_bench([path], kind), precision="fp8")) == [["1", "1.50", "1.00", "2.00"]]


@pytest.mark.parametrize("metric", ["time", "error"])
def test_what_is_wrong_is_named(metric: str, tmp_path: Path) -> None:
    rows = [HEADER, row("cublas", 12.0), row("hybrid", 0.5) | {"metric": metric}]
    rows[2] |= {"status": "wrong", "error": 0.5}
    path = tmp_path / kind / "rows.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"hybrid, o with 1 tokens, is wrong by 0\.5"):
        load_bench([path], kind)


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_older_rows_of_whole_models_are_marked_superseded(fused: bool, tmp_path: Path) -> None:
    variant = {"sparsity": 0.5, "tile": [128, 128], "tiles": "uneven"}
    rows = [HEADER, row("dense", 12.0, sparsity=0.5), row("hybrid", 6.0, **variant)]
    rows += [row("fused", 9.0, sparsity=0.5)] * fused
    for each in rows[1:]:
        each["cell"] |= {"kind": "decode", "batch": 1, "length": 1}
        del each["cell"]["linear"], each["cell"]["tokens"]
    path = tmp_path / "model" / "rows.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, rows)))
    table = speed_tables(load_bench([path], "model"))["model-m"]
    assert table.notes == (() if fused else (SUPERSEDED,))
    assert shown_cells(table)[0][:2] == ["Decoding, batch 1", "1.50" if fused else "2.00"]
