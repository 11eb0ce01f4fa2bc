"""Eight bits: what weights and activations become, and the activations' kernel in Triton's interpreter, on a CPU."""

import json

import pytest
import torch
from interpreted import printed_by
from torch import Tensor

from patch.errors import UserError
from patch.quantise.values import LARGEST, quantise_weight
from stoicc import configs, reference
from stoicc.format import SCALED
from stoicc.kernels import quantise
from stoicc.quantise import converts, quantise_tokens

# The interpreter does not round to float8 as a GPU does.
SHAPES = [(1, 8), (5, 344), (3, 1000)]


@pytest.mark.parametrize("dtype", SCALED, ids=str)
def test_a_weight_becomes_its_nearest_values(dtype: torch.dtype) -> None:
    weight = torch.randn(33, 64) * torch.logspace(-6, 6, 33)[:, None]
    weight[:, ::3] = 0
    weight[7] = 0
    values, scales = quantise_weight(weight, dtype)
    assert values.dtype == dtype and scales.dtype == torch.float32
    assert bool((scales > 0).all() and scales.isfinite().all())
    assert bool((values.float()[:, ::3] == 0).all() and (values.float()[7] == 0).all())
    largest = values.float().abs().amax(1)
    assert bool((largest[torch.arange(33) != 7] == LARGEST[dtype]).all())
    # Half a step of e4m3 is 2**-4 of a value, or 2**-10 where it is subnormal; of int8 half.
    error = (values.float() - weight / scales[:, None]).abs()
    exact = (weight / scales[:, None]).abs()
    allowed = 0.5 if dtype == torch.int8 else torch.maximum(exact / 16, torch.tensor(2.0**-10))
    assert bool((error <= allowed * 1.0001).all())


@pytest.mark.parametrize("dtype", SCALED, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
def test_tokens_become_values_and_scales(dtype: torch.dtype, norm: bool) -> None:
    x = torch.randn(2, 3, 344, dtype=torch.bfloat16)
    weight = torch.randn(344, dtype=torch.bfloat16) if norm else None
    values, scales = quantise_tokens(x, dtype, weight, 1e-5)
    assert values.shape == (6, 352) and scales.shape == (6,)
    assert bool((values[:, 344:].float() == 0).all())
    wanted = x.reshape(6, 344)
    if weight is not None:
        wanted = torch.nn.functional.rms_norm(wanted.float(), (344,), eps=1e-5).bfloat16() * weight
    error = (values[:, :344].float() * scales[:, None] - wanted.float()).norm() / wanted.float().norm()
    assert error < (0.02 if dtype == torch.int8 else 0.04)


@pytest.mark.parametrize("dtype", SCALED, ids=str)
def test_what_is_not_finite_is_not_hidden(dtype: torch.dtype) -> None:
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    x[1, 5], x[2, 9] = float("nan"), float("inf")
    _, scales = quantise_tokens(x, dtype)
    assert scales.isfinite().tolist() == [True, False, False, True]
    with pytest.raises(UserError, match=r"weight \(4, 64\) has values that are not finite"):
        quantise_weight(x, dtype)


@pytest.mark.parametrize(
    ("x", "dtype", "norm", "message"),
    [
        pytest.param(torch.zeros(2, 8), torch.int8, None, "float32", id="activations"),
        pytest.param(torch.zeros(2, 8).half(), torch.float16, None, "cannot quantise to torch.float16", id="dtype"),
        pytest.param(torch.zeros(2, 8).half(), torch.int8, torch.ones(7), r"norm is \(7,\)", id="norm"),
    ],
)
def test_what_cannot_be_quantised(x: Tensor, dtype: torch.dtype, norm: Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantise_tokens(x, dtype, norm)


@pytest.mark.parametrize(("capability", "fp8"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_without_fp8_has_its_tokens_made_by_torch(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fp8: bool
) -> None:
    monkeypatch.setattr(configs, "capability_of", lambda device: capability)
    made = {dtype: converts(torch.device("cuda"), dtype) for dtype in SCALED}
    assert made == {torch.float8_e4m3fn: fp8, torch.int8: True}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return printed_by(__file__, tmp_path_factory)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_kernel_does_as_the_reference(found: dict[str, list[float]], shape: tuple[int, int], norm: bool) -> None:
    values, scales, padding = found[f"{shape} {norm}"]
    # Norms are summed in another order, so that some values are at the edge between two.
    assert values <= (0.02 if norm else 0.0)
    assert scales <= 1e-2
    assert padding == 0


def test_the_kernel_passes_on_what_is_not_finite(found: dict[str, list[float]]) -> None:
    assert found["finite"] == [True, False, False, False, True]


def finite() -> list[bool]:
    """Whether the kernel's scales of five tokens are finite: an infinity, a NaN, and one beside a large value."""
    x = torch.ones(5, 16, dtype=torch.float16)
    x[1, 3], x[2, 7], x[3, 0], x[3, 1] = float("inf"), float("nan"), float("nan"), 6e4
    values, scales = torch.empty(5, 16, dtype=torch.int8), torch.empty(5)
    quantise.launch(x, torch.int8, None, 1e-5, values, scales)
    return scales.isfinite().tolist()


def differences(shape: tuple[int, int], norm: bool) -> list[float]:
    """Share of values that differ, largest difference of scales, largest magnitude behind the last column."""
    x = torch.randn(shape).to(torch.float16)
    x[0] = 0
    weight = torch.randn(shape[1]).to(torch.float16) if norm else None
    columns = shape[1] + -shape[1] % 16
    values, scales = torch.full((shape[0], columns), 99, dtype=torch.int8), torch.empty(shape[0])
    quantise.launch(x, torch.int8, weight, 1e-5, values, scales)
    expected, expected_scales = reference.quantise_tokens(x, torch.int8, weight, 1e-5)
    differ = (values[:, : shape[1]] != expected).float().mean()
    padding = values[:, shape[1] :].float().abs().sum()
    return [float(differ), float((scales / expected_scales - 1).abs().max()), float(padding)]


if __name__ == "__main__":
    torch.manual_seed(0)
    compared = {f"{shape} {norm}": differences(shape, norm) for shape in SHAPES for norm in (False, True)}
    print(json.dumps(compared | {"finite": finite()}))
