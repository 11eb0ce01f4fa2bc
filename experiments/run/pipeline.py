"""The life of a trial: load, calibrate, prune or learn, harden, checkpoint, evaluate, pack, rows.

Every arrow leaves its result in the `Store` under the hash of what defines it, and is skipped when that is there. A
process that is killed loses at most the stage it was in, and of learning at most the steps since the last learner
checkpoint.
Several processes may run the same study on one results directory: each trial and each pruning is leased, and those
that another process has are taken up last.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from analysis.rows.format import STAGE_KINDS, Fact
from experiments.data import models, text
from experiments.eval import humaneval, perplexity, tasks
from experiments.eval.names import HUMANEVAL
from experiments.run import grids, packed
from experiments.run.checkpoints import ensure_checkpoint, facts_of
from experiments.run.provenance import provenance
from experiments.run.runtime import Machine
from experiments.run.sources import MODEL, TASK, Sources
from experiments.run.store import Store
from experiments.studies.trial import Perplexity, Trial, key, lineage
from patch.errors import UserError, check_name
from patch.learn.descent import Stopped
from patch.positions import check_length
from patch.tiles import tile_grid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Measurement = Callable[[nn.Module, "PreTrainedTokenizerBase", Machine], tuple[list[Fact], dict[str, str]]]


def stages(trial: Trial, kinds: Collection[str] = ()) -> list[str]:
    """The names of a trial's stages, in the order in which they run.

    Args:
        kinds: of `STAGE_KINDS`, those that are wanted; if none is named, all.
    """
    if trial.evaluation.grid:
        named = grids.stages(trial)
    else:
        named = ["prune", *_evaluations(trial), *packed.measurements(trial)]
    return [stage for stage in named if not kinds or stage.partition(":")[0] in kinds]


def missing_stages(trial: Trial, store: Store, can_time: bool = False, kinds: Collection[str] = ()) -> list[str]:
    """The stages of a trial without rows.

    Args:
        can_time: also those that a machine skipped because it could not time them.
        kinds: as `stages`.
    """
    return [
        stage
        for stage in stages(trial, kinds)
        if not store.has_rows(trial, stage) or (can_time and store.was_skipped(trial, stage))
    ]


def with_stages(trials: Iterable[Trial], kinds: Collection[str]) -> list[Trial]:
    """The trials that have stages of some kinds; if none is named, all.

    Raises:
        UserError: if a kind is unknown, or is of no trial.
    """
    trials = list(trials)
    for kind in kinds:
        check_name("stage", kind, STAGE_KINDS)
        if not any(stages(trial, [kind]) for trial in trials):
            found = [each for each in STAGE_KINDS if any(stages(trial, [each]) for trial in trials)]
            raise UserError(f"no trial has a stage '{kind}': there are {', '.join(found)}")
    return [trial for trial in trials if stages(trial, kinds)]


def validate(trials: Iterable[Trial], data: Path | None, runs_code: bool = False, kinds: Collection[str] = ()) -> None:
    """Check what can be checked before work starts: models, tasks and local files.

    Args:
        runs_code: whether tasks may run programs that a model wrote.
        kinds: as `stages`: what only others measure on need not be there.

    Raises:
        UserError: naming the first thing that is not there.
    """
    trials = list(trials)
    grids.validate(trials)
    for model in {t.pruning.model for t in trials if t.pruning.method != "dense" or t.pruning.quantisation}:
        models.check_changeable(model)
    for model, tile in {(trial.pruning.model, trial.pruning.tile) for trial in trials}:
        for shape in models.linear_shapes(model):
            if tile:
                tile_grid(shape, tile)
    wanted = {task for trial in trials for task in _tasks_of(trial, stages(trial, kinds))}
    if HUMANEVAL in wanted:
        humaneval.check(data, runs_code)
    tasks.check_tasks(sorted(wanted), data)
    windows = {trial: _texts_of(trial, stages(trial, kinds)) for trial in trials}
    _check_lengths(windows, data)
    for source in {item.source for items in windows.values() for item in items}:
        text.check_source(source, data)
    for pruning in {step for trial in trials for step in lineage(trial.pruning)}:
        for calibration in filter(None, pruning.texts):
            text.check_source(calibration.source, data)
        if pruning.learning:
            text.check_source(pruning.learning.source, data)
        if pruning.recovery:
            text.check_source(pruning.recovery.source, data)


def _check_lengths(trials: Mapping[Trial, Iterable[Perplexity]], data: Path | None) -> None:
    """No text may be longer than the model has positions for, as far as its configuration is at hand.

    Args:
        trials: each with the windows that its perplexity is measured on.
    """
    wanted: dict[str, set[tuple[str, int]]] = {}
    for trial, items in trials.items():
        lengths = wanted.setdefault(trial.pruning.model, set())
        lengths |= {("perplexity windows", item.length) for item in items}
        for pruning in lineage(trial.pruning):
            seen = filter(None, pruning.texts)
            lengths |= {("calibration windows", calibration.length) for calibration in seen}
            if pruning.learning:
                lengths.add(("learning sequences", pruning.learning.recipe.length))
            if pruning.recovery:
                lengths.add(("recovery sequences", pruning.recovery.recipe.length))
    for model, lengths in wanted.items():
        limit = models.longest_text(model, data)
        for what, length in sorted(lengths):
            check_length(model, limit, length, what)


def run_trials(
    trials: Iterable[Trial],
    store: Store,
    machine: Machine,
    on_done: Callable[[Trial, Exception | None], None],
    kinds: Collection[str] = (),
) -> None:
    """Bring every trial to completion, beside any other process that works on the same results directory.

    Args:
        on_done: called once per trial, with the error if it failed; a failed trial does not stop the others.
        kinds: as `run_trial`.

    Raises:
        Stopped: if learning was told to stop (`experiments.run.signals`).
        UserError: if several processes were started to learn one mask.
    """
    if machine.ranks.size > 1:
        raise UserError("a study runs one process a trial: start it in several processes, without torchrun")
    waiting = list(trials)
    while waiting:
        held_elsewhere = []
        for trial in waiting:
            with store.lease(f"trial-{key(trial)}", wait=False) as mine:
                if not mine:
                    held_elsewhere.append(trial)
                    continue
                try:
                    run_trial(trial, store, machine, kinds)
                except Stopped:
                    raise
                except (UserError, OSError, RuntimeError) as error:
                    record_failure(trial, trial.label, error, store)
                    on_done(trial, error)
                else:
                    on_done(trial, None)
        if len(held_elsewhere) == len(waiting):
            machine.progress("waiting for trials that other processes hold", 0, len(waiting))
            time.sleep(1)
        waiting = held_elsewhere


def record_failure(trial: Trial, during: str, error: BaseException, store: Store) -> None:
    """Leave a row with the traceback; on a full disk, where no row can be written, only the caller's report remains."""
    with contextlib.suppress(OSError):
        store.write_failure(trial, during, error, provenance(0.0))


