"""What is to be done for a study, once each, and in which order.

A trial takes one step for each pruning it stands on (its priors, then itself) and one to evaluate it. Trials that share
a pruning share its step. Steps of one kind that stand on equally many others become one or more job arrays; those start
when the arrays that hold what they need have ended, however they ended, so that one failed trial stops nobody but those
that stand on it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from experiments.run import pipeline
from experiments.run.store import Store
from experiments.studies.trial import Pruning, Trial, describe, key, lineage

Kind = Literal["prune", "learn", "evaluate"]


@dataclass(frozen=True)
class Step:
    """One thing to do, by one task of a job array.

    Attributes:
        id: its kind and the hash of what it makes.
        kind: of work; names the resources of the cluster that it takes.
        trials: the one it evaluates, or those that need the checkpoint it makes.
        pruning: what it makes or evaluates.
        needs: ids of the steps that must be over before; all of them, whether they still have to run or not.
    """

    id: str
    kind: Kind
    trials: tuple[Trial, ...]
    pruning: Pruning
    needs: tuple[str, ...]

    @property
    def hash(self) -> str:
        """Of what it makes: names a checkpoint, or the rows of a trial."""
        return self.id.partition("-")[2]

    @property
    def lease(self) -> str:
        """The name under which a process that does this step leases it (see `experiments.run.store`)."""
        return f"{'trial' if self.kind == 'evaluate' else 'pruning'}-{self.hash}"

    @property
    def label(self) -> str:
        """A short human name, such as ``learn embedded patch-joint hybrid 45% 64x64``."""
        return f"{self.kind} {self.trials[0].label if self.kind == 'evaluate' else describe(self.pruning)}"


def _kind(pruning: Pruning) -> Kind:
    return "learn" if pruning.learns else "prune"


def _id(pruning: Pruning) -> str:
    return f"{_kind(pruning)}-{key(pruning)}"


def steps(trials: Iterable[Trial]) -> dict[str, Step]:
    """All steps of some trials by id, each after those that it needs."""
    found: dict[str, Step] = {}
    waiting: dict[str, list[Trial]] = {}
    for trial in trials:
        for pruning in lineage(trial.pruning):
            if not pruning.as_it_is:
                id, needs = _id(pruning), tuple(_id(before) for before in lineage(pruning)[:-1])
                found.setdefault(id, Step(id, _kind(pruning), (), pruning, needs))
                waiting.setdefault(id, []).append(trial)
        id = f"evaluate-{key(trial)}"
        made = tuple(_id(pruning) for pruning in lineage(trial.pruning) if not pruning.as_it_is)
        found[id] = Step(id, "evaluate", (trial,), trial.pruning, made)
    return {
        id: Step(id, step.kind, tuple(waiting[id]), step.pruning, step.needs) if id in waiting else step
        for id, step in found.items()
    }


def is_done(step: Step, store: Store, can_time: bool = False) -> bool:
    """Whether what the step makes is there.

    Args:
        can_time: whether times count that a machine without a GPU skipped, since this one has one.
    """
    if step.kind == "evaluate":
        return not pipeline.missing_stages(step.trials[0], store, can_time)
    return store.checkpoint_path(step.pruning).exists()


def needs(steps: Iterable[Step]) -> set[str]:
    """Ids of the steps that must be over before any of these starts."""
    return {need for step in steps for need in step.needs}


def ordered(known: dict[str, Step], wanted: Collection[str]) -> list[tuple[Step, ...]]:
    """The wanted steps in the order in which they can be submitted: those of one kind that may run at the same time."""
    groups: dict[tuple[int, bool, Kind], list[Step]] = {}
    for id, step in known.items():
        if id in wanted:
            # Slurm takes earlier jobs first: what others wait for goes before evaluations, which nobody waits for.
            groups.setdefault((len(step.needs), step.kind == "evaluate", step.kind), []).append(step)
    return [tuple(steps) for _, steps in sorted(groups.items())]
