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


@pytest.fixture(scope="module")
def by_case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    if GPU:
        return {case.values[0]: measured(case.values[0]) for case in CASES}  # type: ignore[misc]
    return printed_by(__file__, tmp_path_factory)


@pytest.mark.parametrize("case", CASES)
def test_is_the_eager_one(by_case: dict[str, dict[str, float]], case: str) -> None:
    found = by_case[case]
    assert found["chosen"] == 0
    assert found["weights"] < 1e-5
    assert found["errors"] < 1e-5


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("chooses", [True, False], ids=["two-of-four", "given"])
def test_compiles_without_spills(arch: int, chooses: bool) -> None:
    kernel = sparsegpt_triton._settle
    constants = {"CHOOSES": chooses, "ROWS": sparsegpt_triton._ROWS, "GROUPS": 32, "block_row": 1, "errors_row": 1}
    constants |= {"keep_row": 1, "chosen_row": 1}
    types = dict.fromkeys(("block", "errors", "upper"), "*fp32") | dict.fromkeys(("keep", "chosen"), "*i1")
    signature = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 1})
    assert not re.search(r"\b(LDL|STL)\b", compiled.asm["sass"]), "registers spill to local memory"


if __name__ == "__main__":
    print(json.dumps({case.values[0]: measured(case.values[0]) for case in CASES}))
