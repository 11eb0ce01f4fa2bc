"""Python source of a directory as text to learn on, and other packages of it as text to report, for a data directory.

    python -m experiments.data.python_source --root .venv/lib/python3.11/site-packages --data data

writes ``train/python.jsonl.xz`` and ``code/python_test.jsonl`` into ``data``: the text sources ``python`` and
``python/test``. Whole packages are held out, so that no file of the second has a sibling in the first. What comes out
depends on which packages are there in which versions: the digest that rows carry of every text tells two apart.
"""

import argparse
import hashlib
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path

from patch.errors import UserError
from patch.files import replacing

# Well-known packages of different kinds. Copies of them in other packages are left out of what is learned.
HELD_OUT = ("click", "httpx", "jinja2", "networkx", "rich")
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
    for path in sorted(root.rglob("*.py")):
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


def collect(root: Path, data: Path, held_out: tuple[str, ...] = HELD_OUT) -> tuple[int, int]:
    """Write both texts into a data directory; returns how many characters each has.

    Raises:
        UserError: if there is no source, or none of the packages that are held out.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such directory")
    learned: list[dict[str, str]] = []
    reported: list[dict[str, str]] = []
    for name, text in sources(root):
        if name.split("/")[0] in held_out:
            reported.append({"id": name, "text": text})
        elif not _is_copy(name, held_out):
            learned.append({"id": name, "text": text})
    if not learned or not reported:
        missing = "Python source" if not learned else f"any of the packages that are held out, {', '.join(held_out)}"
        raise UserError(f"{root}: has no {missing}: name another directory (--root) or packages (--held-out)")
    with replacing(data / "train" / "python.jsonl.xz") as temporary, lzma.open(temporary, "wt", preset=2) as file:
        file.writelines(json.dumps(row) + "\n" for row in learned)
    with replacing(data / "code" / "python_test.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in reported), encoding="utf-8")
    return sum(len(row["text"]) for row in learned), sum(len(row["text"]) for row in reported)


def main() -> None:
    """Collect the Python source of this environment, or of any directory."""
    parser = argparse.ArgumentParser(prog="python -m experiments.data.python_source", description=main.__doc__)
    parser.add_argument("--root", type=Path, required=True, help="a directory of packages")
    parser.add_argument("--data", type=Path, required=True, help="the data directory to write into")
    parser.add_argument("--held-out", nargs="+", default=HELD_OUT, help="packages to report on")
    arguments = parser.parse_args()
    try:
        learned, reported = collect(arguments.root, arguments.data, tuple(arguments.held_out))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{learned / 1e6:.1f} million characters to learn on, {reported / 1e6:.1f} million to report")


if __name__ == "__main__":
    main()
