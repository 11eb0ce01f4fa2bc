"""Masks without weights: exported, and made the same checkpoint again."""

import json
import lzma
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tiny_study import tiny_trials

from experiments.run import checkpoints, mask_archive, pipeline
from experiments.run.runtime import Machine
from experiments.run.store import Store
from experiments.studies import build
from experiments.studies.trial import Calibration, Evaluation, Pruning, Trial, definition, key
from patch.audit import audit
from patch.checkpoint import INFO_FILE, MASKS_FILE, content_hash, load_info, load_masks
from patch.errors import UserError
from patch.files import sha256
from patch.tiles import tile_grid

CPU = Machine("cpu", None, lambda *_: None)


def pruned(model: Path, text: Path, store: Store, method: str, structure: str = "hybrid") -> tuple[Pruning, Path]:
    sparsity = 0.4 if structure == "hybrid" else 0.5
    calibration = Calibration(str(text), windows=8, length=16)
    pruning = build.one_shot(str(model), method, structure, sparsity, (16, 16), calibration)
    path = checkpoints.ensure_checkpoint(pruning, store, CPU)
    assert path is not None
    return pruning, path


@pytest.fixture
def archive(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> Path:
    _, checkpoint = pruned(tiny_model, tiny_text, Store(tmp_path / "made"), "wanda")
    mask_archive.export(checkpoint, tmp_path / "masks.tar.xz")
    return tmp_path / "masks.tar.xz"


@pytest.mark.parametrize("method", ["magnitude", "wanda", "learned"])
def test_what_is_restored_is_the_checkpoint(tiny_model: Path, tiny_text: Path, tmp_path: Path, method: str) -> None:
    made, other = Store(tmp_path / "made"), Store(tmp_path / "other")
    if method == "learned":
        pruning = tiny_trials(tiny_model, tiny_text)[-1].pruning
        checkpoint = checkpoints.ensure_checkpoint(pruning, made, CPU)
        assert pruning.learning is not None and checkpoint is not None
    else:
        pruning, checkpoint = pruned(tiny_model, tiny_text, made, method)
    archive = tmp_path / "masks.tar.xz"
    mask_archive.export(checkpoint, archive)
    assert mask_archive.restore(archive, other, CPU) == other.checkpoint_path(pruning)
    assert content_hash(other.checkpoint_path(pruning)) == content_hash(checkpoint)
    assert (other.checkpoint_path(pruning) / INFO_FILE).read_text() == (checkpoint / INFO_FILE).read_text()
    assert not any(row.violating for row in audit(other.checkpoint_path(pruning)))


def test_the_masks_of_an_archive_are_those_of_the_rows(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "made")
    calibration = Calibration(str(tiny_text), windows=8, length=16)
    pruning = build.one_shot(str(tiny_model), "wanda", "hybrid", 0.4, (16, 16), calibration)
    trial = Trial(pruning, Evaluation(perplexity=()))
    pipeline.run_trial(trial, store, CPU)
    mask_archive.export(store.checkpoint_path(pruning), tmp_path / "masks.tar.xz")
    with tarfile.open(tmp_path / "masks.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    kept = tmp_path / key(pruning)
    masks = load_masks(kept, alone=True)
    elements = sum(mask.keep().numel() for mask in masks.values())
    assert sum(mask.zeros for mask in masks.values()) / elements == pytest.approx(0.4, abs=1e-2)
    assert load_info(kept, masks_alone=True)["definition"] == definition(pruning)
    rows = store.read_rows(trial, "prune")
    maps = {row["labels"]["layer"]: row["labels"]["tile_map"] for row in rows if row["metric"] == "tile_map"}
    assert set(maps) == set(masks)
    for name, mask in masks.items():
        assert ["".join("01"[int(tile)] for tile in row) for row in mask.dense.tolist()] == maps[name]


def test_a_study_takes_what_was_restored(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "other")
    path = mask_archive.restore(archive, store, CPU)
    assert mask_archive.restore(archive, store, CPU) == path
    monkeypatch.setattr(checkpoints, "_make_checkpoint", lambda *_: pytest.fail("made anew"))
    pruned(tiny_model, tiny_text, store, "wanda")


def test_another_model_is_refused(tiny_model: Path, tmp_path: Path, archive: Path) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    before = {name: weight.clone() for name, weight in weights.items()}
    weights["model.layers.0.mlp.up_proj.weight"] += 1
    try:
        save_file(weights, tiny_model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"with these weights model\.safetensors is another file"):
            mask_archive.restore(archive, Store(tmp_path / "other"), CPU)
    finally:
        save_file(before, tiny_model / "model.safetensors", metadata={"format": "pt"})
    assert not list((tmp_path / "other" / "checkpoints").glob("[!.]*"))


DEFINITIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "definition": lambda info: info.pop("definition"),
    "label": lambda info: info["definition"].update(sparsity=0.1),
    "nan": lambda info: info["definition"].update(sparsity=math.nan),
    "tile": lambda info: info["definition"].update(tile=[8, 8]),
    "fact": lambda info: info.update(sparsity=0.75),
    "zeros": lambda info: next(iter(info["weights"].values())).update(zeros=0),
}


def repacked(archive: Path, target: Path, change: str) -> Path:
    """The archive with one of its files changed."""
    with tarfile.open(archive) as packed:
        packed.extractall(target)
    folder = next(target.iterdir())
    if change == "masks":
        tensors = load_file(folder / MASKS_FILE)
        name = next(name for name in tensors if name.endswith(".dense"))
        tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, folder / MASKS_FILE, metadata={"format": "pt"})
    elif change in DEFINITIONS:
        info = json.loads((folder / INFO_FILE).read_text())
        del info["digest"]
        DEFINITIONS[change](info)
        (folder / INFO_FILE).write_text(json.dumps(info))
    elif change == "bomb":
        (folder / MASKS_FILE).write_bytes(bytes(50_000_000))
    elif change == "nested":
        (folder / INFO_FILE).write_text("[" * 100_000 + "]" * 100_000)
    elif change == "dtype":
        (folder / mask_archive.CONFIG_FILE).write_text('{"dtype": "nn"}')
    else:
        (folder / change).unlink()
    changed = target / "changed.tar.xz"
    with tarfile.open(changed, "w:xz") as packed:
        packed.add(folder, folder.name)
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("masks", MASKS_FILE),
        ("definition", "does not say what defines"),
        ("label", "said to have sparsity 0.1, its masks have 0"),
        ("nan", "said to have sparsity nan"),
        ("tile", r"said to have tiles \[8, 8\]"),
        ("fact", "says sparsity 0.75, its masks have"),
        ("zeros", "has 0 zeros, its mask has"),
        ("bomb", "50000000 bytes, of at most"),
        ("nested", "cannot be read as JSON"),
        ("dtype", "does not say which dtype was pruned"),
        (INFO_FILE, "hybrid.json"),
        (mask_archive.CONFIG_FILE, "config.json"),
    ],
)
def test_damaged_archives_are_refused(tmp_path: Path, archive: Path, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mask_archive.restore(repacked(archive, tmp_path / "unpacked", change), Store(tmp_path / "other"), CPU)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("masks/run.sh", tarfile.REGTYPE, "masks/run.sh in it is no part"),
        (f"masks/{INFO_FILE}", tarfile.SYMTYPE, "in it is no part"),
        (f"other/{INFO_FILE}", tarfile.REGTYPE, "2 folders"),
        (f"masks/../../{INFO_FILE}", tarfile.REGTYPE, "2 folders"),
    ],
    ids=["another-file", "link", "second-folder", "outside"],
)
def test_archives_with_anything_else_are_refused(tmp_path: Path, name: str, kind: bytes, message: str) -> None:
    strange = tmp_path / "strange.tar"
    with tarfile.open(strange, "w") as packed:
        for path, form in ((f"masks/{MASKS_FILE}", tarfile.REGTYPE), (name, kind)):
            member = tarfile.TarInfo(path)
            member.type, member.linkname = form, "/etc/passwd"
            packed.addfile(member)
    with pytest.raises(UserError, match=message):
        mask_archive.restore(strange, Store(tmp_path / "other"), CPU)
    assert not (tmp_path / "other" / "checkpoints").exists()


