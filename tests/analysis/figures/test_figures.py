"""Figures draw every measured point once, say what their axes are, and are the same bytes for the same rows."""

import dataclasses
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

from analysis.figures.frontier import draw_frontier, plot_frontier
from analysis.figures.learning_curves import draw_learning_curves, plot_learning_curves
from analysis.figures.study import _readable, plot_study
from analysis.figures.style import WIDTHS, Width, add_legend, new_figure, paper_style
from analysis.figures.tile_maps import TileMap, draw_layer_sparsity, draw_tile_map, draw_tile_maps
from analysis.rows.points import Text, gather
from patch.errors import UserError

Row = dict[str, Any]
Study = Callable[[dict[str, list[Row]]], pd.DataFrame]
Make = Callable[..., Any]


def legend(figure: Figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def drawn(axes: Iterable[Axes]) -> list[tuple[float, float]]:
    """Where measured markers stand; not dense lines, error bars and the sign of a broken axis."""
    lines = [line for axis in axes for line in axis.lines if line.get_marker() not in ("None", "", "_", "|")]
    lines = [line for line in lines if line.get_gid() != "break"]
    return [(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)]


def dense_lines(axis: Axes) -> list[float]:
    return [line.get_ydata()[0] for line in axis.lines if line.get_gid() == "dense"]


def test_frontier_of_the_demo(demo: pd.DataFrame) -> None:
    figure = draw_frontier(demo)
    panel, band, accuracy = figure.axes
    assert panel.get_ylabel() == "Held-out text perplexity @512" and panel.get_xlabel() == "Sparsity (%)"
    assert accuracy.get_ylabel() == "Continuation (first 400)\naccuracy (%)"
    assert legend(figure) == ["Dense", "Magnitude", "Wanda", "SparseGPT", "MaskLLM", "PATCH joint"]
    assert sorted(y for _, y in drawn([panel])) == pytest.approx([33.4, 36.2, 39.8, 42.3])
    assert sorted({round(x) for x, _ in drawn([panel])}) == [25, 35, 45, 50]
    assert dense_lines(panel) == [30.1] and dense_lines(accuracy) == [pytest.approx(62.0)]
    assert [text.get_text() for text in band.texts] == ["55.40", "71.20", "412.7", "not to scale"]
    at_half = [x for x, _ in drawn([accuracy]) if x > 47]
    assert len(drawn([accuracy])) == 7 and len(set(at_half)) == 4, "error bars would hide each other"
    assert all(abs(x - 50) < 2 for x in at_half)


def test_frontier_of_many_structures(smollm: pd.DataFrame) -> None:
    figure = draw_frontier(smollm, "single")
    panel, band, accuracy = figure.axes
    assert len(drawn([panel, band])) == len(drawn([accuracy])) == 12
    assert [text.get_text() for text in band.texts[:-1]] == ["131.2", "1893"]
    key = panel.get_legend()
    assert key is not None
    assert [text.get_text() for text in key.get_texts()] == ["unstructured", "2:4", "hybrid tiles"]
    curves = [line for line in panel.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 3]
    assert sorted(line.get_gid() or "" for line in curves) == ["sparsegpt hybrid", "wanda hybrid"]
    hollow = [line for line in panel.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_ydata()) for line in hollow] == [[34.1], [30.4]]


@pytest.mark.parametrize("width", ["single", "double"])
def test_figures_have_the_width_of_a_column(demo: pd.DataFrame, width: Width) -> None:
    assert draw_frontier(demo, width).get_figwidth() == WIDTHS[width]


def test_every_model_gets_its_panels(study: Study, make_pruning: Make, make_trial: Make) -> None:
    trials = {}
    for place, (model, method) in enumerate((m, method) for m in ("m1", "m2") for method in ("dense", "wanda")):
        structure, sparsity = ("dense", 0.0) if method == "dense" else ("2:4", 0.5)
        about = make_pruning(model, method, structure, sparsity)
        trials[str(place)] = make_trial(str(place), about, 20.0 + 5 * place, {"piqa": (0.6, 100)})
    frame = study(trials)
    figure = draw_frontier(frame)
    assert [axis.get_title() for axis in figure.axes] == ["m1", "", "m2", ""]
    assert [dense_lines(axis) for axis in figure.axes[::2]] == [[20.0], [30.0]]


