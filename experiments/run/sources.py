"""Whether what results were made of still holds what it did when they were made.

Rows and checkpoints are found by definitions, which say texts and tasks by name, and what a name stands for changes
with an edited file, another data directory or a newer commit on the hub. The hash of each text and task, and of a model
of the hub its commit, is in the provenance; before anything is taken for what a definition asks for, these are compared
with those of now. Where one differs the result is refused, not made anew beside: trials are named without the content
of texts, so that published ones keep their names, and two results of one name would be drawn as one point. Nothing is
replaced that its owner did not remove.

What is older than these hashes is taken as it is, and so is what was made of a text or task that is not here now: what
is absent has not changed.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.data import registry, text
from experiments.eval import tasks
from patch.errors import UserError
from patch.learn.distributed import ALONE, Ranks

logger = logging.getLogger(__name__)

# Before the name of a task, or of a model of the hub; any other name is that of a text.
TASK = "task:"
MODEL = "model:"
_AS_IT_IS = "%s: what was made of it is taken as it is"


class Sources:
    """Texts, tasks and models as a data directory, or the hub, has them; each is read at most once.

    A model of the hub stays at the commit that it had when it was first asked for: what is loaded with it is what is
    noted, whatever is pushed meanwhile.
    """

    def __init__(self, data: Path | None) -> None:
        self._data = data
        self._known: dict[tuple[str, str], str | None] = {}
        self._commits: dict[str, str | None] = {}

    def digest(self, name: str, then: str = "") -> str | None:
        """The hash of what a text, a task (`TASK`) or a model of the hub (`MODEL`) holds now; None if it is not there.

        Args:
            then: what it is to be compared with: of a task on the hub, which says how many items there are of it.

        Raises:
            UserError: if it is there and cannot be read.
        """
        about = name, then if name.startswith(TASK) else ""
        if about not in self._known:
            self._known[about] = self._digest(name, then)
        return self._known[about]

    def _digest(self, name: str, then: str) -> str | None:
        try:
            if name.startswith(TASK):
                return tasks.fingerprint_as(then, name.removeprefix(TASK), self._data)
            if name.startswith(MODEL):
                return self.commit(name.removeprefix(MODEL))
            text.check_source(name, self._data)
        except UserError as error:
            logger.warning(_AS_IT_IS, error)
            return None
        try:
            return text.load_documents(name, self._data).sha256
        except text.Unreachable as error:
            logger.warning(_AS_IT_IS, error)
            return None

    def commit(self, model: str, ranks: Ranks = ALONE) -> str | None:
        """The commit at which a model of the hub is loaded; None of any other.

        Args:
            ranks: that load it together, all of which call this: the first asks the hub for them all, which might
                answer another one with a newer commit.

        Raises:
            UserError: if the model cannot be had.
        """
        if model not in self._commits or ranks.size > 1:
            self._commits[model] = ranks.told(lambda: self._commits.get(model) or registry.hub_commit(model))
        return self._commits[model]

    def of_model(self, name: str) -> dict[str, str]:
        """What to keep of a model in the provenance of what is made of it: of one on the hub, its commit."""
        commit = self.commit(name)
        return {MODEL + name: commit} if commit else {}

    def check_same(self, provenance: Mapping[str, Any], what: str, place: Path) -> None:
        """Compare what something was made of with what is there now.

        Args:
            provenance: of ``what`` was made.
            place: where it lies.

        Raises:
            UserError: naming the first text that holds something else.
        """
        for name, then in provenance.get("sources", {}).items():
            now = self.digest(name, then)
            if now not in (None, then):
                removed = f", or remove {place} to make it anew" if place.exists() else ""
                differs = f"at another commit ({then[:12]}, now {now[:12]}): load that one from a copy"
                if not name.startswith(MODEL):
                    differs = f"with other content (SHA-256 {_short(then)}, now {_short(now)}): bring that back"
                raise UserError(f"{what} is of {name} {differs}, name another results directory{removed}")

    def require(self, name: str, limit: int | None = None) -> None:
        """Read a text or a task that is needed later, or find it read.

        Raises:
            UserError: if it cannot be had.
        """
        if name.startswith(TASK):
            tasks.require(name.removeprefix(TASK), self._data, limit)
        elif self._known.get((name, "")) is None:
            self._known[name, ""] = text.load_documents(name, self._data).sha256


def _short(told: str) -> str:
    where, colon, digest = told.rpartition(":")
    return where + colon + digest[:12]


def of_checkpoint(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """The provenance of a checkpoint; nothing of one that others made."""
    found = info.get("provenance")
    return found if isinstance(found, dict) else {}
