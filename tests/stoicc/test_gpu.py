"""The kernels on a GPU: as right as cuBLAS, for every shipped configuration, and always the same bits."""

import copy
import sys
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path

import pytest
import torch
from stoicc_hybrids import random_hybrid, random_mask, random_weight
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from patch.quantise.values import quantise_groups, quantise_rows, quantise_weight
from patch.tiles import TileShape
from stoicc import configs, matmul, reference, tune
from stoicc.configs import Config, Entry
from stoicc.dispatch import run, run_scaled
from stoicc.format import SCALE_GROUP, HybridWeight, dequantised, pack, unpack
from stoicc.kernels.decode import DecodeConfig
from stoicc.kernels.expand import expand
from stoicc.kernels.hopper import HopperConfig
from stoicc.kernels.hopper_decode import HopperDecodeConfig
from stoicc.kernels.portable import PortableConfig
from stoicc.linear import HybridLinear, compile_model
from stoicc.matmul import choose, linear, linear_op
from stoicc.quantise import quantise_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
SHAPES = [(512, 512), (576, 192), (200, 344), (1536, 576), (960, 1024)]
EIGHT = [torch.float8_e4m3fn, torch.int8]


@pytest.fixture(autouse=True)
def first_of_its_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no table knows runs as its first candidate does: to measure every shape would take longer than the tests."""

    def take(_: torch.device, n: int, k: int, band: int, tokens: int, dtype: torch.dtype) -> Entry:
        return Entry(n, k, band, tokens, configs.candidates(tokens, CAPABILITY, band, dtype)[0], 1.0, 1.0)

    monkeypatch.setattr(matmul, "tune_shape", take)


def assert_right(y: Tensor, x: Tensor, hybrid: HybridWeight, bias: Tensor | None = None) -> None:
    """``y`` is no further from the float64 product than 1.1 times what cuBLAS is, on the same inputs."""
    exact = reference.exact(x, hybrid, bias)
    error = (y.double() - exact).norm() / exact.norm()
    cublas = (reference.linear(x, hybrid, bias).double() - exact).norm() / exact.norm()
    assert error <= 1.1 * cublas, f"relative error {error:.2e}, cuBLAS {cublas:.2e}"


def poisoned_run(x: Tensor, hybrid: HybridWeight, bias: Tensor | None, config: Config) -> Tensor:
    """``run`` right after memory of the output's size was filled with NaN, so that elements left out show."""
    torch.full((x.shape[0], hybrid.shape[0] + 8), float("nan"), device="cuda", dtype=x.dtype)
    return run(x, hybrid, bias, config)


def shipped(dtype: torch.dtype = torch.bfloat16) -> list[tuple[Config, int, int]]:
    """Every configuration that may be chosen, with a band and a number of tokens for it."""
    found: dict[tuple[Config, int], int] = {}
    for tokens in configs.TOKENS:
        for band in (1, 2):
            for config in configs.candidates(tokens, CAPABILITY, band, dtype):
                found.setdefault((config, band), tokens)
    return [(config, band, tokens) for (config, band), tokens in found.items()] + [(PortableConfig(32), 2, 40)]


@pytest.mark.parametrize(("config", "band", "tokens"), shipped(), ids=str)
def test_every_shipped_configuration_is_right(config: Config, band: int, tokens: int) -> None:
    tokens = max(1, tokens - 3)
    for number, (n, k) in enumerate(SHAPES):
        hybrid = random_hybrid(n, k, (64 * band, 64), 0.6, uneven=bool(number % 2), seed=number, device="cuda")
        if not configs.runs(config, CAPABILITY, hybrid.band):
            continue
        x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16) if number % 2 else None
        assert_right(poisoned_run(x, hybrid, bias, config), x, hybrid, bias)


def hybrid_of_eight(
    n: int, k: int, tile: TileShape, share: float, dtype: torch.dtype, *, uneven: bool = False, seed: int = 0
) -> HybridWeight:
    mask = random_mask(n, k, tile, share, uneven=uneven, seed=seed, device="cuda")
    values, scales = quantise_weight(mask.apply(random_weight(n, k, seed=seed, device="cuda")), dtype)
    return pack(values, mask, scales)


