"""Quantising a whole model, masked or dense, block by block as it is pruned.

    >>> weights = quantise_model(model, PRECISIONS["int4"], windows, "cuda", masks)
    >>> weights["model.layers.0.mlp.up_proj"].scales.shape

INT4 is GPTQ (Frantar et al., arXiv:2210.17323) within what the mask keeps: the sweep of `patch.oneshot.sparsegpt` with
the mask fixed, on what the quantised blocks before feed a block; 8 bits are rounded to nearest. Or all precisions are
swept ``sink_aware``: the first token of a window counts as all others together (`patch.oneshot.sparsegpt.SinkHessian`),
and the inputs of the largest mean square are settled first, while groups stay where they are.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from patch.errors import UserError
from patch.layers import check_shared, decoder_blocks, require_linears
from patch.mask import HybridMask
from patch.oneshot import sparsegpt
from patch.oneshot.calibration import Block, blocks_on, calibrate
from patch.quantise.precisions import Precision, group_size
from patch.quantise.values import Quantised, quantise_weight


@dataclass(frozen=True)
class QuantisedModel:
    """What became of a model's weights.

    Attributes:
        weights: by full name, in model order, on the CPU.
        dead: per weight the inputs that were zero in all of the calibration text, of which nothing could be learned.
    """

    weights: dict[str, Quantised]
    dead: dict[str, int]


@torch.no_grad()
def quantise_model(
    model: nn.Module,
    precision: Precision,
    windows: Tensor | None,
    device: torch.device | str,
    masks: Mapping[str, HybridMask],
    *,
    sink_aware: bool = False,
    batch: int = 8,
    on_block: Callable[[int, int], None] | None = None,
) -> QuantisedModel:
    """Quantise every prunable weight, in place; the model stays on its own device.

    Args:
        model: its prunable weights are all ``Linear``, and masked already.
        windows: calibration token ids, integer ``[n, length]``; for INT4 and ``sink_aware``.
        device: where blocks are run and quantised, one at a time.
        masks: of weights that have one, by name; of others, what is zero stays zero.
        sink_aware: pass errors on in every precision, the first token of each window in regard, largest inputs first.
        batch: calibration windows per forward pass.
        on_block: called after each block with the number of blocks done and of all blocks.

    Raises:
        UserError: if an argument does not fit (before any weight changes), or something is not finite.
    """
    check_shared(model)
    linears = require_linears(model, "quantising")
    group = group_size({name: linear.in_features for name, linear in linears.items()}) if precision.grouped else 0
    quantised: dict[str, Quantised] = {}
    dead: dict[str, int] = {}
    blocks = len(decoder_blocks(model))
    passes_on = precision.grouped or sink_aware
    with closing(_blocks(model, precision, windows, sink_aware, device, batch)) as stream:
        for block in stream:
            factors: dict[int, Any] = {}
            for name, weight in block.weights.items():
                if not weight.isfinite().all():
                    raise UserError(f"{name}: the weight holds values that are not finite: the checkpoint is damaged")
                if passes_on:
                    statistic = block.statistics[name]
                    if id(statistic) not in factors:
                        prepare = sparsegpt.largest_first if sink_aware else sparsegpt.inverse_factor
                        factors[id(statistic)] = prepare(statistic.hessian(), name)
                    factor = factors[id(statistic)]
                    keep = masks[name].to(weight.device).keep() if name in masks else weight != 0
                    if sink_aware:
                        found = sparsegpt.quantise_in_order(weight, factor, keep, precision, group)
                        factor = factor.factor
                    else:
                        found = sparsegpt.quantise_masked(weight, factor, keep, group)
                    dead[name] = int(factor.dead.sum())
                else:
                    values, scales = quantise_weight(weight, getattr(torch, precision.dtype))
                    found = Quantised(values, scales[:, None])
                weight.copy_(found.dequantised())
                quantised[name] = found.to("cpu")
            if on_block is not None:
                on_block(block.index + 1, blocks)
    return QuantisedModel(quantised, dead)


def _blocks(
    model: nn.Module,
    precision: Precision,
    windows: Tensor | None,
    sink_aware: bool,
    device: torch.device | str,
    batch: int,
) -> Generator[Block[Any], None, None]:
    if not precision.grouped and not sink_aware:
        return blocks_on(model, device)
    if windows is None:
        raise UserError(f"{precision.label} needs calibration windows: token ids [windows, length]")
    if not sink_aware:
        return calibrate(model, windows, device, batch, sparsegpt.InputHessian)
    return calibrate(model, windows, device, batch, partial(sparsegpt.SinkHessian, length=windows.shape[-1]))
