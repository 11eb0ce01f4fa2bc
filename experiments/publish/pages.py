"""The tables and numbers of README and docs, made from the committed rows.

``python -m experiments.publish.pages`` rewrites in every page what stands between a marker and ``<!-- end -->``:

    <!-- table NAME -->                                   a table of `TABLES`, on lines of its own
    <!-- value NAME -->                                   a number of `VALUES`, within a line
    <!-- cell STUDY TABLE COLUMN at SELECTOR -->          one cell of a study's table, within a line

A cell's column is named by the beginning of its name, its row as in ``hts compare``:
``<!-- cell smollm2-learned accuracy perplexity at method=patch-joint,target=0.45 -->44.97<!-- end -->``.
"""

import csv
import dataclasses
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from pandas import DataFrame

from analysis.rows import layout
from analysis.rows.paired import gap
from analysis.rows.points import Measured, Point, gather, texts
from analysis.tables.compare import select
from analysis.tables.kernels import (
    TILE,
    energy_table,
    kernel_table,
    load_bench,
    measurements,
    model_table,
    precision_table,
)
from analysis.tables.learning import learning_tables, rates_table
from analysis.tables.packed import workloads
from analysis.tables.render import Column, Table, Value, markdown, only, rows_of, shown_cells
from analysis.tables.serving import throughput_table
from analysis.tables.speed_frontier import front_table, placed, placed_on_shapes, workloads_of
from analysis.tables.study import WARNING, study_tables
from experiments.publish import goals, measured, prompts, reproduction, steps
from experiments.run.store import Store
from experiments.studies.build import TARGETS
from experiments.studies.registry import STUDIES
from patch.errors import UserError, check_name
from patch.files import write_atomic
from patch.methods import label_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
# The GPU whose speed is shown first, and the other one.
BENCH = RESULTS / layout.BENCH / "nvidia-h100-80gb-hbm3"
H200 = RESULTS / layout.BENCH / "nvidia-h200"
# What a test found of small models of every family (tests/decoder_lives.py).
FAMILIES = ROOT / "docs" / "families.csv"
# The study of learned masks that is shown first.
_MAIN = "smollm2-published"

_BLOCK = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)
_VALUE = re.compile(r"(<!-- value (?P<name>[\w-]+) -->)(?P<value>.*?)(<!-- end -->)")
_CELL = re.compile(
    r"(<!-- cell (?P<study>\S+) (?P<table>\S+) (?P<column>.+?) at (?P<selector>.+?) -->)(?P<value>.*?)(<!-- end -->)"
)


def pages() -> list[Path]:
    """README, and every page of the docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@cache
def _points(study: str) -> list[Point]:
    return gather(_frame(study))


@cache
def _frame(study: str) -> DataFrame:
    return measured.frame(STUDIES[check_name("study", study, STUDIES)].trials(), Store(RESULTS), parts=False)


@cache
def tables_of(study: str) -> dict[str, Table]:
    """The tables of the committed rows of a study."""
    return study_tables(_frame(study))


def _study_table(study: str, name: str, columns: Sequence[str]) -> Table:
    """A study's table with some of its columns, by the beginning of their names."""
    return only(tables_of(study)[name], columns)


def _bits(study: str, text: str = "") -> Table:
    """What fewer bits cost each mask of a study."""
    return tables_of(study)[f"precisions{text}"]


def _front_on_shapes() -> Table:
    """What is on the frontier of Qwen2.5-Coder's quality and the speed of LLaMA-2-7B's shapes."""
    points, timed = _points("frontier-qwen-coder-0.5b"), _model(gpu=H200)
    by_workload = {work: placed_on_shapes(points, timed, work) for work in workloads_of(_packed(timed, "fp8"))}
    return front_table(by_workload, texts(points)[0])


def _front_on_code() -> Table:
    """What is on the frontier of Qwen2.5-Coder's own speed in decoding and its perplexity on code."""
    study = "frontier-qwen-coder-0.5b"
    frame, points = _frame(study), _points(study)
    decoding = [workload for workload in workloads(frame) if workload.startswith("decode")]
    return front_table({workload: placed(frame, workload, points=points) for workload in decoding}, texts(points)[1])


