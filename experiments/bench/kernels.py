"""Kernel speed: hybrid weights against dense and 2:4 libraries, side by side in one process.

A *cell* is one product: a linear of a model of the registry (query, key and value fused, gate and up fused), a number
of tokens, a sparsity, a tile shape, and whether the dense tiles are spread evenly or as unevenly as learned maps are.
Every hybrid result is compared with float64 before its time counts.

Rows go to ``<results>/bench/<gpu>/kernels/<model>-<linear>.jsonl``, one file per linear, written when it is complete,
so a bench that was interrupted goes on with the next one.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from experiments.data.models import REGISTRY
from experiments.run.provenance import provenance
from patch.files import write_atomic
from patch.mask import HybridMask, TileShape, best_patterns, tile_grid
from stoicc import configs
from stoicc.dispatch import run
from stoicc.format import HybridWeight, pack
from stoicc.matmul import choose
from stoicc.timing import CACHE_BYTES, Call, Roof, Timing, time_in_turns
from stoicc.tune import faster_packed

SCHEMA = 1
# From here on a product is long enough to be timed alone, with a cold cache.
LONG = 512
CHECKED_TOKENS = 256


@dataclass(frozen=True)
class Linear:
    """One kind of linear of a model, siblings fused: ``n`` output and ``k`` input features."""

    model: str
    name: str
    n: int
    k: int


@dataclass(frozen=True)
class Variant:
    """A hybrid weight to time. ``tiles`` is ``even`` or ``uneven``; both are random, not learned."""

    sparsity: float
    tile: TileShape
    tiles: str


def fused_linears(model: str) -> list[Linear]:
    """The products of one decoder block of a model of the registry."""
    shapes = REGISTRY[model].linear_shapes()
    (q, hidden), (k, _), (gate, _) = shapes["q_proj"], shapes["k_proj"], shapes["gate_proj"]
    return [
        Linear(model, "qkv", q + 2 * k, hidden),
        Linear(model, "o", *shapes["o_proj"]),
        Linear(model, "gate_up", 2 * gate, hidden),
        Linear(model, "down", *shapes["down_proj"]),
    ]


def variants(tiles: Sequence[TileShape], sparsities: Sequence[float]) -> Iterator[Variant]:
    """Even and uneven maps of every sparsity; with no or all tiles 2:4 there is only one map."""
    for tile in tiles:
        for sparsity in sparsities:
            for spread in ("even", "uneven") if 0 < sparsity < 0.5 else ("even",):
                yield Variant(sparsity, tile, spread)


def random_mask(n: int, k: int, variant: Variant, scores: Tensor, generator: torch.Generator) -> HybridMask:
    """A mask at the tile share of ``variant``; uneven maps vary by row and column of tiles like learned ones."""
    tile = (min(variant.tile[0], n), min(variant.tile[1], k))
    rows, cols = tile_grid((n, k), tile)
    device = scores.device
    draw = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
    order = draw(rows, cols)
    if variant.tiles == "uneven":
        order = order + draw(rows, 1) + draw(1, cols)
    dense = torch.ones(rows * cols, dtype=torch.bool, device=device)
    dense[order.flatten().argsort()[: round(2 * variant.sparsity * rows * cols)]] = False
    return HybridMask((n, k), tile, dense.reshape(rows, cols), best_patterns(scores))


def bench_linear(
    linear: Linear,
    tokens: Sequence[int],
    tiles: Sequence[TileShape],
    sparsities: Sequence[float],
    rounds: int,
    compiled: bool,
    on_tokens: Callable[[int], None],
) -> list[dict[str, Any]]:
    """All rows of one linear.

    Args:
        rounds: timed runs of each implementation.
        compiled: also time ``torch.compile`` in max-autotune mode, which takes seconds to compile for each shape.
        on_tokens: called after each number of tokens.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(linear.n, linear.k, device="cuda", dtype=torch.bfloat16, generator=generator) / linear.k**0.5
    packed = {}
    for variant in variants(tiles, sparsities):
        mask = random_mask(linear.n, linear.k, variant, weight.abs(), generator)
        packed[variant] = (pack(weight, mask), mask.apply(weight))
    rows = []
    for count in tokens:
        x = torch.randn(count, linear.k, device="cuda", dtype=torch.bfloat16, generator=generator)
        rows += _bench_tokens(linear, x, weight, packed, list(variants(tiles, sparsities)), rounds, compiled)
        on_tokens(count)
    return rows


