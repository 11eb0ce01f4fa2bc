"""Figures draw every measured point once, say what their axes are, and are the same bytes for the same rows."""

import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from analysis.figures.frontier import draw_frontier
from analysis.figures.labels import spread
from analysis.figures.layer_sparsity import draw_layer_sparsity
from analysis.figures.learning_curves import draw_learning_curves, smoothed
from analysis.figures.series import MOST_CURVES, marking
from analysis.figures.study import _legible, plot_study, study_drawings
from analysis.figures.style import (
    DPI,
    WIDTHS,
    Width,
    add_legend,
    new_figure,
    paper_style,
    png_bytes,
    save_figure,
    style_of,
)
from analysis.figures.tile_maps import TileMap, draw_tile_map, draw_tile_maps
from analysis.rows.points import Text, gather
from patch.errors import UserError
from patch.methods import METHODS

Row = dict[str, Any]
Study = Callable[[dict[str, list[Row]]], pd.DataFrame]
Make = Callable[..., Any]


def legend(figure: Figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def title(figure: Figure) -> str:
    return " ".join(figure.get_suptitle().split())


def drawn(axes: Iterable[Axes]) -> list[tuple[float, float]]:
    """Where measured markers stand; not dense lines, error bars and the sign of a broken axis."""
    lines = [line for axis in axes for line in axis.lines if line.get_marker() not in ("None", "", "_", "|")]
    lines = [line for line in lines if line.get_gid() != "break"]
    return [(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)]


def dense_lines(axis: Axes) -> list[float]:
    return [line.get_ydata()[0] for line in axis.lines if line.get_gid() == "dense"]


def labels(axis: Axes) -> list[str]:
    """The names at curves and markers, in one line each."""
    return [" ".join(text.get_text().split()) for text in axis.texts if text.get_gid() == "label"]


def curves(axis: Axes) -> list[Line2D]:
    """Lines through several measured points."""
    return [
        line
        for line in axis.lines
        if len(line.get_xdata()) > 1 and line.get_linestyle() != "None" and (line.get_marker() not in ("None", ""))
    ]


def test_frontier_of_the_demo(demo: pd.DataFrame) -> None:
    figure = draw_frontier(demo)
    panel, band, accuracy = figure.axes
    assert panel.get_ylabel() == "Held-out text perplexity @512" and panel.get_xlabel() == "Sparsity (%)"
    assert accuracy.get_ylabel() == "Continuation (first 400)\naccuracy (%)"
    assert set(labels(panel)) == {"Dense", "MaskLLM", "PATCH joint"}
    assert set(labels(accuracy)) == {"Dense", "Magnitude", "Wanda", "SparseGPT", "MaskLLM", "PATCH joint"}
    assert sorted(y for _, y in drawn([panel])) == pytest.approx([33.4, 36.2, 39.8, 42.3])
    assert sorted({round(x) for x, _ in drawn([panel])}) == [25, 35, 45, 50]
    assert dense_lines(panel) == [30.1] and dense_lines(accuracy) == [pytest.approx(62.0)]
    assert labels(band) == ["SparseGPT 55.40", "Wanda 71.20", "Magnitude 412.7"]
    assert title(figure) == "embedded, tiles of 64x64, measured on CPU"


def test_every_point_stands_at_its_sparsity(demo: pd.DataFrame) -> None:
    panel, band, accuracy = draw_frontier(demo).axes
    expected = sorted(100 * point.achieved for point in gather(demo) if point.method != "dense" and point.achieved)
    assert sorted(x for x, _ in drawn([panel, band])) == pytest.approx(expected)
    assert sorted(x for x, _ in drawn([accuracy])) == pytest.approx(expected)


def test_frontier_of_many_structures(smollm: pd.DataFrame) -> None:
    figure = draw_frontier(smollm, "single")
    panel, band, accuracy = figure.axes
    assert len(drawn([panel, band])) == len(drawn([accuracy])) == 12
    assert labels(band) == ["Magnitude unstructured 131.2", "Magnitude 2:4 1893"]
    assert {"Wanda tiles", "Wanda 2:4", "Wanda unstructured", "SparseGPT tiles"} <= set(labels(panel))
    assert sorted(line.get_gid() or "" for line in curves(panel)) == ["sparsegpt hybrid", "wanda hybrid"]
    hollow = [line for line in panel.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_ydata()) for line in hollow] == [[34.1], [30.4]]
    assert title(figure) == "smollm2-135m, tiles of 64x64, measured on CPU"