def assert_right_of_eight(hybrid: HybridWeight, tokens: int, bias: Tensor | None, config: Config) -> None:
    """No further from the float64 product of the quantised operands than 1.1 times what rounding the result is.

    And for e4m3, of which the tensor cores add up fewer bits, than 1.1 times what the library's fast mode is.
    """
    n, k = hybrid.shape
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
    values, scales = quantise_tokens(x, hybrid.dtype)
    exact = reference.exact(values, hybrid, bias, scales)
    allowed = (exact.bfloat16().double() - exact).norm() / exact.norm()
    if hybrid.dtype == torch.float8_e4m3fn and hasattr(torch, "_scaled_mm") and n % 16 == k % 16 == 0:
        by = {"scale_a": scales[:, None], "scale_b": hybrid.scales[None, :], "out_dtype": torch.bfloat16}
        fast = torch._scaled_mm(values, unpack(hybrid).T, use_fast_accum=True, **by).double()
        fast = fast if bias is None else fast + bias.double()
        allowed = max(allowed, (fast - exact).norm() / exact.norm())
    torch.full((tokens, n + 8), float("nan"), device="cuda", dtype=torch.bfloat16)
    y = run_scaled(values, scales, hybrid, bias, torch.bfloat16, config)
    error = (y.double() - exact).norm() / exact.norm()
    # Of short sums the tensor cores' own order of addition counts.
    assert error <= 1.1 * allowed + 2e-4, f"relative error {error:.2e}, allowed {allowed:.2e}"
    assert torch.equal(y, run_scaled(values, scales, hybrid, bias, torch.bfloat16, config))


@pytest.mark.parametrize(
    ("dtype", "config", "band", "tokens"), [(dtype, *each) for dtype in EIGHT for each in shipped(dtype)], ids=str
)
def test_every_shipped_configuration_of_eight_bits_is_right(
    dtype: torch.dtype, config: Config, band: int, tokens: int
) -> None:
    for number, (n, k) in enumerate(SHAPES):
        hybrid = hybrid_of_eight(n, k, (64 * band, 128), 0.6, dtype, uneven=bool(number % 2), seed=number)
        if configs.runs(config, CAPABILITY, hybrid.band, dtype):
            bias = torch.randn(n, device="cuda", dtype=torch.bfloat16) if number % 2 else None
            assert_right_of_eight(hybrid, max(1, tokens - 3), bias, config)


@pytest.mark.skipif(CAPABILITY < (9, 0), reason="a GPU whose library multiplies with a scale for each token")
@pytest.mark.parametrize("tokens", [1, 16, 64, 130, 1000, 4096])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0], ids=["dense", "mixed", "two-four"])
def test_precise_sums_are_as_good_as_the_librarys_precise_mode(share: float, tokens: int) -> None:
    n, k = 1152, 8192
    mask = random_mask(n, k, (128, 128), share, uneven=True, device="cuda")
    # All of one sign, so that sums grow, and what is cut off with them.
    weight = mask.apply(random_weight(n, k, device="cuda")).abs()
    quantised, weight_scales = quantise_weight(weight, torch.float8_e4m3fn)
    hybrid = pack(quantised, mask, weight_scales)
    x = torch.rand(tokens, k, device="cuda", dtype=torch.bfloat16)
    values, scales = quantise_tokens(x, hybrid.dtype)
    exact = reference.exact(values, hybrid, None, scales)
    by = {"scale_a": scales[:, None], "scale_b": weight_scales[None, :], "out_dtype": torch.bfloat16}
    library = torch._scaled_mm(values, unpack(hybrid).T, use_fast_accum=False, **by)
    error, allowed = ((y.double() - exact).norm() for y in (linear(x, hybrid, precise=True), library))
    assert error <= 1.1 * allowed, f"{error / exact.norm():.2e} for {allowed / exact.norm():.2e}"


