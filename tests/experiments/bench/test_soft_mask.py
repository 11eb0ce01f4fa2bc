"""The bench of soft masks: what it says must be moved, and the rows it writes."""

from pathlib import Path

import pytest
import torch

from analysis.rows.format import SCHEMA
from analysis.rows.jsonl import from_lines
from experiments.bench import soft_mask
from experiments.bench.soft_mask import Bench, Fact, bytes_moved, draw


@pytest.mark.parametrize(
    ("mode", "logits", "per_group"),
    [
        pytest.param("joint", torch.float32, (24 + 8 + 8) + (24 + 8 + 8 + 24), id="joint-float32"),
        pytest.param("maskllm", torch.bfloat16, (12 + 8 + 8) + (12 + 8 + 8 + 12), id="maskllm-bfloat16"),
        pytest.param("tile", torch.float32, (1 + 8 + 8) + (1 + 8 + 8), id="tile"),
    ],
)
def test_bytes_are_those_of_the_passes(mode: str, logits: torch.dtype, per_group: int) -> None:
    shape, tile = (64, 256), (32, 64)
    tiles = 0 if mode == "maskllm" else 2 * 4 * 3 * logits.itemsize
    held = draw(shape, mode, tile, logits, device="meta")
    assert bytes_moved([held]) == 64 * 64 * per_group + tiles


def test_the_model_is_llama() -> None:
    bench = Bench()
    elements = bench.blocks * sum(rows * cols for _, (rows, cols) in bench.linears)
    assert elements == 973_078_528


def test_rows_are_in_the_format_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    path = soft_mask.write(Bench(), [Fact("time", 7.5, "ms", {"mode": "joint"}, 7.4, 7.6, 11)], tmp_path, 0.0)
    (row,) = from_lines(path.read_text())
    assert path == tmp_path / "bench" / "nvidia-h200" / "relax.jsonl"
    assert row["definition"]["blocks"] == 16 and len(row["trial"]) == 12 and row["schema"] == SCHEMA
    assert (row["metric"], row["value"], row["p20"], row["p80"], row["runs"]) == ("time", 7.5, 7.4, 7.6, 11)
    assert row["provenance"]["git"]