@pytest.mark.parametrize("width", ["single", "double"])
def test_figures_have_the_width_of_a_column(demo: pd.DataFrame, width: Width) -> None:
    assert draw_frontier(demo, width).get_figwidth() == WIDTHS[width]


@pytest.mark.parametrize("width", ["single", "double"])
def test_names_cover_neither_points_nor_each_other(demo: pd.DataFrame, smollm: pd.DataFrame, width: Width) -> None:
    for frame in (demo, smollm):
        figure = draw_frontier(frame, width)
        with paper_style():
            figure.draw_without_rendering()
        for axis in figure.axes:
            texts = [text for text in axis.texts if text.get_gid() == "label"]
            # Without the thin line to what they mean.
            boxes = [matplotlib.text.Text.get_window_extent(text) for text in texts]
            points = [axis.transData.transform(point) for point in drawn([axis])]
            assert not [box for box in boxes for x, y in points if box.contains(x, y)]
            pairs = [(one, other) for place, one in enumerate(boxes) for other in boxes[:place]]
            # Touching is no covering.
            assert not [1 for one, other in pairs if one.padded(-2).overlaps(other.padded(-2))]
            assert all(box.x1 <= figure.bbox.x1 and box.x0 >= 0 for box in boxes)


def test_every_model_gets_its_panels(study: Study, make_pruning: Make, make_trial: Make) -> None:
    trials = {}
    for place, (model, method) in enumerate((m, method) for m in ("m1", "m2") for method in ("dense", "wanda")):
        structure, sparsity = ("dense", 0.0) if method == "dense" else ("2:4", 0.5)
        about = make_pruning(model, method, structure, sparsity)
        trials[str(place)] = make_trial(str(place), about, 20.0 + 5 * place, {"piqa": (0.6, 100)})
    frame = study(trials)
    figure = draw_frontier(frame)
    assert [axis.get_title("left") for axis in figure.axes] == ["m1", "m1", "m2", "m2"]
    assert [dense_lines(axis) for axis in figure.axes[::2]] == [[20.0], [30.0]]
    assert title(figure).startswith("m1 and m2")


def test_trained_weights_have_a_panel_of_their_own_that_says_once_what_all_have(
    study: Study, make_pruning: Make, make_trial: Make
) -> None:
    recovery = {"recovery": {"source": "text", "recipe": {"steps": 10, "batch": 2, "length": 8}, "seed": 0}}
    masks = [make_pruning("m", "sparsegpt", "2:4", 0.5), make_pruning("m", "sparsegpt", "hybrid", 0.45)]
    masks.append(make_pruning("m", "patch-joint", "hybrid", 0.45))
    about = [make_pruning("m", "dense", "dense", 0.0), *masks, *(mask | recovery for mask in masks)]
    values = (20.0, 400.0, 40.0, 30.0, 35.0, 30.0, 25.0)
    names = [f"{number}" * 12 for number in range(len(about))]
    found = study(
        {name: make_trial(name, *made) for name, made in zip(names, zip(about, values, strict=True), strict=True)}
    )
    panels = [
        axis for axis in draw_frontier(found).axes if axis.get_title("left") and "perplexity" in axis.get_ylabel()
    ]
    frozen, trained = panels
    assert "trained" in trained.get_title("left") and "trained" not in frozen.get_title("left")
    assert not any("recovered" in label for label in labels(trained))
    # The 400 stands in the band above the frozen ones: neither panel has room for it.
    assert trained.get_ylim() == pytest.approx(frozen.get_ylim()) and trained.get_ylim()[1] < 100


@pytest.mark.parametrize("worst", [math.inf, math.nan])
def test_what_diverged_is_named_above_the_scale(
    study: Study, make_pruning: Make, make_trial: Make, worst: float
) -> None:
    methods = {"wanda": 30.0, "sparsegpt": 25.0, "magnitude": worst}
    trials = {m: make_trial(m, make_pruning("m", m, "2:4", 0.5), value) for m, value in methods.items()}
    # A task of the dense model alone has no panel.
    trials["dense"] = make_trial("dense", make_pruning("m", "dense", "dense", 0.0), 20.0, {"piqa": (0.6, 100)})
    panel, band = draw_frontier(study(trials)).axes
    assert sorted(y for _, y in drawn([panel])) == [25.0, 30.0]
    assert f"Magnitude {worst}" in labels(band)


