"""The pass over PTX, on text: what every mark becomes, what is refused, and how it hooks into the compiler."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from triton import knobs

from stoicc.lowering import VERSION, LoweringError, lower, lowering

ACC = "{%r10,%r11,%r12,%r13}"
FENCE, COMMIT, WAIT = (
    "\twgmma.fence.sync.aligned;",
    "\twgmma.commit_group.sync.aligned;",
    "\twgmma.wait_group.sync.aligned 0;",
)
HEADER = [".visible .entry kernel(", "\t.param .u64 kernel_param_0", ")", ".reqntid 384", ".maxnreg 168", "{"]
COPY = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"


def mark(text: str, version: str = VERSION) -> str:
    return f"\tstoicc.{version} {text}"


def wgmma(
    a: str = "%rd1", b: str = "%rd2", scale_d: str = "%p48", bits: str = "1, 1, 0, 0", types: str = "bf16.bf16"
) -> str:
    return f"\twgmma.mma_async.sync.aligned.m64n256k16.f32.{types} {ACC}, {a}, {b}, {scale_d}, {bits};"


def body(*lines: str) -> str:
    return "\n".join(("// begin", *lines, "\tret;", ""))


SPARSE = "sparse %r1 %r2 %r3 %r4 %r5 1"
DENSE = "dense %r1 %r2 %r3 %r4"

# Waits and arrivals of each warp

POLL = ["{", "\t.reg .pred complete;", "\twaitLoop:", "}"]


def test_quiet_warps_meet_no_more_and_arrive_each() -> None:
    lines = [
        mark("quiet 128"),
        "\tbar.sync \t0, 128;",
        "\t// begin inline asm",
        *POLL,
        "\tbarrier.sync 2, 128;",
        "\t.loc\t1 2 3",
        "\t@%p42 mbarrier.arrive.shared::cta.b64 _, [%r3];",
        "\tbar.sync \t0, 128;",
        "\tld.shared.b32 %r1, [%r2];",
        "\tbar.sync \t1, 32;",
        *POLL,
    ]
    found = lower(body(*lines))
    assert found.count("bar.sync") == 2 and "barrier.sync" not in found
    assert "bar.sync \t0, 128;\n\tld.shared" in found and "bar.sync \t1, 32;" in found
    assert "@%p42" not in found and "%laneid" in found
    assert "@stoicc_first mbarrier.arrive.shared::cta.b64 _, [%r3]; }" in found


def test_a_remote_arrival_is_of_each_warp_too() -> None:
    arrive = "\t@%p42 mbarrier.arrive.shared::cta.b64 _, [%r3];"
    found = lower(body(mark("quiet 128"), mark("remote %r7"), arrive))
    assert "mapa.shared::cluster.u32 stoicc_remote, %r3, %r7;" in found
    assert "@stoicc_first mbarrier.arrive.shared::cluster.b64 _, [stoicc_remote]; }" in found
    assert "@%p42" not in found


# Rewrites

REWRITTEN = [
    pytest.param(
        SPARSE,
        wgmma(),
        f"\twgmma.mma_async.sp.sync.aligned.m64n256k32.f32.bf16.bf16 {ACC}, {{%r1, %r2, %r3, %r4}}, %rd2, %r5, 1, "
        "%p48, 1, 1, 0;",
        id="sparse",
    ),
    pytest.param(
        "sparse %r1 %r2 %r3 %r4 %r5 0",
        wgmma("{%r6,%r7,%r8,%r9}", scale_d="0", bits="1, 1, 0", types="f16.f16"),
        f"\twgmma.mma_async.sp.sync.aligned.m64n256k32.f32.f16.f16 {ACC}, {{%r1, %r2, %r3, %r4}}, %rd2, %r5, 0, "
        "0, 1, 1, 0;",
        id="sparse-of-registers",
    ),
    pytest.param(
        "sparse %r1 %r2 %r3 %r4 %r5 0",
        f"\twgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {ACC}, %rd1, %rd2, %p48, 1, 1;",
        f"\twgmma.mma_async.sp.sync.aligned.m64n8k64.f32.e4m3.e4m3 {ACC}, {{%r1, %r2, %r3, %r4}}, %rd2, %r5, 0, "
        "%p48, 1, 1;",
        id="sparse-e4m3",
    ),
    pytest.param(
        DENSE,
        f"\twgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {ACC}, %rd1, %rd2, %p48, 1, 1;",
        f"\twgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {ACC}, {{%r1, %r2, %r3, %r4}}, %rd2, %p48, 1, 1;",
        id="dense-e4m3",
    ),
    pytest.param(
        "sparse %r1 %r2 %r3 %r4 %r5 0",
        f"\twgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {ACC}, %rd1, %rd2, 1;",
        f"\twgmma.mma_async.sp.sync.aligned.m64n8k64.s32.s8.s8 {ACC}, {{%r1, %r2, %r3, %r4}}, %rd2, %r5, 0, 1;",
        id="sparse-integers",
    ),
    pytest.param(
        DENSE,
        wgmma(),
        f"\twgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {ACC}, {{%r1, %r2, %r3, %r4}}, %rd2, %p48, 1, 1, 0;",
        id="dense-of-shared-memory",
    ),
    pytest.param(
        DENSE,
        wgmma("{%r6, %r7, %r8, %r9}", scale_d="1", bits="1, -1, 1"),
        f"\twgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {ACC}, {{%r1, %r2, %r3, %r4}}, %rd2, 1, 1, -1, 1;",
        id="dense-of-registers",
    ),
    pytest.param(
        DENSE,
        wgmma(bits="1, 1, 1, 0"),
        f"\twgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {ACC}, {{%r1, %r2, %r3, %r4}}, %rd2, %p48, 1, 1, 0;",
        id="keeps-the-transposition-of-b",
    ),
    pytest.param(
        "multicast 3",
        f"\t@%p7 {COPY} [%r1], [%rd1, {{%r2, %r3}}], [%r4];",
        f"\t@%p7 {COPY}.multicast::cluster [%r1], [%rd1, {{%r2, %r3}}], [%r4], 3;",
        id="multicast",
    ),
    pytest.param(
        "remote %r9",
        "\tmbarrier.arrive.shared::cta.b64 _, [%r1];",
        "\t{ .reg .b32 stoicc_remote; mapa.shared::cluster.u32 stoicc_remote, %r1, %r9; "
        "mbarrier.arrive.shared::cluster.b64 _, [stoicc_remote]; }",
        id="remote",
    ),
    pytest.param(
        "remote %r9",
        "\t@!%p2 mbarrier.arrive.shared::cta.b64 _, [%r1+8];",
        "\t{ .reg .b32 stoicc_remote; mapa.shared::cluster.u32 stoicc_remote, %r1+8, %r9; "
        "@!%p2 mbarrier.arrive.shared::cluster.b64 _, [stoicc_remote]; }",
        id="remote-with-a-guard",
    ),
]


@pytest.mark.parametrize(("text", "instruction", "expected"), REWRITTEN)
def test_instruction_after_the_mark_is_rewritten(text: str, instruction: str, expected: str) -> None:
    between = "\tbfe.u32 \t%r624, %r623, 4, 14;"
    source = body(mark(text), between, instruction, instruction.replace("%rd1", "%rd3"))
    assert lower(source) == source.replace(mark(text) + "\n", "").replace(instruction, expected, 1)


def test_each_mark_takes_its_own_instruction() -> None:
    lowered = lower(
        body(
            mark(SPARSE),
            wgmma(b="%rd20"),
            WAIT,
            mark("multicast 3"),
            f"\t{COPY} [%r1], [%rd1, {{%r2}}], [%r4];",
            mark("dense %r5 %r6 %r7 %r8"),
            wgmma(b="%rd21"),
        )
    )
    instructions = [line for line in lowered.split("\n") if line.startswith(("\twgmma.mma", "\tcp."))]
    assert ".sp." in instructions[0] and "%rd20, %r5, 1" in instructions[0]
    assert ".multicast::cluster" in instructions[1]
    assert "{%r5, %r6, %r7, %r8}, %rd21" in instructions[2]


def test_cluster_mark_makes_the_kernel_one_of_clusters() -> None:
    start = "// %bb.0:"
    source = "\n".join(
        [*HEADER, "\t.reg .b32 %r<9>;", start, "\tmov.u32 %r1, %tid.x;", mark("cluster 2 128"), "\tret;", "}"]
    )
    lines = lower(source).split("\n")
    entry = lines.index(".reqntid 384")
    assert lines[entry + 1 : entry + 4] == [".explicitcluster", ".reqnctapercluster 2, 1, 1", ".maxnreg 168"]
    arrive = lines[lines.index(start) + 1]
    assert "setp.ge.u32 stoicc_worker, stoicc_thread, 128;" in arrive
    assert "@stoicc_worker barrier.cluster.arrive.release;" in arrive
    kept = [line for line in lines if line not in (*lines[entry + 1 : entry + 3], arrive)]
    assert kept == source.replace(mark("cluster 2 128") + "\n", "").split("\n")


PLAIN = body(
    FENCE,
    wgmma(),
    COMMIT,
    FENCE,
    wgmma(),
    COMMIT,
    WAIT,
    "\t// stoic comment  ",
    "\tmbarrier.arrive.shared::cta.b64 _, [%r1];",
)


@pytest.mark.parametrize(
    "source", ["", "\n\n", PLAIN, PLAIN.replace("\n", "\r\n")], ids=["empty", "blank", "lf", "crlf"]
)
def test_without_marks_nothing_changes(source: str) -> None:
    assert lower(source) == source


# Refusals


REFUSED = [
    pytest.param([mark(SPARSE, "0123456789ab"), wgmma()], "line 2: mark of version 0123456789ab", id="other-version"),
    pytest.param([mark(SPARSE)], "sparse mark of line 2 was not consumed", id="not-consumed"),
    pytest.param([wgmma(), mark(DENSE)], "dense mark of line 3 was not consumed", id="after-its-instruction"),
    pytest.param([mark("multicast 3"), wgmma()], "multicast mark of line 2 was not consumed", id="other-instruction"),
    pytest.param(
        [mark(SPARSE), mark(DENSE), wgmma()], "line 3: a mark follows the sparse mark of line 2", id="two-marks"
    ),
    pytest.param([mark(SPARSE), "\tadd.s32 \t%r3, %r7, 1;", wgmma()], "line 3: .* overwrites", id="overwritten-value"),
    pytest.param([mark(SPARSE), "\tmov.b32 \t%r5, 0;", wgmma()], "line 3: .* overwrites", id="overwritten-metadata"),
    pytest.param(
        [mark(DENSE), "\tld.global.v2.b32 { %r30, %r4 }, [ %rd1 + 0 ];", wgmma()],
        "overwrites",
        id="overwritten-by-a-vector",
    ),
    pytest.param([mark(DENSE), "\t@!%p3 mov.b32 %r1, %r9;", wgmma()], "overwrites", id="overwritten-under-a-guard"),
    pytest.param(
        [mark("remote %r9"), "\txor.b32 %r9, %r9, 1;", "\tmbarrier.arrive.shared::cta.b64 _, [%r1];"],
        "overwrites",
        id="overwritten-rank",
    ),
    pytest.param(
        [mark(SPARSE), wgmma().replace("k16", "k8").replace("bf16.bf16", "tf32.tf32")],
        "line 3: cannot make this sparse: wgmma",
        id="wgmma-of-other-types",
    ),
    pytest.param([mark(SPARSE), wgmma().replace(".f32.", ".f16.")], "cannot make this sparse", id="wgmma-to-float16"),
    pytest.param(
        [mark("multicast 3"), "\tcp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1}], [%r4];"],
        "line 3: cannot make this multicast",
        id="store-is-not-multicast",
    ),
    pytest.param(
        [mark("remote %r9"), "\tmbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 64;"],
        "line 3: cannot make this remote",
        id="arrive-of-other-kind",
    ),
    pytest.param([mark("sparse %r1 %r2 %r3 %r4 %r5"), wgmma()], "line 2: unknown mark sparse", id="too-few-operands"),
    pytest.param([mark("dense %r1 %r2 %r3 %r4 %r5"), wgmma()], "line 2: unknown mark dense", id="too-many-operands"),
    pytest.param([mark("ternary %r1"), wgmma()], "line 2: unknown mark ternary", id="unknown-kind"),
]


@pytest.mark.parametrize(("lines", "message"), REFUSED)
def test_refused_with_the_kernel_and_the_line(lines: list[str], message: str) -> None:
    with pytest.raises(LoweringError, match=f"^my_kernel: .*{message}"):
        lower(body(*lines), "my_kernel")


@pytest.mark.parametrize(
    "line",
    ["\tadd.s32 \t%r30, %r3, 1;", "\tst.shared.b32 [%r1], %r2;", "\tsetp.eq.b32 %p1, %r5, 0;", "\tmov.b32 %r11, %r1;"],
    ids=["sum", "store", "comparison", "longer-name"],
)
def test_registers_of_a_mark_may_be_read_before_it_is_consumed(line: str) -> None:
    assert "wgmma.mma_async.sp" in lower(body(mark(SPARSE), line, wgmma()))


# Chains of wgmma


def chain(*between: str) -> list[str]:
    """What is left of the fences and commits of two marked ``wgmma`` with ``between`` them, in order."""
    lines = lower(body(FENCE, mark(DENSE), wgmma(), COMMIT, *between, mark(DENSE), FENCE, wgmma(), COMMIT, WAIT))
    names = {
        "wgmma.fence": "fence",
        "wgmma.mma_async": "mma",
        "wgmma.commit_group": "commit",
        "wgmma.wait_group": "wait",
    }
    found = (line.strip().split(".sync")[0] for line in lines.split("\n"))
    return [names[name] for name in found if name in names]


ADDRESSES = [
    "$L__tmp9:",
    "\t.loc\t1 2 3",
    "\tadd.s32 \t%r625, %r623, 64;",
    "\tor.b64 \t%rd6, %rd7, 8;",
    "\tmov.pred \t%p9, -1;",
]


def test_neighbours_share_one_fence_and_one_commit() -> None:
    assert chain() == ["fence", "mma", "mma", "commit", "wait"]


def test_address_arithmetic_does_not_break_a_chain() -> None:
    assert chain(*ADDRESSES) == ["fence", "mma", "mma", "commit", "wait"]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("\tbra.uni \t$L__BB0_3;", id="branch"),
        pytest.param("\t@%p3 bra \t$L__BB0_3;", id="conditional-branch"),
        pytest.param("\t@!%p3 bra \t$L__BB0_3;", id="negated-branch"),
        pytest.param("$L__BB0_2:", id="label"),
        pytest.param("\tbar.sync \t0, 128;", id="bar"),
        pytest.param("\tbarrier.sync \t1;", id="barrier"),
        pytest.param("\tmbarrier.arrive.shared::cta.b64 _, [%r1];", id="mbarrier"),
        pytest.param("\t@%p3 mbarrier.arrive.shared::cta.b64 _, [%r1];", id="guarded-mbarrier"),
        pytest.param("\tld.shared.b32 \t%r77, [%r78];", id="load"),
        pytest.param("\t@%p9 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd5 + 0 ];", id="guarded-load"),
        pytest.param("\tst.shared.b32 \t[%r78], %r77;", id="store"),
        pytest.param("\tcp.async.bulk.commit_group;", id="copy"),
        pytest.param("\tret;", id="return"),
        pytest.param("{", id="block"),
    ],
)
def test_anything_else_breaks_a_chain(line: str) -> None:
    assert chain(*ADDRESSES, line) == ["fence", "mma", "commit", "fence", "mma", "commit", "wait"]


def test_wait_breaks_a_chain() -> None:
    assert chain(WAIT) == ["fence", "mma", "commit", "wait", "fence", "mma", "commit", "wait"]


@pytest.mark.parametrize("register", ["%r10", "%r1"], ids=["accumulator", "operand"])
def test_write_of_an_operand_breaks_a_chain(register: str) -> None:
    """``wgmma`` may not use a register that was written since the last fence."""
    assert chain(f"\tmov.b32 \t{register}, %r40;") == ["fence", "mma", "commit", "fence", "mma", "commit", "wait"]


# The hook

Stages = dict[str, Callable[[Any, dict[str, Any]], Any]]


@pytest.fixture(autouse=True)
def hook_is_left_as_found() -> Iterator[None]:
    before = knobs.runtime.add_stages_inspection_hook
    yield
    knobs.runtime.add_stages_inspection_hook = before


def compiled(source: str, metadata: dict[str, Any]) -> str:
    """What the active hook makes of a compiler whose PTX stage gives ``source``."""
    stages: Stages = {"ptx": lambda given, _: given, "cubin": lambda given, _: given}
    if knobs.runtime.add_stages_inspection_hook:
        knobs.runtime.add_stages_inspection_hook("backend", stages, "options", "language", 90)
    return stages["ptx"](source, metadata)


MARKED = body(mark(SPARSE), wgmma())


def test_hook_lowers_the_ptx_stage_only_while_active() -> None:
    with lowering():
        assert compiled(MARKED, {"name": "k"}) == lower(MARKED)
    assert compiled(MARKED, {"name": "k"}) == MARKED


@pytest.mark.parametrize(("metadata", "name"), [({"name": "hopper_linear"}, "hopper_linear"), ({}, "kernel")], ids=str)
def test_hook_passes_the_kernels_name(metadata: dict[str, Any], name: str) -> None:
    with lowering(), pytest.raises(LoweringError, match=f"^{name}: "):
        compiled(body(mark(SPARSE)), metadata)


def test_another_hook_still_runs_and_is_restored() -> None:
    calls = []

    def other(*arguments: Any) -> None:
        calls.append(arguments)
        to_ptx = arguments[1]["ptx"]
        arguments[1]["ptx"] = lambda source, metadata: to_ptx(source, metadata) + "\t// other"

    knobs.runtime.add_stages_inspection_hook = other
    with lowering():
        assert compiled(MARKED, {}) == lower(MARKED + "\t// other")
    assert len(calls) == 1 and calls[0][0] == "backend" and calls[0][2:] == ("options", "language", 90)
    assert knobs.runtime.add_stages_inspection_hook is other


def test_hook_is_restored_after_an_error() -> None:
    before = knobs.runtime.add_stages_inspection_hook
    with pytest.raises(KeyError), lowering():
        raise KeyError
    assert knobs.runtime.add_stages_inspection_hook is before


def test_hook_without_arguments_gives_the_version_for_the_cache_key() -> None:
    """What Triton asks for from 3.7 on: a key and its digest."""
    with lowering():
        key, digest = knobs.runtime.add_stages_inspection_hook()
    assert VERSION in key and VERSION in digest


def test_hook_without_arguments_keeps_the_other_hooks_key() -> None:
    knobs.runtime.add_stages_inspection_hook = lambda *arguments: ("their key", "their digest")
    with lowering():
        key, digest = knobs.runtime.add_stages_inspection_hook()
    assert "their key" in key and "their digest" in digest and VERSION in key and VERSION in digest


def test_nested_is_as_once() -> None:
    with lowering(), lowering():
        assert compiled(MARKED, {}) == lower(MARKED)


def test_two_threads_may_overlap() -> None:
    """A thread that leaves may not take the hook from one that still compiles, nor leave its own behind."""
    before = knobs.runtime.add_stages_inspection_hook
    first, second = lowering(), lowering()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    active = compiled(MARKED, {}) != MARKED
    second.__exit__(None, None, None)
    assert active
    assert knobs.runtime.add_stages_inspection_hook is before