def test_more_models_than_fit_are_refused(study: Study, make_pruning: Make, make_trial: Make) -> None:
    about = {f"m{place}": make_pruning(f"m{place}", "dense", "dense", 0.0) for place in range(3)}
    frame = study({model: make_trial(model, part, 20.0) for model, part in about.items()})
    assert len(draw_frontier(frame, "double").axes) == 3
    with pytest.raises(UserError, match="3 models do not fit into a single column"):
        draw_frontier(frame, "single")


@pytest.mark.parametrize("worst", [math.inf, math.nan])
def test_what_diverged_is_named_above_the_scale(
    study: Study, make_pruning: Make, make_trial: Make, worst: float
) -> None:
    methods = {"wanda": 30.0, "sparsegpt": 25.0, "magnitude": worst}
    trials = {m: make_trial(m, make_pruning("m", m, "2:4", 0.5), value) for m, value in methods.items()}
    trials["dense"] = make_trial("dense", make_pruning("m", "dense", "dense", 0.0), 20.0)
    panel, band = draw_frontier(study(trials)).axes
    assert sorted(y for _, y in drawn([panel])) == [25.0, 30.0]
    assert str(worst) in [text.get_text() for text in band.texts]


def test_no_point_lies_behind_the_names_of_variants(study: Study, make_pruning: Make, make_trial: Make) -> None:
    trials = {
        f"{target} {ranking}": make_trial(
            f"{target} {ranking}",
            make_pruning("m", "wanda", "hybrid", target, tile_ranking=ranking),
            120.0 - 200 * target,
        )
        for target in (0.05, 0.45)
        for ranking in ("weight", "model")
    }
    figure = draw_frontier(study(trials))
    (panel,) = figure.axes
    figure.draw_without_rendering()
    box = panel.get_legend().get_window_extent()
    points = [panel.transData.transform(point) for point in drawn([panel])]
    assert len(points) == 4 and not any(box.contains(x, y) for x, y in points)


def test_variants_of_a_method_are_told_apart_however_many_a_study_has(
    study: Study, make_pruning: Make, make_trial: Make
) -> None:
    shares = {"maskllm": (0.0, 1.0), "patch-joint": (0.0, 0.8, 1.0), "patch-tile": (0.2, 0.3, 0.4, 0.6)}
    trials = {}
    for method, some in shares.items():
        structure = ("2:4", 0.5) if method == "maskllm" else ("hybrid", 0.45)
        for share in some:
            learning = {"source": "train", "recipe": {"steps": 9} | ({"distillation": share} if share else {})}
            name = f"{method} {share}"
            trials[name] = make_trial(
                name, make_pruning("m", method, *structure, learning=learning), 20.0 + len(trials)
            )
    (panel,) = draw_frontier(study(trials)).axes
    points = [line for line in panel.lines if line.get_gid() and line.get_marker() not in ("_", "|")]
    looks = [(line.get_color(), line.get_marker(), line.get_fillstyle()) for line in points]
    assert len(looks) == len(set(looks)) == 9
    keys = {key.get_label(): key for key in panel.get_legend().get_lines()}
    assert set(keys) == {f"distillation={share:g}" for some in shares.values() for share in some if share}
    shared, own = (keys[f"distillation={share}"] for share in (1, 0.8))
    assert shared.get_color() not in {color for color, *_ in looks}, "of two methods, and in the colour of neither"
    assert (own.get_color(), own.get_marker(), own.get_fillstyle()) in looks


def test_a_wide_range_has_a_logarithmic_axis_with_plain_numbers(
    study: Study, make_pruning: Make, make_trial: Make
) -> None:
    values = {0.25: 30.0, 0.35: 80.0, 0.45: 900.0}
    trials = {str(s): make_trial(str(s), make_pruning("m", "wanda", "hybrid", s), v) for s, v in values.items()}
    figure = draw_frontier(study(trials))
    (panel,) = figure.axes
    figure.draw_without_rendering()
    assert panel.get_yscale() == "log"
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert 4 <= len(labels) <= 8 and all(label.isdigit() for label in labels)


def test_a_chosen_text_is_plotted_and_a_missing_one_named(demo: pd.DataFrame) -> None:
    assert draw_frontier(demo, text=Text("embedded/test", 512)).axes
    with pytest.raises(UserError, match=r"wikitext2/test@2048.*embedded/test@512"):
        draw_frontier(demo, text=Text("wikitext2/test", 2048))
    with pytest.raises(UserError, match="no perplexity"):
        draw_frontier(demo[demo.stage == "prune"])


