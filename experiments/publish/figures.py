"""The figures that README and docs show, drawn from the committed rows: ``python -m experiments.publish.figures``.

They are drawn as reports draw them and kept small: `docs/figures` is the one place where figures are committed.
"""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from PIL import Image

from analysis.figures.study import plot_study
from experiments.publish import reports
from experiments.publish.pages import BENCH, RESULTS, ROOT
from experiments.run.store import Store
from experiments.studies.registry import STUDIES

FOLDER = ROOT / "docs" / "figures"
# Pixels: twice what the page shows them at.
_WIDEST = 1600
_COLORS = 128


def _of_study(study: str, folder: Path) -> None:
    plot_study(reports.frame(STUDIES[study].trials(), Store(RESULTS)), folder)


def _of_bench(folder: Path) -> None:
    reports.speed(BENCH, folder)


# What draws them into a folder, and the files of that folder that are kept, by the names under which they are shown.
FIGURES: Mapping[Callable[[Path], object], Mapping[str, str]] = {
    partial(_of_study, "demo"): {"frontier-demo": "frontier"},
    partial(_of_study, "smollm2-learned"): {
        "frontier-smollm2-learned": "frontier",
        "tiles-guided-45": "tiles-patch-joint-45-guided",
    },
    partial(_of_study, "smollm2-oneshot"): {"frontier-smollm2-oneshot": "frontier"},
    partial(_of_study, "frontier-smollm2"): {"speed-smollm2": "speed"},
    _of_bench: {"speedup-h100": "speedup"},
}
SHOWN = tuple(name for kept in FIGURES.values() for name in kept)


def optimise(source: Path, target: Path) -> None:
    """Write a PNG again with as few bytes as show the same: no wider than it is shown, few colors."""
    image = Image.open(source).convert("RGB")
    if image.width > _WIDEST:
        image = image.resize((_WIDEST, round(image.height * _WIDEST / image.width)), Image.Resampling.LANCZOS)
    target.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(_COLORS, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    for draw, kept in FIGURES.items():
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder))
            for name, file in kept.items():
                optimise(Path(folder) / f"{file}.png", FOLDER / f"{name}.png")
                print(FOLDER / f"{name}.png")
