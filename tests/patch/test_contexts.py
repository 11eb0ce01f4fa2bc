"""Temporary states of torch are as they were when they end, however they were set."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from patch.contexts import full_float32, short_float32


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    places: tuple[Any, ...] = (torch.backends, torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul"))  # noqa: B009
    before = [place.fp32_precision for place in places]
    yield
    torch.set_float32_matmul_precision("highest")
    for place, precision in zip(places, before, strict=True):
        place.fp32_precision = precision


def seen() -> list[str]:
    libraries: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul"))  # noqa: B009
    # Which is the precision of a library that was given none.
    return [library.fp32_precision.replace("none", "ieee") for library in libraries]


def older(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)


def newer(precision: str) -> None:
    torch.backends.fp32_precision = precision


@pytest.mark.parametrize(
    "set_it", [lambda: None, lambda: older("high"), lambda: newer("tf32"), lambda: newer("ieee")],
    ids=["untouched", "older", "newer", "newer-full"],
)  # fmt: skip
@pytest.mark.parametrize(("context", "within"), [(full_float32, "ieee"), (short_float32, "tf32")])
def test_the_precision_of_products_is_put_back_however_it_was_set(
    set_it: Callable[[], None], context: Callable[[], AbstractContextManager[None]], within: str
) -> None:
    set_it()
    before = seen()
    for fails in (False, True):
        try:
            with context():
                assert seen() == [within, within]
                assert torch.equal(torch.eye(2) @ torch.eye(2), torch.eye(2))
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert seen() == before
