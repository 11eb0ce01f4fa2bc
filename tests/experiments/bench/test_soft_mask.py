"""The bench of soft masks: what it says must be moved, and the rows it writes."""

import dataclasses
from pathlib import Path

import pytest
import torch

from analysis.rows.format import SCHEMA, Fact
from analysis.rows.jsonl import from_lines
from experiments.bench import harness, rows, soft_mask
from experiments.bench.harness import Lab, Verified
from experiments.bench.soft_mask import BENCH, MASKS_PART, MODES, STEPS_PART, Bench, bytes_moved, draw


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


def test_rows_are_in_the_format_of_the_store(tmp_path: Path) -> None:
    path = rows.path_of(BENCH, Bench(), MASKS_PART, tmp_path, "NVIDIA H200")
    fact = Fact("time", 7.5, "ms", {"mode": "joint"}, p20=7.4, p80=7.6, runs=11)
    rows.write(BENCH, Bench(), MASKS_PART, [fact], 0.0, path)
    (row,) = from_lines(path.read_text())
    assert path == tmp_path / "bench" / "nvidia-h200" / "soft_mask.jsonl"
    assert row["definition"]["blocks"] == 16 and len(row["trial"]) == 12 and row["schema"] == SCHEMA
    assert (row["metric"], row["value"], row["p20"], row["p80"], row["runs"]) == ("time", 7.5, 7.4, 7.6, 11)
    assert row["provenance"]["git"]


def test_every_mask_is_verified_before_it_is_timed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def verify(case: soft_mask.Case) -> Verified:
        order.append(f"verify {case.mode} {case.logits}")
        return Verified([])

    def time_case(case: soft_mask.Case, verified: Verified, lab: Lab) -> list[Fact]:
        order.append("steps" if case.steps else f"time {case.mode} {case.logits}")
        return []

    bench = dataclasses.replace(BENCH, verify=verify, time=time_case)
    assert [part for part, *_ in harness.measure(bench, Bench(), bench.parts(Bench()), lab)] == [MASKS_PART, STEPS_PART]
    kinds = [("joint", torch.float32), ("joint", torch.bfloat16), *((mode, torch.float32) for mode in MODES[1:])]
    told = [f"{what} {mode} {logits}" for mode, logits in kinds for what in ("verify", "time")]
    assert order == [*told, "verify joint torch.float32", "steps"]