def _timed(study: str, columns: Sequence[str]) -> Table:
    """A study's table of speeds, of what was timed."""
    table = _study_table(study, "speed", columns)
    speeds = [place for place, column in enumerate(table.columns) if column.name.startswith("speedup")]
    return rows_of(table, [row for row, line in enumerate(table.rows) if any(line[place] for place in speeds)])


def _front() -> Table:
    """What the published and the guided recipes reach, and how fast a large model decodes at such sparsities."""
    chosen = (
        "method=dense",
        "method=maskllm",
        "method=patch-joint,target=0.45",
        *(f"method=patch-joint,target={target},variant=guided" for target in (0.45, 0.25)),
    )
    columns = ("method", "structure", "variant", "achieved", "seeds", "perplexity", "mean_acc")
    shown = only(tables_of(_MAIN)["accuracy"], columns)
    points = [select(_points(_MAIN), selector) for selector in chosen]
    speedups = _decoding()
    rows = tuple(
        (*shown.rows[shown.trials.index(point.trials)], Measured(speedups[point.sparsity] if point.sparsity else 1.0))
        for point in points
    )
    speed = Column("decoding", "LLaMA-2-7B decoding, batch 1 (x)", "ratio")
    return Table((*shown.columns, speed), rows, tuple("" for _ in rows), frozenset(), ())


def _decoding() -> dict[float, float]:
    """By sparsity, how much faster LLaMA-2-7B decodes one sequence than dense with fused projections."""
    timed = _one_sequence(_packed(_model(), "bf16"))
    return dict(zip(timed.sparsity, timed.speedup, strict=True))


def _packed(frame: DataFrame, precision: str) -> DataFrame:
    """The times of packed weights in a precision."""
    return frame[(frame.metric == "time") & (frame.implementation == "hybrid") & (frame.precision == precision)]


def _one_sequence(frame: DataFrame) -> DataFrame:
    """Of whole models, what decodes a single sequence."""
    return frame[(frame.kind == "decode") & (frame.batch == 1)]


def _eight_bits(sparsity: float, over: str, gpu: Path = BENCH) -> str:
    """How much faster LLaMA-2-7B is end to end in FP8 tiles: the range over what it was timed at.

    Args:
        over: ``speedup``, over dense of 16 bits, or ``own_speedup``, over dense FP8.
    """
    timed = _packed(_model(gpu=gpu), "fp8")
    found = timed[timed.sparsity == sparsity][over]
    return f"{found.min():.2f} to {found.max():.2f}"


def _paired() -> Table:
    """The learned recipes against each other: differences over the same windows, with the seeds of both sides."""
    joint, tile = "method=patch-joint,target={}", "method=patch-tile,target={}"
    pairs = [
        *((f"{joint},variant=guided".format(target), joint.format(target)) for target in TARGETS),
        *((joint.format(target), tile.format(target)) for target in TARGETS),
        (joint.format(TARGETS[0]), "method=maskllm"),
    ]
    rows = [_pair(*(select(_points(_MAIN), selector) for selector in pair)) for pair in pairs]
    columns = (
        Column("sparsity", "Sparsity (%)", "percent"),
        Column("method", "Method", "text"),
        Column("perplexity", "PPL", "perplexity"),
        Column("against", "Against", "text"),
        Column("perplexity_against", "PPL", "perplexity"),
        Column("difference", "Difference", "number"),
    )
    return Table(columns, tuple(rows), tuple("" for _ in rows), frozenset(), ())


def _perplexity(point: Point) -> Measured:
    """Of a point that has been measured on one text."""
    (found,) = point.perplexity.values()
    return found


def _pair(point: Point, against: Point) -> tuple[Value, ...]:
    names = [f"{label_of(each.method)} {each.variant}".strip() for each in (point, against)]
    found = gap(against_ppl := _perplexity(against), ppl := _perplexity(point))
    assert found.paired
    shown = f"{found.value:.2f} ± {found.error:.2f}"
    return Measured(point.sparsity), names[0], ppl, names[1], against_ppl, shown