def test_points_without_achieved_sparsity_are_not_placed(demo: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="achieved sparsity"):
        draw_frontier(demo.assign(achieved=math.nan))


def hybrid_trial(frame: pd.DataFrame) -> str:
    return next(point.trials[0] for point in gather(frame) if point.structure == "hybrid")


def test_tile_maps_are_drawn_tile_by_tile_with_true_aspect(demo: pd.DataFrame) -> None:
    trial = hybrid_trial(demo)
    figure = draw_tile_maps(demo, trial)
    rows = demo[(demo.trial == trial) & (demo.metric == "tile_map")]
    assert len(figure.axes) == len(rows) == 28
    scales = []
    for axis, row in zip(figure.axes, rows.itertuples(), strict=True):
        labels: Any = row.labels
        (mesh,) = [child for child in axis.get_children() if isinstance(child, QuadMesh)]
        expected = np.array([[mark == "1" for mark in line] for line in labels["tile_map"]])
        assert np.array_equal(np.asarray(mesh.get_array()).reshape(expected.shape), expected)
        assert axis.get_title() == f"{100 * expected.mean():.0f}%"
        box = axis.get_position()
        assert box.width * figure.get_figwidth() / labels["cols"] == pytest.approx(
            box.height * figure.get_figheight() / labels["rows"]
        )
        scales.append(box.width / labels["cols"])
    assert max(scales) == pytest.approx(min(scales)), "all maps are to one scale"
    assert legend(figure) == ["dense 64x64 tile", "2:4 tile"]
    texts = [text.get_text() for text in figure.texts]
    assert texts[:3] == ["q", "k", "v"] and "block 3" in texts
    dense = sum(line.count("1") for row in rows.labels for line in row["tile_map"])
    tiles = sum(len(line) for row in rows.labels for line in row["tile_map"])
    assert f"PATCH joint 45%: {100 * dense / tiles:.1f}% of tiles dense" in texts


def test_ragged_tiles_end_where_the_weight_ends() -> None:
    axis = Figure().subplots()
    weight = TileMap(0, "down", (100, 132), (64, 48), np.array([[True, False, True], [False, False, True]]))
    draw_tile_map(axis, weight)
    assert [edges.tolist() for edges in weight.edges] == [[0, 64, 100], [0, 48, 96, 132]]
    assert axis.get_xlim() == (0, 132) and axis.get_ylim() == (100, 0)


def test_deep_models_show_the_share_of_dense_tiles(smollm: pd.DataFrame) -> None:
    trial = hybrid_trial(smollm)
    heat, bar = draw_tile_maps(smollm, trial).axes
    rows = smollm[(smollm.trial == trial) & (smollm.metric == "dense_tiles")]
    assert [float(text.get_text()) for text in heat.texts] == pytest.approx(100 * rows.value, abs=0.51)
    assert [label.get_text() for label in heat.get_xticklabels()] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert heat.get_ylabel() == "Block" and bar.get_ylabel() == "Dense tiles (%)"
    assert heat.get_title("left").startswith("Wanda 45%: ")


@pytest.mark.parametrize("deep", [False, True], ids=["tiles", "shares"])
def test_long_titles_stay_inside_the_figure(
    deep: bool, demo: pd.DataFrame, smollm: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = smollm if deep else demo
    trial = hybrid_trial(frame)
    name = "PATCH joint 45% seed 0 (distillation=1, tile_prior=30, tile_ranking=model, from Wanda)"
    monkeypatch.setattr("analysis.figures.tile_maps.trial_labels", lambda _: {trial: name})
    with paper_style():
        figure = draw_tile_maps(frame, trial)
        figure.draw_without_rendering()
    (title,) = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().startswith("PATCH joint")]
    assert " ".join(title.get_text().split()).startswith(name)
    box = title.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_trials_without_tile_maps_are_named(demo: pd.DataFrame) -> None:
    dense = gather(demo)[0].trials[0]
    with pytest.raises(UserError, match=rf"{dense} has no tile maps.*{hybrid_trial(demo)}"):
        draw_tile_maps(demo, dense)


