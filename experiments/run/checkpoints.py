"""Making a pruning's checkpoint: load, calibrate, prune or learn, refit or recover or quantise, harden, save.

Of several processes that want the same checkpoint one makes it, and the others wait for it.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
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
from experiments.run.origin import check_same_origin, dense_model, made_from
from experiments.run.provenance import command_line, provenance
from experiments.run.runtime import Machine
from experiments.run.signals import deferred_signals
from experiments.run.sources import of_checkpoint
from experiments.run.spending import Spending, noted
from experiments.run.store import Store
from experiments.studies.trial import Calibration, Pruning, definition, describe, lineage
from patch.checkpoint import INFO_FILE, content_hash, load_info, load_masks, load_tile_scores, save_checkpoint
from patch.errors import UserError
from patch.layers import check_coverage, coverage, decoder_blocks, prunable_linears, prunable_matrices, require_linears
from patch.learn.distributed import ALONE
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
from patch.weights import kept_shares, without_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ensure_checkpoint(pruning: Pruning, store: Store, machine: Machine) -> Path | None:
    """The checkpoint of a pruning, made now (with its priors) if it is not there; None for the dense model.

    Raises:
        Stopped: if learning was told to stop (`experiments.run.signals`).
        UserError: if it, or what it stands on, is there, but was made of texts that hold something else now, or of
            another checkpoint than the one that is there.
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
    # Older ones do not tell of what they stand on, which itself may be there.
    for base in map(store.checkpoint_path, lineage(pruning)[:-1]):
        if machine.ranks.rank == 0 and base.exists():
            _check_same(base, machine)
    if machine.ranks.rank == 0 and pruning.masked_as and (masked := store.checkpoint_path(pruning.masked_as)).exists():
        check_same_origin(masked, path)
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

    Raises:
        UserError: if it is there, but was made of texts that hold something else now (`experiments.run.sources`).
    """
    ranks, first = machine.ranks, machine.ranks.rank == 0
    # What is there is for rank 0 to say: on a shared disk another rank may see a file later.
    if not ranks.agree(first and path.exists(), machine.device):
        before()
        with store.lease(f"pruning-{path.name}") if first else contextlib.nullcontext():
            # Another process may have finished it while this one waited.
            missing = ranks.agree(first and not path.exists(), machine.device)
            if missing and (first or together):
                make()
            if missing:
                return
    if first:
        _check_same(path, machine)


def _check_same(path: Path, machine: Machine) -> None:
    machine.sources.check_same(of_checkpoint(load_info(path)), f"checkpoint {path}", path)


@dataclass(frozen=True)
class _Job:
    """A checkpoint to make, and with what.

    Attributes:
        sources: the SHA-256 of every text that was read, by its name, for it and for what it stands on; filled on
            the way.
    """

    pruning: Pruning
    tokenizer: "PreTrainedTokenizerBase"
    store: Store
    machine: Machine
    sources: dict[str, str] = dataclasses.field(default_factory=dict)

    def progress(self, done: int, total: int) -> None:
        """Tell how far it is."""
        self.machine.progress(describe(self.pruning), done, total)

    def documents(self, source: str) -> text.Documents:
        """A text, noted among the sources."""
        found = text.load_documents(source, self.machine.data)
        self.sources[source] = found.sha256
        return found

    def stream(self, documents: text.Documents, length: int, seed: int) -> "text.TokenStream | text.MixedStream":
        """All of a text in windows of ``length`` tokens."""
        return text.token_stream(documents, self.tokenizer, length, seed, self.store.root / layout.TOKENS)

    def windows(self, wanted: Calibration | None) -> Tensor | None:
        """The windows of a calibration, if there is one."""
        if wanted is None:
            return None
        documents = self.documents(wanted.source)
        if wanted.drawn_from == "stream":
            stream = self.stream(documents, wanted.length, wanted.seed)
            return text.first_windows(stream, wanted.windows, "calibration", wanted.source)
        return text.calibration_windows(documents, self.tokenizer, wanted.windows, wanted.length, wanted.seed)


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


def check_unpruned(model: str) -> None:
    """What an earlier mask dropped would count as kept by the next one, and its tiles as dense.

    Raises:
        UserError: if the model is a pruned checkpoint.
    """
    if not (Path(model) / INFO_FILE).is_file():
        return
    info = load_info(model)
    if info["structure"] not in ("dense", "shallow"):
        dense = dense_model(info) or "the dense model that it was made of"
        raise UserError(f"{model}: pruned already ({info['method']}, {info['structure']}): prune or learn on {dense}")


def check_linears(pruning: Pruning) -> None:
    """Before anything is made that a pruning starts from; a model of the hub is looked at once it is loaded.

    Raises:
        UserError: if the model has matrices that no mask can be learned of, tiles be ranked, or values be rounded.
    """
    wanted = {
        "learning": pruning.learning,
        "ranking tiles over the model": pruning.tile_ranking == "model",
        "quantising": pruning.quantisation,
    }
    asked = [what for what, is_asked in wanted.items() if is_asked]
    if asked and Path(pruning.model).is_dir():
        model = without_weights(Path(pruning.model))
        for what in asked:
            require_linears(model, what)


def _make_checkpoint(pruning: Pruning, store: Store, machine: Machine) -> None:
    if pruning.recovery and not pruning.quantisation:
        assert pruning.base is not None
        sparse = recovered.opened(store.checkpoint_path(pruning.base), pruning.model)
        about, out = definition(pruning), store.checkpoint_path(pruning)
        sources = sources_of(pruning.bases, store)
        recovered.recover_checkpoint(sparse, pruning.recovery, about, describe(pruning), out, store, machine, sources)
        return
    spending = Spending(machine, pruning.learns, store.work_path(pruning) if pruning.learns else None)
    # What is rounded once it is pruned starts from those weights.
    rounded = pruning.quantisation is not None and not pruning.quantisation.joint
    source = str(store.checkpoint_path(pruning.base)) if rounded and pruning.base else pruning.model
    if not rounded:
        check_unpruned(pruning.model)
    # All but learning brings one block at a time to the device, whatever the depth of the model.
    device = machine.device if pruning.learns else "cpu"
    commit = machine.sources.commit(source, machine.ranks if pruning.learns else ALONE)
    made_of = {"base": content_hash(store.checkpoint_path(pruning.masked_as))} if pruning.masked_as else {}
    model, tokenizer = models.load_model(source, device=device, dtype=machine.dtype, data=machine.data, commit=commit)
    covered = check_coverage(model, pruning.partial)
    job = _Job(pruning, tokenizer, store, machine, sources_of(pruning.bases, store) | machine.sources.of_model(source))
    if rounded:
        made = _quantise(job, Path(source), model)
    elif pruning.refit:
        made = _refit(job, model)
    elif pruning.learns:
        outcome = _learn(job, model, spending)
        curves = [
            Fact(metric, value, "1", {"step": int(entry["step"])})
            for entry in outcome.history
            for metric, value in entry.items()
            if metric != "step"
        ]
        made = _Made(outcome.masks, {name: mask.zeros for name, mask in outcome.masks.items()}, curves)
    elif pruning.structure == "shallow":
        made = _drop_blocks(job, model)
    else:
        made = _prune(job, model)
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
        **made_from(pruning.model),
        "command": command_line(),
        "zeros": made.zeros,
        "facts": [vars(fact) for fact in facts],
        "provenance": provenance(spending.seconds, job.sources) | made_of,
    }
    if pruning.quantisation:
        info["precision"] = pruning.quantisation.precision
    path = store.checkpoint_path(pruning)
    beside = models.processor_files(source, machine.data, commit)
    save_checkpoint(path, model, tokenizer, made.masks, info, made.tile_scores, made.quantised, beside)
    # The learner's state has served; its TensorBoard log stays.
    (store.work_path(pruning) / LEARNER_STATE).unlink(missing_ok=True)
    spending.forget()


def sources_of(bases: Iterable[Pruning], store: Store) -> dict[str, str]:
    """The SHA-256 of every text that checkpoints were made of, by its name."""
    found: dict[str, str] = {}
    for base in bases:
        found |= of_checkpoint(load_info(store.checkpoint_path(base))).get("sources", {})
    return found


def _drop_blocks(job: _Job, model: nn.Module) -> _Made:
    """Drop a model's blocks; sparsity is the share of its prunable weights that are gone."""
    windows = job.windows(job.pruning.calibration)
    assert windows is not None
    whole = coverage(model).prunable
    count = max(1, round(job.pruning.sparsity * len(decoder_blocks(model))))
    dropped = drop_blocks(model, count, windows, job.machine.device, job.progress)
    facts = [Fact("block_divergence", each.divergence, "nat", {"block": each.block}) for each in dropped]
    none = dict.fromkeys(prunable_matrices(model), 0)
    return _Made({}, none, facts, sparsity=1 - coverage(model).prunable / whole)


