"""Differences: paired where both sides have what each item gave, at most that of independent samples otherwise."""

import base64
import math

import numpy as np
import pytest

from analysis.rows.items import task_items, window_items
from analysis.rows.paired import gap
from analysis.rows.points import Measured


def test_items_are_unpacked_as_they_were_packed() -> None:
    right = np.array([1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0], dtype=bool)
    packed = base64.b64encode(np.packbits(right).tobytes()).decode()
    found = task_items({"items": packed, "n": 11})
    assert found is not None and found.tolist() == right.astype(float).tolist()
    assert task_items({"items": packed, "n": 99}) is None and task_items({"n": 11}) is None
    windows = window_items({"window_losses": [1.0, 2.0]}, 10.0)
    assert windows is not None and windows.tolist() == [10.0, 20.0] and window_items({}, 10.0) is None


def test_what_both_find_hard_does_not_count() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(4, 1, 400)
    left, right = (Measured(v, 0.05, items=hard + d + rng.normal(0, 0.01, 400)) for v, d in ((4.0, 0), (4.02, 0.02)))
    found = gap(left, right)
    assert found.paired and found.error is not None and found.error < 0.001 and found.exceeds
    assert found.value == pytest.approx(0.02)


@pytest.mark.parametrize("items", [None, np.ones(3)], ids=["of none", "of one side"])
def test_without_items_of_both_it_is_that_of_two_samples(items: np.ndarray | None) -> None:
    found = gap(Measured(4.0, 0.3, items=items), Measured(4.2, 0.4))
    assert not found.paired and found.error == pytest.approx(0.5) and not found.exceeds


@pytest.mark.parametrize(("value", "exceeds"), [(5.0, False), (5.1, True), (2.9, True)])
def test_noise_is_two_standard_errors(value: float, exceeds: bool) -> None:
    assert gap(Measured(4.0, 0.3), Measured(value, 0.4)).exceeds == exceeds


def test_unknown_errors_claim_nothing() -> None:
    assert not gap(Measured(1.0), Measured(9.0, 0.1)).exceeds
    assert not gap(Measured(1.0, 0.1), Measured(math.inf, 0.1)).exceeds


def test_seeds_add_to_it() -> None:
    found = gap(Measured(4.0, 0.3, spread=0.8, seeds=4), Measured(4.2, 0.4))
    assert found.error == pytest.approx(math.sqrt(0.25 + 0.16))


def test_means_over_tasks_pair_each_task() -> None:
    one, other = np.array([1.0, 0, 1, 0]), np.array([1.0, 0, 1, 1])
    tasks = [
        (Measured(0.5, 0.25, items=one), Measured(0.75, 0.2, items=other)),
        (Measured(0.5, 0.1), Measured(0.4, 0.1)),
    ]
    left, right = (Measured(0.5, 0.1, parts=tuple(pair[side] for pair in tasks)) for side in (0, 1))
    found = gap(left, right)
    first = float(np.std(other - one, ddof=1)) / 2
    assert not found.paired and found.error == pytest.approx(math.hypot(first, math.hypot(0.1, 0.1)) / 2)
    only = gap(*(Measured(0.5, 0.1, parts=(tasks[0][side],)) for side in (0, 1)))
    assert only.paired and only.error == pytest.approx(first)