def _changes(study: str, base: str) -> Table:
    """What each change of a recipe does: differences over the same windows from the one that says ``base`` alone."""
    points = [point for point in _points(study) if point.method != "dense"]
    changed = {point.sparsity for point in points if point.variant != base}
    points = [point for point in points if point.sparsity in changed]
    plain = {point.sparsity: point for point in points if point.variant == base}
    rows = []
    for point in points:
        found = None if point.variant == base else gap(_perplexity(plain[point.sparsity]), _perplexity(point))
        assert found is None or found.paired
        shown = "—" if found is None else f"{found.value:.2f} ± {found.error:.2f}"
        rows.append((Measured(point.sparsity), point.variant, _perplexity(point), shown))
    columns = (
        Column("sparsity", "Sparsity (%)", "percent"),
        Column("variant", "Recipe", "text"),
        Column("perplexity", "PPL", "perplexity"),
        Column("difference", "Difference", "number"),
    )
    return Table(columns, tuple(rows), tuple("" for _ in rows), frozenset(), ())


def _below(selector: str, against: str) -> str:
    """How far one recipe's perplexity is below another's, over the same windows."""
    *_, shown = _pair(select(_points(_MAIN), selector), select(_points(_MAIN), against))
    assert isinstance(shown, str) and shown.startswith("-")
    return shown.removeprefix("-")


def _families() -> Table:
    header, *rows = csv.reader(FAMILIES.read_text(encoding="utf-8").splitlines())
    columns = tuple(Column(name, name, "text") for name in header)
    return Table(columns, tuple(map(tuple, rows)), tuple("" for _ in rows), frozenset(), ())


@cache
def _bench(kind: str, gpu: Path = BENCH) -> DataFrame:
    return load_bench([gpu], kind)


def _kernels(model: str = "llama-2-7b", gpu: Path = BENCH) -> DataFrame:
    return _bench("kernels", gpu)[_bench("kernels", gpu).model == model]


def _model(model: str = "llama-2-7b", gpu: Path = BENCH) -> DataFrame:
    return _bench("model", gpu)[_bench("model", gpu).model == model]


def _energy() -> Table:
    table = energy_table(_model())
    assert table is not None
    return table


def _end_to_end_autotuned() -> str:
    """How much faster LLaMA-2-7B decodes one sequence dense where max-autotune chooses its products."""
    timed = _one_sequence(_model()[_model().metric == "time"])
    return f"{timed[timed.implementation == 'autotuned'].speedup.median():.2f}"


def _learning_table(place: int) -> Table:
    return tuple(learning_tables(measurements(BENCH)).values())[place]


def _serving() -> Table:
    """What vLLM makes of packed weights."""
    rows = [row for row in measurements(BENCH) if row["metric"] == "output_tokens_per_second"]
    return only(throughput_table(rows), ("precision", "load", "dense", "packed", "speedup", "base_speedup"))


def _in_vllm(precision: str) -> str:
    """Output tokens a second of packed weights over those of dense ones, in vLLM: the range of a precision."""
    table = _serving()
    place = [column.name for column in table.columns].index("speedup")
    cells = (row[place] for row in table.rows if row[0] == precision)
    found = [cell.value for cell in cells if isinstance(cell, Measured)]
    return f"{min(found):.2f} to {max(found):.2f}"


@cache
def _rates() -> Table:
    """What learning costs, of all GPUs."""
    return rates_table(row for gpu in sorted((RESULTS / layout.BENCH).iterdir()) for row in measurements(gpu))


_ABOUT = ("method", "structure", "variant", "achieved_sparsity")
_ACCURACY = ("method", "structure", "variant", "achieved_sparsity", "perplexity", "accuracy lambada", "mean_accuracy")
_PERPLEXITY = ("method", "structure", "variant", "achieved_sparsity", "perplexity")

