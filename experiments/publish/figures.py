"""The figures that README and docs show, drawn from the committed rows: ``python -m experiments.publish.figures``.

They are drawn as reports draw them, and `docs/figures` is the one place where figures are committed.
"""

from collections.abc import Iterator, Mapping

from analysis.figures.speed_frontier import draw_front_on_shapes
from analysis.figures.study import Drawing, study_drawings
from analysis.figures.style import save_figure
from analysis.rows.points import gather
from analysis.tables.kernels import load_bench
from experiments.publish import measured, reports
from experiments.publish.pages import BENCH, H200, RESULTS, ROOT
from experiments.run.store import Store
from experiments.studies.registry import STUDIES

FOLDER = ROOT / "docs" / "figures"

# For a study, or None for the GPU whose speed is shown: under which names which of its drawings are shown.
FIGURES: Mapping[str | None, Mapping[str, str]] = {
    "demo": {"frontier-demo": "frontier"},
    "smollm2-published": {
        "frontier-smollm2-published": "frontier",
        "layers-guided": "layer-sparsity-patch-joint-patch-joint-guided",
    },
    "smollm2-learned": {"frontier-smollm2-learned": "frontier"},
    "smollm2-recovered": {"frontier-smollm2-recovered": "frontier"},
    "qwen-coder-0.5b": {"frontier-qwen-coder": "frontier"},
    "qwen-coder-0.5b-recovered": {"cost-qwen-coder": "cost"},
    "smollm2-oneshot": {"frontier-smollm2-oneshot": "frontier"},
    "frontier-smollm2": {"speed-smollm2": "speed"},
    "frontier-qwen-coder-0.5b": {"speed-qwen-coder": "speed"},
    None: {
        "speedup-h100": "speedup-llama-2-7b",
        "precisions-h100": "precisions-llama-2-7b",
        "end-to-end-h100": "end-to-end-llama-2-7b",
    },
}
# Of a study, beside the speed of which larger model its quality is shown: on an H200, where INT4 tiles were timed too.
ON_SHAPES: Mapping[str, Mapping[str, str]] = {"frontier-qwen-coder-0.5b": {"front-qwen-coder-bits": "llama-2-7b"}}
SHOWN = tuple(name for shown in (FIGURES, ON_SHAPES) for kept in shown.values() for name in kept)


def _drawings(study: str | None) -> Iterator[Drawing]:
    if study is None:
        yield from reports.speed(BENCH).figures
    else:
        yield from study_drawings(measured.frame(STUDIES[study].trials(), Store(RESULTS)))


if __name__ == "__main__":
    for study, kept in FIGURES.items():
        names = {drawing: name for name, drawing in kept.items()}
        for drawing in _drawings(study):
            if name := names.pop(drawing.name, None):
                print(*save_figure(drawing.figure, FOLDER / name, ["png"]))
            if not names:
                break
        assert not names, f"{study}: no drawings {', '.join(names)}"
    for study, kept in ON_SHAPES.items():
        points = gather(measured.frame(STUDIES[study].trials(), Store(RESULTS)))
        for name, shape in kept.items():
            drawn = draw_front_on_shapes(points, load_bench([H200], "model"), shape)
            print(*save_figure(drawn, FOLDER / name, ["png"]))
