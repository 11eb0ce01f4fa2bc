"""Every shipped configuration, compiled without a GPU: the instructions are there, and nothing spills or serialises."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from stoicc import configs
from stoicc.kernels.decode import DecodeConfig, decode_linear
from stoicc.kernels.hopper import HopperConfig, hopper_linear
from stoicc.lowering import lowering

# Shared memory that one thread block may have, in bytes.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}


def shipped(arch: int, kind: type) -> list[Any]:
    capability = (arch // 10, arch % 10)
    found: dict[Any, None] = {}
    for tokens in configs.TOKENS:
        for band in (1, 2):
            found.update(dict.fromkeys(c for c in configs.candidates(tokens, capability, band) if isinstance(c, kind)))
    return list(found)


def compile_for(arch: int, function: Any, constants: dict[str, Any], types: dict[str, str], warps: int) -> Any:
    names = function.arg_names
    signature = {name: "i32" for name in names} | types | dict.fromkeys(constants, "constexpr")
    aligned = [name for name, kind in signature.items() if kind.startswith("*")] + ["k_words", "x_stride", "y_stride"]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(fn=function, signature=signature, constexprs=values, attrs=attributes)
    with lowering():
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


@cache
def hopper(config: HopperConfig, dtype: str = "bf16") -> Any:
    kind = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]

    def descriptor(tokens: int) -> str:
        return f"tensordesc<{dtype}[{tokens}, 64],{gl.NVMMASharedLayout.get_default_for([tokens, 64], kind)!r}>"

    pointers = ("words", "starts", "columns", "sparse_blocks", "leads", "order")
    types = dict.fromkeys(pointers, "*i32") | {"bias": f"*{dtype}"}
    types |= {"x_desc": descriptor(config.tokens // config.cluster), "y_desc": descriptor(config.tokens)}
    constants = {
        "STAGES": config.stages,
        "CLUSTER": config.cluster,
        "TILES_TOGETHER": config.together,
        "HAS_BIAS": True,
    }
    return compile_for(90, hopper_linear, constants, types, 4)


@cache
def decode(config: DecodeConfig, arch: int, dtype: str = "bf16") -> Any:
    pointers = ("x", "words", "columns", "order")
    types = dict.fromkeys(pointers, "*i32") | {"bias": f"*{dtype}", "y": f"*{dtype}", "workspace": "*fp32"}
    k_warps, row_warps, token_warps = config.warps
    constants = {
        "ROWS": config.rows,
        "TOKENS": config.tokens,
        "K_WARPS": k_warps,
        "ROW_WARPS": row_warps,
        "TOKEN_WARPS": token_warps,
        "RECORDS": config.records,
        "STAGES": config.stages,
        "BLOCKS": config.blocks,
        "HAS_BIAS": True,
        "PDL": arch >= 90 and config.blocks < 8,
    }
    return compile_for(arch, decode_linear, constants, types, k_warps * row_warps * token_warps)


def assert_sound(kernel: Any, arch: int) -> None:
    """No local memory, no serialised wgmma, and shared memory within the chip's limit."""
    assert not re.search(r"\b(LDL|STL)\b", kernel.asm["sass"]), "registers spill to local memory"
    assert kernel.metadata.shared <= SHARED_LIMIT[arch]
    if arch == 90:
        command = [get_ptxas(90).path, "-arch=sm_90a", "-v", "-o", "/dev/null", "/dev/stdin"]
        said = subprocess.run(command, input=kernel.asm["ptx"], capture_output=True, text=True, check=True).stderr
        assert "bytes spill stores" in said and " 0 bytes spill stores" in said
        assert not re.search(r"C75\d\d", said), said


@pytest.mark.parametrize("config", shipped(90, HopperConfig), ids=str)
def test_hopper_configurations(config: HopperConfig) -> None:
    kernel = hopper(config)
    # Two consumers, each with two 2:4 walks (four steps, and single ones) and a dense one (two steps, and single ones).
    assert kernel.asm["sass"].count("HGMMA.SP.") == 2 * 2 * (4 + 1) * 2
    assert kernel.asm["sass"].count("HGMMA.64x") == 2 * (2 + 1) * 4
    assert_sound(kernel, 90)


@pytest.mark.parametrize(
    ("arch", "config"),
    [(arch, config) for arch in (90, 80, 86, 89) for config in shipped(arch, DecodeConfig)],
    ids=str,
)
def test_decode_configurations(arch: int, config: DecodeConfig) -> None:
    kernel = decode(config, arch)
    _, row_warps, token_warps = config.warps
    products = config.records * (config.rows // 16 // row_warps) * (config.tokens // 8 // token_warps)
    sass = kernel.asm["sass"]
    assert sass.count("HMMA.SP.") == 2 * 2 * products  # two sets, two k-steps
    assert sass.count("HMMA.16816.") == 2 * 4 * products
    # The first records of every set are asked for before the kernel waits for the one before it.
    if arch == 90 and config.blocks < 8:
        _, before, after = sass.split("ACQBULK")
        assert before.count("LDG.E.EF.128") >= 8
        # The next kernel begins once this one has waited, or read its last records.
        assert "PREEXIT" not in before
        _, late, rest = after.partition("PREEXIT")
        assert late
        assert ("HMMA" in rest) == (config.stages == 0)
    else:
        assert "ACQBULK" not in sass
        assert "PREEXIT" not in sass
    assert_sound(kernel, arch)


def test_float16_has_its_own_instructions() -> None:
    assert ".F16" not in decode(DecodeConfig(16, 8, (2, 1, 1), 1, 0, 1), 90).asm["sass"].split("HMMA.SP")[1][:20]
    assert "m16n8k32.row.col.f32.f16.f16.f32" in decode(DecodeConfig(16, 8, (2, 1, 1), 1, 0, 1), 90, "fp16").asm["ptx"]
    assert (
        "wgmma.mma_async.sp.sync.aligned.m64n64k32.f32.f16.f16" in hopper(HopperConfig(64, 8, 8, 1), "fp16").asm["ptx"]
    )


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
