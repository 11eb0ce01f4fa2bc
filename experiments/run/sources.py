"""Whether what results were made of still holds what it did when they were made.

Rows and checkpoints are found by definitions, which say texts and tasks by name, and what a name stands for changes
with an edited file or another data directory. The hash of each is in the provenance; before anything is taken for what
a definition asks for, these are compared with those of now. Where one differs the result is refused, not made anew
beside: trials are named without the content of texts, so that published ones keep their names, and two results of one
name would be drawn as one point. Nothing is replaced that its owner did not remove.

What is older than these hashes is taken as it is, and so is what was made of a text or task that is not here now: what
is absent has not changed.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.data import text
from experiments.eval import tasks
from patch.errors import UserError

logger = logging.getLogger(__name__)

# Before the name of a task; any other name is that of a text.
TASK = "task:"
_AS_IT_IS = "%s: what was made of it is taken as it is"


class Sources:
    """Texts and tasks as a data directory, or the hub, has them; each is read at most once."""

    def __init__(self, data: Path | None) -> None:
        self._data = data
        self._known: dict[str, str | None] = {}

    def digest(self, name: str) -> str | None:
        """The hash of what a text, or a task (`TASK`), holds now; None if it is not there, or cannot be reached.

        Raises:
            UserError: if it is there and cannot be read.
        """
        if name not in self._known:
            self._known[name] = self._digest(name)
        return self._known[name]

    def _digest(self, name: str) -> str | None:
        try:
            if name.startswith(TASK):
                return tasks.fingerprint(name.removeprefix(TASK), self._data)
            text.check_source(name, self._data)
        except UserError as error:
            logger.warning(_AS_IT_IS, error)
            return None
        try:
            return text.load_documents(name, self._data).sha256
        except text.Unreachable as error:
            logger.warning(_AS_IT_IS, error)
            return None

    def check_same(self, provenance: Mapping[str, Any], what: str, place: Path) -> None:
        """Compare what something was made of with what is there now.

        Args:
            provenance: of ``what`` was made.
            place: where it lies.

        Raises:
            UserError: naming the first text that holds something else.
        """
        for name, then in provenance.get("sources", {}).items():
            now = self.digest(name)
            if now not in (None, then):
                removed = f", or remove {place} to make it anew" if place.exists() else ""
                raise UserError(
                    f"{what} is of {name} with other content (SHA-256 {then[:12]}, now {now[:12]}): bring that back, "
                    f"name another results directory{removed}"
                )


def of_checkpoint(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """The provenance of a checkpoint; nothing of one that others made."""
    found = info.get("provenance")
    return found if isinstance(found, dict) else {}