@pytest.mark.skipif(CAPABILITY < (9, 0), reason="a GPU whose library multiplies with a scale for each token")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_slower_linears_of_eight_bits_are_left_dense(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # By its module: the package exports a function of the same name.
    monkeypatch.setattr(sys.modules[HybridLinear.__module__], "faster_packed", lambda *_, **__: False)
    masks = {name: random_mask(256, 256, (128, 128), 0.5, seed=int(name), device="cuda") for name in ("0", "1")}
    layers = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in masks)).to("cuda", torch.bfloat16)
    packed = copy.deepcopy(layers)
    compile_model(packed, masks, dtype=torch.float8_e4m3fn)
    report = compile_model(layers, masks, tokens=(1, 64), dtype=torch.float8_e4m3fn)
    assert report.slower == ("0", "1") and not report.packed
    x = torch.randn(3, 7, 256, device="cuda", dtype=torch.bfloat16)
    y = (torch.compile(layers, fullgraph=True) if compiled else layers)(x)
    assert (y - packed(x)).norm() <= 0.03 * y.norm()


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 17, 63, 64, 65, 127, 300, 1000, 8192])
@pytest.mark.parametrize("dtype", EIGHT, ids=str)
def test_chosen_kernel_of_eight_bits_at_any_number_of_tokens(dtype: torch.dtype, tokens: int) -> None:
    for share in (0.0, 0.7, 1.0):
        hybrid = hybrid_of_eight(1152, 896, (128, 128), share, dtype, uneven=True)
        x = torch.randn(tokens, 896, device="cuda", dtype=torch.bfloat16)
        bias = torch.randn(1152, device="cuda", dtype=torch.bfloat16)
        values, scales = quantise_rows(x, dtype)
        exact = reference.exact(values, hybrid, bias, scales)
        assert (linear(x, hybrid, bias).double() - exact).norm() <= 0.003 * exact.norm()


