"""What the published recipes compute on two small weights, from the papers' equations alone: NumPy, float64.

Nothing here uses the learner. Masks, densities and penalties are those of PATCH (Hourri et al., arXiv:2509.23410) and
MaskLLM (Fang et al., arXiv:2409.17481), written out element by element; gradients are central differences of the loss.
The text's loss enters through its gradient with respect to the masked weights, which is given. Run as a script it
writes the vectors that `test_published_vectors` holds the learner to::

    python tests/patch/learn/published_vectors.py
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

VECTORS = Path(__file__).with_name("published_vectors.json")

PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
TILE = (4, 8)
SHAPES = [(8, 16), (4, 24)]
STEPS = 2000
# Of each published run: learning rate and its end, warm-up; temperatures and scales of patterns and tiles; factors of
# the penalties.
RUNS: dict[str, dict[str, Any]] = {
    "patch-joint-45": {
        "mode": "joint", "target": 0.45, "lr": (1e-3, 0.0), "warmup": 5, "pattern_tau": (4, 0.05),
        "pattern_scale": (100, 500), "tile_tau": (4, 0.05), "tile_scale": (25, 350), "penalties": (7, 10),
    },
    "patch-joint-35-25": {
        "mode": "joint", "target": 0.25, "lr": (1e-3, 0.0), "warmup": 5, "pattern_tau": (4, 0.05),
        "pattern_scale": (100, 500), "tile_tau": (2, 0.05), "tile_scale": (25, 350), "penalties": (7, 10),
    },
    "patch-tile-7b-8b": {
        "mode": "tile", "target": 0.35, "lr": (1e-4, 0.0), "warmup": 5, "pattern_tau": (4, 0.05),
        "pattern_scale": (100, 500), "tile_tau": (2, 0.05), "tile_scale": (100, 500), "penalties": (3, 0.1),
    },
    "patch-tile-13b": {
        "mode": "tile", "target": 0.45, "lr": (1e-3, 0.0), "warmup": 5, "pattern_tau": (4, 0.05),
        "pattern_scale": (100, 500), "tile_tau": (2, 0.05), "tile_scale": (100, 500), "penalties": (2, 0.05),
    },
    "maskllm-of-patch": {
        "mode": "maskllm", "target": 0.5, "lr": (1e-4, 0.0), "warmup": 5, "pattern_tau": (4, 0.05),
        "pattern_scale": (100, 500), "tile_tau": (4, 0.05), "tile_scale": (25, 350), "penalties": (0, 0),
    },
    "maskllm": {
        "mode": "maskllm", "target": 0.5, "lr": (5e-4, 5e-5), "warmup": 0, "pattern_tau": (4, 0.05),
        "pattern_scale": (100, 500), "tile_tau": (4, 0.05), "tile_scale": (25, 350), "penalties": (0, 1e-5),
    },
}  # fmt: skip
# Where noise is added to the prior (MaskLLM) and how wide it is; elsewhere the prior replaces the pattern logits.
NOISE = {"maskllm": 0.01}
STD = 0.014
STRENGTH = 3


def schedule(run: dict[str, Any], step: int) -> dict[str, float]:
    """Everything that changes with the step."""
    share = step / STEPS
    first, last = run["lr"]
    if step < run["warmup"]:
        rate = first * step / run["warmup"]
    else:
        angle = math.pi * (step - run["warmup"]) / (STEPS - run["warmup"])
        rate = last + (first - last) * (1 + math.cos(angle)) / 2
    linear = {
        name: run[name][0] + (run[name][1] - run[name][0]) * share
        for name in ("pattern_tau", "pattern_scale", "tile_tau", "tile_scale")
    }
    return {"lr": rate, **linear, "weight_penalty": run["penalties"][1] * (1 - share)}


def initial_patterns(patterns: np.ndarray, std: float) -> np.ndarray:
    """What the prior makes of the logits ``[6, rows, groups]``, noise aside: the overlap, less one, times three std."""
    lift = np.zeros((6, *patterns.shape))
    for row, group in np.ndindex(*patterns.shape):
        kept = set(PAIRS[patterns[row, group]])
        for pattern, pair in enumerate(PAIRS):
            lift[pattern, row, group] = (len(kept & set(pair)) - 1) * std * STRENGTH
    return lift


def initial_tiles(kept: np.ndarray, sparsity: float, std: float) -> np.ndarray:
    """What the prior adds to the tile logits: as many as are dense at the target, those that keep the largest share."""
    rows, columns = kept.shape[0] // TILE[0], kept.shape[1] // TILE[1]
    share = [
        kept[r * TILE[0] : (r + 1) * TILE[0], c * TILE[1] : (c + 1) * TILE[1]].mean()
        for r in range(rows)
        for c in range(columns)
    ]
    dense = round(2 * len(share) * (1 - sparsity - 0.5))
    best = sorted(range(len(share)), key=lambda i: -share[i])[:dense]
    lift = np.full(rows * columns, -1.0)
    lift[best] = 1
    return (lift * std * STRENGTH).reshape(rows, columns)


def mask(
    case: dict[str, Any], patterns: np.ndarray | None, tiles: np.ndarray | None, at: dict[str, float]
) -> np.ndarray:
    """The soft mask of one weight, for one drawing of Gumbel noise."""
    rows, columns = case["weight"].shape
    result = np.zeros((rows, columns))
    for row in range(rows):
        for group in range(columns // 4):
            if patterns is None:
                shares = np.eye(6)[case["patterns"][row, group]]
            else:
                noisy = at["pattern_scale"] * patterns[:, row, group] + case["pattern_noise"][:, row, group]
                shares = np.exp((noisy - noisy.max()) / at["pattern_tau"])
                shares = shares / shares.sum()
            for pattern, pair in enumerate(PAIRS):
                for element in pair:
                    result[row, 4 * group + element] += shares[pattern]
    if tiles is None:
        return result
    for row, column in np.ndindex(rows, columns):
        place = row // TILE[0], column // TILE[1]
        # The two-way Gumbel-softmax over {0, logit}: of its two noises only the difference counts.
        noisy = at["tile_scale"] * tiles[place] + case["tile_noise"][place]
        dense = 1 / (1 + math.exp(-noisy / at["tile_tau"]))
        result[row, column] = dense + (1 - dense) * result[row, column]
    return result


def loss(name: str, cases: list[dict[str, Any]], logits: list[dict[str, np.ndarray]], step: int) -> float:
    """Of one step: the text's part, linear in the masked weights here, and the penalties."""
    run = RUNS[name]
    at = schedule(run, step)
    masks = [mask(case, mine.get("patterns"), mine.get("tiles"), at) for case, mine in zip(cases, logits, strict=True)]
    masked = [case["weight"] * each for case, each in zip(cases, masks, strict=True)]
    total = sum(float((case["gradient"] * each).sum()) for case, each in zip(cases, masked, strict=True))
    if run["mode"] != "maskllm":
        density = sum(each.sum() for each in masks) / sum(each.size for each in masks)
        total += run["penalties"][0] * abs(density - (1 - run["target"]))
    if name == "maskllm":
        size = sum(float((each**2).sum()) for each in masked)
    else:
        size = sum(np.linalg.norm(each) for each in masked) / sum(np.linalg.norm(case["weight"]) for case in cases)
    return total - at["weight_penalty"] * size


