"""Masks that others released become checkpoints like ours, or are refused by name."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_families import make
from tiny_learner import RAGGED, magnitude_prior, tiny_model

from experiments.run.foreign_masks import import_masks
from experiments.run.runtime import Machine
from patch.audit import audit
from patch.checkpoint import load_info, load_masks
from patch.errors import UserError
from patch.layers import prunable_linears
from patch.mask import HybridMask
from patch.tiles import tile_grid

MACHINE = Machine("cpu", None, lambda *_: None)
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    monkeypatch.setattr("experiments.data.models.load_model", lambda *_, **__: (tiny_model(), None))
    return tmp_path / "base"


def masks_of(share: float = 0.3) -> dict[str, HybridMask]:
    """Masks with some dense tiles, of ragged ones."""
    model = tiny_model()
    patterns = magnitude_prior(model).patterns or {}
    source = torch.Generator().manual_seed(1)
    found = {}
    for name, linear in prunable_linears(model).items():
        shape = linear.weight.shape[0], linear.weight.shape[1]
        dense = torch.rand(tile_grid(shape, RAGGED), generator=source) < share
        found[name] = HybridMask(shape, RAGGED, dense, patterns[name])
    return found


def archive_of(masks: dict[str, HybridMask], path: Path, **changes: Any) -> Path:
    arrays: dict[str, Any] = {"__meta__": np.array(json.dumps({"sparsity": 0.35}))}
    for name, mask in masks.items():
        arrays[f"{name}.weight"] = np.packbits(mask.keep().numpy().reshape(-1))
        arrays[f"{name}.weight.__shape__"] = np.array(mask.shape)
    arrays = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(path, **arrays)
    return path


def test_released_masks_become_a_checkpoint(base: Path, tmp_path: Path) -> None:
    masks = masks_of()
    out, sparsity = import_masks(archive_of(masks, tmp_path / "m.npz"), str(base), RAGGED, tmp_path / "out", MACHINE)
    found = load_masks(out)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name].keep(), mask.keep()) for name, mask in masks.items())
    assert not any(row.violating for row in audit(out))
    info = load_info(out)
    assert info["imported"]["meta"] == {"sparsity": 0.35} and info["structure"] == "hybrid"
    assert sparsity == pytest.approx(info["sparsity"])


def test_the_processor_of_the_base_goes_with_its_masks(base: Path, tmp_path: Path) -> None:
    (base / "preprocessor_config.json").write_text('{"do_resize": true}')
    out, _ = import_masks(archive_of(masks_of(), tmp_path / "m.npz"), str(base), RAGGED, tmp_path / "out", MACHINE)
    assert (out / "preprocessor_config.json").read_text() == '{"do_resize": true}'


def test_masks_without_a_dense_tile_are_two_four(base: Path, tmp_path: Path) -> None:
    archive = archive_of(masks_of(0), tmp_path / "m.npz")
    out, sparsity = import_masks(archive, str(base), RAGGED, tmp_path / "out", MACHINE)
    assert sparsity == 0.5 and load_info(out)["structure"] == "2:4"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{FIRST}.weight": None, f"{FIRST}.weight.__shape__": None}, f"no mask for {FIRST}"),
        ({f"{FIRST}.weight.__shape__": None}, "not an archive of masks"),
        ({f"{FIRST}.weight.__shape__": np.array([32, 128])}, r"is \(32, 128\), the weight is \(64, 64\)"),
        ({f"{FIRST}.weight": np.packbits(np.arange(4096) % 3 > 0)}, f"{FIRST} is not made of dense and 2:4 tiles"),
        ({"lm_head": np.zeros(8, np.uint8), "lm_head.__shape__": np.array([8, 8])}, "lm_head, which is no prunable"),
        ({f"{FIRST}.weight": np.zeros(3, np.uint8)}, "has 3 bytes of uint8"),
        ({"__meta__": np.array("{")}, "not an archive of masks"),
        ({"__meta__": np.array("[" * 100_000)}, "not an archive of masks"),
        ({f"{FIRST}.weight.__shape__": np.array(64)}, "not an archive of masks"),
        ({f"{FIRST}.weight.__shape__": np.array([2**32, 2**32])}, r"is \(4294967296, 4294967296\), the weight is"),
        ({f"{FIRST}.weight.__shape__": np.zeros(2**20, np.int8)}, "1048[0-9]+ bytes, of at most"),
        ({f"{FIRST}.weight": np.zeros(2**20, np.uint8)}, "1048[0-9]+ bytes, of at most"),
        ({f"{FIRST}.weight": np.array([None])}, "not an archive of masks"),
    ],
    ids=[
        "missing",
        "no-shape",
        "other-shape",
        "other-tiles",
        "strange",
        "truncated",
        "meta",
        "nested-meta",
        "flat-shape",
        "huge-shape",
        "long-shape",
        "long-mask",
        "objects",
    ],
)
def test_other_archives_are_refused(changes: dict[str, Any], said: str, base: Path, tmp_path: Path) -> None:
    archive = archive_of(masks_of(), tmp_path / "m.npz", **changes)
    with pytest.raises(UserError, match=said):
        import_masks(archive, str(base), RAGGED, tmp_path / "out", MACHINE)
    assert not (tmp_path / "out").exists()


def test_what_is_no_archive_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "m.npz").write_bytes(b"nothing")
    for path in (tmp_path / "m.npz", tmp_path / "none.npz"):
        with pytest.raises(UserError, match=r"not an archive of masks|no such file"):
            import_masks(path, str(base), RAGGED, tmp_path / "out", MACHINE)


def test_an_array_that_says_it_is_huge_is_not_allocated(base: Path, tmp_path: Path) -> None:
    archive = archive_of(masks_of(), tmp_path / "m.npz", **{f"{FIRST}.weight": None})
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "|u1", "fortran_order": False, "shape": (2**60,)})
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr(f"{FIRST}.weight.npy", content.getvalue())
    with pytest.raises(UserError, match=r"has 0 bytes for \(1152921504606846976,\)"):
        import_masks(archive, str(base), RAGGED, tmp_path / "out", MACHINE)


@pytest.mark.parametrize("damage", ["compression", "inflated"])
def test_members_that_cannot_be_inflated_are_refused(damage: str, base: Path, tmp_path: Path) -> None:
    archive = archive_of(masks_of(), tmp_path / "m.npz")
    with zipfile.ZipFile(archive) as packed:
        members = {name: packed.read(name) for name in packed.namelist()}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
        info = packed.getinfo(f"{FIRST}.weight.npy")
        if damage == "compression":
            info.compress_type = 99
    if damage == "inflated":
        data = bytearray(archive.read_bytes())
        start = info.header_offset + 30 + len(info.filename)
        data[start : start + 4] = b"\xff" * 4
        archive.write_bytes(data)
    with pytest.raises(UserError, match="not an archive of masks"):
        import_masks(archive, str(base), RAGGED, tmp_path / "out", MACHINE)


@pytest.mark.parametrize(
    ("family", "said"),
    [("mixtral", "importing masks covers Linear weights alone"), ("recurrent_gemma", r"not model\.")],
)
def test_a_base_that_masks_would_cover_in_part_is_refused(
    family: str, said: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.data.models.load_model", lambda *_, **__: (make(family), None))
    # Of attention alone, as they would be learned without the experts.
    arrays = {}
    for name, linear in prunable_linears(make(family)).items():
        rows, cols = linear.weight.shape
        arrays[name] = np.full(rows * cols // 8, 0b11001100, np.uint8)
        arrays[f"{name}.__shape__"] = np.array([rows, cols])
    with pytest.raises(UserError, match=said):
        import_masks(archive_of({}, tmp_path / "m.npz", **arrays), str(base), (4, 4), tmp_path / "out", MACHINE)
    assert not (tmp_path / "out").exists()
