"""What an audit finds in checkpoints of ours and of others, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import TILE, UP, pruned_model, save_tiny, tiny_model, truncate

from patch.audit import audit
from patch.errors import UserError
from patch.layers import prunable_linears


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A complete hybrid checkpoint with tile scores for one weight."""
    return save_tiny(tmp_path / "saved")


def test_audit_counts_what_was_saved(saved: Path) -> None:
    _, masks = pruned_model()
    rows = {row.layer: row for row in audit(saved)}
    assert list(rows) == list(masks)
    for name, mask in masks.items():
        row = rows[name]
        assert row.shape == mask.shape
        assert (row.tiles, row.dense, row.violating) == (mask.dense.numel(), int(mask.dense.sum()), 0)
        assert row.two_four == int((~mask.dense).sum())
        assert row.sparsity == pytest.approx(mask.sparsity)


def test_audit_finds_weights_that_the_mask_drops(saved: Path) -> None:
    _, masks = pruned_model()
    tensors = load_file(saved / "model.safetensors")
    sparse = [tuple(tile) for tile in (~masks[UP].dense).nonzero().tolist()]
    for row, col in sparse[:2]:
        tensors[f"{UP}.weight"][row * 16, col * 16 : col * 16 + 4] = 1.0
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    found = {row.layer: row.violating for row in audit(saved) if row.violating}
    assert found == {UP: 2}


def test_audit_notices_other_weights_under_the_same_mask(saved: Path) -> None:
    _, masks = pruned_model()
    tensors = load_file(saved / "model.safetensors")
    row, col = (int(i) for i in masks[UP].keep().nonzero()[0])
    tensors[f"{UP}.weight"][row, col] += 1
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.safetensors: its SHA-256"):
        audit(saved)


def test_audit_takes_its_own_tile_only(saved: Path) -> None:
    assert audit(saved, TILE) == audit(saved)
    with pytest.raises(UserError, match="tiles are 16x16, not 8x8"):
        audit(saved, (8, 8))


@pytest.mark.parametrize("shards", [1, 3], ids=["one-file", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_audit_reads_foreign_zeros(tmp_path: Path, shards: int, tied: bool) -> None:
    model, masks = pruned_model(tied)
    # One tile that is neither dense nor 2:4: half zeros, in whole groups.
    row, col = (int(i) for i in masks[UP].dense.nonzero()[0])
    with torch.no_grad():
        tile = prunable_linears(model)[UP].weight[row * 16 : row * 16 + 16, col * 16 : col * 16 + 16]
        tile[: tile.shape[0] // 2] = 0
    size = sum(p.numel() * 4 for p in model.parameters()) // shards + 1
    model.save_pretrained(tmp_path / "foreign", max_shard_size=size if shards > 1 else "5GB")
    assert (len(list((tmp_path / "foreign").glob("*.safetensors"))) > 1) == (shards > 1)
    rows = {row.layer: row for row in audit(tmp_path / "foreign", TILE)}
    assert list(rows) == list(masks)
    for name, mask in masks.items():
        bad = int(name == UP)
        counts = (rows[name].dense, rows[name].two_four, rows[name].violating)
        assert counts == (int(mask.dense.sum()) - bad, int((~mask.dense).sum()), bad)


@pytest.mark.parametrize(
    ("spoil", "tile", "message"),
    [
        pytest.param(lambda p: None, None, "give one, such as `--tile 128x128`", id="no-tile"),
        pytest.param(
            lambda p: None, (64, 64), "self_attn.q_proj: tile 64x64 is larger than the weight", id="large-tile"
        ),
        pytest.param(
            lambda p: truncate(p / "model.safetensors"),
            TILE,
            "model.safetensors: .*(large|incomplete|buffer)",
            id="cut",
        ),
        pytest.param(lambda p: (p / "config.json").unlink(), TILE, "config.json: is missing", id="no-config"),
        pytest.param(lambda p: truncate(p / "config.json"), TILE, "config.json: not a causal", id="bad-config"),
        pytest.param(
            lambda p: save_file({"a": torch.ones(1)}, p / "model.safetensors"),
            TILE,
            "tensor model.layers.0.self_attn.q_proj.weight is missing",
            id="other-tensors",
        ),
        pytest.param(
            lambda p: (p / "model.safetensors").unlink(), TILE, "model.safetensors: is missing", id="no-weights"
        ),
        pytest.param(
            lambda p: (p / "config.json").write_text(
                (p / "config.json").read_text().replace("{", '{"quantization_config": {"quant_method": "fp8"},', 1)
            ),
            TILE,
            "quantised .quantization_config: fp8",
            id="quantised",
        ),
        pytest.param(
            lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}'),
            TILE,
            "gone.safetensors: is missing",
            id="shard-missing",
        ),
    ],
)
def test_audit_of_a_bad_foreign_checkpoint(
    tmp_path: Path, spoil: Callable[[Path], Any], tile: tuple[int, int] | None, message: str
) -> None:
    tiny_model().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        audit(tmp_path, tile)
    assert "\n" not in str(caught.value)