def gradients(name: str, cases: list[dict[str, Any]], logits: list[dict[str, np.ndarray]], step: int) -> list[dict]:
    """Central differences of `loss`."""
    found = []
    for mine in logits:
        found.append({kind: np.zeros_like(values) for kind, values in mine.items()})
        for kind, values in mine.items():
            for place in np.ndindex(*values.shape):
                here, width = values[place], 1e-6
                ends = []
                for end in (here + width, here - width):
                    values[place] = end
                    ends.append(loss(name, cases, logits, step))
                values[place] = here
                found[-1][kind][place] = (ends[0] - ends[1]) / (2 * width)
    return found


def weights(source: np.random.RandomState) -> list[dict[str, Any]]:
    """What is given: weights, masks of the prior, noise, and the gradient of the text's loss."""
    cases = []
    for rows, columns in SHAPES:
        weight = source.randn(rows, columns)
        grid = rows // TILE[0], columns // TILE[1]
        cases.append(
            {
                "weight": weight,
                "gradient": 0.1 * source.randn(rows, columns),
                "patterns": source.randint(6, size=(rows, columns // 4)),
                "kept": (source.rand(rows, columns) < 0.6).astype(int),
                "pattern_noise": -np.log(-np.log(source.rand(6, rows, columns // 4))),
                "tile_noise": np.log(1 / source.rand(*grid) - 1),
            }
        )
    return cases


def vectors() -> dict[str, Any]:
    """Everything, as JSON data."""
    # RandomState is the generator whose numbers NumPy froze.
    cases = weights(np.random.RandomState(7))
    told: dict[str, Any] = {"weights": [{k: v.tolist() for k, v in case.items()} for case in cases], "runs": {}}
    for name, run in RUNS.items():
        std, step = NOISE.get(name, STD), 700
        logits: list[dict[str, np.ndarray]] = []
        for case in cases:
            mine = {}
            if run["mode"] != "tile":
                mine["patterns"] = initial_patterns(case["patterns"], std)
            if run["mode"] != "maskllm":
                mine["tiles"] = initial_tiles(case["kept"], run["target"], std)
            logits.append(mine)
        told["runs"][name] = {
            "target": run["target"],
            "initial": [{kind: values.tolist() for kind, values in mine.items()} for mine in logits],
            "schedule": {str(at): schedule(run, at) for at in (0, 3, 5, 700, 1999)},
            "step": step,
            "loss": loss(name, cases, logits, step),
            "gradients": [
                {kind: values.tolist() for kind, values in mine.items()}
                for mine in gradients(name, cases, logits, step)
            ],
        }
    return told


def rounded(value: Any) -> Any:
    """Twelve digits, which is more than central differences have."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(rounded(vectors())) + "\n")
