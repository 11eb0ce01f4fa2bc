"""Python source as text to learn on, and other packages of it as text to report, for a data directory.

    python -m experiments.data.python_source --data data

writes ``train/python.jsonl.xz`` and ``code/python_test.jsonl`` into ``data``: the text sources ``python`` and
``python/test``, of `PACKAGES`, whose versions are fixed, so that everybody has the same text; 39 wheels, 180 MB. With
``--root`` it is of a directory of packages instead, such as an environment's. Whole packages are held out, so that no
file of the second text has a sibling in the first. The digest that rows carry of every text tells two of them apart.
"""

import argparse
import hashlib
import json
import lzma
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from experiments.data.packaged import unpack
from experiments.data.text import load_documents
from patch.errors import UserError, one_line
from patch.files import replacing

# What is unpacked, and never imported.
PACKAGES = (
    "accelerate==1.15.0",
    "aiohttp==3.14.5",
    "anyio==4.16.0",
    "click==8.5.1",
    "compressed-tensors==0.20.1",
    "datasets==5.2.0",
    "filelock==4.3.1",
    "fonttools==4.68.0",
    "fsspec==2026.9.0",
    "grpcio==1.85.3",
    "httpx==0.28.1",
    "huggingface-hub==1.33.0",
    "hypothesis==6.170.17",
    "jinja2==3.1.6",
    "joblib==1.6.0",
    "lm-eval==0.4.13",
    "matplotlib==3.11.2",
    "mpmath==1.3.0",
    "mypy==2.4.1",
    "narwhals==2.29.0",
    "networkx==3.6.1",
    "nltk==3.10.4",
    "numpy==2.3.5",
    "packaging==26.4",
    "pandas==3.1.1",
    "peft==0.21.2",
    "pillow==13.0.0",
    "protobuf==7.36.2",
    "pydantic==2.14.4",
    "pygments==2.21.0",
    "pytest==9.2.0",
    "rich==15.0.0",
    "scikit-learn==1.9.1",
    "scipy==1.17.1",
    "seaborn==0.13.2",
    "sympy==1.14.0",
    "tensorboard==2.21.0",
    "transformers==5.17.0",
    "werkzeug==3.1.9",
)
# Of both texts of `PACKAGES`, as `experiments.data.text` reads them.
DIGESTS = {
    "python": "fefb14be19158981963fbaaeee2669eddd01ec5cc5217dadc5b8f94bf08913c8",
    "python/test": "112cc4877eb7f9d7b43d280caf8e1534c470b6c16f9b600eb71416b144043dfe",
}
# Well-known packages of different kinds. Copies of them in other packages are left out of what is learned.
HELD_OUT = ("click", "httpx", "jinja2", "networkx", "rich")
# Where both texts lie in a data directory.
_LEARNED, _REPORTED = "train/python.jsonl.xz", "code/python_test.jsonl"
# Tests repeat what they test; generated and copied code repeats itself.
_LEFT_OUT = ("test", "tests", "_vendor", "vendor", "vendored", "locale", "locales", "data")
_GENERATED = ("_pb2.py", "_pb2_grpc.py")
_BYTES = (1_000, 120_000)
# What has longer lines is a table that only looks like code.
_LINE = 1_000


def sources(root: Path) -> Iterator[tuple[str, str]]:
    """The path below ``root`` and the text of every file of Python source that is worth reading, each text once.

    In an order that looks random and depends on the texts alone, so that neighbours are of different packages.
    """
    found: dict[str, tuple[str, str]] = {}
    # By name as it is written: a Windows path compares without regard to case.
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        name = path.relative_to(root)
        if set(name.parts[:-1]) & set(_LEFT_OUT) or name.name.endswith(_GENERATED):
            continue
        if not _BYTES[0] <= path.stat().st_size <= _BYTES[1]:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if max(map(len, text.splitlines()), default=0) <= _LINE:
            found.setdefault(hashlib.sha256(text.encode()).hexdigest(), (name.as_posix(), text))
    for digest in sorted(found):
        yield found[digest]


