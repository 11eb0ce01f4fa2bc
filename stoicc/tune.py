"""Measures which configuration is fastest for a shape on this GPU."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from patch.mask import HybridMask, best_patterns, tile_grid
from stoicc import configs
from stoicc.configs import Config, Entry
from stoicc.format import HybridWeight, pack
from stoicc.matmul import run

# Weights are rotated so that none is read from the L2 cache, which is at most 60 MB on GPUs with these tensor cores.
BEYOND_L2 = 200e6
SPARSE_SHARE = 0.75


def tune_shape(device: torch.device, n: int, k: int, band: int, tokens: int) -> Entry:
    """Measure all candidates for one shape, and add the fastest to the user's table."""
    entry = measure_shape(device, n, k, band, tokens)
    name = torch.cuda.get_device_name(device)
    configs.remember(name, [entry], {"gpu": name, "torch": torch.__version__})
    return entry


def measure_shape(device: torch.device, n: int, k: int, band: int, tokens: int) -> Entry:
    """The fastest of all candidates, on random weights with three quarters of the blocks 2:4."""
    weights = random_weights(device, n, k, band, tokens)
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16)
    timed: list[tuple[float, Config]] = []
    for config in configs.candidates(tokens, configs.capability_of(device), band):
        timed.append((time_rotating(_calls(x, weights, config)), config))
    microseconds, config = min(timed, key=lambda pair: pair[0])
    return Entry(n, k, band, tokens, config, round(microseconds, 2))


def _calls(x: Tensor, weights: Sequence[HybridWeight], config: Config) -> list[Callable[[], Tensor]]:
    orders = weights[0].orders()
    return [lambda w=weight: run(x, w, orders, None, config) for weight in weights]


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


def time_rotating(calls: Sequence[Callable[[], Tensor]], repeats: int = 10) -> float:
    """Median microseconds of one call, from replays of a graph that runs each of ``calls`` once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]
