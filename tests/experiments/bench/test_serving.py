"""The bench of a server: what it serves, what it asks for, and what becomes rows; vLLM itself is not here."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from analysis.rows.points import Measured
from analysis.tables.kernels import measurements
from experiments.bench import harness, rows, serving
from experiments.bench.harness import Lab
from experiments.bench.serving import BENCH, LOADS, Case, Engine, Load, bench_of, options, write_checkpoints
from experiments.publish.measured import bench_frames, bench_tables
from patch.checkpoint import load_masks
from patch.errors import UserError

LOAD = "latency@8x32+128"


def test_checkpoints_have_masks_and_no_weights(tiny: str, tmp_path: Path) -> None:
    bench = bench_of(tiny, None, 0.45, ["bf16"], [LOAD], 3)
    write_checkpoints(tmp_path, bench, "cpu")
    masks = load_masks(tmp_path / "masked")
    assert len(masks) == 14 and not list(tmp_path.glob("*/*.safetensors"))
    dropped = sum(mask.zeros for mask in masks.values()) / sum(mask.shape[0] * mask.shape[1] for mask in masks.values())
    assert abs(dropped - 0.45) < 0.1
    for name in ("masked", "quantised"):
        config = AutoConfig.from_pretrained(tmp_path / name)
        assert (config.architectures, config.num_hidden_layers) == (["LlamaForCausalLM"], 2)
    weights = config.quantization_config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (4, 128)


def test_the_cache_holds_the_largest_load(tiny: str, tmp_path: Path) -> None:
    bench = bench_of(tiny, None, 0.45, ["bf16"], [LOAD, "throughput@2x200+56"], 3)
    found = options(Case(bench, "bf16", tmp_path, "cuda"), "stoicc")
    assert found["max_num_seqs"] == 8 and found["max_model_len"] >= 256
    # Keys and values of two blocks of 4 heads of 64, in 16 bits.
    assert found["kv_cache_memory_bytes"] >= 8 * 160 * 2 * 2 * 4 * 64 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "llama-9"}, "unknown model"),
        ({"sparsity": 0.6}, "sparsity 0.6: hybrid tiles reach 0 to 0.5"),
        ({"precisions": ["int2"]}, "unknown precision"),
        ({"loads": ["latency@8x32"]}, "load 'latency@8x32': give KIND@SEQUENCESxINPUTS"),
        ({"rounds": 1}, "rounds 1: the spread needs two or more"),
    ],
    ids=["model", "sparsity", "precision", "load", "rounds"],
)
def test_definitions_are_refused_in_one_line(change: Mapping[str, Any], message: str) -> None:
    given = {"model": "llama-2-7b", "blocks": None, "sparsity": 0.45, "precisions": ["bf16"], "loads": [], "rounds": 3}
    assert bench_of(**given).loads == LOADS
    with pytest.raises(UserError, match=message):
        bench_of(**(given | change))


class Pipe:
    """To an engine that takes a given time for a load, and longer the first time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked = seconds, 0

    def send(self, load: Load) -> None:
        assert str(load) == LOAD
        self.asked += 1

    def recv(self) -> float:
        return self.seconds + 9 * (self.asked == 1)


def test_engines_take_turns_and_the_first_round_is_not_counted(
    tiny: str, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def engines(case: Case) -> Iterator[dict[str, Engine]]:
        pipes: dict[str, Any] = {"dense": Pipe(2.0), "hybrid": Pipe(1.6)}
        yield {name: Engine(pipe, 8, 1000, "0.26.0") for name, pipe in pipes.items()}

    monkeypatch.setattr(serving, "engines", engines)
    bench = bench_of(tiny, None, 0.45, ["bf16"], [LOAD], 3)
    ((part, facts, _),) = harness.measure(BENCH, bench, BENCH.parts(bench), lab)
    path = rows.path_of(BENCH, bench, part, tmp_path, "A GPU")
    rows.write(BENCH, bench, part, facts, 0.0, path)
    measured = measurements(path)
    (table,) = bench_tables(measured, bench_frames(measured)).values()
    assert table.rows == (
        (
            tiny, Measured(2), "vllm 0.26.0", "bf16", "latency, 8 x (32 + 128)", "45%",
            Measured(512.0), Measured(640.0), Measured(1.25), Measured(1.25),
        ),
    )  # fmt: skip
