"""What was done to a dense model, one checkpoint after the other, as the last of them says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patch.checkpoint import INFO_FILE, content_hash, load_info
from patch.errors import UserError

# What a checkpoint that is made of another, not of a dense model, keeps of it.
_TOLD = ("definition", "recovered_from", "imported", "command", "made_from")


def made_from(model: str) -> dict[str, Any]:
    """What the info of a checkpoint that is made of ``model`` says of that; nothing where it is no checkpoint."""
    if not (Path(model) / INFO_FILE).is_file():
        return {}
    info = load_info(model)
    return {"made_from": {name: info[name] for name in _TOLD if name in info}}


def steps_of(info: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What is known of every checkpoint on the way from the dense model to this one, which is the last."""
    before = info.get("made_from")
    return [*(steps_of(before) if isinstance(before, Mapping) else ()), info]


def dense_model(info: Mapping[str, Any]) -> str | None:
    """The dense model as it was named, where that is known."""
    first = steps_of(info)[0]
    named = (first.get("definition") or {}).get("model") or (first.get("imported") or {}).get("base")
    return str(named) if named else None


def definition_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """The definitions of all steps in one: what a later one leaves open is as it was."""
    found: dict[str, Any] = {}
    for step in steps_of(info):
        found |= {name: value for name, value in (step.get("definition") or {}).items() if value is not None}
    return found


def check_same_origin(before: Path, after: Path) -> None:
    """Check that a checkpoint which is there was made of this one, not of another of its definition.

    What is older than that is told says nothing, and is taken as it is.

    Raises:
        UserError: if it was made of another.
    """
    info = load_info(after)
    then = info.get("recovered_from", {}).get("checkpoint") or (info.get("provenance") or {}).get("base")
    if then is None:
        return
    # A second per GiB, so only where there is something to compare with.
    now = content_hash(before)
    if then != now:
        raise UserError(
            f"{after} was made of checkpoint {then[:12]}, {before} is now {now[:12]}: bring that one back, name "
            "another results directory, or remove the former to make it anew"
        )
