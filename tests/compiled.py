"""Kernels compiled without a GPU, for what their instructions must be and for what they compute in emulation."""

import io
import subprocess
import tempfile
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from stoicc.kernels.decode import DecodeConfig, decode_linear
from stoicc.lowering import lowering

KINDS = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp8e4nv": gl.float8e4nv, "i8": gl.int8}


def compile_for(arch: int, function: Any, constants: dict[str, Any], types: dict[str, str], warps: int) -> Any:
    names = function.arg_names
    signature = {name: "i32" for name in names} | types | dict.fromkeys(constants, "constexpr")
    aligned = [name for name, kind in signature.items() if kind.startswith("*")] + ["k_words", "x_stride", "y_stride"]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(fn=function, signature=signature, constexprs=values, attrs=attributes)
    with lowering(), knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as said:
        knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    if said.getvalue():
        _log(kernel).write_text(said.getvalue(), encoding="utf-8")
    return kernel


def _log(kernel: Any) -> Path:
    """Where what the assembler said of a kernel is kept: beside the kernel, in Triton's cache."""
    (cubin,) = (path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    return Path(cubin).with_suffix(".ptxas")


def said_by_ptxas(kernel: Any, arch: int) -> str:
    """What the assembler says of a kernel's registers, spills, and of what it had to serialise."""
    log = _log(kernel)
    if not log.exists():
        command = [get_ptxas(arch).path, f"-arch=sm_{arch}{'a' * (arch >= 90)}", "-v", "-o", "/dev/null", "/dev/stdin"]
        done = subprocess.run(command, input=kernel.asm["ptx"], capture_output=True, text=True, check=True)
        log.write_text(done.stderr, encoding="utf-8")
    return log.read_text(encoding="utf-8")


@cache
def sass(kernel: Any) -> str:
    """All of the machine code: what Triton keeps as ``sass`` ends after 64 KiB, and takes twice as long."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(Path(get_ptxas(90).path).with_name("nvdisasm")), "-c", "-ndf", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def decode(config: DecodeConfig, arch: int, dtype: str = "bf16", bits: int | None = None) -> Any:
    pointers = ("x", "words", "columns", "order")
    out = "bf16" if KINDS[dtype].primitive_bitwidth == 8 else dtype
    types = dict.fromkeys(pointers, "*i32") | {"bias": f"*{out}", "y": f"*{out}"}
    types |= dict.fromkeys(("workspace", "scales", "token_scales"), "*fp32")
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
        "VALUES": KINDS[dtype],
        "BITS": bits or KINDS[dtype].primitive_bitwidth,
    }
    return compile_for(arch, decode_linear, constants, types, k_warps * row_warps * token_warps)
