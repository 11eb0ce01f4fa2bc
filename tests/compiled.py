"""Kernels compiled without a GPU, for what their instructions must be and for what they compute in emulation."""

from functools import cache
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
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
    with lowering():
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


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
