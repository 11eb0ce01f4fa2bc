"""What of a step of decoding is not its products, as a table."""

from typing import Any

import pandas as pd

from analysis.tables.render import shown_cells
from experiments.publish.steps import table

PACKED = {"implementation": "hybrid", "sparsity": 0.45, "tile": "128x128", "tiles": "uneven"}


def rows(of: dict[str, Any], *implementations: tuple[dict[str, Any], str, float]) -> list[dict[str, Any]]:
    plain = {"metric": "time", "model": "llama-2-7b"} | of
    return [plain | about | {"precision": precision, "value": value} for about, precision, value in implementations]


def test_the_rest_of_a_step_is_what_its_products_do_not_take() -> None:
    products = [
        row
        for linear in ("qkv", "o", "gate_up", "down")
        for row in rows(
            {"tokens": 1, "linear": linear},
            ({"implementation": "cublas"}, "bf16", 40.0),
            (PACKED, "bf16", 25.0),
            ({"implementation": "fp8_tensorwise"}, "fp8", 20.0),
            (PACKED, "fp8", 15.0),
            # Other maps and tiles, which whole models do not have.
            (PACKED | {"tiles": "even"}, "fp8", 1.0),
            (PACKED | {"tile": "64x64"}, "fp8", 1.0),
        )
    ]
    steps = rows(
        {"kind": "decode", "batch": 1},
        # The dense model is timed beside each sparsity.
        ({"implementation": "fused"}, "bf16", 5900.0),
        ({"implementation": "fused"}, "bf16", 6120.0),
        ({"implementation": "fused"}, "bf16", 6200.0),
        (PACKED, "bf16", 4200.0),
        ({"implementation": "fp8_tensorwise"}, "fp8", 3560.0),
        (PACKED, "fp8", 2920.0),
    )
    assert shown_cells(table(pd.DataFrame(products), pd.DataFrame(steps))) == [
        ["1", "dense, bfloat16", "6.12", "5.12", "1.00"],
        ["1", "45%, bfloat16", "4.20", "3.20", "1.00"],
        ["1", "dense, FP8", "3.56", "2.56", "1.00"],
        ["1", "45%, FP8", "2.92", "1.92", "1.00"],
    ]