def _bench_tokens(
    linear: Linear,
    x: Tensor,
    weight: Tensor,
    packed: dict[Variant, tuple[HybridWeight, Tensor]],
    wanted: list[Variant],
    rounds: int,
    compiled: bool,
) -> list[dict[str, Any]]:
    tokens = x.shape[0]
    long = tokens >= LONG
    copies = 1 if long else max(2, -(-3 * CACHE_BYTES // (2 * weight.numel() * 2)))
    calls: dict[str, Sequence[Call]] = {}
    about: dict[str, dict[str, Any]] = {}
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]
    calls["cublas"] = [partial(dense_linear, x, one) for one in weights]
    if compiled:
        # Otherwise the ninth shape of the one function would meet dynamo's limit, and run uncompiled without a word.
        torch.compiler.reset()
        best = torch.compile(dense_linear, mode="max-autotune-no-cudagraphs", dynamic=False)
        calls["compiled"] = [partial(best, x, one) for one in weights]
    rows: list[dict[str, Any]] = []
    half = next((v for v in wanted if v.sparsity == 0.5), None)
    if half:
        for name, make in (("cusparselt", _cusparselt), ("semi_structured", _semi_structured)):
            try:
                calls[name] = make(x, packed[half][1], copies)
                about[name] = {"error": _errors(x, packed[half][1], calls[name][0]())[0]}
            except (RuntimeError, NotImplementedError, ValueError, AssertionError) as failure:
                rows.append(
                    _row(linear, tokens, name, half, None, {"status": f"failed: {str(failure).splitlines()[0]}"})
                )
    for variant in wanted:
        name = f"{variant}"
        hybrid, masked = packed[variant]
        config = choose(x.device, linear.n, linear.k, hybrid.band, configs.token_bucket(tokens))
        about[name] = {"kernel": configs.kernel_name(config), "config": asdict(config), "bytes": hybrid.nbytes}
        if not faster_packed(x.device, hybrid, [tokens]):
            calls[name], about[name]["fallback"] = calls["cublas"], "predicted slower than dense"
            continue
        own = max(copies, 1 if long else -(-3 * CACHE_BYTES // (2 * hybrid.nbytes)))
        held = [hybrid, *(hybrid.copy() for _ in range(own - 1))]
        calls[name] = [partial(run, x, one, None, config) for one in held]
        error, cublas = _errors(x, masked, run(x, hybrid, None, config))
        about[name] |= {"error": error, "cublas_error": cublas, "status": "ok" if error <= 1.1 * cublas else "wrong"}
    times = time_in_turns(calls, rounds, flush=long)
    for name in ("cublas", "compiled"):
        if name in times:
            rows.append(_row(linear, tokens, name, None, times[name], {}))
    for name in ("cusparselt", "semi_structured"):
        if name in times:
            rows.append(_row(linear, tokens, name, half, times[name], about[name]))
    return rows + [_row(linear, tokens, "hybrid", v, times[f"{v}"], about[f"{v}"]) for v in wanted]


def _row(
    linear: Linear,
    tokens: int,
    implementation: str,
    variant: Variant | None,
    timing: Timing | None,
    more: dict[str, Any],
) -> dict[str, Any]:
    cell = {"model": linear.model, "linear": linear.name, "n": linear.n, "k": linear.k, "tokens": tokens}
    if variant:
        cell |= {"sparsity": variant.sparsity, "tile": list(variant.tile), "tiles": variant.tiles}
    measured = (
        {
            "value": round(timing.median, 3),
            "p20": round(timing.p20, 3),
            "p80": round(timing.p80, 3),
            "runs": timing.runs,
        }
        if timing
        else {"value": None}
    )
    return {"metric": "time", "unit": "us", "cell": cell, "implementation": implementation, **measured} | more


def _errors(x: Tensor, masked: Tensor, y: Tensor) -> tuple[float, float]:
    """Relative errors against float64 of ``y`` and of cuBLAS, over at most ``CHECKED_TOKENS`` evenly spaced tokens."""
    some = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], CHECKED_TOKENS), device=x.device).long()
    exact = x[some].double() @ masked.double().T
    return tuple(  # type: ignore[return-value]
        float((value[some].double() - exact).norm() / exact.norm()) for value in (y, dense_linear(x, masked))
    )


def _cusparselt(x: Tensor, masked: Tensor, copies: int) -> list[Call]:
    """cuSPARSELt with its own search for the fastest algorithm; it needs at least eight tokens."""
    padded = torch.cat([x, x.new_zeros(-len(x) % 16, x.shape[1])]).T
    held = [torch._cslt_compress(masked) for _ in range(copies)]
    algorithm = torch._cslt_sparse_mm_search(held[0], padded, transpose_result=True)

    def multiply(weight: Tensor) -> Tensor:
        return torch._cslt_sparse_mm(weight, padded, transpose_result=True, alg_id=int(algorithm))[: len(x)]

    return [partial(multiply, one) for one in held]


def _semi_structured(x: Tensor, masked: Tensor, copies: int) -> list[Call]:
    """What a user of ``torch.sparse`` gets."""
    held = [torch.sparse.to_sparse_semi_structured(masked.clone()) for _ in range(copies)]
    calls: list[Call] = [partial(dense_linear, x, one) for one in held]
    calls[0]()
    return calls


def bench_file(results: Path, gpu: str, linear: Linear) -> Path:
    return results / "bench" / configs.gpu_slug(gpu) / "kernels" / f"{linear.model}-{linear.name}.jsonl"


def write_rows(path: Path, rows: Sequence[dict[str, Any]], roof: Roof, started: float) -> None:
    """One file of a bench: a first line that says where its rows come from, then the rows."""
    header = {"schema": SCHEMA, "roof": asdict(roof), "provenance": provenance(time.time() - started)}
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in (header, *rows)))
