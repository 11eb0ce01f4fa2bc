"""Figures of timed products: every product once, limits and roofs named, no colour of a method."""

from typing import Any

import matplotlib
import pandas as pd
import pytest

from analysis.figures.kernels import compute_limit, draw_precisions, draw_roof, draw_speedup, memory_limit
from analysis.figures.style import paper_style, style_of
from patch.methods import METHODS

SPARSITIES = (0.0, 0.25, 0.35, 0.45, 0.5)


@pytest.fixture
def frame() -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for linear in ("qkv", "o"):
        for tokens in (1, 16, 64, 512, 4096):
            cell = {
                "model": "llama-2-7b",
                "linear": linear,
                "tokens": tokens,
                "n": 64,
                "k": 32,
                "dense": 2.0,
                "precision": "bf16",
            }
            about = {"gpu": "NVIDIA H200", "copy_roof": 4.0, "matmul_roof": 700.0, "fallback": None, "tiles": None}
            rows.append(cell | about | {"implementation": "cublas", "value": 2.0, "speedup": 1.0})
            rows += [
                cell
                | about
                | {"implementation": "hybrid", "tile": "128x128", "tiles": "uneven", "sparsity": sparsity}
                | {"value": 2 - sparsity, "speedup": 2 / (2 - sparsity), "bytes": 1000.0}
                for sparsity in SPARSITIES
            ]
    return pd.DataFrame(rows).assign(metric="time", precision="bf16")


def test_limits() -> None:
    assert compute_limit(0.5) == pytest.approx(2.0) and memory_limit(0.5) == pytest.approx(1 / 0.5625)
    assert compute_limit(0.0) == memory_limit(0.0) == 1.0


def test_curves_and_limits_are_named_at_their_ends(frame: pd.DataFrame) -> None:
    figure = draw_speedup(frame)
    (axis,) = figure.axes
    measured = [line for line in axis.lines if line.get_marker() == "|"]
    assert len(measured) == 5 and all(len(line.get_xdata()) == 5 for line in measured)
    assert {line.get_gid() for line in axis.lines if line not in measured} == {"limit", "dense"}
    names = {text.get_text() for text in axis.texts}
    assert names == {"1 token", "16 tokens", "64 tokens", "512 tokens", "4096 tokens", "compute limit", "memory limit"}
    assert figure.get_suptitle() == "linears of llama-2-7b, tiles of 128x128, timed on H200"
    used = {matplotlib.colors.to_hex(line.get_color()) for line in measured}
    assert not used & {style_of(method).color for method in METHODS}


def test_every_product_has_a_line_and_the_roof_is_named_outside_of_it(frame: pd.DataFrame) -> None:
    figure = draw_roof(frame)
    with paper_style():
        figure.draw_without_rendering()
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["llama-2-7b qkv", "llama-2-7b o"]
    for axis, roof, name in zip(figure.axes, (700.0, 4.0), ("large dense product", "large copy"), strict=True):
        (line,) = [line for line in axis.lines if line.get_gid() == "roof"]
        assert list(line.get_xdata()) == [roof, roof]
        (text,) = axis.texts
        assert text.get_text() == name and text.get_window_extent().y0 >= axis.get_window_extent().y1
        marks = [line for line in axis.lines if line.get_marker() == "|"]
        assert [len(line.get_xdata()) for line in marks] == [2, 2, 2, 2]
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == ["fastest dense", "hybrid 25%", "hybrid 45%", "2:4"]


@pytest.mark.parametrize(("width", "columns"), [("double", 2), ("single", 1)])
def test_few_bits_are_shown_over_both_dense_products(frame: pd.DataFrame, width: Any, columns: int) -> None:
    eight = frame.assign(precision="fp8", speedup=2 * frame.speedup, own_speedup=frame.speedup)
    eight["implementation"] = eight.implementation.replace("cublas", "fp8_rowwise")
    figure = draw_precisions(pd.concat([frame, eight[eight.tokens < 4096]]), width=width)
    assert [axis.get_title("left") for axis in figure.axes] == [
        "FP8 over dense bfloat16 (dashes: dense FP8)",
        "FP8 over dense FP8",
    ]
    assert figure.axes[0].get_subplotspec().get_gridspec().ncols == columns
    for axis, ends in zip(figure.axes, (2 * 2 / 1.5, 2 / 1.5), strict=True):
        measured = [line for line in axis.lines if line.get_marker() == "|"]
        assert [line.get_ydata()[-1] for line in measured] == pytest.approx([ends] * 4)
        assert {text.get_text() for text in axis.texts} == {"1 token", "16 tokens", "64 tokens", "512 tokens"}
    dashes = [[line for line in axis.lines if line.get_gid() == "dense of its own"] for axis in figure.axes]
    assert [len(each) for each in dashes] == [4, 0] and dashes[0][0].get_ydata()[0] == 2.0
