"""The decode kernel's PTX, emulated on a CPU: what each kind of configuration computes is what it must."""

import pytest
import torch
import triton
from compiled import decode
from emulated import run
from stoicc_hybrids import random_mask, random_weight

from patch.quantise.values import quantise_groups
from patch.tiles import TileShape
from stoicc import reference
from stoicc.format import GROUPED, HybridWeight, bits_of, pack
from stoicc.kernels.decode import DecodeConfig

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def hybrid_of(n: int, k: int, tile: TileShape, share: float, dtype: torch.dtype, bits: int) -> HybridWeight:
    mask = random_mask(n, k, tile, share, uneven=True, seed=n)
    weight = random_weight(n, k, dtype, seed=n)
    if bits == 16:
        return pack(weight, mask)
    quantised = quantise_groups(mask.apply(weight), 128)
    return pack(quantised.values, mask, quantised.scales)


def emulated(
    x: torch.Tensor, hybrid: HybridWeight, bias: torch.Tensor, config: DecodeConfig, arch: int
) -> torch.Tensor:
    """As `stoicc.kernels.decode.launch`, into memory that is poisoned."""
    n, tokens = hybrid.shape[0], len(x)
    kernel = decode(config, arch, KINDS[x.dtype], bits_of(hybrid.dtype))
    grid = (triton.cdiv(hybrid.panels * 64, config.rows) * config.blocks, triton.cdiv(tokens, config.tokens))
    words = x.view(torch.int32)
    tensors = {
        "x": words,
        "y": torch.full((tokens, n + -n % 16), float("nan"), dtype=x.dtype),
        "words": hybrid.records,
        "bias": bias,
        "workspace": torch.full((grid[0] * grid[1] * config.rows * config.tokens,), float("nan")),
        "columns": hybrid.columns,
        "order": hybrid.order(2 if config.rows > 64 else 1),
    }
    sizes = [hybrid.steps, tokens, words.shape[1], words.shape[1], n, tensors["y"].shape[1], 0]
    given = ["x", "y", "words", "bias", "y", "y", "workspace", "columns", "order", *sizes]
    found = run(kernel.asm["ptx"], tensors, given, grid, kernel.metadata.shared)["y"]
    return found.reshape(tokens, -1)[:, :n]


CASES = [
    # What GPUs have run, as a test of the emulation.
    pytest.param(DecodeConfig(16, 8, (4, 1, 1), 2, 0), 80, 16, (24, 192), 0.6, 5, torch.bfloat16, id="16-bits"),
    pytest.param(DecodeConfig(16, 8, (4, 1, 1), 2, 0), 80, 4, (24, 384), 0.6, 5, torch.bfloat16, id="registers"),
    pytest.param(DecodeConfig(64, 8, (4, 1, 1), 1, 0, 2), 90, 4, (64, 256), 0.6, 1, torch.float16, id="cluster"),
    pytest.param(DecodeConfig(64, 16, (2, 2, 1), 1, 4, 2), 90, 4, (72, 256), 0.6, 11, torch.bfloat16, id="ring"),
    pytest.param(DecodeConfig(64, 16, (4, 1, 1), 1, 4), 86, 4, (64, 128), 0.0, 10, torch.bfloat16, id="all-dense"),
    pytest.param(DecodeConfig(128, 32, (1, 8, 1), 1, 4), 80, 4, (72, 128), 1.0, 30, torch.float16, id="two-panels"),
    # Three turns of the 2:4 and of the dense loop, so that what each asks for ahead is used.
    pytest.param(DecodeConfig(32, 8, (2, 1, 1), 1, 0), 90, 4, (64, 1792), 0.5, 3, torch.bfloat16, id="long-registers"),
    pytest.param(DecodeConfig(64, 16, (2, 2, 1), 1, 4), 80, 4, (64, 1792), 0.5, 3, torch.float16, id="long-ring"),
    pytest.param(DecodeConfig(64, 64, (1, 4, 2), 1, 3), 89, 4, (64, 768), 0.6, 61, torch.bfloat16, id="many-tokens"),
]


@pytest.mark.parametrize(("config", "arch", "bits", "shape", "share", "tokens", "dtype"), CASES)
def test_a_configuration_computes_the_product(
    config: DecodeConfig, arch: int, bits: int, shape: tuple[int, int], share: float, tokens: int, dtype: torch.dtype
) -> None:
    n, k = shape
    rows = 128 if config.rows > 64 else 64
    hybrid = hybrid_of(n, k, (min(n, rows), 64 if bits == 16 else 128), share, dtype, bits)
    assert (hybrid.dtype == GROUPED) == (bits == 4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    exact = reference.exact(x, hybrid, bias)
    y = emulated(x, hybrid, bias, config, arch)
    error = (y.double() - exact).norm() / exact.norm()
    rounding = (exact.to(dtype).double() - exact).norm() / exact.norm()
    assert error <= 1.1 * rounding + 1e-5, f"relative error {error:.2e}, rounding {rounding:.2e}"
