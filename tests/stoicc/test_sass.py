"""Shipped configurations, compiled without a GPU: the instructions are there, and nothing spills or serialises."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton
from compiled import KINDS, compile_for, decode, said_by_ptxas, sass
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl

from stoicc import configs
from stoicc.kernels.decode import DecodeConfig
from stoicc.kernels.hopper import HopperConfig, hopper_linear
from stoicc.kernels.hopper_decode import HopperDecodeConfig, hopper_decode_linear
from stoicc.kernels.quantise import quantise_kernel

# Shared memory that one thread block may have, in bytes.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}


def shipped(arch: int, kind: type) -> list[Any]:
    capability = (arch // 10, arch % 10)
    found: dict[Any, None] = {}
    for tokens in configs.TOKENS:
        for band in (1, 2):
            found.update(dict.fromkeys(c for c in configs.candidates(tokens, capability, band) if isinstance(c, kind)))
    return list(found)


@cache
def hopper(config: HopperConfig, dtype: str = "bf16") -> Any:
    def descriptor(tokens: int, name: str) -> str:
        block = [tokens, 1024 // KINDS[name].primitive_bitwidth]
        return f"tensordesc<{name}{block},{gl.NVMMASharedLayout.get_default_for(block, KINDS[name])!r}>"

    out = "bf16" if KINDS[dtype].primitive_bitwidth == 8 else dtype
    pointers = ("words", "starts", "columns", "sparse_blocks", "leads", "order")
    types = dict.fromkeys(pointers, "*i32") | {"bias": f"*{out}", "scales": "*fp32", "token_scales": "*fp32"}
    types |= {"x_desc": descriptor(config.tokens // config.cluster, dtype), "y_desc": descriptor(config.tokens, out)}
    constants = {
        "STAGES": config.stages,
        "CLUSTER": config.cluster,
        "TILES_TOGETHER": config.together,
        "HAS_BIAS": True,
        "PROMOTE": config.promote,
    }
    return compile_for(90, hopper_linear, constants, types, 4)


@cache
def hopper_decode(config: HopperDecodeConfig, dtype: str = "bf16") -> Any:
    block = [config.tokens, 1024 // KINDS[dtype].primitive_bitwidth]
    x_desc = f"tensordesc<{dtype}{block},{gl.NVMMASharedLayout.get_default_for(block, KINDS[dtype])!r}>"
    out = "bf16" if KINDS[dtype].primitive_bitwidth == 8 else dtype
    types = dict.fromkeys(("words", "columns", "order"), "*i32") | {"x_desc": x_desc}
    types |= {"bias": f"*{out}", "y": f"*{out}"} | dict.fromkeys(("workspace", "scales", "token_scales"), "*fp32")
    constants = {
        "ROWS": config.rows,
        "TOGETHER": config.together,
        "STAGES": config.stages,
        "BLOCKS": config.blocks,
        "HAS_BIAS": True,
        "PROMOTE": config.promote,
        "PDL": config.blocks < 8,
    }
    return compile_for(90, hopper_decode_linear, constants, types, config.rows // 16)


def assert_sound(kernel: Any, arch: int) -> None:
    """No local memory, no serialised wgmma, and shared memory within the chip's limit."""
    assert not re.search(r"\b(LDL|STL)\b", sass(kernel)), "registers spill to local memory"
    assert kernel.metadata.shared <= SHARED_LIMIT[arch]
    if arch == 90:
        said = said_by_ptxas(kernel, arch)
        assert "bytes spill stores" in said and " 0 bytes spill stores" in said
        assert not re.search(r"C75\d\d", said), said


@pytest.mark.parametrize("config", shipped(90, HopperConfig), ids=str)
def test_hopper_configurations(config: HopperConfig) -> None:
    kernel = hopper(config)
    # Two consumers, each with two 2:4 walks (four steps, and single ones) and a dense one (two steps, and single ones).
    assert sass(kernel).count("HGMMA.SP.") == 2 * 2 * (4 + 1) * 2
    assert sass(kernel).count("HGMMA.64x") == 2 * (2 + 1) * 4
    assert_sound(kernel, 90)


# The widest of each kind, which need the most registers, and the narrowest.
EIGHT_BITS = [
    pytest.param(HopperConfig(256, 5, 8, 2), "fp8e4nv", "QGMMA", "64x256", id="e4m3-256"),
    pytest.param(HopperConfig(64, 8, 8, 1), "fp8e4nv", "QGMMA", "64x64", id="e4m3-64"),
    pytest.param(HopperConfig(128, 6, 8, 2), "i8", "IGMMA", "64x128", id="int8-128"),
    pytest.param(HopperConfig(128, 6, 8, 2, promote=True), "fp8e4nv", "QGMMA", "64x128", id="e4m3-128-promoted"),
]


