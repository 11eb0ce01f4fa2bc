"""What the weights of a model directory tell: where each tensor is, kept shares of tiles."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_learner import tiny_model

from patch.errors import UserError
from patch.layers import prunable_linears
from patch.weights import INDEX, kept_shares, weight_files


@pytest.mark.parametrize("shard", ["../x.safetensors", "..", "", 3, None, ["x"]], ids=repr)
def test_a_shard_is_a_file_of_its_folder(shard: Any, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"")
    index = {"weight_map": {"first": "a.safetensors", "second": shard}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"second is in|is missing"):
        weight_files(folder)


def test_shares_of_each_tile_that_are_not_zero(tmp_path: Path) -> None:
    model = tiny_model()
    linears = prunable_linears(model)
    with torch.no_grad():
        for linear in linears.values():
            linear.weight[:24, :20] = 0
            linear.weight[24, :10] = 0
    model.save_pretrained(tmp_path)
    shares = kept_shares(tmp_path, (24, 20))
    assert shares.keys() == linears.keys()
    for name, linear in linears.items():
        rows, cols = linear.weight.shape
        expected = torch.ones(-(-rows // 24), -(-cols // 20))
        expected[0, 0] = 0
        height = min(24, rows - 24)
        expected[1, 0] = 1 - 10 / (20 * height)
        torch.testing.assert_close(shares[name], expected)