def with_zeros(path: Path, name: str, kind: bytes = tarfile.REGTYPE) -> Path:
    """An archive of one file that says it has 2 GiB and holds only the first MiB of them."""
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, 2 * 2**30
    with lzma.open(path, "wb") as packed:
        packed.write(header.tobuf() + bytes(2**20))
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"masks/{MASKS_FILE}", tarfile.REGTYPE),
        (f"masks/{INFO_FILE}", tarfile.REGTYPE),
        ("masks", tarfile.XHDTYPE),
        ("masks", tarfile.GNUTYPE_LONGNAME),
    ],
    ids=["unwanted", "wanted", "attributes", "long-name"],
)
def test_sizes_are_checked_before_anything_is_decompressed(tmp_path: Path, name: str, kind: bytes) -> None:
    with pytest.raises(UserError, match=r"2147483648 bytes"):
        mask_archive.restore(with_zeros(tmp_path / "m.tar.xz", name, kind), Store(tmp_path / "other"), CPU)


@pytest.mark.parametrize("pax", [False, True], ids=["gnu", "pax"])
def test_files_with_holes_are_refused(tmp_path: Path, pax: bool) -> None:
    """Their maps may go on for as long as the archive does."""
    member = tarfile.TarInfo(f"masks/{INFO_FILE}")
    if pax:
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": member.name}
        header = member.tobuf(tarfile.PAX_FORMAT)
    else:
        member.type = tarfile.GNUTYPE_SPARSE
        header = member.tobuf(tarfile.GNU_FORMAT)
    with lzma.open(tmp_path / "m.tar.xz", "wb") as packed:
        packed.write(header + b"1000000000\n" + b"1\n" * 2**20)
    with pytest.raises(UserError, match="a file with holes"):
        mask_archive.restore(tmp_path / "m.tar.xz", Store(tmp_path / "other"), CPU)


