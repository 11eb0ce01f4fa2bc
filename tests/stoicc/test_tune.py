"""What the tuning tables make of a weight that was not measured: whether it should run packed at all."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from analysis.rows.load import records
from analysis.tables.kernels import load_bench
from stoicc import configs, tune
from stoicc.configs import Entry
from stoicc.format import GROUPED
from stoicc.kernels.decode import DecodeConfig
from stoicc.tune import MARGIN, SPARSE_SHARE, expected_speedup

ROOT = Path(__file__).parent.parent.parent
GPUS = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("tokens", [1, 64, 128, 8192])
def test_what_was_measured_is_expected_and_more_two_four_is_faster(tokens: int) -> None:
    entry = Entry(4096, 4096, 2, tokens, DecodeConfig(16, 8, (1, 1, 1), 1, 0), 8.0, 10.0)
    assert expected_speedup(entry, SPARSE_SHARE) == pytest.approx(1.25)
    speedups = [expected_speedup(entry, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert speedups == sorted(speedups)
    assert speedups[-1] / speedups[0] < (16 / 9 if tokens <= 64 else 2)


def test_products_that_add_up_precisely_are_expected_to_gain_only_where_they_do() -> None:
    frame = grid(GPUS[1])
    frame = frame[frame.precision == "fp8_precise"]
    # With a scale for each feature, as what is left dense has.
    dense = frame[frame.implementation == "fp8_precise_rowwise"].set_index(["linear", "tokens"]).value
    table = configs.read_table(configs.committed_table(GPUS[1]))
    gains = []
    for row in records(frame[(frame.implementation == "hybrid") & frame.fallback.isna() & (frame.tile != "64x64")]):
        entry = configs.nearest(table, row.n, row.k, 2, row.tokens, (9, 0), torch.float8_e4m3fn)
        assert entry
        fast, precise = (expected_speedup(entry, 2 * row.sparsity, precise=each) for each in (False, True))
        assert precise == fast if row.tokens < 64 else precise < fast
        if precise >= MARGIN:
            gains.append(dense[row.linear, row.tokens] / row.value)
    assert len(gains) > 100 and min(gains) > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8, GROUPED], ids=str)
def test_dense_of_any_shape_can_be_measured_beside(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "capability_of", lambda device: (9, 0))
    calls = tune._dense_calls(torch.randn(3, 344, dtype=torch.bfloat16), 200, dtype, copies=2)
    assert len(calls) == 2 and all(len(call()) >= 3 for call in calls)


@cache
def grid(gpu: str) -> pd.DataFrame:
    """The times of a GPU's committed grid of kernels."""
    frame = load_bench([ROOT / "results" / "bench" / configs.gpu_slug(gpu)], "kernels")
    return frame[frame.metric == "time"]


def measured(gpu: str) -> Iterator[tuple[dict[str, Any], float, float]]:
    """Cells of a GPU's committed grid that ran packed: the cell, its speedup over cuBLAS, what the table expects.

    Only those that ran as the table says today: of another kernel they tell nothing.
    """
    table = configs.read_table(configs.committed_table(gpu))
    frame = grid(gpu)
    for _, rows in frame.groupby(["model", "linear"]):
        dense = rows[rows.implementation == "cublas"].set_index("tokens").value
        for row in records(rows):
            if row.implementation == "hybrid" and row.precision == "bf16" and not isinstance(row.fallback, str):
                cell: dict[str, Any] = {"n": row.n, "k": row.k, "tokens": row.tokens, "sparsity": row.sparsity}
                cell |= {"tile": [int(side) for side in str(row.tile).split("x")]}
                n, k, tokens = cell["n"], cell["k"], cell["tokens"]
                band = 2 if cell["tile"][0] > 64 else 1
                entry = configs.nearest(table, n, k, band, configs.token_bucket(tokens), (9, 0))
                assert entry
                if configs.config_named(row.kernel, row.config) != entry.config:
                    continue
                yield cell, dense[tokens] / row.value, expected_speedup(entry, 2 * cell["sparsity"])


@pytest.mark.parametrize("gpu", GPUS, ids=configs.gpu_slug)
def test_nothing_measured_that_is_expected_to_be_faster_is_slower_than_dense(gpu: str) -> None:
    chosen = [(cell, speedup) for cell, speedup, expected in measured(gpu) if expected >= MARGIN]
    assert len(chosen) > 500
    assert [cell for cell, speedup in chosen if speedup < 0.95] == []
