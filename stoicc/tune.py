"""Measures which configuration is fastest for a shape on this GPU."""

import math
import multiprocessing
import statistics
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from patch.errors import one_line
from patch.mask import HybridMask, best_patterns
from patch.quantise.values import quantise_groups, quantise_weight
from patch.tiles import tile_grid
from stoicc import configs, dense8
from stoicc.configs import Config, Entry, HopperConfig
from stoicc.dispatch import run, run_scaled
from stoicc.format import DTYPES, GROUPED, SCALE_GROUP, HybridWeight, block_columns, pack
from stoicc.quantise import quantise_tokens
from stoicc.timing import Call, time_in_turns

# Weights are rotated so that none is read from the L2 cache, which is at most 60 MB on GPUs with these tensor cores.
BEYOND_L2 = 200e6
SPARSE_SHARE = 0.75
# Expectations are off by 5% (standard deviation over the committed grid), and to run dense costs nothing.
MARGIN = 1.05
# What is left of the speed of FP8 when Hopper's kernels add up in float32, with 64 tokens or more (fewer wait for
# weights): for few tokens 0.82 and for many 0.64 in the geometric mean of the committed grid, the first from 0.58 on.
PROMOTED_FEW, PROMOTED_MANY = 0.75, 0.64


def compile_candidates(device: torch.device, workers: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Compile every configuration that may be measured on this GPU, in parallel, into Triton's cache on disk."""
    capability = configs.capability_of(device)
    wanted = {
        (config, tokens, band)
        for tokens in configs.TOKENS
        for band in (1, 2)
        for config in configs.candidates(tokens, capability, band, dtype)
        if band == 2 or config not in configs.candidates(tokens, capability, 2, dtype)
    }
    ordered = sorted(wanted, key=str)
    processes = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=processes) as pool:
        for _ in pool.map(_compile, [(device, dtype, *ordered[first :: workers * 2]) for first in range(workers * 2)]):
            pass


def _compile(work: tuple[Any, ...]) -> None:
    device, dtype, *wanted = work
    for config, tokens, band in wanted:
        weights = random_weights(device, 512, 512, band, 8192, dtype)
        x = torch.zeros(tokens, 512, device=device, dtype=dtype if dtype in DTYPES else torch.bfloat16)
        _calls(x, weights, config)[0]()


def tune_shape(
    device: torch.device, n: int, k: int, band: int, tokens: int, dtype: torch.dtype = torch.bfloat16
) -> Entry:
    """Measure all candidates for one shape, and keep the fastest for its next use, where there is a place for it."""
    entry = measure_shape(device, n, k, band, tokens, dtype)
    name = torch.cuda.get_device_name(device)
    try:
        configs.remember(configs.measured_table(name), [entry], {"gpu": name, "torch": torch.__version__})
    except OSError as error:
        warnings.warn(
            f"what was measured cannot be kept, and every process measures it again ({one_line(error)}): set HTS_CACHE "
            "to a folder that can be written",
            stacklevel=2,
        )
    return entry


def measure_shape(
    device: torch.device, n: int, k: int, band: int, tokens: int, dtype: torch.dtype = torch.bfloat16
) -> Entry:
    """The fastest of all candidates, on random weights with three quarters of the blocks 2:4, and cuBLAS beside it."""
    # A model may be in the middle of drawing tokens, and its other layers on other GPUs.
    with torch.random.fork_rng([device]), torch.cuda.device(device):
        weights = random_weights(device, n, k, band, tokens, dtype)
        x = torch.randn(tokens, k, device=device, dtype=dtype if dtype in DTYPES else torch.bfloat16)
        dense_time = _time(_dense_calls(x, n, dtype, len(weights)))
        timed: list[tuple[float, Config]] = []
        for config in configs.candidates(tokens, configs.capability_of(device), band, dtype):
            timed.append((_time(_calls(x, weights, config)), config))
    microseconds, config = min(timed, key=lambda pair: pair[0])
    name = configs.table_dtype(dtype)
    return Entry(n, k, band, tokens, config, round(microseconds, 2), round(dense_time, 2), name)


def faster_packed(device: torch.device, hybrid: HybridWeight, tokens: Sequence[int], *, precise: bool = False) -> bool:
    """Whether the tables expect a hybrid weight to beat dense, in the geometric mean over these numbers of tokens.

    Numbers of which nothing is known do not count; if nothing is known of any, whether it has fewer bytes. With
    ``precise`` as `stoicc.linear` adds up.
    """
    name, capability = torch.cuda.get_device_name(device), configs.capability_of(device)
    known = [configs.known(name, *hybrid.shape, hybrid.band, count, capability, hybrid.dtype) for count in tokens]
    speedups = [expected_speedup(entry, hybrid.sparse_share, precise=precise) for entry in known if entry]
    return statistics.geometric_mean(speedups) >= MARGIN if speedups else hybrid.sparse_share > 0


