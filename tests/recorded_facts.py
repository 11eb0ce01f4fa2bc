"""Digests of every fact that was recorded before results were published as tables.

    python tests/recorded_facts.py RESULTS > tests/recorded_facts.txt

was run on the results of revision 18eccb4, the last that has them as files of lines, one a stage of a trial or a bench.
It reads them with nothing but the standard library, and writes for each folder, trial and stage how many facts there
are and a digest of them all, with their definition and provenance. ``tests/analysis/rows/test_published.py`` takes the
same digests of what is published now.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SPREAD = ("p20", "p80", "runs")


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def digests(rows: Iterable[Row]) -> dict[tuple[str, str], tuple[int, str]]:
    """How many facts there are of each trial and stage, and the digest of all that is known of them."""
    found: dict[tuple[str, str], list[str]] = {}
    # Thousands of facts share one definition and one provenance; what is named by its address must stay alive.
    common: dict[int, tuple[Any, str]] = {}

    def text_of(shared: Any) -> str:
        if id(shared) not in common:
            common[id(shared)] = shared, canonical(shared)
        return common[id(shared)][1]

    for row in rows:
        labels, spread = dict(row["labels"]), {name: row.get(name) for name in SPREAD}
        # They stood among the labels once.
        spread |= {name: labels.pop(name) for name in SPREAD if name in labels}
        said = canonical([row[name] for name in ("metric", "value", "unit", "stderr")])[1:-1]
        said += f",{text_of(row['definition'])},{text_of(row['provenance'])},{canonical([labels, spread])[1:-1]}"
        found.setdefault((row["trial"], row["stage"]), []).append(f"[{said}]")
    return {about: (len(facts), short("\n".join(sorted(facts)))) for about, facts in found.items()}


def lines(path: Path) -> list[Row]:
    """A file of lines, each of which leaves out what it shares with the one above."""
    found: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.append(row if "schema" in row or not found else found[-1] | row)
    return found


def trials(folder: Path) -> Iterator[Row]:
    for path in sorted(folder.rglob("*.jsonl")):
        yield from lines(path)


def bench(folder: Path) -> Iterator[Row]:
    """The rows of a GPU's bench: some files have a first line about all others instead of whole rows."""
    for path in sorted(folder.rglob("*.jsonl")):
        header, *others = map(json.loads, path.read_text().splitlines())
        if header["schema"] == 2:
            yield from lines(path)
            continue
        common = {"stderr": None, "provenance": header["provenance"]}
        if "roof" not in header:
            about: Row = {"bench": "tests", "gpus": header["gpus"]}
            common |= {
                "trial": short(canonical(about)),
                "definition": about,
                "stage": "tests",
                "p20": None,
                "p80": None,
            }
            for counts in others:
                for metric in ("passed", "failed", "skipped", "seconds"):
                    unit = "s" if metric == "seconds" else "1"
                    said = {"metric": metric, "value": counts[metric], "unit": unit, "labels": {"file": counts["file"]}}
                    yield common | said | {"runs": 1}
            continue
        cell = others[0]["cell"]
        kind = path.parent.name
        about = {"bench": kind, "model": cell["model"]}
        stage = f"{kind}:{cell['linear']}" if "linear" in cell else kind
        common |= {"trial": short(canonical(about)), "definition": about, "stage": stage}
        for row in others:
            measured = ("metric", "value", "unit", *SPREAD, "cell")
            labels = row["cell"] | {name: value for name, value in row.items() if name not in measured}
            said = {"metric": row["metric"], "value": row["value"], "unit": row["unit"], "labels": labels}
            yield common | said | {"p20": row.get("p20"), "p80": row.get("p80"), "runs": row.get("runs", 1)}
        for name, unit in (("copy", "TB/s"), ("matmul", "TFLOP/s")):
            said = {"metric": f"{name}_roof", "value": header["roof"][name], "unit": unit, "labels": {}}
            yield common | said | {"p20": None, "p80": None, "runs": 1}


def main(results: Path) -> None:
    folders = {".": trials(results / "rows")}
    folders |= {f"bench/{path.name}": bench(path) for path in sorted((results / "bench").iterdir())}
    for folder, rows in folders.items():
        for (trial, stage), (count, digest) in sorted(digests(rows).items()):
            print(folder, trial, stage, count, digest)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