def _prune(job: _Job, model: nn.Module) -> _Made:
    """Prune a model in one shot."""
    pruning = job.pruning
    windows = job.windows(pruning.calibration)
    layers = prune_model(
        model,
        pruning.method,
        pruning.structure,
        pruning.sparsity,
        pruning.tile,
        windows,
        job.machine.device,
        dense=_ranked_tiles(job, model, windows),
        weight_update=pruning.weight_update,
        int4=pruning.quantisation is not None,
        on_block=job.progress,
    )
    return _Made(
        {name: layer.mask for name, layer in layers.items() if layer.mask is not None},
        {name: layer.zeros for name, layer in layers.items()},
        tile_scores={name: layer.tile_scores for name, layer in layers.items() if layer.tile_scores is not None},
        quantised={name: layer.quantised for name, layer in layers.items() if layer.quantised is not None},
    )


def _ranked_tiles(job: _Job, model: nn.Module, windows: Tensor | None) -> dict[str, Tensor] | None:
    """The tiles that stay dense if they are ranked over the whole model, which visits the device; else None."""
    pruning = job.pruning
    if pruning.tile_ranking != "model":
        return None
    assert pruning.base is not None and pruning.tile is not None and windows is not None
    label = f"{describe(pruning)}: ranking tiles"
    masks = load_masks(job.store.checkpoint_path(pruning.base))
    dense = most_sensitive_tiles(
        model.to(job.machine.device),
        {name: mask.patterns for name, mask in masks.items()},
        pruning.tile,
        windows,
        pruning.seed,
        pruning.sparsity,
        on_sequence=lambda done, total: job.machine.progress(label, done, total),
    )
    model.to("cpu")
    return dense


