"""Making a pruning's checkpoint: load, calibrate, prune or learn, refit or recover or quantise, harden, save.

Of several processes that want the same checkpoint one makes it, and the others wait for it.
"""

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from analysis.rows import layout
from analysis.rows.format import Fact
from experiments.data import models, text
from experiments.run import recovered
from experiments.run.mask_facts import mask_facts
from experiments.run.provenance import provenance
from experiments.run.runtime import Machine
from experiments.run.signals import deferred_signals
from experiments.run.spending import Spending, noted
from experiments.run.store import Store
from experiments.studies.trial import Calibration, Pruning, definition, describe
from patch.checkpoint import INFO_FILE, load_info, load_masks, load_tile_scores, save_checkpoint
from patch.errors import UserError
from patch.layers import check_coverage, coverage, decoder_blocks, prunable_linears, prunable_matrices
from patch.learn.learner import Learned, learn
from patch.learn.prior import Prior
from patch.learn.saved import CHECKPOINT as LEARNER_STATE
from patch.learn.sensitivity import most_sensitive_tiles
from patch.learn.tracking import TRACK
from patch.mask import HybridMask
from patch.oneshot import prune_model
from patch.oneshot.gptq import quantise_model
from patch.oneshot.refit import refit_model
from patch.quantise.precisions import PRECISIONS
from patch.quantise.values import Quantised
from patch.shallow import drop_blocks
from patch.weights import kept_shares

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ensure_checkpoint(pruning: Pruning, store: Store, machine: Machine) -> Path | None:
    """The checkpoint of a pruning, made now (with its priors) if it is not there; None for the dense model.

    Raises:
        Stopped: if learning was told to stop (`experiments.run.signals`).
    """
    if pruning.as_it_is:
        return None
    path = store.checkpoint_path(pruning)

    def make() -> None:
        _make_checkpoint(pruning, store, machine)

    def before() -> None:
        for base in pruning.bases:
            ensure_checkpoint(base, store, machine)

    made_once(path, make, store, machine, together=pruning.learns, before=before)
    return path


