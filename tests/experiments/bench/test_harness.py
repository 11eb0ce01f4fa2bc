"""The harness of all benches: what is wrong is not timed, what is timed becomes rows, and rows are found again."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.rows.format import Fact
from analysis.rows.jsonl import from_lines
from experiments.bench import harness, power, rows
from experiments.bench.harness import Bench, Case, Entry, Lab, Ready
from experiments.bench.power import Meter
from patch.errors import UserError


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The definition of a bench."""

    sizes: tuple[int, ...] = (1, 2)


def entry(name: str, value: float = 1.0) -> Entry:
    """One whose result is right if it is one."""

    def prepare() -> Ready:
        if name == "broken":
            raise NotImplementedError("no such\ninstruction")
        call = lambda: torch.tensor(value)  # noqa: E731
        return Ready([call], lambda y: (abs(float(y) - 1), 0.1), {"kernel": name}, [Fact("peak_memory", 8, "B", {})])

    return Entry({"implementation": name}, prepare)


def cases(wanted: Wanted, parts: Any, lab: Lab) -> Iterator[tuple[str, Iterator[Case]]]:
    for part in parts:
        entries = [entry("right"), entry("wrong", 2.0), entry("broken"), entry("close", 1.05)]
        yield part, iter([Case({"part": part}, entries, rounds=5, flush=False, tokens=4)])


BENCH = Bench("numbers", lambda wanted: [f"numbers:{size}" for size in wanted.sizes], cases, lambda *_: "numbers.jsonl")


def measured(lab: Lab, wanted: Wanted = Wanted()) -> dict[str, list[Fact]]:
    return {part: facts for part, facts, _ in harness.measure(BENCH, wanted, BENCH.parts(wanted), lab)}


def test_only_what_is_right_is_timed(lab: Lab) -> None:
    facts = measured(lab)["numbers:1"]
    status = {fact.labels["implementation"]: fact.labels["status"] for fact in facts if fact.metric == "error"}
    assert status == {
        "right": "ok",
        "wrong": "wrong",
        "broken": "failed: no such instruction",
        "close": "ok",
    }
    times = {fact.labels["implementation"]: fact for fact in facts if fact.metric == "time"}
    assert set(times) == {"right", "close"}
    assert (times["close"].value, times["close"].p20, times["close"].runs) == (2.0, 1.9, 5)
    assert times["close"].labels | {"clock": 1980.0, "power": 650.0, "kernel": "close"} == times["close"].labels


def test_energy_is_of_a_token_and_roofs_stand_beside(lab: Lab) -> None:
    facts = measured(lab)["numbers:2"]
    energy = [fact for fact in facts if fact.metric == "energy"]
    assert [(fact.value, fact.unit) for fact in energy] == [(0.125, "J/token")] * 2
    assert [fact.value for fact in facts if fact.metric == "peak_memory"] == [8, 8]
    assert {fact.metric: fact.value for fact in facts[-2:]} == {"copy_roof": 4.0, "matmul_roof": 700.0}


def test_a_case_of_which_nothing_is_right_is_not_timed(lab: Lab) -> None:
    case = Case({}, [entry("wrong", 3.0)], rounds=5, flush=False)
    assert harness.time_case(case, harness.verify(case), lab) == []


