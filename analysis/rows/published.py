"""Published rows: what running processes wrote, as tables that any program opens.

::

    trials.jsonl              a line a trial: its definition; of each stage the provenance, how many facts, their digest
    facts.csv                 a line a fact, with what a reader asks first of it in columns
    details/<trial>.csv.xz    the facts of steps, layers, parts of tasks and single products, and what is known of
                              windows and items

Folders of this form are a results directory, for its studies, and each ``bench/<gpu>`` in it.

    >>> facts = pandas.read_csv("results/facts.csv")
    >>> facts[(facts.metric == "perplexity") & (facts.model == "smollm2-135m")][["method", "target", "value"]]
    >>> pandas.read_csv("results/details/7462303378b8.csv.xz")

In both tables ``stage`` and ``on`` are the two parts of a row's stage, and the last columns are labels, one a column; a
label that is no text is JSON. What ``facts.csv`` says of definitions and provenance is there to be read, and made anew
whenever rows are published (`analysis.rows.consolidate`). The digests in ``trials.jsonl`` tell facts that were changed.
"""

import csv
import hashlib
import io
import json
import lzma
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from analysis.rows.format import OUTCOMES, PARTS, SCHEMA, Damaged, Row, identity, names
from analysis.rows.layout import DETAILS, FACTS, TRIALS
from patch.files import from_json

# What was measured and where: made from the definition and the provenance.
ABOUT = ("model", "method", "structure", "variant", "tile", "target", "achieved", "seed")
WHERE = ("gpu", "revision", "dirty", "time")
# The fact itself.
NUMBERS = ("value", "stderr", "p20", "p80", "runs")
_AGAIN = "the file was cut off or edited; take it from its revision again"

_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode

Numbered = list[tuple[str, Row]]


def is_detail(row: Row) -> bool:
    """Whether a fact is of a step, a layer, a part of a task, or a product of a grid, which are thousands."""
    labels = row["labels"]
    if not labels.keys().isdisjoint(PARTS):
        return True
    kind, _, part = row["stage"].partition(":")
    return kind == "kernels" or (kind == "task" and labels.get("task", part) != part)


