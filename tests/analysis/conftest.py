"""Rows like those of a real study, with made-up numbers: nothing here was measured."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.rows.load import load_rows

Row = dict[str, Any]
Trials = dict[str, list[Row]]

RECIPE = {"mode": "joint", "steps": 200, "lr": 1e-3}
LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
TASKS = {
    "mmlu": (0.243, 14042),
    "piqa": (0.681, 1838),
    "arc_easy": (0.561, 2376),
    "arc_challenge": (0.263, 1172),
    "winogrande": (0.523, 1267),
    "openbookqa": (0.222, 500),
    "race_subset": (0.352, 1000),
    "hellaswag": (0.351, 10042),
    "lambada_openai": (0.382, 5153),
}


def pruning(model: str, method: str, structure: str, sparsity: float, seed: int = 0, **changed: Any) -> Row:
    learned = method in ("maskllm", "patch-joint", "patch-tile")
    calibration = {"source": "train", "windows": 128, "length": 512, "seed": 0}
    tile = [64, 64] if structure in ("2:4", "hybrid") else None
    return {
        "model": model,
        "method": method,
        "structure": structure,
        "sparsity": sparsity,
        "tile": tile,
        "seed": seed,
        "calibration": calibration if method in ("wanda", "sparsegpt") else None,
        "learning": {"source": "train", "recipe": RECIPE} if learned else None,
        "prior": pruning(model, "sparsegpt", "2:4", 0.5) if learned else None,
        "revision": None,
    } | changed


def evaluation(source: str, length: int, tasks: Iterable[str], limit: int | None = None) -> Row:
    texts = [{"source": source, "length": length}]
    return {"perplexity": texts, "tasks": list(tasks), "limit": limit, "batch": 16}


def row(trial: str, definition: Row, stage: str, metric: str, value: float | None, **others: Any) -> Row:
    provenance = {"git": "a4530ba", "dirty": False, "machine": "x86_64", "gpu": None, "time": "2026-01-01T00:00:00Z"}
    return {
        "schema": 1,
        "trial": trial,
        "definition": definition,
        "stage": stage,
        "metric": metric,
        "value": value,
        "unit": "1",
        "labels": {},
        "stderr": None,
        "p20": None,
        "p80": None,
        "runs": 1,
        "provenance": provenance,
    } | others


def trial_rows(
    trial: str,
    about: Row,
    evaluated: Row,
    perplexity: float,
    accuracy: dict[str, tuple[float, int]],
    layers: Iterable[tuple[str, int, int]] = (),
    steps: int = 0,
    seed: int = 0,
) -> list[Row]:
    """Every row of one trial, as the pipeline writes them."""
    definition = {"pruning": about, "evaluation": evaluated}
    rng = np.random.default_rng(seed)
    sparsity, rows = about["sparsity"], []
    for step in range(1, steps + 1):
        loss = 3.6 + 2.5 * math.exp(-step / 40) + rng.normal(0, 0.08) + 0.8 * sparsity
        density = 1 - sparsity + (0.25 * sparsity) * math.exp(-step / 50)
        for metric, value in (
            ("loss", loss),
            ("cross_entropy", loss),
            ("density", density),
            ("tau", 4 - 3.95 * step / steps),
        ):
            rows.append(row(trial, definition, "prune", metric, value, labels={"step": step}))
    zeros = elements = 0
    for name, n, k in layers:
        depth = int(name.split(".")[2]) / 4
        lean = 0.25 if "down" in name or "o_proj" in name else -0.05
        dense = rng.random((-(-n // 64), -(-k // 64))) < np.clip(1 - 2 * sparsity + lean * math.cos(depth), 0, 1)
        labels = {"layer": name, "rows": n, "cols": k}
        share = (1 - dense.mean()) / 2 if about["structure"] == "hybrid" else sparsity
        zeros, elements = zeros + round(share * n * k), elements + n * k
        rows.append(row(trial, definition, "prune", "layer_sparsity", share, labels=labels))
        if about["structure"] == "hybrid":
            rows.append(row(trial, definition, "prune", "dense_tiles", float(dense.mean()), labels=labels))
            lines = ["".join("01"[int(tile)] for tile in line) for line in dense]
            rows.append(row(trial, definition, "prune", "tile_map", None, labels=labels | {"tile_map": lines}))
    achieved = sparsity + 0.00012 if about["structure"] == "hybrid" else sparsity
    rows.append(row(trial, definition, "prune", "sparsity", achieved))
    for text in evaluated["perplexity"]:
        stage, labels = f"perplexity:{text['source']}@{text['length']}", {**text, "windows": 148, "tokens": 302956}
        stderr = 0.01 * perplexity
        rows.append(row(trial, definition, stage, "perplexity", perplexity, unit="ppl", labels=labels, stderr=stderr))
    for task, (value, n) in accuracy.items():
        labels = {"task": task, "num_fewshot": 0, "n": n, "primary": True}
        stderr = math.sqrt(value * (1 - value) / n)
        rows.append(row(trial, definition, f"task:{task}", "acc", value, labels=labels, stderr=stderr))
        other = labels | {"primary": False}
        rows.append(row(trial, definition, f"task:{task}", "acc_norm", value + 0.03, labels=other, stderr=stderr))
        if task == "lambada_openai":
            rows.append(row(trial, definition, f"task:{task}", "perplexity", 35.0, labels=other, stderr=1.0))
    return rows


def linears(blocks: int, hidden: int, kv: int, intermediate: int) -> list[tuple[str, int, int]]:
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    names = [(part, name) for part, members in LINEARS.items() for name in members]
    return [(f"model.layers.{b}.{part}.{name}", *shapes[name]) for b in range(blocks) for part, name in names]


DEMO = [
    ("dense", "dense", 0.0, 30.1, 0.62),
    ("magnitude", "2:4", 0.5, 412.7, 0.38),
    ("wanda", "2:4", 0.5, 71.2, 0.47),
    ("sparsegpt", "2:4", 0.5, 55.4, 0.49),
    ("maskllm", "2:4", 0.5, 42.3, 0.53),
    ("patch-joint", "hybrid", 0.45, 39.8, 0.55),
    ("patch-joint", "hybrid", 0.35, 36.2, 0.57),
    ("patch-joint", "hybrid", 0.25, 33.4, 0.59),
]
SMOLLM = [
    ("dense", "dense", 0.0, 21.46),
    ("magnitude", "unstructured", 0.5, 131.2),
    ("magnitude", "2:4", 0.5, 1893.4),
    ("wanda", "unstructured", 0.5, 34.1),
    ("wanda", "2:4", 0.5, 62.8),
    ("wanda", "hybrid", 0.45, 55.2),
    ("wanda", "hybrid", 0.35, 40.3),
    ("wanda", "hybrid", 0.25, 31.9),
    ("sparsegpt", "unstructured", 0.5, 30.4),
    ("sparsegpt", "2:4", 0.5, 43.7),
    ("sparsegpt", "hybrid", 0.45, 38.1),
    ("sparsegpt", "hybrid", 0.35, 31.5),
    ("sparsegpt", "hybrid", 0.25, 27.2),
]


def demo_rows(seeds: Iterable[int] = (0,)) -> Trials:
    """A model of four blocks, eight methods, one task of which only some items were evaluated."""
    layers = linears(4, 256, 128, 768)
    trials: Trials = {}
    for place, (method, structure, sparsity, perplexity, accuracy) in enumerate(DEMO):
        learned = method in ("maskllm", "patch-joint")
        for seed in seeds if learned else (0,):
            about = pruning("embedded", method, structure, sparsity, seed)
            trial = f"{place + 1:02x}{seed:02x}{'0' * 8}"
            trials[trial] = trial_rows(
                trial,
                about,
                evaluation("embedded/test", 512, ["wiki_continuation"], 400),
                perplexity + 0.4 * seed,
                {"wiki_continuation": (accuracy + 0.01 * seed, 400)},
                layers if method != "dense" else (),
                200 if learned else 0,
                place,
            )
    return trials


def smollm_rows() -> Trials:
    """A model of thirty blocks, one-shot methods in every structure, nine tasks."""
    layers = linears(30, 576, 192, 1536)
    trials = {}
    for place, (method, structure, sparsity, perplexity) in enumerate(SMOLLM):
        worse = 1 - 0.11 * math.log(perplexity / 21.46)
        accuracy = {task: (max(0.2, 0.24 + (value - 0.24) * worse), n) for task, (value, n) in TASKS.items()}
        about = pruning("smollm2-135m", method, structure, sparsity)
        trial = f"{place + 160:02x}{'1' * 10}"
        evaluated = evaluation("wikitext2/test", 2048, TASKS)
        given = layers if method != "dense" else ()
        trials[trial] = trial_rows(trial, about, evaluated, perplexity, accuracy, given, 0, place)
    return trials


def write_study(root: Path, trials: Trials) -> Path:
    for trial, rows in trials.items():
        by_stage: dict[str, list[Row]] = {}
        for line in rows:
            by_stage.setdefault(line["stage"], []).append(line)
        for stage, lines in by_stage.items():
            path = root / trial / (stage.replace("/", "-").replace(":", "-") + ".jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return load_rows(write_study(tmp_path_factory.mktemp("demo"), demo_rows()))


@pytest.fixture(scope="session")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The demo with three seeds of each learned method."""
    return load_rows(write_study(tmp_path_factory.mktemp("seeded"), demo_rows(range(3))))


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return load_rows(write_study(tmp_path_factory.mktemp("smollm"), smollm_rows()))


@pytest.fixture
def make_pruning() -> Callable[..., Row]:
    """``(model, method, structure, sparsity, seed=0, **changed)`` to the definition of a pruning."""
    return pruning


@pytest.fixture
def make_trial() -> Callable[..., list[Row]]:
    """``(trial, pruning, perplexity, accuracy={}, limit=None, ...)`` to all rows of a trial."""

    def make(trial: str, about: Row, perplexity: float, accuracy: Row | None = None, **others: Any) -> list[Row]:
        accuracy = accuracy or {}
        evaluated = evaluation("wikitext2/test", others.pop("length", 2048), accuracy, others.pop("limit", None))
        return trial_rows(trial, about, evaluated, perplexity, accuracy, **others)

    return make


@pytest.fixture
def study(tmp_path: Path) -> Callable[[Trials], pd.DataFrame]:
    """Writes trials as a results directory has them and loads them."""

    def load(trials: Trials) -> pd.DataFrame:
        return load_rows(write_study(tmp_path / "rows", trials))

    return load