TABLES: Mapping[str, Callable[[], Table | str]] = {
    "front": _front,
    "paired": _paired,
    "demo": partial(_study_table, "demo", "accuracy", (*_ABOUT, "perplexity", "accuracy")),
    "bits": partial(_bits, "frontier-embedded"),
    "bits-smollm2": partial(_bits, "frontier-smollm2-bits"),
    "bits-qwen": partial(_bits, "frontier-qwen-coder-0.5b"),
    "bits-qwen-python": partial(_bits, "frontier-qwen-coder-0.5b", "-python-test@2048"),
    "bits-qwen-front": _front_on_shapes,
    "bits-qwen-own-front": lambda: tables_of("frontier-qwen-coder-0.5b")["front"],
    "bits-qwen-own-front-python": _front_on_code,
    "bits-qwen-size": partial(
        _study_table,
        "frontier-qwen-coder-0.5b",
        "speed",
        (*_PERPLEXITY, "packed_perplexity", "disk", "peak_memory"),
    ),
    "bits-qwen-speed": partial(
        _timed, "frontier-qwen-coder-0.5b", ("method", "variant", "achieved_sparsity", "speedup")
    ),
    "larger": partial(_study_table, "qwen-coder-1.5b", "accuracy", _PERPLEXITY),
    "recovered-bits": partial(_bits, "embedded-recovered-bits"),
    "sinks": partial(_study_table, "smollm2-sinks", "accuracy", _PERPLEXITY),
    "masks-for-bits": partial(_study_table, "embedded-precisions", "accuracy", _PERPLEXITY),
    "learned": partial(_study_table, "smollm2-learned", "accuracy", _ACCURACY),
    "published-start": partial(
        _study_table,
        _MAIN,
        "accuracy",
        ("method", "structure", "variant", "achieved_sparsity", "seeds", "perplexity", "mean_accuracy"),
    ),
    "recipes": partial(_study_table, "smollm2-recipes", "accuracy", ("method", "variant", "seeds", "perplexity")),
    "oneshot": partial(_study_table, "smollm2-oneshot", "accuracy", _ACCURACY),
    "ablation": partial(_study_table, "recipe-ablation", "accuracy", ("method", "variant", "perplexity")),
    "ideas": partial(_changes, "guided-ideas", "guided"),
    "further": partial(_changes, "guided-further", "guided"),
    "refit": partial(_study_table, "smollm2-refit", "accuracy", _PERPLEXITY),
    "recovered": partial(_study_table, "smollm2-recovered", "accuracy", _ACCURACY),
    "recovered-mixture": partial(_study_table, "smollm2-recovered-mixture", "accuracy", _ACCURACY),
    "qwen": partial(_study_table, "qwen-coder-0.5b", "accuracy", (*_PERPLEXITY, "accuracy humaneval")),
    "qwen-cost": partial(
        _study_table,
        "qwen-coder-0.5b",
        "cost",
        ("target_sparsity", "method", "structure", "variant", "tokens", "gpu_hours", "kilojoules", "perplexity"),
    ),
    "recovery-texts": partial(_study_table, "recovery-texts", "accuracy", ("variant", "perplexity")),
    "recovery-ablation": partial(_study_table, "recovery-ablation", "accuracy", ("variant", "perplexity")),
    "tiles": partial(
        _study_table, "smollm2-tiles", "accuracy", ("method", "variant", "tile", "achieved_sparsity", "perplexity")
    ),
    "joined": partial(_study_table, "frontier-smollm2", "speed", (*_PERPLEXITY, "packed_perplexity", "speedup")),
    "carried": partial(
        _study_table,
        "frontier-smollm2",
        "carried-llama-2-7b",
        ("method", "target_sparsity", "packed_share", "peak_memory", "speedup"),
    ),
    "kernels": lambda: kernel_table(_kernels()),
    "kernels-front": lambda: kernel_table(_kernels()[_kernels().tokens.isin([1, 16, 64, 512, 2048, 8192])]),
    "kernels-fp8": lambda: kernel_table(_kernels(), precision="fp8"),
    "kernels-fp8-precise": lambda: kernel_table(_kernels(), precision="fp8_precise"),
    "kernels-int4": lambda: kernel_table(_kernels(), precision="int4"),
    "serving": _serving,
    "precisions": lambda: precision_table(_model(gpu=H200)),
    "model": lambda: model_table(_model()),
    "model-fp8": lambda: model_table(_model(), "fp8"),
    "model-8b": lambda: model_table(_model("llama-3.1-8b")),
    "model-fp8-8b": lambda: model_table(_model("llama-3.1-8b"), "fp8"),
    "kernels-h200": lambda: kernel_table(_kernels(gpu=H200)),
    "kernels-fp8-h200": lambda: kernel_table(_kernels(gpu=H200), precision="fp8"),
    "kernels-fp8-precise-h200": lambda: kernel_table(_kernels(gpu=H200), precision="fp8_precise"),
    "kernels-int4-h200": lambda: kernel_table(_kernels(gpu=H200), precision="int4"),
    "model-h200": lambda: model_table(_model(gpu=H200)),
    "model-fp8-h200": lambda: model_table(_model(gpu=H200), "fp8"),
    "model-int4-h200": lambda: model_table(_model(gpu=H200), "int4"),
    "goals": lambda: goals.table(_bench("kernels"), _bench("model")),
    "goals-h200": lambda: goals.table(_bench("kernels", H200), _bench("model", H200)),
    "decode-steps": lambda: steps.table(_bench("kernels"), _bench("model")),
    "prompts": lambda: prompts.table(_bench("model")),
    "prompts-h200": lambda: prompts.table(_bench("model", H200)),
    "energy": _energy,
    "masks": partial(_learning_table, 0),
    "steps": partial(_learning_table, 1),
    "rates": _rates,
    "families": _families,
    "published": reproduction.table,
    "needs": reproduction.needs,
}


