"""Least squares on what a mask keeps: the weights that stay make up for those that go.

For one weight ``W`` ``[N, K]`` whose inputs ``X`` have the Hessian ``H = 2/n X X^T`` (see `patch.oneshot.sparsegpt`),
the refitted ``W'`` is zero where the mask drops and minimises the squared error of the outputs on calibration text::

    tr((W' - W) H (W' - W)^T) + ridge * |W' - mask * W|^2

SparseGPT (Frantar and Alistarh, arXiv:2301.00774) chooses and corrects in one sweep, in which only the columns to its
right make up for a dropped weight. With the mask known all that is kept does, and the minimum is one linear system a
row, with as many unknowns as the row keeps (Boža, arXiv:2401.02938, solves them by ADMM). Here all rows are solved at
once by conjugate gradients (Hestenes and Stiefel, 1952) with the diagonal as preconditioner: a step is one product with
``H``, whatever the masks, and nothing is factorised.

Outputs of single weights are no measure of what a mask learned by distillation loses: fitting such a mask can make the
model worse, though every output is nearer the dense one.

    >>> fitted = refit_model(model, load_masks("learned"), windows, "cuda")   # in place, of the dense model
    >>> fitted["model.layers.0.mlp.up_proj"].error
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patch.contexts import full_float32
from patch.errors import UserError
from patch.layers import Matrix, check_present, decoder_blocks, prunable_matrices
from patch.mask import HybridMask
from patch.oneshot.calibration import calibrate
from patch.oneshot.sparsegpt import InputHessian

# As a share of the mean diagonal. Ten times SparseGPT's: on the embedded model's validation text the PATCH mask of 45%
# has perplexity 40.5, fitted with 0.01 38.6, with 0.1 38.2, with 1 38.6.
DAMPING = 0.1
# A row is solved when its residual has fallen to this share, far below what rounding to bfloat16 changes.
TOLERANCE = 1e-4
MOST_STEPS = 500

# Keeps a quotient of nothing by nothing at zero: rows that keep all their elements, inputs that are always zero.
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Fit:
    """How one weight was fitted.

    Attributes:
        masked_error: squared error of the outputs over their squared size, with the kept weights as they were.
        error: likewise, with the kept weights fitted; both on the calibration text, in float32.
        steps: of the conjugate gradients; `MOST_STEPS` if some row had not converged by then.
    """

    masked_error: float
    error: float
    steps: int


def refit(weight: Tensor, keep: Tensor, hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, Fit]:
    """The weight whose outputs are nearest those of ``weight``, of all that are zero outside ``keep``.

    Args:
        weight: ``[N, K]``, any floating dtype.
        keep: bool ``[N, K]``.
        hessian: float32 ``[K, K]``, of the inputs.
        damping: ``ridge``, as a share of the mean diagonal of ``hessian``.

    Returns:
        float32 ``[N, K]``, and how it was found. Rows of which nothing is dropped stay as they are.
    """
    with full_float32():
        dense, kept = weight.float(), keep.float()
        diagonal = hessian.diagonal()
        ridge = damping * diagonal.mean()
        scale = kept / (diagonal + ridge).clamp_min(_TINY)
        # What is to be added to the kept weights solves (change H) * kept + ridge * change = (dropped H) * kept.
        dropped = dense - dense * kept
        missing = dropped @ hessian
        change = torch.zeros_like(dense)
        residual = missing * kept
        direction = residual * scale
        size = (residual * direction).sum(1, keepdim=True)
        enough = TOLERANCE**2 * size
        steps = 0
        while steps < MOST_STEPS and bool((size > enough).any()):
            product = (direction @ hessian) * kept + ridge * direction
            length = size / (direction * product).sum(1, keepdim=True).clamp_min(_TINY)
            change += length * direction
            residual -= length * product
            scaled = residual * scale
            before, size = size, (residual * scaled).sum(1, keepdim=True)
            direction = scaled + size / before.clamp_min(_TINY) * direction
            steps += 1
        left = change - dropped
        outputs = (dense * (dense @ hessian)).sum().clamp_min(_TINY)
        masked_error = float((dropped * missing).sum() / outputs)
        error = float((left * (left @ hessian)).sum() / outputs)
    return dense * kept + change, Fit(masked_error, error, steps)


@torch.no_grad()
def refit_model(
    model: nn.Module,
    masks: Mapping[str, HybridMask],
    windows: Tensor,
    device: torch.device | str,
    *,
    batch: int = 8,
    on_block: Callable[[int, int], None] | None = None,
) -> dict[str, Fit]:
    """Mask every prunable weight of a dense model, and fit what is kept, in place; the model stays on its own device.

    Blocks follow one another as in one-shot pruning (`patch.oneshot.prune_model`): each is fitted to its own dense
    outputs, on what the fitted blocks before it feed it.

    Args:
        masks: one for every prunable weight, by its dotted name.
        windows: calibration token ids, integer ``[n, length]``.
        device: where blocks are run and fitted, one at a time.
        batch: calibration windows per forward pass.
        on_block: called after each block with the number of blocks done and of all blocks.

    Returns:
        Per weight how it was fitted, in model order.

    Raises:
        UserError: if masks and weights do not fit each other (before any weight changes), the windows do not fit the
            model, or something is not finite.
    """
    check_present(model)
    _check_masks(prunable_matrices(model), masks)
    blocks = len(decoder_blocks(model))
    fits: dict[str, Fit] = {}
    with closing(calibrate(model, windows, device, batch, InputHessian)) as stream:
        for block in stream:
            # Weights that read the same tensor share its Hessian.
            hessians: dict[int, Tensor] = {}
            for name, weight in block.weights.items():
                statistic = block.statistics[name]
                if id(statistic) not in hessians:
                    hessians[id(statistic)] = statistic.hessian()
                keep = masks[name].to(weight.device).keep()
                fitted, fits[name] = refit(weight, keep, hessians[id(statistic)])
                if not fitted.isfinite().all():
                    raise UserError(f"{name}: the fitted weight is not finite: the checkpoint is damaged")
                weight.copy_(fitted)
            if on_block is not None:
                on_block(block.index + 1, blocks)
    return fits


def _check_masks(matrices: Mapping[str, Matrix], masks: Mapping[str, HybridMask]) -> None:
    for name, matrix in matrices.items():
        if name not in masks:
            raise UserError(f"{name}: there is no mask for it, and every prunable weight needs one to be fitted")
        if masks[name].shape != tuple(matrix.weight.shape):
            raise UserError(f"{name}: mask is for a weight of {masks[name].shape}, it is {tuple(matrix.weight.shape)}")
    if unknown := next((name for name in masks if name not in matrices), None):
        raise UserError(f"there is a mask for {unknown!r}, which is no prunable weight of the model")
