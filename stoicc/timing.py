"""Timing of GPU work: replayed graphs, implementations taken in turns, caches cold, roofs measured alongside."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], Tensor]

# Larger than any L2 cache: written before each run of a large product, exceeded by the rotated weights of a small one.
CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Times of one call over several runs, in the unit that they were measured in."""

    median: float
    p20: float
    p80: float
    runs: int


@dataclass(frozen=True)
class Roof:
    """What the GPU reaches: a large copy in TB/s, read and written, and a large bfloat16 product in TFLOP/s."""

    copy: float
    matmul: float


@dataclass(frozen=True)
class Graph:
    """A captured CUDA graph, and how many calls of the same thing it makes."""

    graph: torch.cuda.CUDAGraph
    calls: int


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A CUDA graph that runs each call once, in order, captured on a stream of its own after a warm-up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def time_in_turns(implementations: Mapping[str, Sequence[Call]], rounds: int, flush: bool) -> dict[str, Timing]:
    """Time implementations of the same thing against each other, in microseconds.

    Args:
        implementations: by name, the calls to run; the time reported is that of one of them. Give several on distinct
            weights where one weight would stay in the L2 cache.
        rounds, flush: as `time_graphs`.
    """
    graphs = {name: Graph(capture(calls), len(calls)) for name, calls in implementations.items()}
    return time_graphs(graphs, rounds, flush)


def time_graphs(
    graphs: Mapping[str, Graph], rounds: int, flush: bool, on_round: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """Time captured implementations of the same thing against each other, in microseconds.

    Each round runs every implementation once, so that a change of clocks or temperature meets all of them. Work is
    queued ahead of the GPU, so host time does not count.

    Args:
        flush: write over the L2 cache before each run.
        on_round: called while the GPU still works on what a round has queued.
    """
    cache = torch.empty(CACHE_BYTES if flush else 0, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    names = list(graphs)
    for number in range(rounds + 2):
        # Another one first each round: whoever follows the pause between rounds meets a cooler GPU.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if flush:
                cache.zero_()
            else:
                torch.cuda._sleep(100_000)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graphs[name].graph.replay()
            end.record()
            events[name].append((start, end))
        on_round()
        torch.cuda.synchronize()
    return {
        name: timing([start.elapsed_time(end) * 1e3 / graphs[name].calls for start, end in pairs[2:]])
        for name, pairs in events.items()
    }


def timing(times: Sequence[float]) -> Timing:
    """Median and percentiles of at least two runs."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[3], len(times))


def measure_roof() -> Roof:
    """The two ceilings, in a second or so."""
    source = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)

    def copy() -> Tensor:
        # A kernel: in a graph, copy_ is a node of the copy engine, which is slower.
        return torch.bitwise_or(source, 0, out=target)

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = time_in_turns({"copy": [copy], "matmul": [lambda: a @ b]}, rounds=10, flush=True)
    return Roof(8 * source.numel() / times["copy"].median / 1e6, 2 * 8192**3 / times["matmul"].median / 1e6)
