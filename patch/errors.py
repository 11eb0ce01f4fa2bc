"""The one exception that means "the input is wrong": the command line prints its message as a single line."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Raised for anything a user can cause and mend; the message names the thing, the value and what to do."""


def check_name(kind: str, name: str, known: Iterable[str]) -> str:
    """``name``, if it is among ``known``.

    Args:
        kind: what it is the name of, for the message.

    Raises:
        UserError: if it is not, suggesting the nearest ones.
    """
    known = list(known)
    if name in known:
        return name
    # Names that begin so are near however long they are; among few, far ones still may be meant.
    begun = [each for each in known if name and each.startswith(name)][:3]
    *others, last = begun or difflib.get_close_matches(name, known, cutoff=0.55) or [""]
    near = f"{', '.join(others)} or {last}" if others else last
    hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
    raise UserError(f"unknown {kind} '{name}': {hint}")


def one_line(error: BaseException) -> str:
    """The whole message on one line; the class's name if there is none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def written_for(path: Path, temporary: Path) -> Iterator[None]:
    """What the system says of a temporary file is said of the one that it stands for."""
    try:
        yield
    except OSError as error:
        # A write that fails names no file, and one that is opened the temporary.
        if error.filename in (None, str(temporary)) and error.errno is not None:
            error.filename = str(path)
        raise
