"""Accuracy against speed: who is on the frontier, who is no result, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from analysis.figures.speed_frontier import draw_front_on_shapes, draw_speed_frontier
from analysis.figures.study import study_drawings
from analysis.rows.points import Text, gather
from analysis.tables.packed import workloads
from analysis.tables.render import shown_cells
from analysis.tables.speed_frontier import front_table, on_front, pareto, placed, placed_on_shapes, workloads_of
from patch.errors import UserError

Row = dict[str, Any]
Make = Callable[..., Any]

# Method, structure, sparsity, perplexity, speedup of decoding and of prefill, whether packed agrees.
POINTS = {
    "d" * 12: ("dense", "dense", 0.0, 20.0, 1.0, 1.0, True),
    "1" * 12: ("wanda", "2:4", 0.5, 80.0, 1.6, 1.4, True),
    "2" * 12: ("maskllm", "2:4", 0.5, 40.0, 1.6, 1.4, True),
    "3" * 12: ("patch-joint", "hybrid", 0.25, 24.0, 1.3, 1.1, True),
    "4" * 12: ("patch-joint", "hybrid", 0.45, 33.0, 1.5, 1.3, False),
}


@pytest.fixture
def frame(study: Make, make_pruning: Make, make_trial: Make) -> pd.DataFrame:
    trials: dict[str, list[Row]] = {}
    for trial, (method, structure, sparsity, perplexity, decode, prefill, agrees) in POINTS.items():
        rows = make_trial(trial, make_pruning("m", method, structure, sparsity), perplexity, {"piqa": (0.6, 500)})
        for row in rows:
            row["provenance"] = row["provenance"] | {"checkpoint": trial * 4}
        last = rows[-1]
        for workload, value in (("decode@1x1", decode), ("prefill@8x2048", prefill)):
            over = {"metric": "speedup", "value": value, "labels": {"dense": "fused"}}
            rows.append(last | {"stage": f"speed:{workload}"} | over)
        labels = {"source": "wikitext2/test", "length": 2048, "agrees": agrees}
        rows.append(
            last
            | {"stage": "packed:wikitext2/test@2048", "metric": "packed_perplexity", "value": perplexity}
            | {"labels": labels}
        )
        trials[trial] = rows
    return study(trials)


def test_points_are_placed_by_workload(frame: pd.DataFrame) -> None:
    assert workloads(frame) == ["decode@1x1", "prefill@8x2048"]
    found = {each.point.trials[0]: each for each in placed(frame, "prefill@8x2048")}
    assert {trial: (each.speedup, each.agrees) for trial, each in found.items()} == {
        trial: (about[5], about[6]) for trial, about in POINTS.items()
    }


def test_the_frontier_is_what_no_other_beats_in_both() -> None:
    points = [(1.0, 20.0), (1.6, 80.0), (1.6, 40.0), (1.3, 24.0), (1.2, 30.0)]
    assert pareto(points, lower_is_better=True) == [(1.0, 20.0), (1.3, 24.0), (1.6, 40.0)]
    assert pareto([(1.0, 60.0), (1.5, 50.0), (1.4, 40.0)], lower_is_better=False) == [(1.0, 60.0), (1.5, 50.0)]
    assert pareto([], lower_is_better=True) == []


def test_a_point_that_does_not_agree_is_marked_and_not_on_the_frontier(frame: pd.DataFrame) -> None:
    figure = draw_speed_frontier(frame)
    panel = figure.axes[0]
    assert [text.get_text() for text in panel.texts] == ["wrong"]
    (edge,) = [line for line in panel.lines if line.get_gid() == "pareto"]
    assert list(edge.get_xdata()) == [1.0, 1.3, 1.6] and list(edge.get_ydata()) == [20.0, 24.0, 40.0]
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == [
        "Decoding, batch 1",
        "Prefill, 8 x 2048 tokens",
    ]


def test_error_bars_end_within_the_panels(frame: pd.DataFrame) -> None:
    figure = draw_speed_frontier(frame.assign(stderr=20 * frame.stderr))
    for panel in figure.axes[:2]:
        low, high = panel.get_ylim()
        ends = [y for bars in panel.collections for bar in bars.get_segments() for _, y in bar]
        assert len(ends) == 2 * len(POINTS)
        # One that does not agree is no result and does not decide what is seen.
        assert all(low < y < high for y in ends if y not in (0.8 * 33.0, 1.2 * 33.0))


def test_the_front_is_in_the_key_and_the_title_says_what_and_where(frame: pd.DataFrame) -> None:
    figure = draw_speed_frontier(frame.assign(gpu="NVIDIA H200"))
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == ["Dense", "Wanda", "MaskLLM", "PATCH joint", "Pareto front"]
    assert " ".join(figure.get_suptitle().split()) == "m, tiles of 64x64, timed on one H200"


def test_what_is_far_slower_stands_at_the_edge_with_its_speed(frame: pd.DataFrame) -> None:
    slow = frame.trial.eq("1" * 12) & frame.metric.eq("speedup")
    panel = draw_speed_frontier(frame.assign(value=frame.value.where(~slow, 0.2))).axes[0]
    assert "0.20x" in [text.get_text() for text in panel.texts]
    xs = [float(x) for line in panel.lines if line.get_marker() in ("^", "D", "o", "*") for x in line.get_xdata()]
    assert sorted(xs)[1:] == [1.0, 1.3, 1.5, 1.6] and panel.get_xlim()[0] < min(xs) < 1.0


def test_what_is_slower_by_steps_stands_where_it_is(frame: pd.DataFrame) -> None:
    steps = {"1" * 12: 0.9, "3" * 12: 0.72, "4" * 12: 0.6}
    values = [
        steps.get(trial, value) if metric == "speedup" else value
        for trial, metric, value in zip(frame.trial, frame.metric, frame.value, strict=True)
    ]
    changed = frame.assign(value=values)
    panel = draw_speed_frontier(changed[changed.trial.ne("2" * 12)]).axes[0]
    assert not [text for text in panel.texts if text.get_gid() == "label"]
    xs = [float(x) for line in panel.lines if line.get_marker() in ("^", "o", "*") for x in line.get_xdata()]
    assert sorted(xs) == [0.6, 0.72, 0.9, 1.0]


def test_a_dense_model_that_was_not_fused_is_said_in_the_title(frame: pd.DataFrame) -> None:
    before = frame.assign(labels=[labels if "dense" not in labels else {} for labels in frame.labels])
    title = draw_speed_frontier(before).get_suptitle()
    assert " ".join(title.split()).endswith("superseded: the dense model was not fused")


@pytest.mark.parametrize(
    ("variants", "name"), [(("guided, FP8", "guided"), "PATCH joint (guided)"), (("guided", ""), "PATCH joint")]
)
def test_the_key_says_what_is_true_of_all_points_of_a_method(
    frame: pd.DataFrame, variants: tuple[str, str], name: str
) -> None:
    points = gather(frame)
    for place, variant in zip([i for i, p in enumerate(points) if p.method == "patch-joint"], variants, strict=True):
        points[place] = replace(points[place], variant=variant, precision="FP8" if "FP8" in variant else "")
    (key,) = draw_speed_frontier(frame, points=points).legends
    assert [text.get_text() for text in key.get_texts()][:4] == ["Dense", "Wanda", "MaskLLM", name]


def test_without_speed_there_is_nothing_to_plot(demo: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="no speed to plot"):
        draw_speed_frontier(demo)


def test_one_model_alone_has_no_figure_of_its_speed(frame: pd.DataFrame) -> None:
    names = [drawing.name for drawing in study_drawings(frame)]
    alone = [drawing.name for drawing in study_drawings(frame[frame.trial.eq("d" * 12) | frame.metric.ne("speedup")])]
    assert "speed" in names and "speed" not in alone


def test_speed_without_perplexity_has_no_figure_yet(frame: pd.DataFrame) -> None:
    timed = [drawing.name for drawing in study_drawings(frame[~frame.stage.str.startswith("perplexity:")])]
    assert "speed" not in timed


def test_a_title_without_tiles_says_so(frame: pd.DataFrame) -> None:
    figure = draw_speed_frontier(frame[frame.structure.ne("hybrid")].assign(gpu="NVIDIA H200"))
    assert " ".join(figure.get_suptitle().split()) == "m, no tiles, timed on one H200"


@pytest.fixture
def in_few_bits(frame: pd.DataFrame) -> pd.DataFrame:
    """The same, MaskLLM's in FP8 and PATCH's at 25% in INT4."""
    precisions = {"2" * 12: "fp8", "3" * 12: "int4"}
    definitions = [
        each if trial not in precisions else each | {"pruning": each["pruning"] | {"quantisation": {"precision": name}}}
        for trial, each in zip(frame.trial, frame.definition, strict=True)
        for name in [precisions.get(trial)]
    ]
    return frame.assign(definition=definitions)


def test_points_of_fewer_bits_are_marked_and_in_the_key(in_few_bits: pd.DataFrame) -> None:
    figure = draw_speed_frontier(in_few_bits)
    for panel in figure.axes[::2]:
        marks = {line.get_gid(): list(line.get_ydata()) for line in panel.lines if line.get_gid() in ("FP8", "INT4")}
        assert marks == {"FP8": [40.0], "INT4": [24.0]}
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said[-3:] == ["FP8 (in white)", "INT4 (in white)", "Pareto front"]


def test_the_frontier_in_words_names_precisions_and_differences(in_few_bits: pd.DataFrame) -> None:
    found = placed(in_few_bits, "decode@1x1")
    table = front_table({"decode@1x1": found}, Text("wikitext2/test", 2048))
    cells = [[str(cell) for cell in row] for row in shown_cells(table)]
    assert [row[1:5] for row in cells[:3]] == [
        ["1.00", "Dense", "", "bfloat16"],
        ["1.30", "PATCH joint", "25%", "INT4"],
        ["1.60", "MaskLLM", "50%", "FP8"],
    ]
    assert [row[-1].partition(" ")[0] for row in cells[:3]] == ["", "4.00", "16.00"]
    assert [each.point.precision for each in on_front(found, lambda point: None)] == []


def test_quality_is_shown_beside_the_speed_of_a_larger_model(in_few_bits: pd.DataFrame) -> None:
    """As many zeros and bits, wherever that was timed; what was not is left out."""
    about = {"model": "large", "kind": "decode", "batch": 1.0, "length": 1.0, "metric": "time", "tile": "128x128"}
    timed = pd.DataFrame(
        about | {"gpu": "NVIDIA H100", "implementation": name, "precision": precision, "sparsity": s, "speedup": speed}
        for name, precision, s, speed in (
            ("fused", "bf16", float("nan"), 1.0),
            ("hybrid", "bf16", 0.5, 1.6),
            ("hybrid", "bf16", 0.45, 1.5),
            ("hybrid", "fp8", 0.5, 2.1),
        )
    )
    points = gather(in_few_bits)
    assert workloads_of(timed) == ["decode@1x1"]
    found = {each.point.method: each.speedup for each in placed_on_shapes(points, timed, "decode@1x1")}
    assert found == {"dense": 1.0, "wanda": 1.6, "maskllm": 2.1, "patch-joint": 1.5}
    figure = draw_front_on_shapes(points, timed, "large")
    said = " ".join(figure.get_suptitle().split())
    assert said == "quality of m, speed of large with random weights and tiles of 128x128, H100"
    assert [list(line.get_xdata()) for line in figure.axes[0].lines if line.get_gid() == "FP8"] == [[2.1]]
