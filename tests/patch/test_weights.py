"""What the weights of a model directory tell: kept shares of tiles."""

from pathlib import Path

import torch
from tiny_learner import tiny_model

from patch.layers import prunable_linears
from patch.weights import kept_shares


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
