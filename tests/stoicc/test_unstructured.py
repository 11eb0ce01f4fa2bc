"""The unstructured kernel: packing by zeros, the operator, and the kernel in Triton's interpreter, on a CPU.

Triton decides when it is imported whether it interprets, so all cases of the kernel run in one process of their own.
"""

import json

import pytest
import torch
import triton
from interpreted import printed_by
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from patch.errors import UserError
from stoicc.kernels.unstructured import _unstructured_kernel, launch, pack_unstructured, unpack_unstructured
from stoicc.unstructured import UnstructuredLinear, compile_unstructured, unstructured_linear

# Neither rows nor columns nor tokens need be whole blocks.
SHAPES = [(64, 64, 1), (136, 152, 5), (65, 129, 33), (3, 8, 70)]
KEPT = [0.0, 0.5, 1.0]
SPLITS = [1, 3]
# The interpreter cuts bfloat16 off where a GPU rounds.
TOLERANCE = {"float16": 5e-4, "bfloat16": 5e-3}


def sparse_weight(n: int, k: int, kept: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    return weight.masked_fill(torch.rand(n, k, generator=generator) >= kept, 0)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("kept", KEPT)
def test_unpacking_gives_the_weight_back(shape: tuple[int, int, int], kept: float) -> None:
    weight = sparse_weight(*shape[:2], kept, torch.bfloat16)
    packed = pack_unstructured(weight)
    assert torch.equal(unpack_unstructured(packed), weight)
    assert packed.values.numel() == int((weight != 0).sum())


def test_half_of_the_weights_take_less_than_two_thirds_of_the_bytes() -> None:
    weight = sparse_weight(512, 1024, 0.5, torch.bfloat16)
    assert pack_unstructured(weight).nbytes < 2 / 3 * weight.nbytes


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return printed_by(__file__, tmp_path_factory)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_kernel_against_the_dense_product(
    errors: dict[str, float], shape: tuple[int, int, int], kept: float, splits: int, dtype: str
) -> None:
    assert errors[f"{shape} {kept} {splits} {dtype}"] <= TOLERANCE[dtype]


def test_packed_linears_of_a_model_compute_what_the_linears_did() -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 16, bias=False))
    for linear in model:
        linear.weight.data = sparse_weight(*linear.weight.shape, 0.5, torch.float32)
    x = torch.randn(2, 3, 24)
    with torch.no_grad():
        expected = model(x)
        compile_unstructured(model, {"0": model[0], "1": model[1]})
        assert all(isinstance(module, UnstructuredLinear) for module in model)
        assert torch.equal(model(x), expected)


def test_operands_that_do_not_fit_are_refused() -> None:
    packed = pack_unstructured(sparse_weight(64, 64, 0.5, torch.bfloat16))
    with pytest.raises(UserError, match="last dimension of 64"):
        unstructured_linear(torch.zeros(2, 32, dtype=torch.bfloat16), packed)
    with pytest.raises(UserError, match=r"float32.*bfloat16"):
        unstructured_linear(torch.zeros(2, 64), packed)
    with pytest.raises(UserError, match="must be a matrix"):
        pack_unstructured(torch.zeros(4))


def test_no_tokens_give_no_outputs() -> None:
    packed = pack_unstructured(sparse_weight(40, 64, 0.5, torch.bfloat16))
    assert unstructured_linear(torch.zeros(0, 64, dtype=torch.bfloat16), packed).shape == (0, 40)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_it_compiles_for_a_gpu_onto_tensor_cores(tokens: int, dtype: str) -> None:
    names = _unstructured_kernel.arg_names
    constants = {"TOKENS": tokens, "SPLITS": 4, "UPCAST": False}
    types = {"x": f"*{dtype}", "values": f"*{dtype}", "parts": "*fp32", "bits": "*i32", "rows": "*i32"}
    signature = dict.fromkeys(names, "i32") | types | dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types}
    for arch in (80, 90):
        source = ASTSource(_unstructured_kernel, signature, constants, aligned)
        assembly = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
        assert "mma" in assembly and "popc" in assembly


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [*SHAPES, (1536, 576, 1), (576, 1536, 16), (4096, 4096, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_it_is_as_right_as_cublas(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, k, tokens = shape
    weight = sparse_weight(n, k, 0.5, dtype).cuda()
    x, bias = torch.randn(tokens, k, device="cuda", dtype=dtype), torch.randn(n, device="cuda", dtype=dtype)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    error = (unstructured_linear(x, pack_unstructured(weight), bias).double() - exact).norm()
    assert error <= 1.1 * (torch.nn.functional.linear(x, weight, bias).double() - exact).norm()


def relative_error(n: int, k: int, tokens: int, kept: float, splits: int, dtype: torch.dtype) -> float:
    weight = sparse_weight(n, k, kept, dtype)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() @ weight.double().T
    error = (launch(x, pack_unstructured(weight), splits).double() - exact).norm()
    return float(error / exact.norm()) if kept else float(error)


if __name__ == "__main__":
    found = {}
    for shape in SHAPES:
        for kept in KEPT:
            for splits in SPLITS:
                for dtype in TOLERANCE:
                    found[f"{shape} {kept} {splits} {dtype}"] = relative_error(
                        *shape, kept, splits, getattr(torch, dtype)
                    )
    print(json.dumps(found))