def _closed(variant: str) -> str:
    """How much a variant of PATCH joint closes of the distance from MaskLLM to dense, in percent, by sparsity."""
    found = {(point.method, point.sparsity, point.variant): _perplexity(point).value for point in _points(_MAIN)}
    dense, maskllm = found["dense", 0.0, ""], found["maskllm", 0.5, ""]
    patch = [found["patch-joint", target, variant] for target in TARGETS]
    *first, last = (f"{100 * (maskllm - value) / (maskllm - dense):.0f}" for value in patch)
    return f"{', '.join(first)} and {last}%"


def _of_tile(tile: str) -> str:
    """The perplexity of the embedded model at 35% with tiles of this shape."""
    (found,) = (_perplexity(point).value for point in _points("embedded-tiles") if point.tile == tile)
    return f"{found:.1f}"


def _left_dense(precision: str) -> str:
    """How many of the products that could be packed ran dense, since that was expected to be faster."""
    timed = _kernels()
    packed = timed[(timed.implementation == "hybrid") & (timed.metric == "time") & (timed.precision == precision)]
    packed = packed[packed.tile == TILE]
    return f"{packed.fallback.str.startswith('predicted').fillna(value=False).sum()} of {len(packed)}"


def _max_autotune_gain() -> str:
    """How much less time than cuBLAS torch.compile's choice takes with one token: the range over linears."""
    # Of the benches that have both, since only what one process timed is compared.
    rows = [row for row in measurements(BENCH) if row["metric"] == "time" and row["labels"].get("tokens") == 1]
    both = {row["trial"] for row in rows if row["labels"]["implementation"] == "compiled"}
    one = DataFrame([row["labels"] | {"value": row["value"]} for row in rows if row["trial"] in both])
    one = one[(one.model == "llama-2-7b") & one.implementation.isin(["cublas", "compiled"])]
    times = one.pivot_table(index="linear", columns="implementation", values="value")
    saved = 100 * (1 - times.compiled / times.cublas)
    return f"{saved.min():.0f} to {saved.max():.0f}%"


def _hours(model: str, tokens: float) -> str:
    """How long learning on so many tokens takes at the measured rate."""
    rates = _rates()
    column = [column.name for column in rates.columns].index("rate")
    (rate,) = (row[column] for row in rates.rows if row[0] == model)
    assert isinstance(rate, Measured)
    return f"{tokens / rate.value / 3600:.1f}"


def _gain_of_two() -> str:
    """How much faster two GPUs of a kind learn than one, the shapes and passes being the same."""
    rates = _rates()
    gpus, rate = ([column.name for column in rates.columns].index(name) for name in ("gpus", "rate"))
    by_gpus = {row[gpus]: row[rate] for row in rates.rows}
    (pair,) = (name for name in by_gpus if str(name).startswith("2 x "))
    together, alone = by_gpus[pair], by_gpus[str(pair).replace("2 x", "1 x")]
    assert isinstance(together, Measured) and isinstance(alone, Measured)
    return f"{together.value / alone.value:.2f}"


