"""From marked dense tensor-core instructions to sparse ones: the compiler pass behind ``stoicc.language``.

Stock Triton can emit the dense ``wgmma`` with all its layouts, barriers and fences, but not its sparse form. So a kernel
emits a *mark*, one line of inline assembly that is only a comment, directly before a dense ``wgmma`` of a 64 x 16 A
operand; this pass, wrapped around Triton's own PTX stage through the public
``triton.knobs.runtime.add_stages_inspection_hook``, rewrites that next instruction:

    // stoicc.<version> sparse  a0 a1 a2 a3 metadata selector   ->   wgmma.mma_async.sp ... m64nNk32 {a0, a1, a2, a3}, ...
    // stoicc.<version> dense   a0 a1 a2 a3                     ->   wgmma.mma_async    ... m64nNk16 {a0, a1, a2, a3}, ...

The registers of the A operand come from the mark, as 32-bit words exactly as they were loaded: Triton's own way through
tensors of 16-bit elements unpacks and repacks every word, and those moves wait for loads that should stay in flight.
The B operand of the sparse instruction covers 32 columns of K; the 16-column slice that the kernel names starts at the
same address and, K-major and 128-byte swizzled, has the same descriptor.

A mark that is not followed by its instruction, or a mark of another version, is a ``LoweringError``. Kernels without
marks pass through unchanged, and the hook is set only while one of ours is compiled. The version is part of the marks and
so of the source that Triton's cache hashes.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs

VERSION = "1"

_MARK = re.compile(r"//\s*stoicc\.(\S+) (sparse|dense)((?: %r\d+)+)(?: ([01]))?\s*$")
_WGMMA = re.compile(
    r"(?P<indent>\s*)wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k16\.f32\.(?P<types>\w+\.\w+)\s+"
    r"(?P<acc>\{[^}]*\}),\s*(?P<a>\{[^}]*\}|[^,{]+),\s*(?P<b>[^,]+),\s*(?P<scale_d>[^,]+),\s*(?P<rest>.*);"
)


class LoweringError(RuntimeError):
    """A mark could not be turned into the instruction it stands for; the kernel would compute something else."""


def lower(ptx: str, kernel: str = "kernel") -> str:
    """PTX with every marked ``wgmma`` rewritten.

    Args:
        ptx: what Triton generated.
        kernel: its name, for error messages.

    Raises:
        LoweringError: if a mark is of another version, is not followed by a ``wgmma`` of bfloat16 or float16 with a
            16-column A operand before the next mark, or one of its registers is written in between.
    """
    if "stoicc." not in ptx:
        return ptx
    lines: list[str] = []
    pending: tuple[str, list[str], str | None] | None = None
    for number, line in enumerate(ptx.split("\n"), start=1):
        mark = _MARK.search(line)
        if mark:
            version, kind, registers, selector = mark.groups()
            if version != VERSION:
                raise LoweringError(f"{kernel}: line {number}: mark of version {version}, this lowering is {VERSION}")
            if pending:
                raise LoweringError(f"{kernel}: line {number}: a mark follows a mark that no wgmma has consumed")
            pending = (kind, registers.split(), selector)
        elif pending and "wgmma.mma_async" in line:
            line = _rewrite(line, pending, kernel, number)
            pending = None
        elif pending and _writes(line, pending[1]):
            raise LoweringError(f"{kernel}: line {number}: {line.strip()} overwrites a register of the mark before it")
        lines.append(line)
    if pending:
        raise LoweringError(f"{kernel}: the last mark was not consumed: place it directly before its wgmma")
    return "\n".join(lines)


def _rewrite(line: str, mark: tuple[str, list[str], str | None], kernel: str, number: int) -> str:
    kind, registers, selector = mark
    found = _WGMMA.fullmatch(line.rstrip())
    if not found or len(registers) != (5 if kind == "sparse" else 4) or (selector is None) == (kind == "sparse"):
        raise LoweringError(f"{kernel}: line {number}: cannot make the marked instruction {kind}: {line.strip()}")
    # A in registers has no transposition bit, A in shared memory has one: keep the scales and B's bit.
    scale_a, scale_b, *transposed = (item.strip() for item in found["rest"].split(","))
    operands = [found["acc"], "{" + ", ".join(registers[:4]) + "}", found["b"]]
    name = "wgmma.mma_async"
    shape = f"m64n{found['n']}k16"
    if kind == "sparse":
        name, shape = name + ".sp", f"m64n{found['n']}k32"
        operands += [registers[4], str(selector)]
    operands += [found["scale_d"], scale_a, scale_b, transposed[-1]]
    return f"{found['indent']}{name}.sync.aligned.{shape}.f32.{found['types']} {', '.join(operands)};"


def _writes(line: str, registers: list[str]) -> bool:
    destination = re.match(r"\s*(?:@!?%p\d+\s+)?[a-z][\w.:]*\s+(\{[^}]*\}|%\w+)", line)
    return bool(destination) and any(re.search(re.escape(r) + r"\b", destination[1]) for r in registers)


@contextmanager
def lowering() -> Iterator[None]:
    """While active, kernels that Triton compiles have their marks lowered; another hook that is set still runs."""
    before = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = _stages_hook(before)
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before


def _stages_hook(inner: Callable[..., Any] | None) -> Callable[..., Any]:
    def hook(*arguments: Any) -> Any:
        if not arguments:  # Triton 3.7 and newer ask for what to add to the cache key.
            key, digest = inner() if inner else ("", "")
            return f"{key}stoicc-{VERSION}", f"{digest}stoicc-{VERSION}"
        if inner:
            inner(*arguments)
        stages = arguments[1]
        to_ptx = stages["ptx"]
        stages["ptx"] = lambda source, metadata: lower(to_ptx(source, metadata), metadata.get("name", "kernel"))
        return None

    return hook