def split(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Facts for the table of all and for the details.

    Details are facts of parts, and in full those that say something of each window or item, which is left out of the
    table of all.
    """
    headlines: list[Row] = []
    details: list[Row] = []
    for row in rows:
        detail = is_detail(row)
        brief = {name: value for name, value in row["labels"].items() if name not in OUTCOMES}
        if not detail:
            headlines.append(row | {"labels": brief})
        if detail or len(brief) < len(row["labels"]):
            details.append(row)
    return headlines, details


def digest_of(rows: Iterable[Row]) -> str:
    """12 hex digits of the facts of a stage, in whatever order they come."""
    return _digest_of_lines(_canonical([row[name] for name in ("metric", "unit", "labels", *NUMBERS)]) for row in rows)


def _digest_of_lines(said: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(said)).encode()).hexdigest()[:12]


def stages(folder: Path) -> dict[str, dict[str, Any]]:
    """What is published of each trial, by stage; nothing where nothing is.

    Raises:
        Damaged: naming the line, if it is not as it was written.
    """
    return {trial: about["stages"] for trial, (_, about) in _trials(folder, None).items()}


def read(
    folder: Path, trials: Collection[str] | None = None, parts: bool = True
) -> Iterator[tuple[str, Numbered | Damaged]]:
    """The rows of each trial that is published, with the file and line of each, or why they cannot be read.

    Args:
        trials: that are wanted; all by default.
        parts: as `analysis.rows.load.load_rows`.

    Raises:
        Damaged: if the list of trials, or the table of all, is not as it was written.
    """
    known = _trials(folder, trials)
    if not known:
        return
    headlines = _facts(folder / FACTS, known)
    for trial, (line, about) in known.items():
        try:
            yield trial, _rows(folder, trial, line, about, headlines.get(trial, []), parts)
        except Damaged as problem:
            yield trial, problem


def _trials(folder: Path, trials: Collection[str] | None) -> dict[str, tuple[int, dict[str, Any]]]:
    """The lines of the list of trials, by trial."""
    path = folder / TRIALS
    if not path.exists():
        return {}
    found = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            about = from_json(line)
            trial, definition = about["trial"], about["definition"]
            for stage in about["stages"].values():
                stage["provenance"] = about["provenance"] | stage["provenance"]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Damaged(f"{path}:{number}: no trial ({error}): {_AGAIN}") from error
        if trials is not None and trial not in trials:
            continue
        if not names(trial, definition):
            raise Damaged(f"{path}:{number}: the definition is not that of trial {trial}: {_AGAIN}")
        found[trial] = number, about
    return found


def _rows(
    folder: Path, trial: str, line: int, about: dict[str, Any], headlines: "_Facts", with_parts: bool
) -> Numbered:
    """The whole rows of a trial, each stage checked against what the list of trials says of it."""
    details = folder / DETAILS / f"{trial}.csv.xz"
    parts: _Facts = []
    in_full: dict[Any, _Fact] = {}
    # Of each stage, what is digested of facts that are left out.
    left_out: dict[str, list[str]] = {}
    read_from = f"{DETAILS}/{details.name}"
    for fact in _read(details, read_from, left_out=None if with_parts else left_out) if details.exists() else ():
        if is_detail(fact[1]):
            parts.append(fact)
        else:
            in_full[identity(fact[1])] = fact
    # In the order of the table of all, so that publishing again changes nothing.
    of_stage: dict[str, _Facts] = {}
    for origin, row, said in headlines:
        _, same, of_same = in_full.get(identity(row), ("", row, said))
        if any(_canonical(row[name]) != _canonical(same[name]) for name in NUMBERS):
            raise Damaged(f"{folder / origin}: {row['metric']} is another in {details.name}: {_AGAIN}")
        of_stage.setdefault(row["stage"], []).append((origin, same, of_same))
    for fact in parts:
        of_stage.setdefault(fact[1]["stage"], []).append(fact)
    if of_stage.keys() != about["stages"].keys():
        other = min(of_stage.keys() ^ about["stages"].keys())
        raise Damaged(f"{folder / TRIALS}:{line}: stage {other} is in one of {TRIALS} and the tables alone: {_AGAIN}")
    whole: Numbered = []
    for stage, told in about["stages"].items():
        facts, provenance = of_stage[stage], told["provenance"]
        common = {"schema": SCHEMA, "trial": trial, "definition": about["definition"]}
        whole += [(origin, {**common, **row, "provenance": provenance}) for origin, row, _ in facts]
        digested = [said for *_, said in facts] + left_out.get(stage, [])
        if len(digested) != told["facts"] or _digest_of_lines(digested) != told["digest"]:
            raise Damaged(f"{folder / TRIALS}:{line}: the tables have other facts of {trial} {stage}: {_AGAIN}")
    return whole


def _facts(path: Path, wanted: Collection[str]) -> "dict[str, _Facts]":
    found: dict[str, _Facts] = {}
    for fact in _read(path, path.name, wanted):
        found.setdefault(fact[1].pop("trial"), []).append(fact)
    return found


# Tables as text. A label whose name is a column of another meaning is told by this.
_MARK = "_label"
_TAKEN = {"trial", *ABOUT, "stage", "on", "metric", "unit", *NUMBERS, "spread", "seeds", *WHERE}


def table(rows: Sequence[Mapping[str, Any]], before: Sequence[str]) -> str:
    """Rows as CSV: ``before``, the fact, and the labels that any of them has.

    Args:
        before: columns that come first, and more of `WHERE` and ``spread``, ``seeds`` if rows have them, which are
            written as they are.
    """
    labels = sorted({name for row in rows for name in row["labels"]})
    derived = [name for name in ("spread", "seeds") if any(name in row for row in rows)]
    where = [name for name in WHERE if any(name in row for row in rows)]
    fixed = [*before, "stage", "on", "metric", "value", "unit", "stderr", *derived, "p20", "p80", "runs", *where]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*fixed, *(name + _MARK if name in _TAKEN else name for name in labels)])
    for row in rows:
        kind, colon, on = row["stage"].partition(":")
        parts = {**row, "stage": kind, "on": colon and on}
        writer.writerow(
            [
                *(_cell(parts.get(name)) for name in fixed),
                *(_label(row["labels"][name]) if name in row["labels"] else "" for name in labels),
            ]
        )
    return text.getvalue()


# Where a fact is, its row, and what is digested of it.
_Fact = tuple[str, Row, str]
_Facts = list[_Fact]


def read_table(path: Path, name: str, trials: Collection[str] | None = None) -> Numbered:
    """The facts of a table, with ``name`` and line.

    Args:
        trials: that are wanted, of a table with a column of them.

    Raises:
        Damaged: naming the line, if it is not as it was written.
    """
    return [(origin, row) for origin, row, _ in _read(path, name, trials)]


def _read(
    path: Path,
    name: str,
    trials: Collection[str] | None = None,
    left_out: dict[str, list[str]] | None = None,
) -> _Facts:
    """`read_table`, each fact with the text that its digest is of, which its cells have already.

    Args:
        left_out: gets that text alone, by stage, of facts of layers and steps, but for the first of each metric.
    """
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        lines = csv.reader(io.StringIO(data.decode(), newline=""), strict=True)
        columns = next(lines)
        places = {column: place for place, column in enumerate(columns)}
        last = places["runs"]
        # The last columns, most of them empty in any line.
        labels = [
            (label := column.removesuffix(_MARK), f"{_canonical(label)}:")
            for column, place in places.items()
            if place > last and column not in WHERE
        ]
        first = len(columns) - len(labels)
        stage, on, metric, unit = (places[column] for column in ("stage", "on", "metric", "unit"))
        value, stderr, p20, p80, runs = (places[column] for column in NUMBERS)
        trial = places.get("trial")
        found: _Facts = []
        numbers, values, texts = _Numbers(), _Values(), _Texts()
        of_parts = [first + place for place, (label, _) in enumerate(labels) if label in PARTS]
        begun: set[tuple[str, str, str]] = set()
        for cells in lines:
            if trial is not None and trials is not None and cells[trial] not in trials:
                continue
            tail = cells[first:]
            told = [
                (label, head, values[cell]) for (label, head), cell in compress(zip(labels, tail, strict=False), tail)
            ]
            spelled = ",".join([head + text for _, head, (_, text) in told])
            said = (
                f"[{texts[cells[metric]]},{texts[cells[unit]]},{{{spelled}}},{cells[value] or 'null'},"
                f"{cells[stderr] or 'null'},{cells[p20] or 'null'},{cells[p80] or 'null'},{cells[runs] or 'null'}]"
            )
            if len(cells) != len(columns):
                raise ValueError(f"{len(cells)} cells")
            if left_out is not None and any(cells[place] for place in of_parts):
                kind = cells[stage], cells[on], cells[metric]
                if kind in begun:
                    left_out.setdefault(_stage(cells[stage], cells[on]), []).append(said)
                    continue
                begun.add(kind)
            row: Row = {} if trial is None else {"trial": cells[trial]}
            row["stage"] = _stage(cells[stage], cells[on])
            row["metric"], row["unit"], row["value"] = cells[metric], cells[unit], _number(cells[value])
            row["stderr"], row["p20"] = numbers[cells[stderr]], numbers[cells[p20]]
            row["p80"], row["runs"] = numbers[cells[p80]], numbers[cells[runs]]
            row["labels"] = {label: known for label, _, (known, _) in told}
            found.append((f"{name}:{lines.line_num}", row, said))
    except FileNotFoundError:
        raise Damaged(f"{path}: is not there: {_AGAIN}") from None
    except (ValueError, LookupError, StopIteration, csv.Error, lzma.LZMAError, EOFError) as error:
        raise Damaged(f"{path}: not a table of facts ({error or type(error).__name__}): {_AGAIN}") from error
    return found


def _stage(kind: str, on: str) -> str:
    return f"{kind}:{on}" if on else kind


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _number(cell: str) -> float | None:
    if not cell:
        return None
    return int(cell) if cell.lstrip("-").isdecimal() else float(cell)


def _label(value: Any) -> str:
    """A text as it is, unless it reads as JSON or has what lines end with; anything else as JSON."""
    if isinstance(value, str) and value and value.isprintable():
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value)


# What cells say, each read once: most of a table's are among a few.
class _Numbers(dict[str, float | None]):
    def __missing__(self, cell: str) -> float | None:
        self[cell] = number = _number(cell)
        return number


class _Texts(dict[str, str]):
    """As JSON."""

    def __missing__(self, cell: str) -> str:
        self[cell] = text = _canonical(cell)
        return text


class _Values(dict[str, tuple[Any, str]]):
    """Labels, each also as JSON."""

    def __missing__(self, cell: str) -> tuple[Any, str]:
        try:
            value = from_json(cell)
        except ValueError:
            value = cell
        self[cell] = both = value, _canonical(value)
        return both
