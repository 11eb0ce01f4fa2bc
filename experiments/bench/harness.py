"""How everything is timed: a bench makes cases, each is verified, what is right is timed, and all becomes rows.

A *case* is one thing that several *entries* do, each in its own way: a product of a linear with so many tokens, a pass
of a model. Entries of a case are timed in turns in one process. An entry whose result is wrong, or that fails, leaves
a row that says so and is not timed. Benches that measure something else than cases (`Bench`) go through the same
`measure`, and all write the same rows (`experiments.run.store.as_rows`).

Facts of a case: ``error`` (relative, against float64 where nothing else is said; labels ``bound`` and ``status``),
``time`` in microseconds (labels ``clock`` in MHz and ``power`` in W, as they were meanwhile), ``energy`` in J a token
where the case says how many tokens it has, and what entries add.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from analysis.rows.format import Fact
from experiments.bench import power
from experiments.bench.power import Steady
from experiments.run.provenance import revision
from experiments.studies.trial import key
from patch.errors import one_line
from stoicc import timing
from stoicc.timing import Call, Graph, Timing

Labels = dict[str, Any]
# Settings of torch.compile's kernels: they begin while the one before them ends, as those of packed weights do.
BEGIN_EARLY: dict[str, Any] = {"triton.enable_pdl": True}
# For how long an entry works while its energy is counted.
SECONDS = 1.0


@dataclass(frozen=True)
class Ready:
    """An entry that can run.

    Attributes:
        calls: the same work on distinct weights, where one weight would stay in the L2 cache; else a single one.
        check: the relative error of what the first call returns, and how large it may be.
        labels: what is known once it is ready, such as the kernel that was chosen.
        facts: measured meanwhile, such as memory.
    """

    calls: Sequence[Call]
    check: Callable[[Tensor], tuple[float, float]]
    labels: Labels = field(default_factory=dict)
    facts: Sequence[Fact] = ()


@dataclass(frozen=True)
class Entry:
    """One way to do what a case is about.

    Attributes:
        labels: of its rows: ``implementation``, ``precision``, and what tells it from others of the case.
        prepare: makes it ready, or raises where it cannot run.
    """

    labels: Labels
    prepare: Callable[[], Ready]

    @property
    def name(self) -> str:
        return json.dumps(self.labels)


@dataclass(frozen=True)
class Case:
    """What is timed together.

    Attributes:
        labels: of all rows.
        rounds: timed runs of each entry.
        flush: write over the L2 cache before each run.
        tokens: of one run, where energy is wanted.
    """

    labels: Labels
    entries: Sequence[Entry]
    rounds: int
    flush: bool
    tokens: int = 0


@dataclass(frozen=True)
class Reading:
    """What was read of an entry while it was timed."""

    time: Timing
    clock: float | None = None
    power: float | None = None
    steady: Steady | None = None


Measure = Callable[[Mapping[str, Sequence[Call]], int, bool, float], dict[str, Reading]]


def read_gpu(calls: Mapping[str, Sequence[Call]], rounds: int, flush: bool, seconds: float) -> dict[str, Reading]:
    """Time calls in turns, and then each alone for so many seconds while its energy is counted; none for zero."""
    graphs = {name: Graph(timing.capture(several), len(several)) for name, several in calls.items()}
    gpu = power.meter(torch.device("cuda", torch.cuda.current_device()))
    seen: list[tuple[float | None, float | None]] = []
    times = timing.time_graphs(graphs, rounds, flush, lambda: seen.append((gpu.clock(), gpu.power())))
    clock, watts = (_middle([value for value in values if value is not None]) for values in zip(*seen, strict=True))
    found = {name: Reading(spread, clock, watts) for name, spread in times.items()}
    if seconds:
        for name, graph in graphs.items():
            one_replay = times[name].median * graph.calls
            alone = power.steady(graph.graph.replay, power.recorded, one_replay, seconds, gpu)
            if alone:
                alone = Steady(alone.energy / graph.calls, alone.power, alone.clock)
                found[name] = Reading(times[name], alone.clock, alone.power, alone)
    return found


def _middle(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _roof() -> Mapping[str, float]:
    return asdict(timing.measure_roof())


@dataclass(frozen=True)
class Lab:
    """Where and how cases are timed; tests put a made-up clock here.

    Attributes:
        device: a torch device name.
        measure: as `read_gpu`.
        roof: what the GPU reaches, as `stoicc.timing.Roof`.
        progress: called with (label, done, total) as work goes on.
    """

    device: str
    measure: Measure = read_gpu
    roof: Callable[[], Mapping[str, float]] = _roof
    progress: Callable[[str, int, int], None] = lambda *_: None


@dataclass(frozen=True)
class Verified:
    """What verification left: facts, and of each entry that was right what is to be timed, by its name."""

    facts: Sequence[Fact]
    ready: Mapping[str, Ready] = field(default_factory=dict)


def verify(case: Case) -> Verified:
    """Run every entry of a case once, and compare what it returns."""
    facts: list[Fact] = []
    ready: dict[str, Ready] = {}
    for entry in case.entries:
        about = case.labels | entry.labels
        try:
            made = entry.prepare()
            error, bound = made.check(made.calls[0]())
        except (RuntimeError, NotImplementedError, ValueError, AssertionError) as failure:
            # Libraries refuse shapes, and GPUs instructions: the others are timed without it.
            facts.append(Fact("error", None, "1", about | {"status": f"failed: {one_line(failure)[:200]}"}))
            continue
        right = error <= bound
        facts.append(Fact("error", error, "1", about | {"bound": bound, "status": "ok" if right else "wrong"}))
        if right:
            ready[entry.name] = made
    return Verified(facts, ready)


def time_case(case: Case, verified: Verified, lab: Lab) -> list[Fact]:
    """Time in turns what was right."""
    ready = verified.ready
    if not ready:
        return []
    found = lab.measure(
        {name: made.calls for name, made in ready.items()}, case.rounds, case.flush, SECONDS if case.tokens else 0.0
    )
    facts: list[Fact] = []
    for entry in case.entries:
        if entry.name not in ready:
            continue
        reading = found[entry.name]
        spread = reading.time
        about = case.labels | entry.labels | ready[entry.name].labels
        told = about | {"clock": reading.clock, "power": reading.power and round(reading.power, 1)}
        p20, p80 = round(spread.p20, 3), round(spread.p80, 3)
        facts.append(Fact("time", round(spread.median, 3), "us", told, p20=p20, p80=p80, runs=spread.runs))
        if reading.steady and case.tokens:
            facts.append(Fact("energy", float(f"{reading.steady.energy / case.tokens:.5g}"), "J/token", about))
        facts += (replace(fact, labels=about | fact.labels) for fact in ready[entry.name].facts)
    return facts


@dataclass(frozen=True)
class Bench:
    """Something that can be timed.

    Attributes:
        title: in a few words.
        parts: of a definition: names of what is measured, and written, one after the other.
        cases: of some parts, in their order: the part, and what there is to measure of it.
        file: where the rows of a definition and part go, below ``<results>/bench/<gpu>``.
        verify: raises, or leaves out, what is wrong.
        time: times what is right.
        identity: the hash that names a definition in its rows.
        roof: add what the GPU reaches to each part.
    """

    title: str
    parts: Callable[[Any], Sequence[str]]
    cases: Callable[[Any, Sequence[str], Lab], Iterator[tuple[str, Iterator[Any]]]]
    file: Callable[[Any, str], str]
    verify: Callable[[Any], Verified] = verify
    time: Callable[[Any, Verified, Lab], list[Fact]] = time_case
    identity: Callable[[Any], str] = key
    roof: bool = True


def measure(bench: Bench, wanted: Any, parts: Sequence[str], lab: Lab) -> Iterator[tuple[str, list[Fact], float]]:
    """Measure some parts of a definition: each with its facts and the seconds that it took."""
    # What names no commit is refused before anything is measured.
    revision()
    started = time.monotonic()
    for part, cases in bench.cases(wanted, parts, lab):
        facts: list[Fact] = []
        for case in cases:
            verified = bench.verify(case)
            facts += [*verified.facts, *bench.time(case, verified, lab)]
            # What they hold is given back before the next is prepared.
            del case, verified
        if bench.roof:
            units = {"copy": "TB/s", "matmul": "TFLOP/s"}
            facts += (Fact(f"{name}_roof", value, units[name], {}) for name, value in lab.roof().items())
        yield part, facts, time.monotonic() - started
        started = time.monotonic()
