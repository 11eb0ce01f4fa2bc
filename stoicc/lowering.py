"""From marked instructions to ones that stock Triton does not emit: the compiler pass behind ``stoicc.language``.

Stock Triton can emit the dense ``wgmma`` and bulk copies with all their layouts, barriers and fences, but not their
sparse and cluster forms. So a kernel emits a *mark*, one line of inline assembly that ptxas would refuse, directly
before the instruction; this pass, wrapped around Triton's own PTX stage through the public
``triton.knobs.runtime.add_stages_inspection_hook``, rewrites what follows:

    sparse a0 a1 a2 a3 metadata selector    wgmma.mma_async ... m64nNk16       A in those registers, 2:4, m64nNk32
    dense a0 a1 a2 a3                       wgmma.mma_async ... m64nNk16       A in those registers
                                            of 8 bits: m64nNk32                the same, 2:4 m64nNk64
    multicast mask                          cp.async.bulk.tensor to shared     into the same place of several blocks
    remote rank                             mbarrier.arrive                    at the barrier of another block

The registers of the A operand come from the mark, as 32-bit words exactly as they were loaded: Triton's own way through
tensors of 16-bit elements unpacks and repacks every word, and those moves wait for loads that should stay in flight.
The B operand of the sparse instruction covers twice the columns of K; the slice that the kernel names starts at the
same address and, K-major and 128-byte swizzled, has the same descriptor. Instructions of 8 bits have no transposition
operands, for B is always K-major, those of integers no scales either, and the only selector of metadata is 0.

A fifth mark stands alone: ``cluster size threads`` makes the kernel one of clusters of that many blocks. Only its first
``threads`` threads wait at the cluster's barrier; the others, Triton's waiting workers, arrive as the kernel starts.

A sixth, ``quiet threads``, stands alone as well: the warps of a partition of that many threads meet at no barrier
before they wait at an ``mbarrier`` or arrive at one, and instead of one thread the first lane of each warp arrives, so
that the count must be that of the warps. Triton lets all warps meet each time; for a ring that is filled by bulk copies
and read by ``wgmma`` alone, each warp knows for itself when its part is there and when it has read it.

A mark that is not followed by its instruction, or a mark of another version, is a ``LoweringError``. Kernels without
marks pass through unchanged, and the hook is set only while one of ours is compiled.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import RLock
from typing import Any

from triton import knobs

# The marks carry the digest of this file, so that no change to it can be served an old binary by Triton's cache.
VERSION = sha256(Path(__file__).read_bytes()).hexdigest()[:12]

_MARK = re.compile(r"\s*stoicc\.(?P<version>\S+) (?P<kind>\w+) ?(?P<operands>.*?)\s*")
_WGMMA = re.compile(
    r"(?P<indent>\s*)wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k(?P<k>16|32)\.(?P<types>[fs]32\.\w+\.\w+)\s+"
    r"(?P<acc>\{[^}]*\}),\s*(?P<a>\{[^}]*\}|[^,{]+),\s*(?P<b>[^,]+),\s*(?P<scale_d>[^,]+)(,\s*(?P<rest>.*))?;"
)
_BREAKS_CHAIN = re.compile(
    r"(@!?%p\d+ )?(bra|brx|ret|bar|barrier|mbarrier|ld|st|cp|wgmma\.wait_group)\b|(?!\$L__tmp)[\w$]+:|\{$"
)
_REGISTER = re.compile(r"%r\d+")
_COPY = re.compile(
    r"(?P<head>.*cp\.async\.bulk\.tensor\.\dd)\.shared::(cluster|cta)(?P<kind>\.global\.mbarrier::complete_tx::bytes)"
    r"(?P<rest> .*);"
)
_ARRIVE = re.compile(r"\s*(?P<guard>@!?%p\d+ )?mbarrier\.arrive\.shared::cta\.b64 _, \[(?P<barrier>[^\]]+)\];")


# Lines that do nothing, and arrivals of one thread.
_NOTHING = re.compile(r"\s*(\$L__tmp\d+:|\.loc\b.*|//.*)?\s*")
_ARRIVAL = re.compile(r"@!?%p\d+ (mbarrier\.arrive\.shared::(?:cta|cluster)\.b64 _, \[[^\]]+\];)")
_BY_WARP = (
    r"{ .reg .pred stoicc_first; .reg .b32 stoicc_lane; mov.u32 stoicc_lane, %laneid; "
    r"setp.eq.u32 stoicc_first, stoicc_lane, 0; @stoicc_first \1 }"
)


class LoweringError(RuntimeError):
    """A mark could not be turned into the instruction it stands for; the kernel would compute something else."""


@dataclass(frozen=True)
class _Mark:
    kind: str
    operands: list[str]
    line: int


def lower(ptx: str, kernel: str = "kernel") -> str:
    """PTX with the instruction after every mark rewritten.

    Args:
        ptx: what Triton generated.
        kernel: its name, for error messages.

    Raises:
        LoweringError: if a mark is of another version, its operands are not of its kind, the instruction it stands for
            does not follow before the next mark, or one of its registers is written in between.
    """
    if "stoicc." not in ptx:
        return ptx
    lines: list[str] = []
    pending: _Mark | None = None
    cluster: _Mark | None = None
    quiet: _Mark | None = None
    for number, line in enumerate(ptx.split("\n"), start=1):
        found = _MARK.fullmatch(line)
        if found:
            mark = _Mark(found["kind"], found["operands"].split(), number)
            _check(mark, found["version"], kernel)
            if pending:
                raise LoweringError(
                    f"{kernel}: line {number}: a mark follows the {pending.kind} mark of line {pending.line}"
                )
            if mark.kind == "cluster":
                cluster = mark
            elif mark.kind == "quiet":
                quiet = mark
            else:
                pending = mark
            continue
        elif pending and _INSTRUCTIONS[pending.kind] in line:
            rewritten = _REWRITES[pending.kind](line, pending)
            if rewritten is None:
                raise LoweringError(f"{kernel}: line {number}: cannot make this {pending.kind}: {line.strip()}")
            line, pending = rewritten, None
        elif pending and _writes(line, pending.operands):
            raise LoweringError(f"{kernel}: line {number}: {line.strip()} overwrites a register of the mark before it")
        lines.append(line)
    if pending:
        raise LoweringError(
            f"{kernel}: the {pending.kind} mark of line {pending.line} was not consumed: place it directly before its "
            f"{_INSTRUCTIONS[pending.kind]}"
        )
    lines = _chain(lines)
    if quiet:
        lines = _quiet(lines, quiet)
    return "\n".join(lines if cluster is None else _in_clusters(lines, cluster))


def _check(mark: _Mark, version: str, kernel: str) -> None:
    if version != VERSION:
        raise LoweringError(f"{kernel}: line {mark.line}: mark of version {version}, this lowering is {VERSION}")
    if mark.kind not in _OPERANDS or len(mark.operands) != _OPERANDS[mark.kind]:
        raise LoweringError(f"{kernel}: line {mark.line}: unknown mark {mark.kind} {' '.join(mark.operands)}")


def _wgmma(line: str, mark: _Mark) -> str | None:
    found = _WGMMA.fullmatch(line.rstrip())
    if not found:
        return None
    scales = [item.strip() for item in (found["rest"] or "").split(",") if item.strip()]
    if found["k"] == "16":
        # A in registers has no transposition bit, A in shared memory has one: keep the scales and B's bit.
        scales = [*scales[:2], scales[-1]]
    elif mark.operands[5:] not in ([], ["0"]):
        return None
    operands = [found["acc"], "{" + ", ".join(mark.operands[:4]) + "}", found["b"], *mark.operands[4:]]
    name, k = ("wgmma.mma_async.sp", 2) if mark.kind == "sparse" else ("wgmma.mma_async", 1)
    operands += [found["scale_d"], *scales]
    shape = f"m64n{found['n']}k{k * int(found['k'])}"
    return f"{found['indent']}{name}.sync.aligned.{shape}.{found['types']} {', '.join(operands)};"


def _multicast(line: str, mark: _Mark) -> str | None:
    found = _COPY.fullmatch(line.rstrip())
    if not found:
        return None
    return f"{found['head']}.shared::cluster{found['kind']}.multicast::cluster{found['rest']}, {mark.operands[0]};"


def _remote(line: str, mark: _Mark) -> str | None:
    found = _ARRIVE.fullmatch(line.rstrip())
    return found and (
        "\t{ .reg .b32 stoicc_remote; "
        f"mapa.shared::cluster.u32 stoicc_remote, {found['barrier']}, {mark.operands[0]}; "
        f"{found['guard'] or ''}mbarrier.arrive.shared::cluster.b64 _, [stoicc_remote]; }}"
    )


def _chain(lines: list[str]) -> list[str]:
    """Let ``wgmma`` that directly follow each other share one fence and one group.

    Triton fences and commits each; then every instruction waits for the one before it to have read its registers. Only
    the first needs the fence, and only the last the commit, as long as nothing but address arithmetic lies between.
    """
    kept: list[str] = []
    commit: int | None = None  # where the previous wgmma of this chain was committed
    since: list[str] = []  # what came after it
    dropped: set[int] = set()
    for number, line in enumerate(lines):
        text = line.strip()
        if text == "wgmma.fence.sync.aligned;" and commit is not None:
            operands = next((_REGISTER.findall(later) for later in lines[number:] if "wgmma.mma_async" in later), [])
            if not any(_writes(earlier, operands) for earlier in since):
                dropped.add(commit)
                continue
        if text == "wgmma.commit_group.sync.aligned;":
            commit, since = len(kept), []
        elif _BREAKS_CHAIN.match(text):
            commit = None
        since.append(line)
        kept.append(line)
    return [line for number, line in enumerate(kept) if number not in dropped]


def _in_clusters(lines: list[str], mark: _Mark) -> list[str]:
    size, threads = mark.operands
    arrive = (
        "\t{ .reg .pred stoicc_worker; .reg .b32 stoicc_thread; mov.u32 stoicc_thread, %tid.x; "
        f"setp.ge.u32 stoicc_worker, stoicc_thread, {threads}; @stoicc_worker barrier.cluster.arrive.release; }}"
    )
    entry = next(i for i, line in enumerate(lines) if line.startswith(".reqntid"))
    body = next(i for i, line in enumerate(lines) if i > entry and line.startswith("// %bb.0"))
    directives = [".explicitcluster", f".reqnctapercluster {size}, 1, 1"]
    return [*lines[: entry + 1], *directives, *lines[entry + 1 : body + 1], arrive, *lines[body + 1 :]]


def _quiet(lines: list[str], mark: _Mark) -> list[str]:
    """Without the barriers directly before waits and arrivals, and with an arrival of each warp."""
    barrier = re.compile(rf"\s*bar(rier)?\.sync\s+\d+, {mark.operands[0]};")
    kept: list[str] = []
    for number, line in enumerate(lines):
        if barrier.fullmatch(line):
            following = (later for later in lines[number + 1 :] if not _NOTHING.fullmatch(later))
            first, second = next(following, ""), next(following, "")
            if _ARRIVAL.search(first) or (first.strip() == "{" and second.strip() == ".reg .pred complete;"):
                continue
        kept.append(_ARRIVAL.sub(_BY_WARP, line))
    return kept


_OPERANDS = {"sparse": 6, "dense": 4, "multicast": 1, "remote": 1, "cluster": 2, "quiet": 1}
_INSTRUCTIONS = {
    "sparse": "wgmma.mma_async",
    "dense": "wgmma.mma_async",
    "multicast": "cp.async.bulk.tensor",
    "remote": "mbarrier.arrive",
}
_REWRITES: dict[str, Callable[[str, _Mark], str | None]] = {
    "sparse": _wgmma,
    "dense": _wgmma,
    "multicast": _multicast,
    "remote": _remote,
}


def _writes(line: str, operands: list[str]) -> bool:
    destination = re.match(r"\s*(?:@!?%p\d+\s+)?[a-z][\w.:]*\s+(\{[^}]*\}|%\w+)", line)
    return destination is not None and any(
        re.search(re.escape(register) + r"\b", destination[1]) for register in operands if register[0] == "%"
    )


class _Active:
    """How many are compiling with marks lowered, and the hook that was set before the first."""

    lock = RLock()
    depth = 0
    before: Callable[..., Any] | None = None


@contextmanager
def lowering() -> Iterator[None]:
    """While active, kernels that Triton compiles have their marks lowered; another hook that is set still runs.

    Triton has one hook for the whole process: threads take turns, and the first in sets it, the last out restores it.
    """
    with _Active.lock:
        if _Active.depth == 0:
            _Active.before = knobs.runtime.add_stages_inspection_hook
            knobs.runtime.add_stages_inspection_hook = _stages_hook(_Active.before)
        _Active.depth += 1
        try:
            yield
        finally:
            _Active.depth -= 1
            if _Active.depth == 0:
                knobs.runtime.add_stages_inspection_hook = _Active.before


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
