"""Comparing two points: who is meant, what differs, and what counts as noise."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.rows.points import Measured, Point, gather
from analysis.tables.compare import Difference, comparison, differences, how_sure, select
from analysis.tables.render import render, shown_cells
from patch.errors import UserError


@pytest.fixture
def points(demo: pd.DataFrame) -> list[Point]:
    return gather(demo)


@pytest.mark.parametrize(
    ("selector", "method", "sparsity"),
    [
        ("method=wanda", "wanda", 0.5),
        ("method=patch-joint,target=0.35", "patch-joint", 0.35),
        ("method=patch-joint,target=45%", "patch-joint", 0.45),
        ("structure=hybrid,target=0.25,tile=64x64", "patch-joint", 0.25),
    ],
)
def test_a_selector_finds_its_point(points: list[Point], selector: str, method: str, sparsity: float) -> None:
    found = select(points, selector)
    assert (found.method, found.sparsity) == (method, sparsity)
    assert select(points, found.trials[0]) is found


@pytest.mark.parametrize(
    ("selector", "variant"),
    [
        ("method=wanda", ""),
        ("method=wanda,variant=", ""),
        ("method=wanda,variant=a=1", "a=1"),
        ("method=wanda,variant=a=1, from MaskLLM", "a=1, from MaskLLM"),
        ("variant=a=1, from MaskLLM,method=wanda", "a=1, from MaskLLM"),
    ],
    ids=["plain", "explicitly plain", "variant", "with a comma", "in the middle"],
)
def test_the_plain_method_is_meant_where_no_variant_is_named(points: list[Point], selector: str, variant: str) -> None:
    (plain,) = (point for point in points if point.method == "wanda")
    points += [replace(plain, variant=each) for each in ("a=1", "a=1, from MaskLLM")]
    assert select(points, selector).variant == variant


def test_variants_alone_are_told_apart_by_name(points: list[Point]) -> None:
    (plain,) = (point for point in points if point.method == "wanda")
    points = [replace(plain, variant=each) for each in ("a=1", "b=1")]
    with pytest.raises(UserError, match=r"means 2 of these: .*variant=a=1; .*variant=b=1"):
        select(points, "method=wanda")


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("method=patch-joint", "means 3 of these: .*target=0.45.*target=0.35.*target=0.25"),
        ("method=wanda,target=0.9", "means none of these: .*method=dense"),
        ("method=sparsgpt", "unknown method 'sparsgpt': did you mean sparsegpt"),
        ("metod=wanda", "unknown field 'metod': did you mean method"),
        ("ffffffffffff", "means none"),
        ("target=half", "target=half: give a sparsity"),
        ("method=wanda,hybrid", "unknown field 'hybrid'"),
    ],
)
def test_a_selector_that_means_none_or_several_is_refused(points: list[Point], selector: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(points, selector)


@pytest.mark.parametrize(
    ("left", "right", "verdict"),
    [
        (Measured(10.0, 0.3), Measured(11.01, 0.4), "yes"),
        (Measured(10.0, 0.3), Measured(10.99, 0.4), "no"),
        (Measured(10.0, 0.3), Measured(8.9, 0.4), "yes"),
        (Measured(10.0), Measured(99.0, 0.4), "unknown"),
        (Measured(10.0, 0.1), Measured(math.nan, 0.4), "unknown"),
        # Over seeds, their spread is what counts.
        (Measured(10.0, 0.1, 2.0, 3), Measured(12.0, 0.1, 2.0, 3), "no"),
    ],
)
def test_noise_is_two_standard_errors(left: Measured, right: Measured, verdict: str) -> None:
    assert Difference("x", left, right, share=False).verdict == verdict


def test_every_quantity_of_both_is_compared(points: list[Point]) -> None:
    dense, wanda = select(points, "method=dense"), select(points, "method=wanda")
    found = differences(dense, wanda)
    assert len(found) == len(dense.perplexity) + len(dense.accuracy) + bool(dense.mean_accuracy and wanda.mean_accuracy)
    (text,) = dense.perplexity
    assert found[0].value == pytest.approx(wanda.perplexity[text].value - dense.perplexity[text].value)
    table = comparison(dense, wanda)
    assert shown_cells(table)[0][3].startswith("+") and "Wanda 50%" in render(table, "md")


@pytest.mark.parametrize(
    ("paired", "seeds", "said"),
    [
        ((True, True), 1, "more than two standard errors, of the differences window by window and item by item."),
        (
            (False, False),
            1,
            "more than two standard errors, taken as if each side had been measured on items of its own",
        ),
        (
            (True, False),
            3,
            "more than two standard errors, which the spread over seeds is part of, of a window by window",
        ),
    ],
    ids=["all-paired", "none-paired", "some-paired-with-seeds"],
)
def test_what_errors_are_of_is_said(paired: tuple[bool, bool], seeds: int, said: str) -> None:
    items = np.array([1.0, 2.0, 3.0])
    found = [
        Difference(
            name, *(Measured(2.0, 0.1, 0.2, seeds, items * side if own else None) for side in (1, 2)), share=False
        )
        for name, own in zip("ab", paired, strict=True)
    ]
    assert said in how_sure(found)


def test_nothing_in_common_is_said(points: list[Point]) -> None:
    bare = replace(points[1], perplexity={}, accuracy={}, mean_accuracy=None)
    with pytest.raises(UserError, match="nothing was measured of both"):
        comparison(points[0], bare)