@pytest.mark.parametrize(("config", "dtype", "name", "shape"), EIGHT_BITS)
def test_hopper_instructions_of_eight_bits(config: HopperConfig, dtype: str, name: str, shape: str) -> None:
    kernel = hopper(config, dtype)
    code = sass(kernel)
    # Sums that are promoted are of one step.
    assert code.count(f"{name}.SP.{shape}x64.") == 2 * 2 * (1 if config.promote else 4 + 1) * 2
    assert code.count(f"{name}.{shape}x32.") == 2 * (1 if config.promote else 2 + 1) * 4
    assert_sound(kernel, 90)


HOPPER_DECODE = [
    (HopperDecodeConfig(64, 8, 4, 2, 4), "fp8e4nv", "QGMMA"),
    (HopperDecodeConfig(64, 128, 4, 2, 1), "fp8e4nv", "QGMMA"),
    (HopperDecodeConfig(128, 128, 2, 4, 2), "fp8e4nv", "QGMMA"),
    (HopperDecodeConfig(64, 64, 2, 4, 1, promote=True), "fp8e4nv", "QGMMA"),
    (HopperDecodeConfig(64, 16, 2, 4, 8), "i8", "IGMMA"),
    (HopperDecodeConfig(64, 128, 4, 2, 1), "bf16", "HGMMA"),
    (HopperDecodeConfig(64, 16, 4, 2, 4), "fp16", "HGMMA"),
]


@pytest.mark.parametrize(("config", "dtype", "name"), HOPPER_DECODE, ids=str)
def test_hopper_decode_configurations(config: HopperDecodeConfig, dtype: str, name: str) -> None:
    kernel = hopper_decode(config, dtype)
    code = sass(kernel)
    depth = 256 // KINDS[dtype].primitive_bitwidth
    assert code.count(f"{name}.SP.64x{config.tokens}x{2 * depth}.") == 2 * config.together
    assert code.count(f"{name}.64x{config.tokens}x{depth}.") == 4 * config.together
    # The first records of every kind are asked for before the kernel waits for the one before it.
    if config.blocks < 8:
        _, before, after = code.split("ACQBULK")
        assert before.count("LDG.E.EF.128") == 6 * config.together
        assert "PREEXIT" in after
    else:
        assert "ACQBULK" not in code
    assert_sound(kernel, 90)


