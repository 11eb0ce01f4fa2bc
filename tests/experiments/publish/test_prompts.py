"""How certain speedups with prompts are, as a table."""

from typing import Any

import pandas as pd

from analysis.tables.render import shown_cells
from experiments.publish.prompts import table


def rows(stage: str, implementation: str, turns: float, alone: float, **more: Any) -> list[dict[str, Any]]:
    """The time of a pass in turns, and its joules a token at 500 W; both times in milliseconds."""
    of = {"model": "llama-2-7b", "kind": "prefill", "batch": 8.0, "length": 2048.0, "precision": "fp8"} | more
    of |= {"stage": f"model:{stage}", "implementation": implementation, "power": 500.0}
    energy = {"metric": "energy", "value": 500.0 * alone / 1e3 / (8 * 2048)}
    return [of | {"metric": "time", "value": turns * 1e3}, of | energy]


def test_speedups_with_prompts_are_told_in_three_ways() -> None:
    frame = pd.DataFrame(
        [
            # Neither decoding nor another model nor separate projections nor another precision is meant.
            *rows("dense", "fp8_tensorwise", 1.0, 1.0, kind="decode"),
            *rows("dense", "fp8_tensorwise", 1.0, 1.0, model="llama-3.1-8b"),
            *rows("dense", "dense", 1.0, 1.0, precision="bf16"),
            *rows("dense", "fused", 290.0, 300.0, precision="bf16"),
            *rows("25%", "fused", 300.0, 300.0, precision="bf16"),
            *rows("25%", "hybrid", 250.0, 240.0, precision="bf16", sparsity=0.25),
            *rows("dense", "fp8_rowwise", 220.0, 220.0),
            *rows("dense", "fp8_tensorwise", 190.0, 190.0),
            *rows("25%", "fp8_rowwise", 230.0, 230.0),
            *rows("25%", "fp8_tensorwise", 200.0, 210.0),
            *rows("25%", "hybrid", 200.0, 175.0, sparsity=0.25),
            *rows("45%", "fp8_tensorwise", 204.0, 208.0),
            *rows("45%", "hybrid", 170.0, 160.0, sparsity=0.45),
        ]
    )
    work = "Prefill, 8 x 2048 tokens"
    assert shown_cells(table(frame)) == [
        [work, "bfloat16", "in turns", "1.20", "—"],
        [work, "bfloat16", "each alone", "1.25", "—"],
        [work, "bfloat16", "dense among dense", "1.16", "—"],
        [work, "FP8", "in turns", "1.00", "1.20"],
        [work, "FP8", "each alone", "1.20", "1.30"],
        [work, "FP8", "dense among dense", "0.95", "1.12"],
    ]
