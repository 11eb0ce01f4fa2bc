"""The masks that are kept in the repository are those whose rows are reported."""

import tarfile
from pathlib import Path

import pytest

from experiments.publish import reports
from experiments.run.store import Store
from experiments.studies.registry import STUDIES
from experiments.studies.trial import Trial, definition, key
from patch.checkpoint import load_info, load_masks
from patch.mask import model_sparsity

ROOT = Path(__file__).parents[3]
NAME = "smollm2-135m-patch-joint-45-guided"


@pytest.fixture(scope="module")
def trial() -> Trial:
    label = "smollm2-135m patch-joint hybrid 45% 64x64 guided"
    return next(trial for trial in STUDIES["smollm2-learned"].trials() if trial.label == label)


def test_they_are_the_masks_of_the_rows(trial: Trial, tmp_path: Path) -> None:
    with tarfile.open(ROOT / "results" / "masks" / f"{NAME}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    kept = tmp_path / key(trial.pruning)
    masks = load_masks(kept, alone=True)
    assert model_sparsity(list(masks.values())) == pytest.approx(0.45, abs=1e-6)
    assert load_info(kept, masks_alone=True)["definition"] == definition(trial.pruning)
    frame = reports.frame([trial], Store(ROOT / "results"))
    maps = frame[frame.metric == "tile_map"].set_index("layer").labels
    assert set(maps.index) == set(masks) and key(trial) in set(frame.trial)
    for name, mask in masks.items():
        assert ["".join("01"[int(tile)] for tile in row) for row in mask.dense.tolist()] == maps[name]["tile_map"]