@pytest.mark.parametrize(
    ("arch", "config", "dtype", "name"),
    [
        (89, DecodeConfig(16, 8, (2, 1, 1), 2, 0), "fp8e4nv", "QMMA"),
        (89, DecodeConfig(64, 64, (1, 4, 1), 1, 4), "fp8e4nv", "QMMA"),
        *((arch, DecodeConfig(64, 16, (1, 2, 1), 2, 4), "i8", "IMMA") for arch in (80, 86, 90)),
    ],
    ids=str,
)
def test_decode_instructions_of_eight_bits(arch: int, config: DecodeConfig, dtype: str, name: str) -> None:
    kernel = decode(config, arch, dtype)
    _, row_warps, token_warps = config.warps
    products = config.records * (config.rows // 16 // row_warps) * (config.tokens // 8 // token_warps)
    code = sass(kernel)
    assert code.count(f"{name}.SP.16864.") == 2 * 2 * products
    assert code.count(f"{name}.16832.") == 2 * 4 * products
    assert_sound(kernel, arch)


# Of each number of tokens the ones that need most registers, and others.
OF_FOUR = [
    DecodeConfig(16, 8, (4, 1, 1), 2, 0, 2),
    DecodeConfig(64, 8, (4, 1, 1), 1, 0, 1),
    DecodeConfig(64, 16, (4, 1, 1), 1, 4, 1),
    DecodeConfig(128, 32, (2, 4, 1), 1, 4, 1),
    DecodeConfig(64, 64, (1, 2, 4), 1, 3, 1),
]


@pytest.mark.parametrize(
    ("arch", "config", "dtype"),
    [
        *((arch, config, "bf16") for arch in (80, 90) for config in OF_FOUR if config.blocks == 1 or arch == 90),
        *((arch, OF_FOUR[2], "fp16") for arch in (86, 89, 90)),
    ],
    ids=str,
)
def test_decode_widens_four_bits(arch: int, config: DecodeConfig, dtype: str) -> None:
    kernel = decode(config, arch, dtype, bits=4)
    _, row_warps, token_warps = config.warps
    rows, tokens = config.rows // 16 // row_warps, config.tokens // 8 // token_warps
    code = sass(kernel)
    # Of each set four k-steps of a 2:4 record, eight of a dense one; each word is widened once, into four registers.
    assert code.count("HMMA.SP.") == 2 * 4 * config.records * rows * tokens
    assert code.count("HMMA.16816.") == 2 * 8 * config.records * rows * tokens
    widened = len(re.findall(r"HFMA2(\.BF16_V2|\.BF16|\.MMA)?\b", code))
    assert widened >= 2 * (4 + 8) * 4 * config.records * rows
    assert "LDG.E.EF.128" in code and not re.search(r"\b(LDL|STL)\b", code)
    assert_sound(kernel, arch)


def compiled_for(arch: int) -> list[DecodeConfig]:
    """The configurations to compile, of many some unless all are asked for: neighbours compile alike."""
    every = 1 if os.environ.get("EVERY_ARCHITECTURE") else {90: 2, 80: 3, 86: 8, 89: 8}[arch]
    return shipped(arch, DecodeConfig)[::every]


@pytest.mark.parametrize(
    ("arch", "config"), [(arch, config) for arch in (90, 80, 86, 89) for config in compiled_for(arch)], ids=str
)
def test_decode_configurations(arch: int, config: DecodeConfig) -> None:
    kernel = decode(config, arch)
    _, row_warps, token_warps = config.warps
    products = config.records * (config.rows // 16 // row_warps) * (config.tokens // 8 // token_warps)
    code = sass(kernel)
    assert code.count("HMMA.SP.") == 2 * 2 * products  # two sets, two k-steps
    assert code.count("HMMA.16816.") == 2 * 4 * products
    # The first records of every set are asked for before the kernel waits for the one before it.
    if arch == 90 and config.blocks < 8:
        _, before, after = code.split("ACQBULK")
        assert before.count("LDG.E.EF.128") >= 8
        # The next kernel begins once this one has waited, or read its last records.
        assert "PREEXIT" not in before
        _, late, rest = after.partition("PREEXIT")
        assert late
        assert ("HMMA" in rest) == (config.stages == 0)
    else:
        assert "ACQBULK" not in code
        assert "PREEXIT" not in code
    assert_sound(kernel, arch)


def test_float16_has_its_own_instructions() -> None:
    assert ".F16" not in sass(decode(DecodeConfig(16, 8, (2, 1, 1), 1, 0, 1), 90)).split("HMMA.SP")[1][:20]
    assert "m16n8k32.row.col.f32.f16.f16.f32" in decode(DecodeConfig(16, 8, (2, 1, 1), 1, 0, 1), 90, "fp16").asm["ptx"]
    assert (
        "wgmma.mma_async.sp.sync.aligned.m64n64k32.f32.f16.f16" in hopper(HopperConfig(64, 8, 8, 1), "fp16").asm["ptx"]
    )


@pytest.mark.parametrize("columns", [4096, 11008])
def test_tokens_are_quantised_sixteen_bytes_at_a_time(columns: int) -> None:
    names = quantise_kernel.arg_names
    block = triton.next_power_of_2(columns)
    constants = {"BLOCK": block, "NORM": False, "INTEGERS": False, "PDL": True, "EARLY": False}
    types = {"x": "*bf16", "norm": "*bf16", "values": "*fp8e4nv", "scales": "*fp32", "eps": "fp32", "largest": "fp32"}
    signature = dict.fromkeys(names, "i32") | types | dict.fromkeys(constants, "constexpr")
    # What Triton finds out by itself where it is launched.
    aligned = ("x", "norm", "values", "scales", "columns", "padded", "x_stride")
    assert not any(parameter.do_not_specialize for parameter in quantise_kernel.params if parameter.name in aligned)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=quantise_kernel, signature=signature, constexprs=values, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": min(16, block // 512)})
    moved = re.findall(r"(?:ld|st)\.global[.\w:]*", kernel.asm["ptx"])
    assert {name for name in moved if ".v4." not in name} == {"st.global.b32"}, "the scale, once a token"


OTHER_KERNELS = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
{extra}
@triton.jit
def product(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(a + i[:, None] * N + i[None, :])
    y = tl.load(b + i[:, None] * N + i[None, :])
    tl.store(c + i[:, None] * N + i[None, :], tl.dot(x, y))
types = dict(a="*bf16", b="*bf16", c="*fp32", N="constexpr")
source = ASTSource(fn=product, signature=types, constexprs={{(3,): 64}})
print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


@pytest.mark.thorough
def test_other_kernels_compile_as_if_stoicc_were_not_there(tmp_path: Path) -> None:
    printed = []
    for number, extra in enumerate(("", "import stoicc.kernels.hopper, stoicc.kernels.decode")):
        script = tmp_path / "script.py"
        script.write_text(OTHER_KERNELS.format(extra=extra))
        environment = {
            "TRITON_CACHE_DIR": str(tmp_path / f"cache{number}"),
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
        }
        command = [sys.executable, str(script)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        printed.append(re.sub(r"\s*\.(loc|file)\b.*", "", run.stdout))
    assert "wgmma" in printed[0]
    assert re.sub(r"//.*", "", printed[0]) == re.sub(r"//.*", "", printed[1])