def test_a_panel_has_at_most_five_curves_and_each_curve_is_drawn_once(
    study: Study, make_pruning: Make, make_trial: Make
) -> None:
    shares = {"maskllm": (0.0, 1.0), "patch-joint": (0.0, 0.8, 1.0), "patch-tile": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)}
    trials = {}
    for method, some in shares.items():
        for structure, target in [("2:4", 0.5)] if method == "maskllm" else [("hybrid", 0.25), ("hybrid", 0.45)]:
            for share in some:
                learning = {"source": "train", "recipe": {"steps": 9} | ({"distillation": share} if share else {})}
                about = make_pruning("m", method, structure, target, learning=learning)
                name = f"{method} {target} {share}"
                trials[name] = make_trial(name, about, 20.0 + len(trials))
    figure = draw_frontier(study(trials))
    assert len(figure.axes) > 1 and all(0 < len(curves(axis)) <= MOST_CURVES for axis in figure.axes)
    values = [tuple(line.get_ydata()) for axis in figure.axes for line in curves(axis)]
    assert len(values) == len(set(values)) == 9
    for axis in figure.axes:
        looks = [(line.get_color(), line.get_marker(), str(line._dash_pattern)) for line in curves(axis)]
        assert len(looks) == len(set(looks)), "variants of a method have dashes of their own"
        assert {line.get_fillstyle() for line in axis.lines} == {"full"}, "no half-filled markers"
        assert {text for text in labels(axis) if text.startswith("MaskLLM")} == {"MaskLLM", "MaskLLM (distillation=1)"}
        assert axis.get_ylim() == figure.axes[0].get_ylim(), "all panels of a model have one scale"


def test_a_glyph_means_one_method_in_all_figures() -> None:
    looks = [(style_of(method).color, style_of(method).marker) for method in METHODS if method != "dense"]
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
    assert marking("wanda", "2:4")["marker"] == marking("wanda", "hybrid")["marker"] == style_of("wanda").marker


def test_a_wide_range_has_a_logarithmic_axis_with_plain_numbers(
    study: Study, make_pruning: Make, make_trial: Make
) -> None:
    values = {0.25: 30.0, 0.35: 80.0, 0.45: 900.0}
    trials = {str(s): make_trial(str(s), make_pruning("m", "wanda", "hybrid", s), v) for s, v in values.items()}
    figure = draw_frontier(study(trials))
    (panel,) = figure.axes
    figure.draw_without_rendering()
    assert panel.get_yscale() == "log"
    found = [label.get_text() for label in panel.get_yticklabels()]
    assert 4 <= len(found) <= 8 and all(label.isdigit() for label in found)


def test_a_chosen_text_is_plotted_and_a_missing_one_named(demo: pd.DataFrame) -> None:
    assert draw_frontier(demo, text=Text("embedded/test", 512)).axes
    with pytest.raises(UserError, match=r"wikitext2/test@2048.*embedded/test@512"):
        draw_frontier(demo, text=Text("wikitext2/test", 2048))
    with pytest.raises(UserError, match="no perplexity"):
        draw_frontier(demo[demo.stage == "prune"])


def test_points_without_achieved_sparsity_are_not_placed(demo: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="achieved sparsity"):
        draw_frontier(demo.assign(achieved=math.nan))


@pytest.mark.parametrize("wanted", [[5.0, 5.0, 5.0], [0.0, 10.0], [9.9, 9.8, 0.1], []], ids=str)
def test_names_are_spread_no_further_than_they_must(wanted: list[float]) -> None:
    middles = spread(wanted, [2.0] * len(wanted), 0.0, 10.0)
    assert all(1.0 <= middle <= 9.0 for middle in middles)
    ordered = sorted(middles)
    assert all(above - below >= 2.0 - 1e-9 for below, above in itertools.pairwise(ordered))
    if wanted == [5.0, 5.0, 5.0]:
        assert ordered == [3.0, 5.0, 7.0]


def test_more_names_than_have_room_overlap_evenly() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0], [2.0] * 4, 0.0, 4.0) == [0.5, 1.5, 2.5, 3.5]