def _refit(job: _Job, model: nn.Module) -> _Made:
    """Mask the dense model's weights as the pruning without refit does, and fit what is kept."""
    pruning = job.pruning
    assert pruning.base is not None
    windows = job.windows(pruning.refit)
    assert windows is not None
    found = job.store.checkpoint_path(pruning.base)
    masks = load_masks(found)
    fits = refit_model(
        model,
        masks,
        windows,
        job.machine.device,
        on_block=job.progress,
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


def _quantise(job: _Job, source: Path, model: nn.Module) -> _Made:
    """Quantise a model's weights, those of a checkpoint at ``source`` within what its masks keep."""
    pruning = job.pruning
    assert pruning.quantisation is not None
    pruned = (source / INFO_FILE).is_file()
    info = load_info(source) if pruned else {}
    masks, tile_scores = (load_masks(source), load_tile_scores(source)) if pruned else ({}, {})
    zeros = info.get("zeros") or {name: mask.zeros for name, mask in masks.items()}
    windows = job.windows(pruning.quantisation.calibration)
    found = quantise_model(
        model,
        PRECISIONS[pruning.quantisation.precision],
        windows,
        job.machine.device,
        masks,
        sink_aware=pruning.quantisation.sink_aware,
        on_block=job.progress,
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


def _learn(job: _Job, model: nn.Module, spending: Spending) -> Learned:
    """Learn the masks of a pruning and apply them to the model's weights."""
    pruning, store = job.pruning, job.store
    assert pruning.learning is not None and pruning.tile is not None
    recipe = pruning.learning.recipe
    stream = job.stream(job.documents(pruning.learning.source), recipe.length, pruning.seed)
    seen = (pruning.learning.source, *job.machine.sources.of_model(pruning.model))
    prior = Prior()
    if pruning.prior:
        path = store.checkpoint_path(pruning.prior)
        patterns = {name: mask.patterns for name, mask in load_masks(path).items()}
        prior = Prior(patterns=patterns, tile_scores=load_tile_scores(path) or None)
    if pruning.tile_prior:
        shares = kept_shares(store.checkpoint_path(pruning.tile_prior), pruning.tile)
        prior = dataclasses.replace(prior, tile_scores=shares)

    def on_step(metrics: Mapping[str, Any]) -> None:
        job.progress(int(metrics["step"]), recipe.steps)
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
            texts={name: job.sources[name] for name in seen},
            work=store.work_path(pruning),
            device=job.machine.device,
            on_step=on_step,
            stop=stop,
            ranks=job.machine.ranks,
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
