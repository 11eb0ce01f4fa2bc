"""Plans: what trials share runs once, after what it stands on and before what stands on it."""

import io
from pathlib import Path

from forty_study import forty_trials
from rich.console import Console
from tiny_study import tiny_trials

from analysis.rows.format import Fact
from experiments.run import pipeline
from experiments.run.runtime import Machine
from experiments.run.store import Store
from experiments.studies.registry import STUDIES
from experiments.studies.trial import Evaluation, Perplexity, Trial, key
from slurm import commands, plan, status
from slurm.cluster import Cluster, Resources
from slurm.submit import Sweep, todo
from slurm.task import Work


def finish(trial: Trial, store: Store) -> None:
    """The rows of a trial, as if it had run."""
    for stage in pipeline.stages(trial):
        store.write_rows(trial, stage, [Fact("sparsity", 0.0, "1", {})], {})


def wanted(trials: tuple[Trial, ...], root: Path, busy: tuple[str, ...] = (), retry: bool = False) -> list[str]:
    sweep = Sweep("test", trials, Cluster(executor="debug"), Work(root))
    return [step.id for group in todo(sweep, busy, retry) for step in group]


def test_every_pruning_is_one_step_whoever_needs_it() -> None:
    trials = STUDIES["demo"].trials()
    steps = plan.steps(trials)
    # Eight prunings: three one-shot, of which SparseGPT's is also the prior of the four that are learned, and what FP8
    # is made of.
    assert [step.kind for step in steps.values()].count("prune") == 4
    assert [step.kind for step in steps.values()].count("learn") == 4
    assert [step.kind for step in steps.values()].count("evaluate") == len(trials)
    sparsegpt = [step for step in steps.values() if step.pruning.method == "sparsegpt" and step.kind == "prune"]
    [shared] = [step for step in sparsegpt if step.pruning.quantisation is None]
    assert {trial.label for trial in shared.trials} == {
        trial.label for trial in trials if trial.pruning.method in ("sparsegpt", "maskllm", "patch-joint")
    }


def test_steps_follow_what_they_stand_on(tmp_path: Path) -> None:
    steps = plan.steps(forty_trials(tmp_path / "text"))
    seen: set[str] = set()
    for group in plan.ordered(steps, steps):
        assert plan.needs(group) <= seen and len({step.kind for step in group}) == 1
        seen |= {step.id for step in group}
    assert seen == set(steps)


def test_what_is_done_running_or_failed_is_not_wanted(tmp_path: Path) -> None:
    trials, store = tiny_trials(Path("embedded"), tmp_path / "text"), Store(tmp_path)
    everything = wanted(trials, tmp_path)
    assert sorted(everything) == sorted(plan.steps(trials))
    dense, magnitude, learned = trials
    finish(dense, store)
    assert f"evaluate-{key(dense)}" not in wanted(trials, tmp_path)
    # A checkpoint is there: only the evaluation is left.
    store.checkpoint_path(magnitude.pruning).mkdir(parents=True)
    assert wanted((dense, magnitude), tmp_path) == [f"evaluate-{key(magnitude)}"]
    # In the queue: its dependents are submitted, itself not.
    prior, mask, evaluation = (
        f"prune-{key(learned.pruning.prior)}",
        f"learn-{key(learned.pruning)}",
        f"evaluate-{key(learned)}",
    )
    assert wanted((learned,), tmp_path, (prior, mask)) == [evaluation]
    # What the queue holds stands on a step that was lost: it will not start.
    assert wanted((learned,), tmp_path, (mask, evaluation)) == [prior, mask, evaluation]
    with store.lease(f"trial-{key(magnitude)}"):
        assert wanted((magnitude,), tmp_path) == []
    store.write_failure(learned, "learn", ValueError("diverged"), {})
    assert wanted((learned,), tmp_path) == []
    assert len(wanted((learned,), tmp_path, retry=True)) == 3


def test_a_finished_trial_needs_no_checkpoint(tmp_path: Path) -> None:
    """Checkpoints are large: they may be deleted once their rows are there."""
    trials = tiny_trials(Path("embedded"), tmp_path / "text")
    for trial in trials:
        finish(trial, Store(tmp_path))
    assert wanted(trials, tmp_path) == []


def test_another_evaluation_of_a_pruning_shares_it(tmp_path: Path) -> None:
    trial = tiny_trials(Path("embedded"), tmp_path / "text")[1]
    other = Trial(trial.pruning, Evaluation((Perplexity("wikitext2/test", 128),)))
    kinds = [step.kind for step in plan.steps((trial, other)).values()]
    assert kinds == ["prune", "evaluate", "evaluate"]


def test_times_that_a_machine_without_a_gpu_skipped_are_wanted_where_there_is_one(tmp_path: Path) -> None:
    trials = STUDIES["speed-models"].trials()[:1]
    pipeline.run_trial(trials[0], Store(tmp_path), Machine("cpu", None, lambda *_: None))
    for gpus, device, missing in ((1, None, True), (1, "cpu", False), (0, None, False)):
        stages = {"evaluate": Resources(gpus=gpus)}
        sweep = Sweep("test", trials, Cluster(stages=stages), Work(tmp_path, device=device))
        found = [step.id for group in todo(sweep, (), False) for step in group]
        assert found == ([f"evaluate-{key(trials[0])}"] if missing else [])


def test_status_says_which_times_a_machine_without_a_gpu_skipped(tmp_path: Path) -> None:
    trials, store = STUDIES["speed-models"].trials()[:1], Store(tmp_path)
    assert status.examine(trials, store).trials[0].state == "missing"
    pipeline.run_trial(trials[0], store, Machine("cpu", None, lambda *_: None))
    (found,) = status.examine(trials, store).trials
    assert found.state == "done" and "not timed: run it again on a GPU" in found.note
    shown = io.StringIO()
    commands.status(trials, store, Console(file=shown, width=120), watch=False, each=False)
    assert "1 of those done are not timed" in shown.getvalue()