def hybrid_trial(frame: pd.DataFrame) -> str:
    return next(point.trials[0] for point in gather(frame) if point.structure == "hybrid")


def test_tile_maps_are_drawn_tile_by_tile_with_true_aspect(demo: pd.DataFrame) -> None:
    trial = hybrid_trial(demo)
    figure = draw_tile_maps(demo, trial)
    rows = demo[(demo.trial == trial) & (demo.metric == "tile_map")]
    (axis,) = figure.axes
    meshes = [child for child in axis.get_children() if isinstance(child, QuadMesh)]
    assert len(meshes) == len(rows) == 28
    corners = []
    for mesh, row in zip(meshes, rows.itertuples(), strict=True):
        about: Any = row.labels
        expected = np.array([[mark == "1" for mark in line] for line in about["tile_map"]])
        assert np.array_equal(np.asarray(mesh.get_array()).reshape(expected.shape), expected)
        box = mesh.get_datalim(axis.transData)
        assert (box.width, box.height) == pytest.approx((about["cols"], about["rows"])), "in elements"
        corners.append((round(box.x0), round(box.y0)))
    assert len(set(corners)) == 28, "each has a place of its own"
    unit = axis.transData.transform([(0, 0), (100, 100)])
    assert abs(unit[1][0] - unit[0][0]) == pytest.approx(abs(unit[1][1] - unit[0][1])), "one scale along and across"
    texts = [text.get_text() for text in axis.texts]
    shares = [100 * np.asarray(mesh.get_array()).mean() for mesh in meshes]
    assert [text for text in texts if text.endswith("%")] == [f"{share:.0f}%" for share in shares]
    assert {"q", "k", "v", "down", "block 0", "block 3"} <= set(texts)
    assert legend(figure) == ["dense 64x64 tile", "2:4 tile"]
    dense = sum(line.count("1") for row in rows.labels for line in row["tile_map"])
    tiles = sum(len(line) for row in rows.labels for line in row["tile_map"])
    (heading,) = [" ".join(text.get_text().split()) for text in figure.texts]
    assert heading.startswith("PATCH joint 45%, embedded, tiles of 64x64, measured on CPU")
    assert heading.endswith(f"{100 * dense / tiles:.1f}% of tiles dense")


def test_ragged_tiles_end_where_the_weight_ends() -> None:
    axis = Figure().subplots()
    weight = TileMap(0, "down", (100, 132), (64, 48), np.array([[True, False, True], [False, False, True]]))
    draw_tile_map(axis, weight, (10.0, 20.0))
    assert [edges.tolist() for edges in weight.edges] == [[0, 64, 100], [0, 48, 96, 132]]
    (mesh,) = [child for child in axis.get_children() if isinstance(child, QuadMesh)]
    box = mesh.get_datalim(axis.transData)
    assert (box.x0, box.y0, box.x1, box.y1) == (10, 20, 142, 120)


def test_tile_maps_of_deep_models_are_refused(smollm: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="too many blocks"):
        draw_tile_maps(smollm, hybrid_trial(smollm))


