"""Measures which configuration is fastest for a shape on this GPU."""

import math
import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from patch.mask import HybridMask, best_patterns, tile_grid
from stoicc import configs
from stoicc.configs import Config, Entry
from stoicc.dispatch import run
from stoicc.format import HybridWeight, pack
from stoicc.timing import Call, time_in_turns

# Weights are rotated so that none is read from the L2 cache, which is at most 60 MB on GPUs with these tensor cores.
BEYOND_L2 = 200e6
SPARSE_SHARE = 0.75
# Expectations are off by 5% (standard deviation over the committed grid), and to run dense costs nothing.
MARGIN = 1.05


def compile_candidates(device: torch.device, workers: int) -> None:
    """Compile every configuration that may be measured on this GPU, in parallel, into Triton's cache on disk."""
    capability = configs.capability_of(device)
    wanted = {
        (config, tokens, band)
        for tokens in configs.TOKENS
        for band in (1, 2)
        for config in configs.candidates(tokens, capability, band)
        if band == 2 or config not in configs.candidates(tokens, capability, 2)
    }
    ordered = sorted(wanted, key=str)
    processes = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=processes) as pool:
        for _ in pool.map(_compile, [(device, *ordered[first :: workers * 2]) for first in range(workers * 2)]):
            pass


def _compile(work: tuple[Any, ...]) -> None:
    device, *wanted = work
    for config, tokens, band in wanted:
        hybrid = random_weights(device, 512, 512, band, tokens=8192)[0]
        run(torch.zeros(tokens, 512, device=device, dtype=torch.bfloat16), hybrid, None, config)


def tune_shape(device: torch.device, n: int, k: int, band: int, tokens: int) -> Entry:
    """Measure all candidates for one shape, and add the fastest to the user's table."""
    entry = measure_shape(device, n, k, band, tokens)
    name = torch.cuda.get_device_name(device)
    configs.remember(configs.user_table(name), [entry], {"gpu": name, "torch": torch.__version__})
    return entry


def measure_shape(device: torch.device, n: int, k: int, band: int, tokens: int) -> Entry:
    """The fastest of all candidates, on random weights with three quarters of the blocks 2:4, and cuBLAS beside it."""
    weights = random_weights(device, n, k, band, tokens)
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16)
    dense = [torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in weights]
    dense_time = _time([partial(dense_linear, x, weight) for weight in dense])
    del dense
    timed: list[tuple[float, Config]] = []
    for config in configs.candidates(tokens, configs.capability_of(device), band):
        timed.append((_time(_calls(x, weights, config)), config))
    microseconds, config = min(timed, key=lambda pair: pair[0])
    return Entry(n, k, band, tokens, config, round(microseconds, 2), round(dense_time, 2))


def faster_packed(device: torch.device, hybrid: HybridWeight, tokens: Sequence[int]) -> bool:
    """Whether the tables expect a hybrid weight to beat dense, in the geometric mean over these numbers of tokens.

    If nothing is known of the GPU, whether it has fewer bytes.
    """
    name, capability = torch.cuda.get_device_name(device), configs.capability_of(device)
    known = [configs.nearest(configs.tables(name), *hybrid.shape, hybrid.band, count, capability) for count in tokens]
    speedups = [expected_speedup(entry, hybrid.sparse_share) for entry in known if entry]
    return statistics.geometric_mean(speedups) >= MARGIN if speedups else hybrid.sparse_share > 0


def expected_speedup(entry: Entry, share: float) -> float:
    """Over dense, of a weight of an entry's shape with another share of its blocks 2:4.

    If nothing but bytes counted, which decide with few tokens, time would go by 16 - 7 share; if nothing but
    instructions, by 2 - share. Measured on an H200 it goes by the square root of that: what is left is launches, the
    way of activations, and columns of blocks that are dense for one half of a cluster and 2:4 for the other.
    """
    whole, saved = (16, 7) if entry.tokens <= 64 else (2, 1)
    work = (whole - saved * share) / (whole - saved * SPARSE_SHARE)
    return entry.dense_microseconds / (entry.microseconds * math.sqrt(work))


def _time(calls: Sequence[Call]) -> float:
    """Median microseconds of one call."""
    return time_in_turns({"": calls}, rounds=10, flush=False)[""].median


def _calls(x: Tensor, weights: Sequence[HybridWeight], config: Config) -> list[Call]:
    return [partial(run, x, weight, None, config) for weight in weights]


def random_weights(device: torch.device, n: int, k: int, band: int, tokens: int) -> list[HybridWeight]:
    """Copies of a random hybrid weight, enough that none stays in the L2 cache between its turns."""
    tile = (min(n, 64 * band), min(k, 64))
    grid = tile_grid((n, k), tile)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16, generator=generator) / k**0.5
    dense = torch.rand(grid, device=device, generator=generator) >= SPARSE_SHARE
    packed = pack(weight, HybridMask((n, k), tile, dense, best_patterns(weight.abs())))
    if packed.band != band:  # a single row of tiles is uniform by chance
        packed = pack(weight, HybridMask((n, k), tile, dense & False, best_patterns(weight.abs())))
    copies = max(1, min(64, round(BEYOND_L2 / packed.nbytes))) if tokens <= 512 else 1
    return [packed, *(packed.copy() for _ in range(copies - 1))]
