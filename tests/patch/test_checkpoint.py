"""Hybrid checkpoints: what is saved comes back, what is damaged is refused, what violates is found."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_checkpoint import (
    TILE,
    UP,
    apply_masks,
    info_for,
    pruned_model,
    random_masks,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
    truncate,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from patch import checkpoint
from patch.audit import audit
from patch.checkpoint import (
    FORMER_MASKS_FILE,
    INFO_FILE,
    MASKS_FILE,
    content_hash,
    copy_checkpoint,
    load_info,
    load_masks,
    load_tile_scores,
    save_checkpoint,
)
from patch.errors import UserError
from patch.files import new_directory, sha256
from patch.layers import prunable_linears
from patch.mask import HybridMask


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A complete hybrid checkpoint with tile scores for one weight."""
    return save_tiny(tmp_path / "saved")


def test_servers_find_weights_alone_in_safetensors_files(saved: Path) -> None:
    """Some read every ``*.safetensors`` of a directory, and stopped at the masks."""
    names = {name for file in saved.glob("*.safetensors") for name in load_file(file)}
    assert names and all(name.startswith(("model.", "lm_head.")) and "patterns" not in name for name in names)


def test_checkpoints_of_before_load(saved: Path) -> None:
    masks, content = load_masks(saved), content_hash(saved)
    (saved / MASKS_FILE).rename(saved / FORMER_MASKS_FILE)
    rewrite_json(saved, lambda c: c["files"].update({FORMER_MASKS_FILE: c["files"].pop(MASKS_FILE)}))
    again = load_masks(saved)
    assert content_hash(saved) == content and not any(row.violating for row in audit(saved))
    assert all(torch.equal(again[name].keep(), mask.keep()) for name, mask in masks.items())


def test_what_hybrid_json_says_has_a_digest(saved: Path) -> None:
    content = json.loads((saved / INFO_FILE).read_text())
    (saved / INFO_FILE).write_text(json.dumps(content | {"seed": 7}))
    with pytest.raises(UserError, match="its digest is not that of what it says"):
        load_info(saved)


def visible(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir() if item.suffix != ".lock")


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((path / INFO_FILE).read_text())
    del content["digest"]  # as in a checkpoint of before: what else is checked must notice
    change(content)
    (path / INFO_FILE).write_text(json.dumps(content))