def _recovery_minutes() -> str:
    """How long recovery of each mask of SmolLM2 took its process, in minutes: the range."""
    frame = _frame("smollm2-recovered")
    trained = {trial for point in _points("smollm2-recovered") if point.trained for trial in point.trials}
    seconds = frame[(frame.metric == "prune_seconds") & frame.trial.isin(trained)].value
    return f"{seconds.min() / 60:.1f} to {seconds.max() / 60:.1f}"


def _pins() -> str:
    """The versions that the package asks for, of what matters most."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [text.partition(";")[0] for text in project["dependencies"]]
    found = [text for text in wanted if re.match(r"(torch|triton|transformers)\b", text)]
    return ", ".join(
        [f"Python {project['requires-python'].removeprefix('>=')} or newer", *(f"`{text}`" for text in found)]
    )


VALUES: Mapping[str, Callable[[], str]] = {
    "pins": _pins,
    "guided-below-published": partial(
        _below, "method=patch-joint,target=0.45,variant=guided", "method=patch-joint,target=0.45"
    ),
    "joint-below-maskllm": partial(_below, "method=patch-joint,target=0.45", "method=maskllm"),
    "joint-below-tile": partial(_below, "method=patch-joint,target=0.45", "method=patch-tile,target=0.45"),
    "closed": partial(_closed, ""),
    "closed-guided": partial(_closed, "guided"),
    "left-bf16": partial(_left_dense, "bf16"),
    "left-fp8": partial(_left_dense, "fp8"),
    "max-autotune": _max_autotune_gain,
    "end-to-end-autotuned": _end_to_end_autotuned,
    "fp8-over-fp8": partial(_eight_bits, 0.45, "own_speedup"),
    "fp8-over-bf16": partial(_eight_bits, 0.45, "speedup"),
    "fp8-over-fp8-h200": partial(_eight_bits, 0.45, "own_speedup", H200),
    "fp8-over-bf16-h200": partial(_eight_bits, 0.45, "speedup", H200),
    "vllm-bf16": partial(_in_vllm, "bf16"),
    "vllm-fp8": partial(_in_vllm, "fp8"),
    "hours-8b": partial(_hours, "llama-3.1-8b", 90e6),
    "two-gpus": _gain_of_two,
    "recovery-minutes": _recovery_minutes,
    "smallest-tile": partial(_of_tile, "16x16"),
    "largest-tile": partial(_of_tile, "128x128"),
}


@cache
def table(name: str) -> str:
    """A table by name, as Markdown without notes, but for warnings."""
    made = TABLES[check_name("table of pages", name, TABLES)]()
    if isinstance(made, str):
        return made
    warnings = (f"\n{note}" for note in made.notes if note.startswith(WARNING))
    return "\n".join([markdown(made, notes=False), *warnings])


@cache
def value(name: str) -> str:
    """A number by name."""
    return VALUES[check_name("value of pages", name, VALUES)]()


@cache
def cell(study: str, name: str, column: str, selector: str) -> str:
    """What a study's table shows of one point, without its error."""
    found = tables_of(study)[check_name("table", name, tables_of(study))]
    trials = select(_points(study), selector).trials
    shown = only(found, (column,))
    if len(shown.columns) != 1:
        raise UserError(f"{study} {name}: '{column}' means {len(shown.columns)} columns: name one by its beginning")
    place = found.trials.index(trials)
    return shown_cells(dataclasses.replace(shown, best=frozenset()))[place][0].partition(" ±")[0]


def fill(text: str) -> str:
    """A page with its tables and numbers as the rows have them.

    Raises:
        UserError: if a marker names something that is not there.
    """
    text = _BLOCK.sub(lambda block: f"{block[1]}\n{table(block['name'])}\n\n{block[4]}", text)
    text = _VALUE.sub(lambda found: f"{found[1]}{value(found['name'])}{found[4]}", text)
    return _CELL.sub(
        lambda found: f"{found[1]}{cell(*found.group('study', 'table', 'column', 'selector'))}{found[7]}", text
    )


if __name__ == "__main__":
    for page in pages():
        write_atomic(page, fill(page.read_text(encoding="utf-8")))