def run_trial(trial: Trial, store: Store, machine: Machine, kinds: Collection[str] = ()) -> None:
    """Run the stages of one trial that are not complete.

    Whatever stages are wanted, the checkpoint that they are measured of is made first, and all that the trial has rows
    of must be of that checkpoint and of the texts of now: they are shown together.

    Args:
        kinds: as `stages`.

    Raises:
        UserError: if something cannot be had or does not fit, or stages were measured of another checkpoint, or on
            texts that hold something else now.
        Stopped: if learning was told to stop (`experiments.run.signals`).
    """
    missing = missing_stages(trial, store, machine.can_time, kinds)
    check_sources(trial, store, machine.sources)
    if missing or not kinds:
        # Where nothing is tried again, what failed of other kinds of stages has still failed.
        store.clear_failure(trial)
    if not missing:
        return
    if trial.evaluation.grid:
        grids.run_stages(trial, missing, store, machine)
        return
    _require(trial, missing, machine.sources)
    pruning = trial.pruning
    ensure_checkpoint(pruning, store, machine)
    source = pruning.model if pruning.as_it_is else str(store.checkpoint_path(pruning))
    content = models.content(source, machine.data, machine.sources.commit(source))
    _check_content(trial, content, store)
    if not store.has_rows(trial, "prune"):
        # Also where other stages are wanted: tables say of each of them how sparse the checkpoint is.
        facts, origin = facts_of(pruning, store)
        store.write_rows(trial, "prune", facts, origin | {"checkpoint": content})
    missing = [stage for stage in missing if not _take_over(trial, stage, content, store, machine.sources)]
    _evaluate(trial, missing, source, content, store, machine)
    packed.run_stages(trial, missing, source, content, store, machine)


def _require(trial: Trial, missing: Collection[str], sources: Sources) -> None:
    """Read what the missing stages will ask, before hours of work.

    Raises:
        UserError: naming the first text or task that cannot be had.
    """
    for item in _texts_of(trial, missing):
        sources.require(item.source)
    for task in _tasks_of(trial, missing):
        sources.require(TASK + task, trial.evaluation.limit)


def _texts_of(trial: Trial, wanted: Collection[str]) -> list[Perplexity]:
    """The windows that some of a trial's stages measure perplexity on, of the model unpacked or packed."""
    return [item for item in trial.evaluation.perplexity if {f"perplexity:{item}", f"packed:{item}"} & set(wanted)]


def _tasks_of(trial: Trial, wanted: Collection[str]) -> list[str]:
    """The tasks that some of a trial's stages are about."""
    return [task for task in trial.evaluation.tasks if TASK + task in wanted]


def check_sources(trial: Trial, store: Store, sources: Sources) -> None:
    """What was measured must be of the texts and tasks that the trial would be measured on now.

    Raises:
        UserError: naming the first that holds something else.
    """
    for stage in stages(trial):
        for row in store.read_rows(trial, stage)[:1]:
            made, what, place = row["provenance"], f"{trial.label}: {stage}", store.rows_path(trial, stage).parent
            sources.check_same(made, what, place)
            # A model as it is was measured itself: its commit is what its rows name as the checkpoint.
            if trial.pruning.as_it_is and made.get("checkpoint"):
                sources.check_same({"sources": {MODEL + trial.pruning.model: made["checkpoint"]}}, what, place)


