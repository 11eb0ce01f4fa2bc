"""Values of few bits and their scales against float64 references, and linears of them."""

import pytest
import torch
from torch import Tensor

from patch.errors import UserError
from patch.quantise import reference
from patch.quantise.linear import QuantisedLinear
from patch.quantise.precisions import PRECISIONS, group_size
from patch.quantise.values import (
    LARGEST,
    GroupRounding,
    Quantised,
    group_scales,
    nearest,
    quantise_rows,
    quantise_weight,
)

SHAPES = [pytest.param(shape, id="x".join(map(str, shape))) for shape in ((1, 1), (5, 12), (33, 96), (7, 344))]


def random(shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-5, 5, shape[0])[:, None]
    return torch.randn(shape, generator=generator) * sizes


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_become_their_nearest_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = random(shape)
    x[0] = 0
    values, scales = quantise_rows(x, dtype)
    nearest, exact = reference.quantise_rows(x, dtype)
    torch.testing.assert_close(scales.double(), exact, rtol=1e-6, atol=0)
    # As near as the nearest: at the middle between two, float32 may take the other.
    error = (x.double() / exact[:, None] - values.double()).abs()
    assert bool((error <= (x.double() / exact[:, None] - nearest).abs() + 1e-4).all())
    assert (values.double() == nearest).double().mean() > 0.99


@pytest.mark.parametrize("columns", [4, 32, 128])
def test_a_groups_scale_loses_least(columns: int) -> None:
    weight = random((24, columns), seed=1)
    weight[3], weight[:, ::3] = 0, 0
    importance = torch.rand(columns) + 0.1
    scales = group_scales(weight, importance)
    assert float(scales[3]) == 1.0
    assert torch.equal(scales, scales.bfloat16().float())
    for row in range(24):
        best = reference.group_scale(weight[row], importance)
        if float(scales[row]) != best:
            rounded = [(weight[row] / s).round().clamp(-8, 7) * s for s in (float(scales[row]), best)]
            losses = [float(((weight[row] - r) ** 2 * importance).sum()) for r in rounded]
            assert losses[0] <= losses[1] * (1 + 1e-5)


def settle(rounding: GroupRounding, column: int, weight: Tensor) -> Tensor:
    scales = rounding.scales_of(column, column + 1)
    values = nearest(weight[:, None] / scales, rounding.precision)
    rounding.take(column, values)
    return (values * scales)[:, 0]


def test_groups_are_settled_column_by_column() -> None:
    rounding = GroupRounding((3, 64), 32, torch.device("cpu"))
    weight = random((3, 64))
    for column in range(64):
        if column % 32 == 0:
            rounding.open(column, weight[:, column : column + 32], torch.ones(32))
        becomes = settle(rounding, column, weight[:, column])
        torch.testing.assert_close(becomes, rounding.quantised.dequantised()[:, column])
    assert rounding.quantised.group == 32
    # Half a step each, but where what is largest is cut off.
    assert (rounding.quantised.dequantised() - weight).norm() < 0.15 * weight.norm()


def quantised(precision: str, n: int = 24, k: int = 96) -> Quantised:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(5))
    weight[:, 1::4] = 0
    if precision != "int4":
        values, scales = quantise_weight(weight, getattr(torch, PRECISIONS[precision].dtype))
        return Quantised(values, scales[:, None])
    rounding = GroupRounding((n, k), 32, weight.device)
    for column in range(k):
        if column % 32 == 0:
            rounding.open(column, weight[:, column : column + 32], torch.ones(32))
        settle(rounding, column, weight[:, column])
    return rounding.quantised


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_linear_computes_the_product_of_its_values(precision: str, dtype: torch.dtype, bias: bool) -> None:
    weight = quantised(precision)
    added = torch.randn(24).to(dtype) if bias else None
    linear = QuantisedLinear(PRECISIONS[precision], weight, added, dtype)
    x = torch.randn(2, 5, 96).to(dtype)
    x[0, 0] = 0
    tokens, scales = x.reshape(10, 96), None
    if not PRECISIONS[precision].grouped:
        tokens, scales = quantise_rows(tokens, weight.values.dtype)
    exact = reference.product(tokens, weight, added, scales).reshape(2, 5, 24)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert linear(x).dtype == dtype and linear(x).shape == (2, 5, 24)
    assert (linear(x).double() - exact).norm() <= tolerance * exact.norm()
    assert bool((linear.weight[:, 1::4] == 0).all())
    assert set(linear.state_dict()) <= {"weight", "bias"}


def test_a_token_that_is_not_finite_stays_so() -> None:
    linear = QuantisedLinear(PRECISIONS["fp8"], quantised("fp8"), None, torch.float32)
    x = torch.randn(3, 96)
    x[1, 4] = float("nan")
    assert linear(x).isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        pytest.param(torch.zeros(2, 8), torch.ones(2, 1), "need 8 bits", id="values"),
        pytest.param(torch.zeros(2, 8).to(torch.int8), torch.ones(3, 1), "need float32", id="rows"),
        pytest.param(torch.zeros(2, 8).to(torch.int8), torch.ones(2, 3), "cannot be cut", id="groups"),
        pytest.param(
            torch.zeros(2, 8).to(torch.int8), torch.tensor([[1.0], [float("nan")]]), "scale of row 1", id="nan"
        ),
        pytest.param(torch.zeros(2, 8).to(torch.int8), torch.tensor([[0.0], [1.0]]), "scale of row 0", id="zero"),
        pytest.param(torch.full((2, 8), float("nan")).to(torch.float8_e4m3fn), torch.ones(2, 1), "finite", id="code"),
    ],
)
def test_what_is_no_quantised_weight(values: Tensor, scales: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Quantised(values, scales)


@pytest.mark.parametrize(("inputs", "size"), [((256, 768), 128), ((576, 1536), 64), ((32, 64), 32)])
def test_all_weights_of_a_model_have_whole_groups_of_one_size(inputs: tuple[int, ...], size: int) -> None:
    assert group_size({str(count): count for count in inputs}) == size


def test_a_weight_without_whole_groups_is_named() -> None:
    with pytest.raises(UserError, match="up_proj: 36 inputs: INT4 needs a multiple of 32"):
        group_size({"q_proj": 64, "up_proj": 36})
