"""Recovering a checkpoint: its masks as they are, what they keep trained towards the dense model (`patch.recover`)."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from analysis.rows import layout
from analysis.rows.format import Fact, name_of
from experiments.data import models, text
from experiments.run.mask_facts import mask_facts
from experiments.run.provenance import command_line, provenance
from experiments.run.runtime import Machine
from experiments.run.signals import deferred_signals
from experiments.run.spending import Spending, noted
from experiments.run.store import Store
from experiments.studies.trial import Recovery, definition
from patch.audit import audit
from patch.checkpoint import INFO_FILE, content_hash, load_info, load_masks, load_tile_scores, save_checkpoint
from patch.errors import UserError
from patch.files import read_json
from patch.layers import coverage, decoder_blocks
from patch.learn.saved import CHECKPOINT as STATE
from patch.learn.tracking import TRACK
from patch.recover.recovery import recover
from patch.recover.run import Metrics
from patch.structures import TILED
from patch.weights import prunable_weights


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be recovered.

    Attributes:
        info: what its ``hybrid.json`` says.
        model: the dense model that it was made of: name, path or hub id.
    """

    path: Path
    info: Mapping[str, Any]
    model: str


def opened(path: Path, base: str | None = None) -> Source:
    """A hybrid or unstructured checkpoint, and the dense model that it was made of.

    Args:
        base: that model, where the checkpoint does not say it (imported masks do) or it is elsewhere now.

    Raises:
        UserError: if it is no such checkpoint, damaged, packed, quantised, or recovered already.
    """
    config = path / "config.json"
    if not config.is_file():
        raise UserError(f"{path}: not a model directory, it has no config.json")
    if read_json(config).get("quantization_config"):
        raise UserError(
            f"{path}: its weights are packed or quantised, which cannot be trained: recover the checkpoint that it was "
            "made of, and pack or quantise what comes out"
        )
    if not (path / INFO_FILE).is_file():
        raise UserError(
            f"{path}: has no {INFO_FILE}, so no mask to keep: a dense model needs no recovery; make a checkpoint with "
            "`hts prune`, `hts learn` or `hts import`"
        )
    info = load_info(path)
    if info.get("precision"):
        raise UserError(
            f"{path}: its weights are quantised ({info['precision']}): recover before, and quantise after that"
        )
    if info["structure"] not in (*TILED, "unstructured"):
        raise UserError(f"{path}: its structure is {info['structure']}, which has no mask to keep")
    about = info.get("definition") or {}
    if about.get("recovery") or "recovered_from" in info:
        raise UserError(f"{path}: is recovered already: recover what it was made of, {_origin(info)}, in more steps")
    model = base or about.get("model") or info.get("imported", {}).get("base")
    if not model:
        raise UserError(f"{path}: does not say of which dense model it was made: name it with --base")
    return Source(path, info, str(model))


def _origin(info: Mapping[str, Any]) -> str:
    return str(info.get("recovered_from", {}).get("path", "its origin"))


def definition_of(source: Source, recovery: Recovery) -> dict[str, Any]:
    """What a recovered checkpoint is, as a trial of a study has it where the checkpoint is one's."""
    about = source.info.get("definition")
    if not isinstance(about, dict):
        about = {"model": source.model, "checkpoint": content_hash(source.path)}
    return {**about, "recovery": definition(recovery)}