def expected_speedup(entry: Entry, share: float, *, precise: bool = False) -> float:
    """Over dense, of a weight of an entry's shape with another share of its blocks 2:4; FP8 may add up precisely.

    If nothing but bytes counted, which decide with few tokens, time would go by 16 - 7 share; if nothing but
    instructions, by 2 - share. Measured on an H200 it goes by the square root of that: what is left is launches, the
    way of activations, and columns of blocks that are dense for one half of a cluster and 2:4 for the other.
    """
    whole, saved = (16, 7) if entry.tokens <= 64 else (2, 1)
    work = (whole - saved * share) / (whole - saved * SPARSE_SHARE)
    speedup = entry.dense_microseconds / (entry.microseconds * math.sqrt(work))
    promoted = precise and configs.promoting(entry.config) != entry.config
    if not promoted or entry.tokens < 64:
        return speedup
    return speedup * (PROMOTED_MANY if isinstance(entry.config, HopperConfig) else PROMOTED_FEW)


def _time(calls: Sequence[Call]) -> float:
    """Median microseconds of one call."""
    return time_in_turns({"": calls}, rounds=10, flush=False)[""].median


def _calls(x: Tensor, weights: Sequence[HybridWeight], config: Config) -> list[Call]:
    if weights[0].scales is None:
        return [partial(run, x, weight, None, config) for weight in weights]
    values, scales = quantise_tokens(x, weights[0].dtype)
    return [partial(run_scaled, values, scales, weight, None, x.dtype, config) for weight in weights]


def _dense_calls(x: Tensor, n: int, dtype: torch.dtype, copies: int) -> list[Call]:
    """What cuBLAS has for a dense weight of this dtype, on as many weights as are measured packed."""
    if dtype in DTYPES or dtype == GROUPED:
        dense = [torch.randn(n, x.shape[1], device=x.device, dtype=x.dtype) for _ in range(copies)]
        return [partial(dense_linear, x, weight) for weight in dense]
    # cuBLAS takes rows and columns by sixteen; the values of tokens are padded so.
    values, scales = quantise_tokens(x, dtype)
    shape = (n + -n % 16, values.shape[1])
    dense = [torch.randn(shape, device=x.device, dtype=torch.bfloat16) for _ in range(copies)]
    quantised = [quantise_weight(weight, dtype) for weight in dense]
    del dense
    if dtype == torch.int8:
        # cuBLAS wants more than 16 rows of integers, and returns their sums unscaled.
        padded = torch.nn.functional.pad(values, (0, 0, 0, max(0, 17 - len(values))))
        return [partial(torch._int_mm, padded, weight.T) for weight, _ in quantised]
    one = torch.ones((), device=x.device, dtype=torch.float32)
    if configs.capability_of(x.device) < (9, 0):
        # A scale for each token is Hopper's.
        product = partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=x.dtype, use_fast_accum=True)
        return [partial(product, values, weight.T) for weight, _ in quantised]
    # Not compiled: what splitting sums gains there, the quantisation and scaling that are left out here take again.
    return [partial(dense8.product, values, scales, weight, scale, one) for weight, scale in quantised]


def _quantised(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight as `pack` takes it."""
    if dtype in DTYPES:
        return weight.to(dtype), None
    if dtype == GROUPED:
        grouped = quantise_groups(weight, SCALE_GROUP)
        return grouped.values, grouped.scales
    return quantise_weight(weight, dtype)


def random_weights(
    device: torch.device, n: int, k: int, band: int, tokens: int, dtype: torch.dtype = torch.bfloat16
) -> list[HybridWeight]:
    """Copies of a random hybrid weight, enough that none stays in the L2 cache between its turns."""
    tile = (min(n, 64 * band), min(k, block_columns(dtype)))
    grid = tile_grid((n, k), tile)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16, generator=generator) / k**0.5
    dense = torch.rand(grid, device=device, generator=generator) >= SPARSE_SHARE
    patterns = best_patterns(weight.abs())
    values, scales = _quantised(weight, dtype)
    packed = pack(values, HybridMask((n, k), tile, dense, patterns), scales)
    if packed.band != band:  # a single row of tiles is uniform by chance
        packed = pack(values, HybridMask((n, k), tile, dense & False, patterns), scales)
    copies = max(1, min(64, round(BEYOND_L2 / packed.nbytes))) if tokens <= 512 else 1
    return [packed, *(packed.copy() for _ in range(copies - 1))]
