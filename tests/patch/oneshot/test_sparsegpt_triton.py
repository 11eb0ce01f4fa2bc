"""SparseGPT's blocks of columns in one kernel: against the eager ones, in Triton's interpreter or on a GPU.

Triton decides when it is imported whether it interprets, so all cases run in one process of their own.
"""

import json
import re

import pytest
import torch
import triton
from interpreted import printed_by
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from patch.oneshot import sparsegpt, sparsegpt_triton
from patch.quantise.precisions import PRECISIONS
from patch.quantise.values import limits, nearest

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Rows need not fill a program, nor columns a block.
SHAPES = {f"{rows}x{columns}": (rows, columns) for rows, columns in [(64, 128), (75, 36), (1, 4), (130, 12), (9, 30)]}
KEPT = {"none": 0.0, "half": 0.5, "all": 1.0}
CASES = [
    pytest.param(f"{shape}-{kept}-{chooses}", id=f"{shape}-{kept}-kept-{chooses}")
    for shape in SHAPES
    for kept in KEPT
    for chooses in ("two-of-four", "given")
    if chooses == "given" or SHAPES[shape][1] % 4 == 0
]

# Precision, rows, columns, how many of them are settled.
ROUNDED = [
    pytest.param(case, id=case)
    for case in ("fp8-75-24-24-two-of-four", "int4-70-40-32-given", "int8-1-30-30-given", "int4-66-24-8-two-of-four")
]


def measured(case: str) -> dict[str, float]:
    """How far the kernel is from eager code in float64, and the share of groups where it chooses otherwise."""
    shape, kept, chooses = case.split("-", 2)
    rows, columns = SHAPES[shape]
    source = torch.Generator().manual_seed(rows + columns)
    block = torch.randn(rows, columns, generator=source)
    # Ties, of which the earlier are kept; where there is a choice, a weight that is no number, which counts as large.
    block[0, :4] = torch.tensor([1.0, -1.0, 1.0, 1.0])
    if rows > 1 and chooses == "two-of-four":
        block[1, 2] = torch.nan
    # As `inverse_factor` lays it out: columns are contiguous, and it is a part of a larger one.
    whole_factor = torch.zeros(columns + 8, columns + 8).T
    upper = whole_factor[4:-4, 4:-4]
    upper.copy_(torch.eye(columns) + torch.randn(columns, columns, generator=source).triu(1) / columns)
    assert upper.stride() == sparsegpt.inverse_factor(torch.eye(columns + 8)).upper[4:-4, 4:-4].stride()
    keep = torch.rand(rows, columns, generator=source) < KEPT[kept]

    def settled(settle, dtype: torch.dtype, device: str) -> list[Tensor]:  # type: ignore[no-untyped-def]
        # Columns are contiguous, in a larger tensor.
        whole = torch.zeros(columns + 4, rows, dtype=dtype, device=device).T
        here = whole[:, 2 : columns + 2]
        here.copy_(block)
        chosen = torch.zeros_like(keep, device=device) if chooses == "two-of-four" else None
        errors = settle(here, upper.to(device, dtype), keep.to(device), chosen)
        assert not whole[:, :2].any() and not whole[:, columns + 2 :].any(), "wrote outside the block"
        stays = keep.to(device) if chosen is None else keep.to(device) | chosen
        found = [here.masked_fill(~stays, 0), errors, stays if chosen is None else chosen]
        # What is no number must be none on both sides.
        return [tensor.double().cpu().nan_to_num(nan=1e9) for tensor in found]

    fused = settled(sparsegpt_triton.settle, torch.float32, DEVICE)
    eager = settled(sparsegpt.settle, torch.float64, "cpu")
    return {
        "weights": float((fused[0] - eager[0]).abs().max()),
        "errors": float((fused[1] - eager[1]).abs().max()),
        "chosen": float((fused[2] != eager[2]).double().mean()),
    }


def measured_rounding(case: str) -> dict[str, float]:
    """How far the kernel is from eager code, both in float32, and the share of what it rounds to other values."""
    precision, *shape, chooses = case.split("-", 4)
    about, (rows, columns, settled) = PRECISIONS[precision], map(int, shape)
    source = torch.Generator().manual_seed(rows + columns)
    block = torch.randn(columns, rows, generator=source).T
    upper = torch.eye(columns) + torch.randn(columns, columns, generator=source).triu(1) / columns
    # Of some rows everything is kept, of some nothing, of the others half; scales are too small for some weights.
    keep = torch.rand(rows, columns, generator=source) < torch.tensor([0.5, 1.0, 0.5, 0.0]).repeat(rows)[:rows, None]
    scales = (torch.rand(rows, settled, generator=source) + 0.5) / limits(about)[1]
    # In the middle between two values; nothing changes a first column before it is settled.
    block[::3, 0] = 2.5 * scales[::3, 0]
    found = []
    for settle, device in ((sparsegpt_triton.settle_rounded, DEVICE), (sparsegpt.settle_rounded, "cpu")):
        here = block.to(device, copy=True)
        chosen = torch.zeros_like(keep, device=device) if chooses == "two-of-four" else None
        errors, values = settle(here, upper.to(device), keep.to(device), chosen, scales.to(device), about)
        found.append([t.float().cpu() for t in (values, errors, here, keep if chosen is None else chosen)])
    values, errors, left, chosen = ((ours - theirs).abs() for ours, theirs in zip(*found, strict=True))
    return {
        "values": float((values > 0).float().mean()),
        "errors": float(errors.max()),
        "left": float(left[:, settled:].max()) if settled < columns else 0.0,
        "chosen": float(chosen.max()),
    }