def assert_replayed_as_run(chain: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A captured chain of products gives the bits of the same chain run one by one, whatever was in its output."""
    chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        expected = chain(x)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


def chained(hybrids: list[HybridWeight]) -> Callable[[Tensor], Tensor]:
    """One product after the other, each with the kernel that the tables choose."""
    return lambda x: reduce(linear, hybrids, x)


@pytest.mark.parametrize("dtype", EIGHT, ids=str)
def test_eight_bits_in_a_captured_chain(dtype: torch.dtype) -> None:
    hybrids = [hybrid_of_eight(1024, 1024, (128, 128), 0.6, dtype, uneven=True, seed=seed) for seed in range(4)]

    for tokens in (1, 16, 300):
        assert_replayed_as_run(chained(hybrids), torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", EIGHT, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
def test_quantised_tokens_are_the_references(dtype: torch.dtype, norm: bool) -> None:
    for tokens, k in ((1, 8), (37, 344), (130, 4096), (3, 28672)):
        x = torch.randn(tokens, k + 8, device="cuda", dtype=torch.bfloat16)[:, :k]
        weight = torch.randn(k, device="cuda", dtype=torch.bfloat16) if norm else None
        values, scales = quantise_tokens(x, dtype, weight, 1e-5)
        expected, expected_scales = reference.quantise_tokens(x, dtype, weight, 1e-5)
        differ = (values[:, :k].view(torch.int8) != expected.view(torch.int8)).float().mean()
        # Sums of a norm in another order put some values on the other side of an edge.
        assert differ <= (0.01 if norm else 0)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-2 if norm else 0, atol=0)
        assert not values[:, k:].view(torch.int8).any()


FAMILIES = [
    DecodeConfig(16, 8, (4, 1, 1), 2, 0, 1),
    DecodeConfig(64, 16, (1, 2, 1), 2, 4, 4),
    DecodeConfig(128, 64, (1, 4, 2), 1, 4, 4),
    DecodeConfig(64, 128, (1, 2, 4), 1, 4, 1),
    HopperDecodeConfig(64, 16, 4, 2, 4),
    HopperDecodeConfig(64, 128, 2, 2, 1),
    HopperDecodeConfig(128, 64, 2, 4, 2),
    HopperConfig(64, 8, 8, 1),
    HopperConfig(256, 4, 4, 1),
    HopperConfig(256, 5, 4, 2),
    PortableConfig(32),
]
FAMILIES = [config for config in FAMILIES if configs.runs(config, CAPABILITY, 2)]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("config", FAMILIES, ids=str)
def test_every_density(config: Config, share: float) -> None:
    for tile in ((128, 64), (128, 128), (256, 256)):
        hybrid = random_hybrid(768, 1024, tile, share, uneven=True, device="cuda")
        x = torch.randn(77, 1024, device="cuda", dtype=torch.bfloat16)
        assert_right(poisoned_run(x, hybrid, None, config), x, hybrid)


@pytest.mark.parametrize("config", FAMILIES, ids=str)
def test_rows_that_are_all_dense_or_all_two_four(config: Config) -> None:
    mask = random_mask(1024, 512, (128, 128), 0.5, device="cuda")
    mask.dense[0], mask.dense[3], mask.dense[5] = True, False, True
    hybrid = pack(random_weight(1024, 512, device="cuda"), mask)
    x = torch.randn(130, 512, device="cuda", dtype=torch.bfloat16)
    assert_right(poisoned_run(x, hybrid, None, config), x, hybrid)


@pytest.mark.parametrize("config", FAMILIES, ids=str)
def test_float16(config: Config) -> None:
    hybrid = random_hybrid(576, 704, (128, 128), 0.5, torch.float16, device="cuda")
    x = torch.randn(70, 704, device="cuda", dtype=torch.float16)
    assert_right(poisoned_run(x, hybrid, None, config), x, hybrid)


@pytest.mark.parametrize("config", FAMILIES, ids=str)
def test_same_bits_every_time(config: Config) -> None:
    hybrid = random_hybrid(2048, 2048, (128, 128), 0.6, uneven=True, device="cuda")
    x = torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)
    first = run(x, hybrid, None, config)
    for _ in range(20):
        assert torch.equal(run(x, hybrid, None, config), first)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 17, 63, 64, 65, 127, 300, 1000, 8192])
@pytest.mark.parametrize("tile", [(64, 64), (128, 128)], ids=["64x64", "128x128"])
def test_chosen_kernel_at_any_number_of_tokens(tile: tuple[int, int], tokens: int) -> None:
    hybrid = random_hybrid(1152, 896, tile, 0.7, uneven=True, device="cuda")
    x = torch.randn(tokens, 896, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(1152, device="cuda", dtype=torch.bfloat16)
    assert_right(linear(x, hybrid, bias), x, hybrid, bias)


def test_leading_dimensions_strides_and_no_tokens() -> None:
    hybrid = random_hybrid(200, 344, (64, 64), 0.5, device="cuda")
    wide = torch.randn(3, 5, 400, device="cuda", dtype=torch.bfloat16)
    views = [wide[..., :344], wide[..., 3:347], wide.transpose(0, 1)[..., 8:352], wide[:, ::2, 8:352], wide[0, 0, :344]]
    for x in views:
        y = linear(x, hybrid)
        assert y.shape == (*x.shape[:-1], 200)
        assert_right(y, x, hybrid)
    assert linear(wide[:0, :, :344], hybrid).shape == (0, 5, 200)


def test_graph_capture_and_replay() -> None:
    hybrid = random_hybrid(1024, 1024, (128, 128), 0.5, device="cuda")
    for tokens in (1, 16, 512):
        x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
        linear(x, hybrid)
        parts = (*hybrid.parts().values(), hybrid.orders)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear_op(x, *parts, None, x.dtype, [1024, 1024], [128, 128], hybrid.band)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            y.fill_(float("nan"))
            graph.replay()
            assert_right(y, x, hybrid)


@pytest.mark.parametrize("config", FAMILIES, ids=str)
def test_a_captured_chain_of_products_waits_for_each(config: Config) -> None:
    # In a graph a kernel may begin before the one before it is done: right after another product, or one of torch.
    hybrids = [random_hybrid(1024, 1024, (128, 64), 0.6, uneven=True, seed=seed, device="cuda") for seed in range(6)]
    assert all(hybrid.band == 2 for hybrid in hybrids)

    def chain(x: Tensor) -> Tensor:
        for number, hybrid in enumerate(hybrids):
            x = run(x, hybrid, None, config)
            x = x.relu() if number % 3 == 2 else x
        return x

    assert_replayed_as_run(chain, torch.randn(24, 1024, device="cuda", dtype=torch.bfloat16))


KINDS = ["bf16", "fp8", "fp8-precise", "int8", "int4"]


def hybrid_named(kind: str, n: int, k: int, seed: int = 0) -> HybridWeight:
    if kind == "bf16":
        return random_hybrid(n, k, (128, 128), 0.6, seed=seed, device="cuda")
    if kind == "int4":
        return hybrid_of_four(n, k, (128, 128), 0.6, seed=seed)
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    return hybrid_of_eight(n, k, (128, 128), 0.6, dtype, seed=seed)


@pytest.mark.parametrize("tokens", [16, 300])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:many tokens have no kernel for int4")
def test_many_streams_at_once(kind: str, tokens: int) -> None:
    hybrid = hybrid_named(kind, 2048, 2048)
    multiply = partial(linear, precise=kind == "fp8-precise")
    xs = [torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    expected = [multiply(x, hybrid) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, x in zip(streams, xs, strict=True):
            with torch.cuda.stream(stream):
                results.append(multiply(x, hybrid))
        torch.cuda.synchronize()
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result, wanted)


def test_fullgraph_compile() -> None:
    hybrid = random_hybrid(512, 512, (128, 128), 0.5, device="cuda")
    parts = (*hybrid.parts().values(), hybrid.orders)

    @torch.compile(fullgraph=True)
    def layer(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(linear_op(x, *parts, None, torch.bfloat16, [512, 512], [128, 128], 2)) + 1

    x = torch.randn(40, 512, device="cuda", dtype=torch.bfloat16)
    expected = torch.nn.functional.silu(linear(x, hybrid)) + 1
    torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tokens", [1, 16])
def test_between_kernels_that_begin_early(tokens: int) -> None:
    # Inductor's kernels, as the products, can begin before the one before them is done: the bits stay the same.
    hybrids = [random_hybrid(1024, 1024, (128, 64), 0.6, uneven=True, seed=seed, device="cuda") for seed in range(4)]

    def blocks(x: Tensor) -> Tensor:
        for hybrid in hybrids:
            parts = (*hybrid.parts().values(), hybrid.orders)
            y = linear_op(torch.nn.functional.silu(x), *parts, None, x.dtype, [1024, 1024], [128, 64], hybrid.band)
            x = x + torch.nn.functional.rms_norm(y, (1024,))
        return x

    def captured(x: Tensor, early: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        torch.compiler.reset()
        with torch._inductor.config.patch({"triton.enable_pdl": early}):
            compiled = torch.compile(blocks, fullgraph=True)
            compiled(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = compiled(x)
        return graph, y

    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
    (late, expected), (early, y) = captured(x, False), captured(x, True)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        late.replay()
        early.replay()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", EIGHT, ids=str)
def test_a_compiler_fuses_the_quantisation_of_tokens(dtype: torch.dtype, tokens: int) -> None:
    masks = {str(number): random_mask(1024, 1024, (128, 128), 0.6, seed=number, device="cuda") for number in range(3)}
    layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024, bias=False) for _ in masks).to("cuda", torch.bfloat16)
    compile_model(layers, masks, dtype=dtype)

    def blocks(x: Tensor) -> Tensor:
        for layer in layers:
            x = x + layer(torch.nn.functional.rms_norm(x, (1024,)))
        return x

    x = torch.randn(1, tokens, 1024, device="cuda", dtype=torch.bfloat16)
    with torch._inductor.config.patch({"triton.enable_pdl": True}):
        torch.compiler.reset()
        y, (code,) = run_and_get_code(torch.compile(blocks, fullgraph=True), x)
    assert "quantise_tokens" not in code and code.count("stoicc.scaled_linear") >= len(layers)
    # Between a norm and the values of 8 bits it does not round to 16: some values come to lie on another side.
    assert (y - blocks(x)).float().norm() < 0.03 * blocks(x).float().norm()


@pytest.mark.parametrize("faster", [True, False], ids=["faster", "slower"])
def test_linears_are_packed_where_the_tuning_table_says_so(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # By its module: the package exports a function of the same name.
    monkeypatch.setattr(sys.modules[HybridLinear.__module__], "faster_packed", lambda *_, **__: faster)
    masks = {name: random_mask(256, 256, (64, 64), share, device="cuda") for name, share in (("0", 0.0), ("1", 0.5))}
    layers = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in masks)).to("cuda", torch.bfloat16)
    report = compile_model(layers, masks, tokens=(1,))
    assert [name for spec in report.packed for name, _ in spec.parts] == (["0", "1"] if faster else [])
    assert (report.dense, report.slower) == (((), ()) if faster else (("0",), ("1",)))


@pytest.mark.parametrize("tile", [(64, 64), (64, 256), (256, 64), (256, 256)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_packing_on_the_gpu_is_packing_on_the_cpu(tile: tuple[int, int]) -> None:
    mask = random_mask(576, 512, tile, 0.5)
    weight = random_weight(576, 512)
    on_cpu, on_gpu = pack(weight, mask), pack(weight.cuda(), mask.to("cuda"))
    for name, part in on_cpu.parts().items():
        assert torch.equal(part, on_gpu.parts()[name].cpu()), name
    assert torch.equal(unpack(on_gpu).cpu().view(torch.int16), mask.apply(weight).view(torch.int16))


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_precise_sums_in_a_captured_chain(tokens: int) -> None:
    hybrids = [hybrid_named("fp8", 1024, 1024, seed) for seed in range(4)]
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
    assert_replayed_as_run(lambda x: reduce(partial(linear, precise=True), hybrids, x), x)


@pytest.mark.parametrize("dtype", EIGHT, ids=str)
@pytest.mark.parametrize("tokens", [5, 60, 300])
def test_rows_of_eight_bits_that_are_all_dense_or_all_two_four(dtype: torch.dtype, tokens: int) -> None:
    mask = random_mask(1024, 512, (128, 128), 0.5, device="cuda")
    mask.dense[0], mask.dense[3], mask.dense[5] = True, False, True
    values, scales = quantise_weight(mask.apply(random_weight(1024, 512, device="cuda")), dtype)
    hybrid = pack(values, mask, scales)
    config = choose(hybrid.device, 1024, 512, hybrid.band, configs.token_bucket(tokens), dtype)
    assert_right_of_eight(hybrid, tokens, None, config)


def hybrid_of_four(
    n: int, k: int, tile: TileShape, share: float, *, uneven: bool = False, seed: int = 0
) -> HybridWeight:
    mask = random_mask(n, k, tile, share, uneven=uneven, seed=seed, device="cuda")
    weight = quantise_groups(mask.apply(random_weight(n, k, seed=seed, device="cuda")), SCALE_GROUP)
    return pack(weight.values, mask, weight.scales)


def assert_right_of_four(hybrid: HybridWeight, x: Tensor, bias: Tensor | None, config: Config) -> None:
    """No further from the float64 product of the quantised operands than 1.1 times what rounding the result is.

    Nor than 1.1 times a library that rounds the weight to 16 bits first, which in half precision does as well.
    """
    exact = reference.exact(x, hybrid, bias)
    y = poisoned_run(x, hybrid, bias, config)
    assert y.dtype == x.dtype and y.shape == exact.shape
    error = (y.double() - exact).norm() / exact.norm()
    rounding = (exact.to(x.dtype).double() - exact).norm() / exact.norm()
    library = (reference.linear(x, hybrid, bias).double() - exact).norm() / exact.norm()
    bound = 1.1 * min(rounding, library) + 1e-5
    assert error <= bound, f"error {error:.2e}, rounding {rounding:.2e}, library {library:.2e}"
    assert torch.equal(y, run(x, hybrid, bias, config))


SHAPES_OF_FOUR = [(512, 512), (576, 128), (200, 384), (1536, 640), (960, 1024), (128, 8192)]


OF_FOUR = [each for each in shipped(torch.int4) if isinstance(each[0], DecodeConfig)]


@pytest.mark.parametrize(("config", "band", "tokens"), OF_FOUR, ids=str)
def test_every_shipped_configuration_of_four_bits_is_right(config: Config, band: int, tokens: int) -> None:
    tokens = max(1, tokens - 3)
    for number, (n, k) in enumerate(SHAPES_OF_FOUR):
        tile = (min(n, 64 * band), 128)
        hybrid = hybrid_of_four(n, k, tile, 0.6, uneven=bool(number % 2), seed=number)
        if configs.runs(config, CAPABILITY, hybrid.band, torch.int4):
            dtype = torch.float16 if number == 2 else torch.bfloat16
            x = torch.randn(tokens, k, device="cuda", dtype=dtype)
            bias = torch.randn(n, device="cuda", dtype=dtype) if number % 2 else None
            assert_right_of_four(hybrid, x, bias, config)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 17, 33, 63, 64, 65, 90, 91, 127, 1000])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0], ids=["dense", "mixed", "two-four"])
@pytest.mark.filterwarnings("ignore:many tokens have no kernel for int4")
def test_chosen_kernel_of_four_bits_at_any_number_of_tokens(share: float, tokens: int) -> None:
    hybrid = hybrid_of_four(1152, 896, (128, 128), share, uneven=True)
    x = torch.randn(3, tokens, 900, device="cuda", dtype=torch.bfloat16)[1, :, 4:]
    bias = torch.randn(1152, device="cuda", dtype=torch.bfloat16)
    exact = reference.exact(x, hybrid, bias)
    assert (linear(x, hybrid, bias).double() - exact).norm() <= 0.003 * exact.norm()


def test_rows_of_four_bits_that_are_all_dense_or_all_two_four() -> None:
    mask = random_mask(1024, 512, (128, 128), 0.5, device="cuda")
    mask.dense[0], mask.dense[3], mask.dense[5] = True, False, True
    weight = quantise_groups(mask.apply(random_weight(1024, 512, device="cuda")), SCALE_GROUP)
    hybrid = pack(weight.values, mask, weight.scales)
    for tokens, config in ((5, DecodeConfig(32, 8, (4, 1, 1), 1, 0)), (60, DecodeConfig(128, 64, (1, 4, 2), 1, 3))):
        assert_right_of_four(hybrid, torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16), None, config)


@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.filterwarnings("ignore:many tokens have no kernel for int4")
def test_four_bits_in_a_captured_chain(tokens: int) -> None:
    hybrids = [hybrid_of_four(1024, 1024, (128, 128), 0.6, uneven=True, seed=seed) for seed in range(4)]

    assert_replayed_as_run(chained(hybrids), torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16))


def test_four_bits_expand_on_the_gpu_as_on_the_cpu() -> None:
    hybrid = hybrid_of_four(200, 384, (64, 128), 0.5)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(expand(hybrid, dtype), dequantised(hybrid).to(dtype))


def test_what_no_table_knows_is_measured_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = configs.candidates(1, CAPABILITY, 2)[:2]
    monkeypatch.setattr(configs, "candidates", lambda *_: few)
    monkeypatch.setenv("HTS_CACHE", str(tmp_path))
    device = torch.device("cuda", torch.cuda.current_device())
    drawn = torch.cuda.get_rng_state(device)
    entry = tune.tune_shape(device, 512, 512, 2, 1)
    assert torch.equal(torch.cuda.get_rng_state(device), drawn)
    assert entry.config in few and entry.microseconds > 0 and entry.dense_microseconds > 0
    assert configs.read_table(configs.measured_table(torch.cuda.get_device_name(device))) == (entry,)
    configs.measured.cache_clear()