def test_files_and_folders_of_an_archive_are_few(tmp_path: Path) -> None:
    for names, message in ((["masks"] * 100, "more than 16"), ([f"masks/{MASKS_FILE}"] * 2, "in it twice")):
        with tarfile.open(tmp_path / "m.tar", "w") as packed:
            for name in names:
                member = tarfile.TarInfo(name)
                member.type = tarfile.DIRTYPE if name == "masks" else tarfile.REGTYPE
                packed.addfile(member)
        with pytest.raises(UserError, match=message):
            mask_archive.restore(tmp_path / "m.tar", Store(tmp_path / "other"), CPU)


@pytest.mark.parametrize("tile", [(1, 4), (2, 8), (64, 64)], ids=["1x4", "2x8", "64x64"])
@pytest.mark.parametrize("shape", [(576, 1536), (65, 68)], ids=["large", "odd"])
def test_masks_with_scores_of_any_tile_are_no_larger_than_allowed(
    shape: tuple[int, int], tile: tuple[int, int]
) -> None:
    n, k = shape
    grid = tile_grid(shape, tile)
    tensors = {
        "patterns": torch.zeros(n, -(-k // 8), dtype=torch.uint8),
        "dense": torch.zeros(grid, dtype=torch.bool),
        "tile_scores": torch.zeros(grid),
    }
    assert len(save({f"model.layers.0.mlp.up_proj.{name}": part for name, part in tensors.items()})) <= (
        mask_archive.most_mask_bytes(n, k)
    )


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.tar.xz").write_text("no archive")
    for name, message in (("text", "not an archive of masks"), ("missing", "no such file")):
        with pytest.raises(UserError, match=message):
            mask_archive.restore(tmp_path / f"{name}.tar.xz", Store(tmp_path / "other"), CPU)


def test_what_masks_alone_cannot_restore_is_not_exported(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    _, changed = pruned(tiny_model, tiny_text, store, "sparsegpt")
    with pytest.raises(UserError, match="sparsegpt changes the weights"):
        mask_archive.export(changed, tmp_path / "masks.tar.xz")
    pruning, _ = pruned(tiny_model, tiny_text, store, "wanda")
    fitted = checkpoints.ensure_checkpoint(build.refitted(pruning, Calibration(str(tiny_text), 8, 16)), store, CPU)
    with pytest.raises(UserError, match="refit changes the weights"):
        mask_archive.export(fitted, tmp_path / "masks.tar.xz")
    _, unstructured = pruned(tiny_model, tiny_text, store, "wanda", "unstructured")
    with pytest.raises(UserError, match="has no masks to share"):
        mask_archive.export(unstructured, tmp_path / "masks.tar.xz")
    assert not (tmp_path / "masks.tar.xz").exists()


def test_an_archive_is_not_overwritten(tmp_path: Path, archive: Path) -> None:
    before = archive.read_bytes()
    with pytest.raises(UserError, match="already there"):
        mask_archive.export(tmp_path / "made" / "checkpoints" / restored_key(archive), archive)
    assert archive.read_bytes() == before


def restored_key(archive: Path) -> str:
    with tarfile.open(archive) as packed:
        info = packed.extractfile(next(member for member in packed if member.name.endswith(INFO_FILE)))
        assert info is not None
        return key(json.load(info)["definition"])


def test_an_archive_of_other_masks_does_not_pass_for_what_is_there(archive: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "other")
    path = mask_archive.restore(archive, store, CPU)
    assert mask_archive.restore(archive, store, CPU) == path
    masks = load_file(path / MASKS_FILE)
    name = next(name for name in masks if name.endswith(".patterns"))
    masks[name] = masks[name].roll(1, 0)
    save_file(masks, path / MASKS_FILE)
    info = json.loads((path / INFO_FILE).read_text())
    del info["digest"]
    info["files"][MASKS_FILE] = {"bytes": (path / MASKS_FILE).stat().st_size, "sha256": sha256(path / MASKS_FILE)}
    (path / INFO_FILE).write_text(json.dumps(info))
    with pytest.raises(UserError, match=f"{path} is there with other masks than {archive}"):
        mask_archive.restore(archive, store, CPU)
