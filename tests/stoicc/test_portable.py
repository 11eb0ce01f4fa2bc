"""The portable kernels in Triton's interpreter, on a CPU: the product, and what expands 4 bits.

Triton decides when it is imported whether it interprets, so all cases run in one process of their own.
"""

import json
from typing import Any

import pytest
import torch
from interpreted import printed_by
from stoicc_hybrids import random_hybrid, random_mask, random_weight

from patch.quantise.values import quantise_groups, quantise_weight
from stoicc import reference
from stoicc.format import SCALED, dequantised, pack
from stoicc.kernels.expand import expand
from stoicc.kernels.portable import PortableConfig, launch
from stoicc.quantise import quantise_tokens

SHAPES = [(64, 64, 1), (136, 152, 5), (128, 192, 33), (72, 8, 16)]
SHARES = [0.0, 0.5, 1.0]
DTYPES = ("float16", "bfloat16", "float8_e4m3fn", "int8")
# Of the ragged shape all; each of the others with each dtype once, or nearly.
CASES = [
    (shape, share, dtype)
    for row, shape in enumerate(SHAPES)
    for column, share in enumerate(SHARES)
    for place, dtype in enumerate(DTYPES)
    if shape == (136, 152, 5) or place == (row + column) % len(DTYPES)
]
EXPANDED = [(64, 128), (136, 384), (1, 256)]
# The interpreter cuts bfloat16 off where a GPU rounds.
TOLERANCE = {"float16": 5e-4, "bfloat16": 5e-3, "float8_e4m3fn": 5e-4, "int8": 5e-4}


def relative_error(n: int, k: int, tokens: int, share: float, dtype: torch.dtype) -> float:
    out = torch.float16 if dtype in SCALED else dtype
    x = torch.randn(tokens, k).to(out)
    bias = torch.randn(n).to(out) if tokens > 1 else None
    y = torch.full((tokens, n), float("nan"), dtype=out)
    token_scales = None
    if dtype in SCALED:
        mask = random_mask(n, k, (64, min(k, 128)), share)
        values, scales = quantise_weight(mask.apply(random_weight(n, k)), dtype)
        hybrid = pack(values, mask, scales)
        x, token_scales = quantise_tokens(x, dtype)
    else:
        hybrid = random_hybrid(n, k, (64, min(k, 64)), share, dtype)
    launch(x, hybrid, bias, y, PortableConfig(16), token_scales)
    exact = reference.exact(x, hybrid, bias, token_scales)
    return float((y.double() - exact).norm() / exact.norm())


def expands(n: int, k: int, share: float) -> bool:
    """Whether the expanded weight is the reference's, in float16 and float32."""
    mask = random_mask(n, k, (min(n, 64), 128), share)
    weight = quantise_groups(mask.apply(random_weight(n, k)), 128)
    hybrid = pack(weight.values, mask, weight.scales)
    dtypes = (torch.float16, torch.float32)
    return all(torch.equal(expand(hybrid, dtype), dequantised(hybrid).to(dtype)) for dtype in dtypes)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return printed_by(__file__, tmp_path_factory)


@pytest.mark.parametrize(("shape", "share", "dtype"), CASES, ids=str)
def test_portable_kernel(errors: dict[str, Any], shape: tuple[int, int, int], share: float, dtype: str) -> None:
    assert errors[f"{shape} {share} {dtype}"] <= TOLERANCE[dtype]


@pytest.mark.parametrize("share", SHARES, ids=["dense", "mixed", "two-four"])
@pytest.mark.parametrize("shape", EXPANDED, ids=lambda s: "x".join(map(str, s)))
def test_four_bits_expand_to_what_they_stand_for(errors: dict[str, Any], shape: tuple[int, int], share: float) -> None:
    assert errors[f"{shape} {share}"] is True


if __name__ == "__main__":
    found: dict[str, Any] = {f"{shape} {share}": expands(*shape, share) for shape in EXPANDED for share in SHARES}
    for size, dense, kind in CASES:
        found[f"{size} {dense} {kind}"] = relative_error(*size, dense, getattr(torch, kind))
    print(json.dumps(found))