def _is_copy(name: str, held_out: tuple[str, ...]) -> bool:
    """Whether a file of another package lies in a folder, or is a module, of the name of one that is held out."""
    parts = [part.removesuffix(".py").strip("_") for part in name.split("/")]
    return bool(set(parts) & {package.strip("_") for package in held_out})


def _check_writable(data: Path) -> None:
    """Raise before anything is fetched or read if the texts could not be written.

    Raises:
        UserError: naming the place.
    """
    for folder in (data / "train", data / "code"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(
                f"cannot write into {folder}: {error.strerror or error}: name another directory (--data)"
            ) from error


def collect(root: Path, data: Path, held_out: tuple[str, ...] = HELD_OUT) -> tuple[int, int]:
    """Write both texts into a data directory; returns how many characters each has.

    Raises:
        UserError: if there is no source, or none of the packages that are held out, or the texts cannot be written.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such directory")
    _check_writable(data)
    learned: list[dict[str, str]] = []
    reported: list[dict[str, str]] = []
    for name, text in sources(root):
        if name.split("/")[0] in held_out:
            reported.append({"id": name, "text": text})
        elif not _is_copy(name, held_out):
            learned.append({"id": name, "text": text})
    if not learned or not reported:
        missing = "no Python source" if not learned else f"none of the packages held out, {', '.join(held_out)}"
        raise UserError(f"{root}: has {missing}: name another directory (--root) or packages (--held-out)")
    with replacing(data / _LEARNED) as temporary, lzma.open(temporary, "wt", preset=2) as file:
        file.writelines(json.dumps(row) + "\n" for row in learned)
    with replacing(data / _REPORTED) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in reported), encoding="utf-8")
    return sum(len(row["text"]) for row in learned), sum(len(row["text"]) for row in reported)


def collect_packages(data: Path) -> tuple[int, int]:
    """`collect` of `PACKAGES`, fetched from the package index; what is in the data directory stays until all is there.

    Raises:
        UserError: if one cannot be had, the texts cannot be written, or they are not those that `DIGESTS` tells of.
    """
    _check_writable(data)
    with tempfile.TemporaryDirectory() as folder:
        unpacked, found = Path(folder) / "packages", Path(folder) / "data"
        unpack(PACKAGES, unpacked, "or name a directory of packages (--root)", platform=True)
        sizes = collect(unpacked, found)
        for source, digest in DIGESTS.items():
            has = load_documents(source, found).sha256
            if has != digest:
                raise UserError(
                    f"{source}: what the packages hold has digest {has[:12]}, not {digest[:12]}: the index has other "
                    "files under their versions; nothing was written (a directory of packages of yours: --root)"
                )
        for name in (_LEARNED, _REPORTED):
            with replacing(data / name) as temporary:
                shutil.copyfile(found / name, temporary)
    return sizes


def main() -> None:
    """Collect the Python source of packages of fixed versions, from the package index, or of any directory."""
    parser = argparse.ArgumentParser(prog="python -m experiments.data.python_source", description=main.__doc__)
    parser.add_argument("--root", type=Path, help="a directory of packages, in place of those of fixed versions")
    parser.add_argument("--data", type=Path, required=True, help="the data directory to write into")
    parser.add_argument("--held-out", nargs="+", help="packages of that directory to report on")
    arguments = parser.parse_args()
    try:
        if arguments.root:
            learned, reported = collect(arguments.root, arguments.data, tuple(arguments.held_out or HELD_OUT))
        elif arguments.held_out:
            raise UserError("--held-out: of which directory? name it with --root")
        else:
            learned, reported = collect_packages(arguments.data)
    except (UserError, OSError) as error:
        # Such as a full disk.
        sys.exit(f"error: {one_line(error)}")
    print(f"{learned / 1e6:.1f} million characters to learn on, {reported / 1e6:.1f} million to report")


if __name__ == "__main__":
    main()
