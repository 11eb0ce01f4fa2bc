"""Dense FP8 products: as exact however they are scaled."""

import pytest
import torch

from patch.quantise.values import quantise_rows, quantise_weight
from stoicc import dense8

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("tokens", [1, 17, 256, 257], ids=lambda tokens: f"{tokens}-tokens")
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_dense_product_is_that_of_the_quantised_operands(
    tokens: int, with_bias: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    values, scales = quantise_weight(torch.randn(32, 64, dtype=torch.bfloat16), FP8)
    bias = torch.randn(32, dtype=torch.bfloat16) if with_bias else None
    x = torch.randn(1, tokens, 64, dtype=torch.bfloat16)
    # What is traced is what counts: the compiler's own code would take seconds a case.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    taken = []
    monkeypatch.setattr(dense8, "sums", lambda *a, real=dense8.sums, **how: taken.append(1) or real(*a, **how))
    y = dense8.linear(x, values, scales, torch.ones(()), bias)
    x8, x_scales = quantise_rows(x[0], FP8)
    exact = (x8.double() * x_scales[:, None]) @ (values.double() * scales[:, None]).T
    exact = exact if bias is None else exact + bias.double()
    assert y.shape == (1, tokens, 32) and y.dtype == torch.bfloat16
    assert (y[0].double() - exact).norm() <= 0.004 * exact.norm()
    assert len(taken) == (compiled and tokens <= 256)
