"""Clock, power and energy of a GPU while it works, from NVML.

The energy counter moves every few tens of milliseconds, so energy is read between two of its steps at least a second
apart, and shared among the runs that ended between them. Runs are started before those before them have ended, so that
the GPU never waits for the host meanwhile.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pynvml
import torch

# Seconds between two readings of the host while the GPU works ahead, and the longest that a counter is waited for.
CHUNK = 0.01
PATIENCE = 10.0


@dataclass(frozen=True)
class Meter:
    """What can be read of a GPU; each None where the GPU or the machine does not say.

    Attributes:
        clock: of the multiprocessors, in MHz.
        power: in W; the driver's mean of the last second.
        energy: in J since the driver was loaded.
    """

    clock: Callable[[], float | None]
    power: Callable[[], float | None]
    energy: Callable[[], float | None]


@dataclass(frozen=True)
class Steady:
    """Of work that was repeated without a pause: joules of one run, watts, and the median clock in MHz."""

    energy: float
    power: float
    clock: float | None


def meter(device: torch.device | str) -> Meter:
    """The meter of a CUDA device; one that reads nothing where NVML cannot be asked."""
    try:
        pynvml.nvmlInit()
        # By its name, since CUDA may count other devices than NVML.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return Meter(lambda: None, lambda: None, lambda: None)

    def reader(read: Callable[..., Any], scale: float, *about: int) -> Callable[[], float | None]:
        def value() -> float | None:
            try:
                return float(read(handle, *about)) * scale
            except pynvml.NVMLError:
                return None

        return value

    return Meter(
        reader(pynvml.nvmlDeviceGetClockInfo, 1, pynvml.NVML_CLOCK_SM),
        reader(pynvml.nvmlDeviceGetPowerUsage, 1e-3),
        reader(pynvml.nvmlDeviceGetTotalEnergyConsumption, 1e-3),
    )


def recorded() -> Callable[[], None]:
    """A mark on the current stream of the current CUDA device, for `steady`."""
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def steady(
    run: Callable[[], None],
    mark: Callable[[], Callable[[], None]],
    microseconds: float,
    seconds: float,
    meter: Meter,
    now: Callable[[], float] = time.perf_counter,
) -> Steady | None:
    """Repeat something for a while and read what it takes.

    Args:
        run: starts it once.
        mark: returns what waits until all that was started before the mark was made has ended.
        microseconds: about how long one run takes.
        seconds: at least so long, between two steps of the energy counter.

    Returns:
        None if the GPU does not count energy.
    """
    together = max(1, math.ceil(CHUNK * 1e6 / microseconds))
    started, done, clocks = now(), 0, []
    last = meter.energy()
    # (time, runs, joules) at the counter's first step, and at its latest.
    first = latest = None
    previous: Callable[[], None] | None = None
    while last is not None and now() - started < seconds + PATIENCE:
        for _ in range(together):
            run()
        previous, ended = mark(), previous
        if ended is None:
            continue
        ended()
        done += together
        energy, at = meter.energy(), now()
        if energy is not None and energy != last:
            last, latest = energy, (at, done, energy)
            first = first or latest
            if at - first[0] >= seconds:
                break
        if (clock := meter.clock()) is not None:
            clocks.append(clock)
    if previous is not None:
        previous()
    if first is None or latest is None or latest[1] == first[1]:
        return None
    joules, runs, passed = latest[2] - first[2], latest[1] - first[1], latest[0] - first[0]
    return Steady(joules / runs, joules / passed, sorted(clocks)[len(clocks) // 2] if clocks else None)