def recover_checkpoint(
    source: Source,
    recovery: Recovery,
    about: Mapping[str, Any],
    label: str,
    out: Path,
    store: Store,
    machine: Machine,
    sources: Mapping[str, str] | None = None,
) -> None:
    """Train what the masks of ``source`` keep, and save the checkpoint ``out``; all ranks call it.

    Args:
        about: what ``out`` is: the definition that names it.
        label: for progress.
        sources: the SHA-256 of the texts that ``source`` was made of, where ``out`` is asked for by these and not by
            naming ``source``.

    Raises:
        Stopped: if it was told to stop (`experiments.run.signals`).
        UserError: if checkpoint, dense model and text do not fit each other.
    """
    recipe, work = recovery.recipe, store.root / layout.WORK / name_of(about)
    spending = Spending(machine, together=True, work=work)
    # Block by block, the model need not be on the device.
    device = machine.device if recipe.steps else "cpu"
    model, tokenizer = models.load_model(
        source.model,
        device=device,
        dtype=machine.dtype,
        data=machine.data,
        commit=machine.sources.commit(source.model, machine.ranks),
    )
    documents = text.load_documents(recovery.source, machine.data)
    own = {recovery.source: documents.sha256} | machine.sources.of_model(source.model)
    stream = text.token_stream(documents, tokenizer, recipe.length, recovery.seed, store.root / layout.TOKENS)
    windows = None
    if recipe.block_epochs:
        windows = text.first_windows(stream, recipe.block_windows, "recovery (block_windows)", recovery.source)
    # The second phase goes on where the first one's windows end.
    seen = -(-recipe.block_windows // recipe.batch) if recipe.block_epochs else 0
    masks, origin = load_masks(source.path), content_hash(source.path)
    weights = dict(prunable_weights(source.path))
    keep = {name: mask.keep() for name, mask in masks.items()} or {name: each != 0 for name, each in weights.items()}

    def on_step(metrics: Metrics) -> None:
        done, first = int(metrics["step"]), total - recipe.steps
        if "block" in metrics:
            machine.progress(f"{label}: block by block", done, first)
        else:
            machine.progress(f"{label}: distillation", done - first, recipe.steps)
        spending.note()

    total = recipe.block_steps * len(decoder_blocks(model)) + recipe.steps
    with deferred_signals() as stop, noted(spending):
        outcome = recover(
            model,
            keep,
            weights.items(),
            recipe,
            windows=windows,
            batches=lambda step: stream.batch(step + seen, recipe.batch),
            tile=source.info["tile"] or (1, 1),
            origin=origin,
            seed=recovery.seed,
            work=work,
            device=machine.device,
            on_step=on_step,
            stop=stop,
            ranks=machine.ranks,
            track=os.environ.get(TRACK),
            texts=own,
        )
    spent = spending.facts()
    if machine.ranks.rank:
        return
    zeros = {name: mask.zeros for name, mask in masks.items()} or {name: int((~keep[name]).sum()) for name in keep}
    covered = coverage(model)
    facts = [
        *(
            Fact(f"recovery_{metric}", value, "1", {name: int(entry[name]) for name in _PLACES if name in entry})
            for entry in outcome.history
            for metric, value in entry.items()
            if metric not in _PLACES
        ),
        *mask_facts(model, covered, masks, zeros),
        Fact("recovery_tokens", recipe.tokens, "1", {}),
        *spent,
    ]
    kept = {name: source.info[name] for name in ("method", "structure", "target", "seed") if name in source.info}
    save_checkpoint(
        out,
        model,
        tokenizer,
        masks,
        {
            **kept,
            "sparsity": sum(zeros.values()) / covered.prunable,
            "definition": dict(about),
            "recovered_from": {
                "path": str(source.path),
                "checkpoint": origin,
                "dense": source.model,
                "tokens": recipe.tokens,
                "recipe": dataclasses.asdict(recipe),
            },
            "command": command_line(),
            "zeros": zeros,
            "facts": [vars(fact) for fact in facts],
            "provenance": provenance(spending.seconds, {**(sources or {}), **own}) | {"base": origin},
        },
        load_tile_scores(source.path),
        beside=models.processor_files(str(source.path)),
    )
    check_same_masks(source.path, out)
    (work / STATE).unlink(missing_ok=True)
    spending.forget()


_PLACES = ("step", "block")


def check_same_masks(before: Path, after: Path) -> int:
    """Audit a recovered checkpoint; how many weights have the masks that they had.

    Raises:
        UserError: naming the first weight whose mask or zeros are other ones.
    """
    masks, ours = load_masks(before), load_masks(after)
    rows = audit(after)
    for row in rows:
        name = row.layer
        same = name not in masks or torch.equal(masks[name].keep(), ours[name].keep())
        if row.violating or not same or masks.keys() != ours.keys():
            raise UserError(
                f"{after}: {name} has not the mask that it had in {before}: this is a fault of hts, tell us"
            )
    return len(rows)