def made_once(
    path: Path,
    make: Callable[[], None],
    store: Store,
    machine: Machine,
    *,
    together: bool,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Make the checkpoint ``path`` of a results directory if it is not there, in one process of all that want it.

    Args:
        together: all ranks make it, as in learning, not the first alone.
        before: makes what it stands on.
    """
    ranks, first = machine.ranks, machine.ranks.rank == 0
    # What is there is for rank 0 to say: on a shared disk another rank may see a file later.
    if ranks.agree(first and path.exists(), machine.device):
        return
    before()
    with store.lease(f"pruning-{path.name}") if first else contextlib.nullcontext():
        # Another process may have finished it while this one waited.
        missing = ranks.agree(first and not path.exists(), machine.device)
        if missing and (first or together):
            make()


@dataclass(frozen=True)
class _Made:
    """What became of a model's weights, beside the weights themselves.

    Attributes:
        masks: by weight.
        zeros: elements dropped of each weight.
        facts: that were measured on the way.
        tile_scores: of weights whose tiles the method scored.
        quantised: of all weights, if they are.
        about: where this is not what the definition says: method, structure and target of what was quantised.
        sparsity: achieved, where that is not the share of zeros.
    """

    masks: Mapping[str, HybridMask]
    zeros: Mapping[str, int]
    facts: list[Fact] = dataclasses.field(default_factory=list)
    tile_scores: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    quantised: Mapping[str, Quantised] = dataclasses.field(default_factory=dict)
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sparsity: float | None = None


def _make_checkpoint(pruning: Pruning, store: Store, machine: Machine) -> None:
    if pruning.recovery and not pruning.quantisation:
        assert pruning.base is not None
        sparse = recovered.opened(store.checkpoint_path(pruning.base), pruning.model)
        about, out = definition(pruning), store.checkpoint_path(pruning)
        recovered.recover_checkpoint(sparse, pruning.recovery, about, describe(pruning), out, store, machine)
        return
    spending = Spending(machine, pruning.learns, store.work_path(pruning) if pruning.learns else None)
    # What is rounded once it is pruned starts from those weights.
    rounded = pruning.quantisation is not None and not pruning.quantisation.joint
    source = str(store.checkpoint_path(pruning.base)) if rounded and pruning.base else pruning.model
    # All but learning brings one block at a time to the device, whatever the depth of the model.
    model, tokenizer = models.load_model(
        source, device=machine.device if pruning.learns else "cpu", dtype=machine.dtype, data=machine.data
    )
    covered = check_coverage(model, pruning.partial)
    sources: dict[str, str] = {}
    if rounded:
        made = _quantise(pruning, Path(source), model, tokenizer, store, machine, sources)
    elif pruning.refit:
        made = _refit(pruning, model, tokenizer, store, machine, sources)
    elif pruning.learns:
        outcome = _learn(pruning, model, tokenizer, store, machine, sources, spending)
        curves = [
            Fact(metric, value, "1", {"step": int(entry["step"])})
            for entry in outcome.history
            for metric, value in entry.items()
            if metric != "step"
        ]
        made = _Made(outcome.masks, {name: mask.zeros for name, mask in outcome.masks.items()}, curves)
    elif pruning.structure == "shallow":
        made = _drop_blocks(pruning, model, tokenizer, store, machine, sources)
    else:
        made = _prune(pruning, model, tokenizer, store, machine, sources)
    spent = spending.facts()
    if machine.ranks.rank:
        return
    facts = [*made.facts, *mask_facts(model, covered, made.masks, made.zeros, made.sparsity), *spent]
    info = {
        "method": pruning.method,
        "structure": pruning.structure,
        "target": pruning.sparsity,
        **made.about,
        "sparsity": sum(made.zeros.values()) / covered.prunable if made.sparsity is None else made.sparsity,
        "seed": pruning.seed,
        "definition": definition(pruning),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "zeros": made.zeros,
        "facts": [vars(fact) for fact in facts],
        "provenance": provenance(spending.seconds, sources),
    }
    if pruning.quantisation:
        info["precision"] = pruning.quantisation.precision
    path = store.checkpoint_path(pruning)
    beside = models.processor_files(pruning.model, machine.data)
    save_checkpoint(path, model, tokenizer, made.masks, info, made.tile_scores, made.quantised, beside)
    # The learner's state has served; its TensorBoard log stays.
    (store.work_path(pruning) / LEARNER_STATE).unlink(missing_ok=True)
    spending.forget()


def _drop_blocks(
    pruning: Pruning,
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    store: Store,
    machine: Machine,
    sources: dict[str, str],
) -> _Made:
    """Drop a model's blocks; sparsity is the share of its prunable weights that are gone."""
    windows = _calibration_windows(pruning.calibration, tokenizer, store, machine, sources)
    assert windows is not None
    whole = coverage(model).prunable
    count = max(1, round(pruning.sparsity * len(decoder_blocks(model))))
    dropped = drop_blocks(
        model, count, windows, machine.device, lambda done, total: machine.progress(describe(pruning), done, total)
    )
    facts = [Fact("block_divergence", each.divergence, "nat", {"block": each.block}) for each in dropped]
    none = dict.fromkeys(prunable_matrices(model), 0)
    return _Made({}, none, facts, sparsity=1 - coverage(model).prunable / whole)


def _prune(
    pruning: Pruning,
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    store: Store,
    machine: Machine,
    sources: dict[str, str],
) -> _Made:
    """Prune a model in one shot."""
    windows = _calibration_windows(pruning.calibration, tokenizer, store, machine, sources)
    layers = prune_model(
        model,
        pruning.method,
        pruning.structure,
        pruning.sparsity,
        pruning.tile,
        windows,
        machine.device,
        dense=_ranked_tiles(pruning, model, windows, store, machine),
        weight_update=pruning.weight_update,
        int4=pruning.quantisation is not None,
        on_block=lambda done, total: machine.progress(describe(pruning), done, total),
    )
    return _Made(
        {name: layer.mask for name, layer in layers.items() if layer.mask is not None},
        {name: layer.zeros for name, layer in layers.items()},
        tile_scores={name: layer.tile_scores for name, layer in layers.items() if layer.tile_scores is not None},
        quantised={name: layer.quantised for name, layer in layers.items() if layer.quantised is not None},
    )


def _calibration_windows(
    wanted: Calibration | None,
    tokenizer: "PreTrainedTokenizerBase",
    store: Store,
    machine: Machine,
    sources: dict[str, str],
) -> Tensor | None:
    if wanted is None:
        return None
    documents = text.load_documents(wanted.source, machine.data)
    sources[wanted.source] = documents.sha256
    if wanted.drawn_from == "stream":
        stream = text.token_stream(documents, tokenizer, wanted.length, wanted.seed, store.root / layout.TOKENS)
        if stream.windows < wanted.windows:
            raise UserError(
                f"calibration needs {wanted.windows} windows of {wanted.length} tokens, but {wanted.source} holds "
                f"{stream.windows}: ask for fewer or shorter windows, or name a source with more text"
            )
        return stream.batch(0, wanted.windows)
    return text.calibration_windows(documents, tokenizer, wanted.windows, wanted.length, wanted.seed)


def _ranked_tiles(
    pruning: Pruning, model: nn.Module, windows: Tensor | None, store: Store, machine: Machine
) -> dict[str, Tensor] | None:
    """The tiles that stay dense if they are ranked over the whole model, which visits the device; else None."""
    if pruning.tile_ranking != "model":
        return None
    assert pruning.base is not None and pruning.tile is not None and windows is not None
    label = f"{describe(pruning)}: ranking tiles"
    masks = load_masks(store.checkpoint_path(pruning.base))
    dense = most_sensitive_tiles(
        model.to(machine.device),
        {name: mask.patterns for name, mask in masks.items()},
        pruning.tile,
        windows,
        pruning.seed,
        pruning.sparsity,
        on_sequence=lambda done, total: machine.progress(label, done, total),
    )
    model.to("cpu")
    return dense


def _refit(
    pruning: Pruning,
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    store: Store,
    machine: Machine,
    sources: dict[str, str],
) -> _Made:
    """Mask the dense model's weights as the pruning without refit does, and fit what is kept."""
    assert pruning.base is not None
    windows = _calibration_windows(pruning.refit, tokenizer, store, machine, sources)
    assert windows is not None
    found = store.checkpoint_path(pruning.base)
    masks = load_masks(found)
    fits = refit_model(
        model,
        masks,
        windows,
        machine.device,
        on_block=lambda done, total: machine.progress(describe(pruning), done, total),
    )
    facts = [
        Fact(metric, value, "1", {"layer": name})
        for name, fit in fits.items()
        for metric, value in (
            ("masked_output_error", fit.masked_error),
            ("refitted_output_error", fit.error),
            ("refit_steps", fit.steps),
        )
    ]
    return _Made(masks, {name: mask.zeros for name, mask in masks.items()}, facts, load_tile_scores(found))


def _quantise(
    pruning: Pruning,
    source: Path,
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    store: Store,
    machine: Machine,
    sources: dict[str, str],
) -> _Made:
    """Quantise a model's weights, those of a checkpoint at ``source`` within what its masks keep."""
    assert pruning.quantisation is not None
    pruned = (source / INFO_FILE).is_file()
    info = load_info(source) if pruned else {}
    masks, tile_scores = (load_masks(source), load_tile_scores(source)) if pruned else ({}, {})
    zeros = info.get("zeros") or {name: mask.zeros for name, mask in masks.items()}
    windows = _calibration_windows(pruning.quantisation.calibration, tokenizer, store, machine, sources)
    found = quantise_model(
        model,
        PRECISIONS[pruning.quantisation.precision],
        windows,
        machine.device,
        masks,
        on_block=lambda done, total: machine.progress(describe(pruning), done, total),
    )
    return _Made(
        masks,
        {name: zeros.get(name, 0) for name in found.weights},
        [Fact("dead_inputs", dead, "1", {"layer": name}) for name, dead in found.dead.items() if dead],
        tile_scores,
        found.weights,
        {name: info[name] for name in ("method", "structure", "target") if name in info},
        info.get("sparsity"),
    )


def _learn(
    pruning: Pruning,
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    store: Store,
    machine: Machine,
    sources: dict[str, str],
    spending: Spending,
) -> Learned:
    """Learn the masks of a pruning and apply them to the model's weights."""
    assert pruning.learning is not None and pruning.tile is not None
    recipe = pruning.learning.recipe
    documents = text.load_documents(pruning.learning.source, machine.data)
    sources[pruning.learning.source] = documents.sha256
    stream = text.token_stream(documents, tokenizer, recipe.length, pruning.seed, store.root / layout.TOKENS)
    prior = Prior()
    if pruning.prior:
        path = store.checkpoint_path(pruning.prior)
        patterns = {name: mask.patterns for name, mask in load_masks(path).items()}
        prior = Prior(patterns=patterns, tile_scores=load_tile_scores(path) or None)
    if pruning.tile_prior:
        shares = kept_shares(store.checkpoint_path(pruning.tile_prior), pruning.tile)
        prior = dataclasses.replace(prior, tile_scores=shares)

    def on_step(metrics: Mapping[str, Any]) -> None:
        machine.progress(describe(pruning), int(metrics["step"]), recipe.steps)
        spending.note()

    with deferred_signals() as stop, noted(spending):
        outcome = learn(
            model,
            recipe,
            lambda step: stream.batch(step, recipe.batch),
            sparsity=pruning.sparsity,
            tile=pruning.tile,
            seed=pruning.seed,
            prior=prior,
            work=store.work_path(pruning),
            device=machine.device,
            on_step=on_step,
            stop=stop,
            ranks=machine.ranks,
            track=os.environ.get(TRACK),
        )
    with torch.no_grad():
        for name, linear in prunable_linears(model).items():
            linear.weight.copy_(outcome.masks[name].to(linear.weight.device).apply(linear.weight))
    return outcome


def facts_of(pruning: Pruning, store: Store) -> tuple[list[Fact], dict[str, Any]]:
    """What was measured when the checkpoint was made, and on what; for the dense model, that it has no zeros."""
    if pruning.as_it_is:
        return [Fact("sparsity", 0.0, "1", {})], provenance(0.0)
    info = load_info(store.checkpoint_path(pruning))
    return [Fact(**fact) for fact in info["facts"]], info["provenance"]