def test_rows_of_parts_share_a_file_and_are_measured_once(lab: Lab, tmp_path: Path) -> None:
    wanted = Wanted()
    assert rows.missing(BENCH, wanted, tmp_path, "A GPU") == ["numbers:1", "numbers:2"]
    for part, facts in measured(lab).items():
        path = rows.path_of(BENCH, wanted, part, tmp_path, "A GPU")
        rows.write(BENCH, wanted, part, facts, 1.5, path)
    assert path == tmp_path / "bench" / "a-gpu" / "numbers.jsonl"
    found = from_lines(path.read_text())
    assert {row["stage"] for row in found} == {"numbers:1", "numbers:2"}
    assert {row["definition"]["sizes"][1] for row in found} == {2} and found[0]["provenance"]["wall_s"] == 1.5
    assert rows.missing(BENCH, wanted, tmp_path, "A GPU") == []
    assert rows.missing(BENCH, Wanted((1, 2, 3)), tmp_path, "A GPU") == [], "what is there is not replaced unasked"
    rows.write(BENCH, wanted, "numbers:1", [Fact("time", 3.0, "us", {})], 0.0, path)
    again = from_lines(path.read_text())
    assert [row["value"] for row in again if row["stage"] == "numbers:1"] == [3.0]
    rows.write(BENCH, Wanted((1,)), "numbers:1", [], 0.0, path)
    assert rows.rows_in(path) == [], "rows of another definition do not stay"


def test_a_part_that_a_file_lacks_is_measured(tmp_path: Path) -> None:
    path = rows.path_of(BENCH, Wanted(), "numbers:1", tmp_path, "A GPU")
    rows.write(BENCH, Wanted(), "numbers:1", [Fact("time", 3.0, "us", {})], 0.0, path)
    assert rows.missing(BENCH, Wanted(), tmp_path, "A GPU") == ["numbers:2"]
    path.write_text("{")
    with pytest.raises(UserError, match=r"numbers\.jsonl.*measure it again"):
        rows.missing(BENCH, Wanted(), tmp_path, "A GPU")


# Energy


class Card:
    """A GPU that draws 500 W while it works and 100 W while it does not; its counter steps every 60 ms.

    Reading it takes the host a millisecond, in which the GPU goes on with what was started.
    """

    def __init__(self, run: float) -> None:
        self.run = run
        # Of the host; when all that was started will have ended; how long nothing was to be done; of the counter.
        self.time = self.end = self.idle = self.counted = self.step = 0.0

    def work(self) -> None:
        self.idle += max(0.0, self.time - self.end)
        self.end = max(self.end, self.time) + self.run

    def mark(self) -> Callable[[], None]:
        end = self.end

        def wait() -> None:
            self.time = max(self.time, end)

        return wait

    def energy(self) -> float:
        self.time += 1e-3
        if self.time // 0.06 > self.step:
            self.step = self.time // 0.06
            idle = self.idle + max(0.0, self.time - self.end)
            self.counted = 500 * (self.time - idle) + 100 * idle
        return self.counted

    def measure(self, seconds: float = 1.0) -> power.Steady | None:
        meter = Meter(lambda: 1500.0, lambda: 480.0, self.energy)
        return power.steady(self.work, self.mark, self.run * 1e6, seconds, meter, lambda: self.time)


def unmarked() -> Callable[[], None]:
    return lambda: None


@pytest.mark.parametrize("run", [3e-6, 4e-3, 0.35, 2.0], ids=["microseconds", "decoding", "prefill", "seconds"])
def test_energy_is_counted_between_steps_of_the_counter(run: float) -> None:
    found = Card(run).measure()
    assert found is not None and found.clock == 1500
    assert found.energy == pytest.approx(500 * run, rel=0.06) and found.power == pytest.approx(500, rel=0.06)


def test_a_gpu_that_counts_no_energy_says_so() -> None:
    nothing = Meter(lambda: None, lambda: None, lambda: None)
    ticks = itertools.count()
    assert power.steady(lambda: None, unmarked, 5.0, 1.0, nothing, lambda: next(ticks)) is None
    still = Meter(lambda: None, lambda: None, lambda: 7.0)
    assert power.steady(lambda: None, unmarked, 5.0, 1.0, still, lambda: float(next(ticks))) is None


def test_without_nvml_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise power.pynvml.NVMLError(power.pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(power.pynvml, "nvmlInit", missing)
    meter = power.meter("cuda")
    assert (meter.clock(), meter.power(), meter.energy()) == (None, None, None)
