"""The compiler pass on text: every mark becomes its instruction, nothing else changes, and nothing is missed."""

import pytest
from triton import knobs

from stoicc.lowering import VERSION, LoweringError, lower, lowering

SHARED = "\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1,%f2}, %rd1, %rd2, %p3, 1, 1, 0, 1;"
REGISTERS = "\twgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1,%f2}, {%r7, %r8, %r9, %r10}, %rd2, 1, 1, 1, 0;"
COPY_TO = "\t@%p6 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
COPY = COPY_TO + " [%r80], [%rd21, {%r81, %r82}], [%r79];"
ARRIVE = "\t@%p41 mbarrier.arrive.shared::cta.b64 _, [%r663];"
FENCE, COMMIT = "\twgmma.fence.sync.aligned;", "\twgmma.commit_group.sync.aligned;"


def mark(text: str, version: str = VERSION) -> str:
    return f"\tstoicc.{version} {text}"


SPARSE_MARK, DENSE_MARK = mark("sparse %r1 %r2 %r3 %r4 %r5 1"), mark("dense %r1 %r2 %r3 %r4")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param(
            [SPARSE_MARK, SHARED],
            "\twgmma.mma_async.sp.sync.aligned.m64n128k32.f32.bf16.bf16 "
            "{%f1,%f2}, {%r1, %r2, %r3, %r4}, %rd2, %r5, 1, %p3, 1, 1, 1;",
            id="sparse-a-in-shared-memory",
        ),
        pytest.param(
            [SPARSE_MARK, REGISTERS],
            "\twgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 "
            "{%f1,%f2}, {%r1, %r2, %r3, %r4}, %rd2, %r5, 1, 1, 1, 1, 0;",
            id="sparse-a-in-registers",
        ),
        pytest.param(
            [DENSE_MARK, SHARED],
            "\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
            "{%f1,%f2}, {%r1, %r2, %r3, %r4}, %rd2, %p3, 1, 1, 1;",
            id="dense",
        ),
        pytest.param(
            [mark("multicast 3"), COPY],
            "\t@%p6 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%r80], [%rd21, {%r81, %r82}], [%r79], 3;",
            id="multicast",
        ),
        pytest.param(
            [mark("remote %r9"), ARRIVE],
            "\t{ .reg .b32 stoicc_remote; mapa.shared::cluster.u32 stoicc_remote, %r663, %r9; "
            "@%p41 mbarrier.arrive.shared::cluster.b64 _, [stoicc_remote]; }",
            id="remote",
        ),
    ],
)
def test_the_instruction_after_a_mark_is_rewritten(lines: list[str], expected: str) -> None:
    between = "\tadd.s32 \t%r20, %r1, 16;"
    lowered = lower("\n".join([lines[0], between, lines[1], "\tret;"])).split("\n")
    assert lowered == [lines[0], between, expected, "\tret;"]


def test_text_without_marks_is_not_touched() -> None:
    text = "\n".join([FENCE, SHARED, COMMIT, FENCE, SHARED, COMMIT, COPY, ARRIVE, ""])
    assert lower(text) is text


def test_a_cluster_is_declared_and_waiting_workers_arrive() -> None:
    head = [".visible .entry kernel(", ")", ".reqntid 384", "{", "\t.reg .b32 %r<9>;", "// %bb.0:", "\tret;"]
    lowered = lower("\n".join([*head[:-1], mark("cluster 2 128"), head[-1]])).split("\n")
    at = lowered.index(".reqntid 384")
    assert lowered[at + 1 : at + 3] == [".explicitcluster", ".reqnctapercluster 2, 1, 1"]
    arrive = lowered[lowered.index("// %bb.0:") + 1]
    assert "setp.ge.u32 stoicc_worker, stoicc_thread, 128" in arrive and "barrier.cluster.arrive" in arrive


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        pytest.param([mark("dense %r1 %r2 %r3 %r4", "0"), SHARED], "version 0", id="version"),
        pytest.param([DENSE_MARK, "\tret;"], "not consumed", id="not-consumed"),
        pytest.param([DENSE_MARK, ARRIVE], "not consumed", id="misplaced"),
        pytest.param([DENSE_MARK, SPARSE_MARK, SHARED], "line 2.*follows the dense mark of line 1", id="two-marks"),
        pytest.param([DENSE_MARK, "\tmov.b32 \t%r3, 0;", SHARED], "line 2.*overwrites", id="overwritten"),
        pytest.param([DENSE_MARK, SHARED.replace("k16", "k32")], "line 2: cannot make this dense", id="other-shape"),
        pytest.param([mark("dense %r1 %r2"), SHARED], "unknown mark", id="operands-missing"),
        pytest.param([mark("magic 1"), SHARED], "unknown mark magic", id="unknown"),
    ],
)
def test_what_cannot_be_lowered_is_an_error_that_names_the_kernel(lines: list[str], message: str) -> None:
    with pytest.raises(LoweringError, match=f"my_kernel: .*{message}"):
        lower("\n".join(lines), "my_kernel")


def chained(*between: str) -> list[str]:
    lines = [
        DENSE_MARK,
        FENCE,
        SHARED,
        COMMIT,
        *between,
        DENSE_MARK,
        FENCE,
        SHARED,
        COMMIT,
        "\twgmma.wait_group.sync.aligned 0;",
    ]
    return [line.strip() for line in lower("\n".join(lines)).split("\n")]


@pytest.mark.parametrize(
    "between", [(), ("\tadd.s32 \t%r20, %r21, 16;",), ("$L__tmp7:",)], ids=["nothing", "arithmetic", "debug-label"]
)
def test_neighbours_share_one_fence_and_one_group(between: tuple[str, ...]) -> None:
    lowered = chained(*between)
    assert lowered.count(FENCE.strip()) == lowered.count(COMMIT.strip()) == 1
    assert lowered.index(FENCE.strip()) < lowered.index(COMMIT.strip()) == len(lowered) - 2


@pytest.mark.parametrize(
    "between",
    [
        pytest.param("$L__BB0_3:", id="label"),
        pytest.param("\t@%p1 bra \t$L__BB0_4;", id="branch"),
        pytest.param("\tbar.sync \t0, 128;", id="barrier"),
        pytest.param("\twgmma.wait_group.sync.aligned 0;", id="wait"),
        pytest.param("\tld.global.b32 \t%r9, [%rd4];", id="load"),
    ],
)
def test_anything_else_between_keeps_both(between: str) -> None:
    lowered = chained(between)
    assert lowered.count(FENCE.strip()) == lowered.count(COMMIT.strip()) == 2


def test_the_hook_runs_the_one_that_was_there_and_goes_away() -> None:
    seen: list[str] = []

    def other(backend: object, stages: dict, options: object, language: object, capability: object) -> None:
        seen.append("other")

    before = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = other
    try:
        with lowering():
            stages = {"ptx": lambda source, metadata: source}
            knobs.runtime.add_stages_inspection_hook(None, stages, None, None, 90)
            assert seen == ["other"]
            assert "m64n128k16" in stages["ptx"]("\n".join([DENSE_MARK, SHARED]), {"name": "k"})
            with pytest.raises(LoweringError, match="k: "):
                stages["ptx"](DENSE_MARK, {"name": "k"})
        assert knobs.runtime.add_stages_inspection_hook is other
    finally:
        knobs.runtime.add_stages_inspection_hook = before


def test_newer_tritons_are_told_what_to_add_to_the_cache_key() -> None:
    with lowering():
        key, digest = knobs.runtime.add_stages_inspection_hook()
    assert VERSION in key and VERSION in digest
