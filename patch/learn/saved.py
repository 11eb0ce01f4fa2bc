"""A run's state on disk: there in full or not at all, with a hash that is verified, and of one run."""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from patch.errors import UserError, one_line
from patch.files import check_seal, replacing, seal

CHECKPOINT = "learner.pt"
# Of a fingerprint: digests of the texts that a run sees, by name. States of before have none.
TEXTS = "texts"


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors and plain data.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        with replacing(path, one_writer=True) as temporary:
            with open(temporary, "wb") as file:
                torch.save(state, file)
            seal(temporary)
    except (RuntimeError, OSError) as error:
        # Closing what could not be written, torch raises an error of its own over the system's.
        first: BaseException | None = error
        while first is not None and not isinstance(first, OSError):
            first = first.__context__
        reason = (first.strerror if isinstance(first, OSError) else None) or one_line(error)
        raise OSError(f"cannot write the learner's checkpoint {path}: {reason}; the one before is kept") from error


def read(path: Path, version: int, ours: Mapping[str, Any], younger: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `write` wrote, its tensors on the CPU, read as they are used.

    Args:
        version: what its ``format`` must be.
        ours: what its ``fingerprint`` must be.
        younger: defaults of fields of the recipe that the state may be older than.

    Raises:
        UserError: if it is damaged, of another format, or of another run.
    """
    with undamaged(path):
        check_seal(path)
        state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        found = state["format"]
    if found != version:
        raise UserError(f"{path} has format {found}, this version reads {version}: remove it to start over")
    with undamaged(path):
        theirs = state["fingerprint"]
    _check_same_run(path, ours, theirs, younger)
    return state


def _check_same_run(path: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any], younger: Mapping[str, Any]) -> None:
    """Raise if a state is of another run: one of its parts is not ours; of the recipe the field is named."""
    differing = [name for name, value in ours.items() if theirs.get(name) != value]
    if "recipe" in differing:
        recipe, other = ours["recipe"], dict(younger) | theirs.get("recipe", {})
        differing.remove("recipe")
        differing += [f"recipe.{name}" for name in recipe if other.get(name) != recipe[name]]
    if TEXTS in differing:
        differing.remove(TEXTS)
        before = theirs.get(TEXTS, {})
        differing += [f"content of {name}" for name, text in ours[TEXTS].items() if before.get(name, text) != text]
    if differing:
        raise UserError(
            f"{path} belongs to another run ({', '.join(differing)} differ): remove it or choose another folder"
        )


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Anything that reading a checkpoint can raise becomes one line that names the file."""
    try:
        yield
    except (torch.OutOfMemoryError, PermissionError):
        # A RuntimeError and an OSError too, but what is in the file is not to blame for them.
        raise
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is not a whole checkpoint ({reason}): remove it to start over") from error