def test_long_titles_stay_inside_the_figure(demo: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = hybrid_trial(demo)
    name = "PATCH joint 45% seed 0 (distillation=1, tile_prior=30, tile_ranking=model, from Wanda)"
    monkeypatch.setattr("analysis.figures.tile_maps.trial_labels", lambda _: {trial: name})
    figure = draw_tile_maps(demo, trial)
    with paper_style():
        figure.draw_without_rendering()
    (heading,) = figure.texts
    assert " ".join(heading.get_text().split()).startswith(name)
    box = heading.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_trials_without_tile_maps_are_named(demo: pd.DataFrame) -> None:
    dense = gather(demo)[0].trials[0]
    with pytest.raises(UserError, match=rf"{dense} has no tile maps.*{hybrid_trial(demo)}"):
        draw_tile_maps(demo, dense)


def written(axis: Axes, gid: str | None = None) -> list[str]:
    return [text.get_text() for text in axis.texts if gid is None or text.get_gid() == gid]


def test_layer_sparsity(smollm: pd.DataFrame) -> None:
    trials = [point.trials[0] for point in gather(smollm) if point.method == "wanda" and point.structure == "hybrid"]
    figure = draw_layer_sparsity(smollm, trials)
    panel, bar = figure.axes
    assert written(panel, "trial") == ["Wanda 45%", "Wanda 35%", "Wanda 25%"]
    assert written(panel, "kind") == ["q", "k", "v", "o", "gate", "up", "down"] * 3
    for trial in trials:
        (mesh,) = panel.findobj(lambda artist, trial=trial: artist.get_gid() == trial)
        assert isinstance(mesh, QuadMesh)
        rows = smollm[(smollm.trial == trial) & (smollm.metric == "layer_sparsity")]
        values = np.asarray(mesh.get_array()).reshape(7, 30)
        assert values[-1] == pytest.approx(100 * rows[rows.layer.str.contains("down")].value.to_numpy())
        assert mesh.get_clim() == (0, 50)
    assert written(panel)[-1] == "Block" and bar.get_ylabel() == "Sparsity (%)"
    assert written(panel)[-11:-1] == [str(block) for block in range(0, 30, 3)]
    assert title(figure) == "smollm2-135m, tiles of 64x64, measured on CPU"
    with pytest.raises(UserError, match="no sparsity per layer"):
        draw_layer_sparsity(smollm, [gather(smollm)[0].trials[0]])
    others = [point.trials[0] for point in gather(smollm) if point.method != "dense"]
    with pytest.raises(UserError, match="at most 5"):
        draw_layer_sparsity(smollm, others[:6])


def test_experts_share_a_place_and_kinds_that_end_alike_are_told_apart(demo: pd.DataFrame) -> None:
    trial = hybrid_trial(demo)
    names = {"gate_proj": "experts.gate_up_proj.0", "up_proj": "experts.gate_up_proj.1", "down_proj": "shared.o_proj"}

    def renamed(layer: str | None) -> str | None:
        before, _, end = (layer or "").rpartition(".")
        return f"{before}.{names.get(end, end)}" if layer else layer

    frame = demo.assign(layer=demo.layer.map(renamed))
    (panel, _) = draw_layer_sparsity(frame, [trial]).axes
    kinds = ["q", "k", "v", "self_attn.o", "gate_up", "mlp.shared.o"]
    assert written(panel, "kind") == kinds
    with pytest.raises(UserError, match="or experts, for tile maps"):
        draw_tile_maps(frame, trial)
    drawn = [drawing.name for drawing in study_drawings(frame)]
    assert "layer-sparsity-patch-joint" in drawn and not any(name.startswith("tiles") for name in drawn)


def test_a_large_study_shows_some_masks_and_says_so(demo: pd.DataFrame) -> None:
    whole = list(study_drawings(demo))
    shown = {drawing.name: drawing.caption for drawing in study_drawings(demo, masks=2)}
    assert shown.keys() == {drawing.name for drawing in whole} - {"tiles-patch-joint-25"}
    assert not any("left out" in drawing.caption for drawing in whole)
    assert {name for name, caption in shown.items() if "1 more are left out" in caption} == {
        "tiles-patch-joint-45",
        "tiles-patch-joint-35",
    }


@pytest.mark.parametrize(
    "lost", [["tile_map"], ["tile_map", "layer_sparsity", "dense_tiles", "sparsity"]], ids=["maps", "all"]
)
def test_a_trial_without_its_layers_is_left_out_and_the_others_are_drawn(lost: list[str], demo: pd.DataFrame) -> None:
    trial = hybrid_trial(demo)
    whole = {drawing.name for drawing in study_drawings(demo)}
    rest = {drawing.name for drawing in study_drawings(demo[(demo.trial != trial) | ~demo.metric.isin(lost)])}
    assert whole - rest == {"tiles-patch-joint-45"} and not rest - whole


def test_a_legend_is_as_wide_as_its_figure_allows() -> None:
    figure = new_figure(3.35, 2.0)
    figure.subplots()
    add_legend(figure, [Line2D([], [], label=f"a rather long label, number {number}") for number in range(4)], 4)
    (found,) = figure.legends
    assert found.get_window_extent().width <= figure.bbox.width
    assert len(legend(figure)) == 4


def test_more_trials_than_can_be_told_apart_are_a_figure_for_each_variant(demo: pd.DataFrame) -> None:
    points = [point for point in gather(demo) if point.method != "dense"]
    assert list(_legible("curves", points[:5])) == ["curves"]
    variants = [dataclasses.replace(points[0], variant=name) for name in ("", "lr=0.1", "lr=0.1")] * 3
    files = _legible("curves", variants)
    assert set(files) == {"curves-magnitude", "curves-magnitude-lr-0.1", "curves-magnitude-lr-0.1-2"}
    assert sum(map(len, files.values())) == 9 and max(map(len, files.values())) <= MOST_CURVES


def test_learning_curves(demo: pd.DataFrame) -> None:
    figure = draw_learning_curves(demo)
    loss, density = figure.axes
    assert loss.get_ylabel() == "Cross entropy (nat/token)" and density.get_ylabel() == "Density (%)"
    assert loss.get_xlabel() == density.get_xlabel() == "Step"
    assert labels(loss) == labels(density) == ["MaskLLM 2:4", "PATCH joint 45%", "PATCH joint 35%", "PATCH joint 25%"]
    assert {len(line.get_xdata()) for line in loss.lines} == {200}
    assert len(loss.lines) == 8, "each curve as logged and smoothed"
    targets = sorted(line.get_ydata()[0] for line in density.lines if len(line.get_xdata()) == 2)
    assert targets == pytest.approx([0.5, 0.55, 0.65, 0.75])
    assert title(figure) == "embedded, tiles of 64x64, measured on CPU"
    with pytest.raises(UserError, match="no learning rows"):
        draw_learning_curves(demo[demo.stage != "prune"])


def test_smoothing_keeps_what_is_constant_and_does_not_touch_short_curves() -> None:
    assert smoothed(np.full(100, 3.0)) == pytest.approx(np.full(100, 3.0))
    noisy = np.tile([1.0, 3.0], 50)
    assert smoothed(noisy)[10:-10] == pytest.approx(np.full(80, 2.0), abs=0.25)
    assert smoothed(noisy[:10]).tolist() == noisy[:10].tolist()


def test_a_study_is_plotted_into_its_folder(seeded: pd.DataFrame, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    written = plot_study(seeded, folder)
    stems = ["frontier", *[f"tiles-patch-joint-{share}" for share in (45, 35, 25)], "layer-sparsity-patch-joint"]
    expected = [f"{stem}.png" for stem in [*stems, "learning-curves"]]
    assert [path.name for path in written] == expected
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected), "no temporary file stays behind"
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


def test_captions_name_model_tiles_and_gpu(demo: pd.DataFrame) -> None:
    frame = demo.assign(gpu="NVIDIA H100 80GB HBM3")
    for drawing in study_drawings(frame):
        assert all(name in drawing.caption for name in ("embedded", "64x64", "H100")), drawing.name
        named = " ".join((drawing.figure.get_suptitle() or drawing.figure.texts[0].get_text()).split())
        assert all(name in named for name in ("embedded", "64x64", "H100")), drawing.name


def test_pngs_are_small_and_as_wide_as_their_figure(demo: pd.DataFrame) -> None:
    content = png_bytes(draw_frontier(demo))
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "P" and image.width == round(DPI * WIDTHS["double"])
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert len(content) < 100_000


def test_a_paper_may_have_a_pdf_and_an_unknown_format_is_named(demo: pd.DataFrame, tmp_path: Path) -> None:
    figure = draw_frontier(demo, "single")
    (path,) = save_figure(figure, tmp_path / "frontier", ["pdf"])
    assert path.name == "frontier.pdf" and path.read_bytes()[:4] == b"%PDF"
    assert b"CreationDate" not in path.read_bytes()
    with pytest.raises(UserError, match="figure format 'svgg'"):
        save_figure(figure, tmp_path / "frontier", ["svgg"])


def test_the_same_rows_give_the_same_bytes(demo: pd.DataFrame) -> None:
    shuffled = demo.sample(frac=1, random_state=0)
    assert png_bytes(draw_frontier(demo)) == png_bytes(draw_frontier(shuffled))


def test_plotting_leaves_global_settings_alone(demo: pd.DataFrame, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    save_figure(draw_learning_curves(demo), tmp_path / "curves")
    assert dict(matplotlib.rcParams) == before and plt.get_fignums() == []


def test_a_failed_write_leaves_the_old_figure(demo: pd.DataFrame, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "frontier.png").write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_figure(draw_frontier(demo), tmp_path / "frontier")
    assert [path.name for path in tmp_path.iterdir()] == ["frontier.png"]
    assert (tmp_path / "frontier.png").read_bytes() == b"old"