def test_layer_sparsity(smollm: pd.DataFrame) -> None:
    trials = [point.trials[0] for point in gather(smollm) if point.method == "wanda" and point.structure == "hybrid"]
    figure = draw_layer_sparsity(smollm, trials)
    panels = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title() for axis in panels] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert {len(axis.lines) for axis in panels} == {3} and {len(line.get_xdata()) for line in panels[0].lines} == {30}
    rows = smollm[(smollm.trial == trials[0]) & (smollm.metric == "layer_sparsity") & smollm.layer.str.contains("down")]
    assert list(panels[-1].lines[0].get_ydata()) == pytest.approx(list(100 * rows.value))
    assert (panels[-1].get_xlabel(), figure.get_supylabel()) == ("Block", "Sparsity (%)")
    key = figure.axes[-1].get_legend()
    assert key is not None
    assert [text.get_text() for text in key.get_texts()] == ["Wanda 45%", "Wanda 35%", "Wanda 25%"]
    with pytest.raises(UserError, match="no sparsity per layer"):
        draw_layer_sparsity(smollm, [gather(smollm)[0].trials[0]])


def test_a_legend_is_as_wide_as_its_figure_allows() -> None:
    figure = new_figure(3.35, 2.0)
    figure.subplots()
    add_legend(figure, [Line2D([], [], label=f"a rather long label, number {number}") for number in range(4)], 4)
    (found,) = figure.legends
    assert found.get_window_extent().width <= figure.bbox.width
    assert len(legend(figure)) == 4


def test_more_lines_than_can_be_told_apart_are_a_figure_for_each_variant(demo: pd.DataFrame) -> None:
    points = [point for point in gather(demo) if point.method != "dense"]
    assert list(_readable("curves", points[:8])) == ["curves"]
    variants = [dataclasses.replace(points[0], variant=name) for name in ("", "lr=0.1", "lr=0.1")] * 3
    files = _readable("curves", variants)
    assert set(files) == {"curves", "curves-lr-0.1"}
    assert sum(map(len, files.values())) == 9


def test_learning_curves(demo: pd.DataFrame) -> None:
    figure = draw_learning_curves(demo)
    loss, density = figure.axes
    assert loss.get_ylabel() == "Cross entropy (nat/token)" and density.get_ylabel() == "Density (%)"
    assert loss.get_xlabel() == density.get_xlabel() == "Step"
    assert legend(figure) == ["MaskLLM 2:4", "PATCH joint 45%", "PATCH joint 35%", "PATCH joint 25%"]
    assert {len(line.get_xdata()) for line in loss.lines} == {200}
    assert len(loss.lines) == 8, "each curve as measured and smoothed"
    targets = sorted(line.get_ydata()[0] for line in density.lines if len(line.get_xdata()) == 2)
    assert targets == pytest.approx([0.5, 0.55, 0.65, 0.75])
    with pytest.raises(UserError, match="no learning rows"):
        draw_learning_curves(demo[demo.stage != "prune"])


def test_a_study_is_plotted_into_its_folder(seeded: pd.DataFrame, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    written = plot_study(seeded, folder)
    stems = ["frontier", *[f"tiles-patch-joint-{share}" for share in (45, 35, 25)], "layer-sparsity-patch-joint"]
    expected = [f"{stem}.{suffix}" for stem in [*stems, "learning-curves"] for suffix in ("png", "pdf")]
    assert [path.name for path in written] == expected
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected), "no temporary file stays behind"
    for path in written:
        start = path.read_bytes()[:4]
        assert start == (b"\x89PNG" if path.suffix == ".png" else b"%PDF")


def test_the_same_rows_give_the_same_bytes(demo: pd.DataFrame, tmp_path: Path) -> None:
    shuffled = demo.sample(frac=1, random_state=0)
    for one, other in zip(
        plot_frontier(demo, tmp_path / "one"), plot_frontier(shuffled, tmp_path / "other"), strict=True
    ):
        assert one.read_bytes() == other.read_bytes()
    assert b"CreationDate" not in (tmp_path / "one.pdf").read_bytes()


def test_plotting_leaves_global_settings_alone(demo: pd.DataFrame, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plot_learning_curves(demo, tmp_path / "curves")
    assert dict(matplotlib.rcParams) == before and plt.get_fignums() == []


def test_a_failed_write_leaves_the_old_figure(demo: pd.DataFrame, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "frontier.png").write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        plot_frontier(demo, tmp_path / "frontier")
    assert [path.name for path in tmp_path.iterdir()] == ["frontier.png"]
    assert (tmp_path / "frontier.png").read_bytes() == b"old"
