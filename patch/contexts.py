"""Temporary states of a model and of torch, as they were again when the block ends."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from patch.errors import UserError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode: no dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """Nothing within writes to the model's weights, as some models (RWKV) do the first time that they run.

    Raises:
        UserError: if they did: saved now, they would be written to a second time when they are loaded.
    """
    before = {name: parameter._version for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter._version != before.get(name):
            raise UserError(f"{type(model).__name__} changes its own weights when it runs, such as {name}")


def full_float32() -> AbstractContextManager[None]:
    """Matrix products of float32 without TF32, which keeps ten bits of their mantissas."""
    return _float32_products("highest")


def short_float32() -> AbstractContextManager[None]:
    """Matrix products of float32 in TF32 where the GPU has it: values of 8 bits are exact, sums are of float32."""
    return _float32_products("high")


def _float32_products(precision: str) -> AbstractContextManager[None]:
    try:
        torch.get_float32_matmul_precision()
    except RuntimeError:
        # Somebody gave libraries their own precision (`torch.backends`), as transformers' TrainingArguments do.
        return _products_of_libraries({"highest": "ieee", "high": "tf32"}[precision])
    return _products(precision)


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _products_of_libraries(precision: str) -> Iterator[None]:
    libraries: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul"))  # noqa: B009
    before = [library.fp32_precision for library in libraries]
    try:
        for library in libraries:
            library.fp32_precision = precision
        yield
    finally:
        for library, its_own in zip(libraries, before, strict=True):
            library.fp32_precision = its_own


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other forward functions for some modules."""
    own = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, before in own.items():
            vars(module).pop("forward", None)
            if before is not None:
                vars(module)["forward"] = before