def rounded_otherwise(name: str) -> int:
    """How many of all that decide how a precision rounds the kernel rounds otherwise; no error goes anywhere."""
    precision = PRECISIONS[name]
    lowest, highest = limits(precision)
    values = torch.arange(lowest, highest + 1)
    if name == "fp8":
        values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        values = torch.cat([-values[1:].flip(0), values])
    middles = (values[1:] + values[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    cases = torch.cat([values, middles, middles.nextafter(infinity), middles.nextafter(-infinity)])
    cases = torch.cat([cases, torch.tensor([lowest * 1.1, highest * 1.1, 1e-30, -1e-30, 1e30, -1e30])])
    block = torch.nn.functional.pad(cases, (0, -len(cases) % 16)).reshape(-1, 16)
    device = block.to(DEVICE, copy=True)
    keep, ones = torch.ones_like(device, dtype=torch.bool), torch.ones_like(device)
    _, found = sparsegpt_triton.settle_rounded(device, torch.eye(16, device=DEVICE), keep, None, ones, precision)
    expected = nearest(block, precision)
    # Bits, for a zero has a sign; not where there are no two of them, once they are integers.
    kind = getattr(torch, precision.dtype)
    return int((found.cpu().to(kind).view(torch.uint8) != expected.to(kind).view(torch.uint8)).sum())


def all_measured() -> dict[str, dict[str, float]]:
    found = {case.values[0]: measured(case.values[0]) for case in CASES}  # type: ignore[arg-type]
    found |= {case.values[0]: measured_rounding(case.values[0]) for case in ROUNDED}  # type: ignore[arg-type]
    return found | {name: {"otherwise": rounded_otherwise(name)} for name in PRECISIONS}  # type: ignore[return-value]


@pytest.fixture(scope="module")
def by_case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    if GPU:
        return all_measured()
    return printed_by(__file__, tmp_path_factory)


@pytest.mark.parametrize("case", CASES)
def test_is_the_eager_one(by_case: dict[str, dict[str, float]], case: str) -> None:
    found = by_case[case]
    assert found["chosen"] == 0
    assert found["weights"] < 1e-5
    assert found["errors"] < 1e-5


@pytest.mark.parametrize("case", ROUNDED)
def test_rounds_as_the_eager_one(by_case: dict[str, dict[str, float]], case: str) -> None:
    found = by_case[case]
    assert found["chosen"] == 0
    # A GPU rounds a product and a sum once: what then lies on the other side of a middle changes all that follows.
    assert found["values"] <= (0.02 if GPU else 0.0)
    if found["values"] == 0:
        assert found["errors"] < 1e-5 and found["left"] < 1e-5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounds_to_nearest_and_to_even_at_the_half(by_case: dict[str, dict[str, float]], precision: str) -> None:
    assert by_case[precision]["otherwise"] == 0


@pytest.mark.parametrize(
    ("arch", "chooses", "precision"),
    [
        *((arch, chooses, None) for arch in (80, 90) for chooses in (True, False)),
        (80, True, "int4"),
        (90, False, "fp8"),
    ],
)
def test_compiles_without_spills(arch: int, chooses: bool, precision: str | None) -> None:
    kernel = sparsegpt_triton._settle
    constants = {"CHOOSES": chooses, "ROWS": sparsegpt_triton._ROWS, "GROUPS": 32, "block_row": 1, "errors_row": 1}
    constants |= {"keep_row": 1, "chosen_row": 1, "values_row": 1, "scales_row": 1}
    constants |= {"ROUNDS": precision is not None, "LOWEST": -8.0, "HIGHEST": 7.0, "FLOATING": precision == "fp8"}
    types = dict.fromkeys(("block", "errors", "upper", "values", "scales"), "*fp32")
    types |= dict.fromkeys(("keep", "chosen"), "*i1")
    signature = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 1})
    assert not re.search(r"\b(LDL|STL)\b", compiled.asm["sass"]), "registers spill to local memory"


if __name__ == "__main__":
    print(json.dumps(all_measured()))