def rewrite_tensors(path: Path, name: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change tensors and make the recorded size and hash fit, as a wrong writer would."""
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name, metadata={"format": "pt"})
    about = {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)}
    rewrite_json(path, lambda content: content["files"].update({name: about}))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trip(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model, masks = pruned_model(tied, dtype)
    scores = {name: torch.rand(mask.dense.shape) for name, mask in masks.items()}
    save_checkpoint(tmp_path / "out", model, tiny_tokenizer(), masks, info_for(masks, note="é"), scores)

    loaded = load_masks(tmp_path / "out")
    assert list(loaded) == list(masks)
    for name, mask in masks.items():
        assert loaded[name].tile == TILE and loaded[name].shape == mask.shape
        assert torch.equal(loaded[name].dense, mask.dense)
        assert torch.equal(loaded[name].patterns, mask.patterns)
        assert torch.equal(load_tile_scores(tmp_path / "out")[name], scores[name])
    info = load_info(tmp_path / "out", verify=True)
    assert info["note"] == "é" and info["method"] == "wanda" and info["tile"] == TILE
    assert info["weights"][UP]["zeros"] == masks[UP].zeros


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_plain_transformers_loads_the_masked_weights(tmp_path: Path, tied: bool) -> None:
    model, masks = pruned_model(tied)
    save_checkpoint(tmp_path / "out", model, tiny_tokenizer(), masks, info_for(masks))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, linear in prunable_linears(loaded).items():
        assert torch.equal(linear.weight, prunable_linears(model)[name].weight)
        assert not linear.weight[~masks[name].keep()].any()
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("two one").input_ids == [2, 1]


def test_files_are_as_readable_as_the_umask_says(saved: Path) -> None:
    modes = {stat.S_IMODE(file.stat().st_mode) for file in saved.iterdir()}
    assert modes == {stat.S_IMODE(saved.stat().st_mode) & 0o666}


def test_unstructured_has_no_masks(tmp_path: Path) -> None:
    model, masks = pruned_model()
    info = info_for(masks, structure="unstructured")
    save_checkpoint(tmp_path / "out", model, None, {}, info)
    assert load_masks(tmp_path / "out") == {} and load_tile_scores(tmp_path / "out") == {}
    assert not (tmp_path / "out" / MASKS_FILE).exists()
    assert load_info(tmp_path / "out")["zeros"] == info["zeros"]
    rows = audit(tmp_path / "out")
    assert all((row.tiles, row.violating) == (0, 0) for row in rows)
    zeros = sum(row.sparsity * row.shape[0] * row.shape[1] for row in rows)
    assert zeros == pytest.approx(sum(info["zeros"].values()))
    # With a tile shape it is read as a foreign checkpoint is.
    assert sum(row.dense + row.two_four for row in audit(tmp_path / "out", TILE)) == sum(
        mask.dense.numel() for mask in masks.values()
    )


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=50)
def test_nibbles_round_trip(rows: int, groups: int, seed: int) -> None:
    patterns = torch.randint(0, 6, (rows, groups), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = checkpoint._pack_nibbles(patterns)
    assert packed.shape == (rows, (groups + 1) // 2)
    assert int(packed[0, 0]) & 15 == int(patterns[0, 0])
    assert torch.equal(checkpoint._unpack_nibbles(packed, groups), patterns)


def unmask(model: LlamaForCausalLM, masks: Mapping[str, HybridMask]) -> None:
    row, col = (int(i) for i in (~masks[UP].keep()).nonzero()[0])
    with torch.no_grad():
        prunable_linears(model)[UP].weight[row, col] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda m, k, i, s: unmask(m, k), f"{UP}: 1 weights are not zero", id="weight-not-masked"),
        pytest.param(lambda m, k, i, s: k.update(lm_head=k[UP]), "lm_head is not a prunable weight", id="not-prunable"),
        pytest.param(
            lambda m, k, i, s: k.update({UP: k["model.layers.0.mlp.down_proj"]}), f"{UP}: the mask is for", id="shape"
        ),
        pytest.param(lambda m, k, i, s: k.clear(), "there are 0 masks", id="no-masks"),
        pytest.param(lambda m, k, i, s: i.update(structure="unstructured"), "14 masks", id="unstructured-with-masks"),
        pytest.param(lambda m, k, i, s: i.update(files={}), "must not have 'files'", id="reserved-key"),
        pytest.param(lambda m, k, i, s: i["zeros"].update({UP: 800}), "800 elements are said", id="zeros-not-there"),
        pytest.param(lambda m, k, i, s: s.update({UP: torch.rand(1, 1)}), f"{UP}: tile scores are", id="scores-shape"),
        pytest.param(lambda m, k, i, s: s.update(x=torch.rand(1, 1)), "x is not a prunable weight", id="scores-name"),
        pytest.param(
            lambda m, k, i, s: k.update({UP: random_masks(tiny_model(), (4, 4))[UP]}) or apply_masks(m, k),
            "different tile shapes",
            id="two-tile-shapes",
        ),
    ],
)
def test_save_refuses_parts_that_disagree(tmp_path: Path, spoil: Callable[..., Any], message: str) -> None:
    model, masks = pruned_model()
    info = info_for(masks)
    del info["zeros"][UP]
    scores: dict[str, Tensor] = {}
    spoil(model, masks, info, scores)
    with pytest.raises(UserError, match=message):
        save_checkpoint(tmp_path / "out", model, None, masks, info, scores)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_info_that_is_not_json_before_it_writes(tmp_path: Path) -> None:
    model, masks = pruned_model()
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "out", model, None, masks, info_for(masks, mask=masks))
    assert list(tmp_path.iterdir()) == []


def test_save_keeps_what_is_already_there(saved: Path) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    model, masks = pruned_model(tied=False)
    with pytest.raises(UserError, match="already there"):
        save_checkpoint(saved, model, None, masks, info_for(masks))
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), id="python"),
        pytest.param(
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), id="rust"
        ),
    ],
)
@pytest.mark.parametrize("victim", ["weights", "masks"])
def test_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, victim: str
) -> None:
    model, masks = pruned_model()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    if victim == "weights":
        monkeypatch.setattr(model, "save_pretrained", fail)
    else:
        monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(
        UserError, match=r"cannot write .*/out: No space left on device; nothing half-written"
    ) as caught:
        save_checkpoint(tmp_path / "out", model, tiny_tokenizer(), masks, info_for(masks))
    assert "\n" not in str(caught.value)
    assert visible(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, masks = pruned_model()
    with pytest.raises(UserError, match=r"cannot write .*/file/out: (Not a directory|File exists)"):
        save_checkpoint(tmp_path / "file" / "out", model, None, masks, info_for(masks))


def test_other_errors_pass_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "out") as folder:
        (folder / "part").write_text("half")
        raise ZeroDivisionError
    assert visible(tmp_path) == []


def test_a_killed_writer_leaves_no_checkpoint_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    code = f"""
import os, signal
from patch.files import new_directory
with new_directory({str(tmp_path / "out")!r}) as folder:
    (folder / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert all(item.name.startswith(".") for item in tmp_path.iterdir())
    with new_directory(tmp_path / "out") as folder:
        (folder / "whole").write_text("whole")
    assert visible(tmp_path) == ["out"]
    assert visible(tmp_path / "out") == ["whole"]


def test_copy(saved: Path, tmp_path: Path) -> None:
    assert copy_checkpoint(saved, tmp_path / "deep" / "copy") == tmp_path / "deep" / "copy"
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "deep" / "copy").iterdir()
    }
    with pytest.raises(UserError, match="already there"):
        copy_checkpoint(saved, tmp_path / "deep" / "copy")


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda p: flip_last_byte(p / MASKS_FILE), f"{MASKS_FILE}: its SHA-256", id="masks-tampered"),
        pytest.param(lambda p: truncate(p / MASKS_FILE), f"{MASKS_FILE}: .* truncated", id="masks-truncated"),
        pytest.param(lambda p: (p / MASKS_FILE).unlink(), f"{MASKS_FILE}: is missing", id="masks-missing"),
        pytest.param(
            lambda p: truncate(p / "model.safetensors"), "model.safetensors: .* truncated", id="weights-truncated"
        ),
        pytest.param(
            lambda p: (p / "model.safetensors").unlink(), "model.safetensors: is missing", id="weights-missing"
        ),
        pytest.param(lambda p: (p / INFO_FILE).unlink(), f"{INFO_FILE}: is missing", id="info-missing"),
        pytest.param(lambda p: truncate(p / INFO_FILE), f"{INFO_FILE}: cannot be read as JSON", id="info-truncated"),
        pytest.param(lambda p: (p / INFO_FILE).write_text("[]"), f"{INFO_FILE}: holds a list", id="info-not-an-object"),
        pytest.param(
            lambda p: rewrite_json(p, lambda c: c.update(format=4)), "format 4 is newer than 3", id="newer-version"
        ),
        pytest.param(lambda p: rewrite_json(p, lambda c: c.pop("tile")), "'tile' is missing", id="no-tile-key"),
        pytest.param(lambda p: rewrite_json(p, lambda c: c.update(tile=None)), "no tile shape", id="tile-null"),
        pytest.param(
            lambda p: rewrite_json(p, lambda c: c.update(tile=[16, 6])), "multiple of 4", id="tile-cuts-groups"
        ),
        pytest.param(
            lambda p: rewrite_json(p, lambda c: c["weights"].update({UP: {}})), f"{INFO_FILE}: damaged", id="no-shape"
        ),
        pytest.param(
            lambda p: rewrite_json(p, lambda c: c["weights"][UP].update(shape=[40, 24])),
            rf"{MASKS_FILE}: {UP}.patterns is torch.uint8 \(36, 3\), needs torch.uint8 \(40, 3\)",
            id="shape-does-not-fit",
        ),
        pytest.param(
            lambda p: rewrite_json(p, lambda c: c["files"].pop(MASKS_FILE)), "does not know this file", id="no-hash"
        ),
        pytest.param(
            lambda p: rewrite_json(p, lambda c: c["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
            "malformed entry",
            id="path-in-files",
        ),
        pytest.param(
            lambda p: rewrite_tensors(p, MASKS_FILE, lambda t: t.pop(f"{UP}.patterns")),
            f"{MASKS_FILE}: tensor {UP}.patterns is missing",
            id="tensor-missing",
        ),
        pytest.param(
            lambda p: rewrite_tensors(p, MASKS_FILE, lambda t: t[f"{UP}.patterns"].fill_(0x66)),
            f"{MASKS_FILE}: {UP}.patterns: pattern 6 is out of range",
            id="pattern-out-of-range",
        ),
        pytest.param(
            lambda p: rewrite_tensors(p, MASKS_FILE, lambda t: t.update({f"{UP}.dense": torch.ones(3, 2)})),
            rf"{UP}.dense is torch.float32 \(3, 2\), needs torch.bool",
            id="wrong-dtype",
        ),
    ],
)
def test_damage_is_refused_by_name(saved: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(saved)
    with pytest.raises(UserError, match=message) as caught:
        load_masks(saved)
    assert "\n" not in str(caught.value)


def test_tile_scores_that_do_not_fit_are_refused(saved: Path) -> None:
    assert list(load_tile_scores(saved)) == [UP]
    rewrite_tensors(saved, MASKS_FILE, lambda t: t.update({f"{UP}.tile_scores": torch.rand(1, 1)}))
    with pytest.raises(UserError, match=rf"{UP}.tile_scores is torch.float32 \(1, 1\), needs torch.float32 \(3, 2\)"):
        load_tile_scores(saved)


def test_no_directory_and_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such directory"):
        load_masks(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"{INFO_FILE}: is missing"):
        load_masks(tmp_path)


def test_changed_weights_of_the_same_size_need_the_hash(saved: Path) -> None:
    flip_last_byte(saved / "model.safetensors")
    load_info(saved)
    with pytest.raises(UserError, match=r"model.safetensors: its SHA-256"):
        load_info(saved, verify=True)