def _check_content(trial: Trial, content: str, store: Store) -> None:
    """What is measured now must be what was measured before: one made anew elsewhere may differ in its bits."""
    for stage in stages(trial):
        for row in store.read_rows(trial, stage):
            measured = row["provenance"].get("checkpoint")
            if measured not in (None, content):
                raise UserError(
                    f"{trial.label}: {stage} was measured of checkpoint {measured[:12]}, but the one here is "
                    f"{content[:12]}: bring that one back (`hts restore`), or remove "
                    f"{store.rows_path(trial, stage).parent} to measure all of it anew"
                )


def _take_over(trial: Trial, stage: str, content: str, store: Store, sources: Sources) -> bool:
    """Take a stage's rows from the same trial without packed stages, if it measured the same weights and masks."""
    twin = Trial(trial.pruning, dataclasses.replace(trial.evaluation, packed=None))
    if twin == trial or stage == "prune" or stage not in stages(twin):
        return False
    rows = store.read_rows(twin, stage)
    if not rows or any(row["provenance"].get("checkpoint") != content for row in rows):
        return False
    # Its texts may be others.
    sources.check_same(rows[0]["provenance"], f"{twin.label}: {stage}", store.rows_path(twin, stage).parent)
    facts = [Fact(**{field.name: row[field.name] for field in dataclasses.fields(Fact)}) for row in rows]
    store.write_rows(trial, stage, facts, rows[0]["provenance"])
    return True


def _evaluations(trial: Trial) -> dict[str, Measurement]:
    """The stages of the unpacked model by name, in the order in which they run, and what runs each.

    A measurement returns facts, and the SHA-256 of what it read.
    """
    found: dict[str, Measurement] = {}
    for item in trial.evaluation.perplexity:
        found[f"perplexity:{item}"] = partial(_perplexity, trial, item)
    for task in trial.evaluation.tasks:
        found[TASK + task] = partial(_task, trial, task)
    return found


def _evaluate(
    trial: Trial, missing: Collection[str], source: str, content: str, store: Store, machine: Machine
) -> None:
    """The stages of the unpacked model that are missing."""
    wanted = {stage: measure for stage, measure in _evaluations(trial).items() if stage in missing}
    if not wanted:
        return
    model, tokenizer = models.load_model(
        source,
        device=machine.device,
        dtype=machine.dtype,
        data=machine.data,
        quantised=True,
        commit=machine.sources.commit(source),
    )
    for stage, measure in wanted.items():
        started = time.monotonic()
        facts, read = measure(model, tokenizer, machine)
        store.write_rows(trial, stage, facts, provenance(time.monotonic() - started, read, content))


def _perplexity(
    trial: Trial, item: Perplexity, model: nn.Module, tokenizer: "PreTrainedTokenizerBase", machine: Machine
) -> tuple[list[Fact], dict[str, str]]:
    documents = text.load_documents(item.source, machine.data)
    windows = text.perplexity_windows(documents, tokenizer, item.length)
    label = f"{trial.label}: {item.source}"
    result = perplexity.perplexity(
        model,
        windows,
        device=machine.device,
        batch=trial.evaluation.batch,
        on_batch=lambda done, total: machine.progress(label, done, total),
    )
    labels = {"source": item.source, "length": item.length, "windows": result.windows, "tokens": result.tokens}
    labels["window_losses"] = [float(f"{loss:.6g}") for loss in result.window_losses]
    return [Fact("perplexity", result.value, "ppl", labels, result.stderr)], {item.source: documents.sha256}


def _task(
    trial: Trial, task: str, model: nn.Module, tokenizer: "PreTrainedTokenizerBase", machine: Machine
) -> tuple[list[Fact], dict[str, str]]:
    label = f"{trial.label}: {task}"
    # Before the items are read: of a file that is edited meanwhile, rows must not name what was not read.
    read = {TASK + task: tasks.fingerprint(task, machine.data, trial.evaluation.limit)}

    def on_batch(done: int, total: int) -> None:
        machine.progress(label, done, total)

    data, limit, device = machine.data, trial.evaluation.limit, machine.device
    if task == HUMANEVAL:
        humaneval.check(data, machine.runs_code)
        right = humaneval.passed(model, tokenizer, data=data, limit=limit, device=device, on_batch=on_batch)
        results = [tasks.share_of(task, humaneval.METRIC, right)]
    else:
        results = tasks.evaluate_tasks(
            model, tokenizer, [task], data=data, limit=limit, batch="auto", device=device, on_batch=on_batch
        )
    facts = [
        Fact(
            result.metric,
            result.value,
            "ppl" if result.metric == "perplexity" else "1",
            {"task": result.task, "num_fewshot": result.num_fewshot, "n": result.n, "primary": result.primary}
            | ({} if result.items is None else {"items": result.items}),
            result.stderr,
        )
        for result in results
    ]
    return facts, read
