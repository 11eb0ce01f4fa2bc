"""What learning costs on one GPU and on several: tokens per second, memory, and whether they learn the same.

Models of the registry's shapes with random weights in bfloat16, PATCH joint over tiles of 128x128, random tokens::

    python -m experiments.bench.learning results llama-3.2-1b
    torchrun --nproc-per-node 2 -m experiments.bench.learning results llama-3.2-1b
    python -m experiments.bench.learning results llama-3.1-8b --logits bfloat16 --checkpointing

The step is the same whatever the number of processes: ``--batch`` sequences of 4096 tokens, in micro-batches of
``--microbatch``. Rows go to ``<results>/bench/<gpu>/learning/``, the learning curve of the steps among them, so that
one can be laid over the other.
"""

import argparse
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.rows.format import SCHEMA
from analysis.rows.jsonl import to_lines
from experiments.bench.model import build
from experiments.data.models import REGISTRY
from experiments.run.provenance import provenance
from experiments.studies.trial import definition, digest
from patch.files import write_atomic
from patch.learn.distributed import Ranks, joined
from patch.learn.learner import learn
from patch.learn.prior import Prior
from patch.learn.recipe import PATCH_JOINT, Recipe
from stoicc.configs import gpu_slug
from stoicc.timing import timing

TILE = (128, 128)
SPARSITY = 0.45
# Steps that are not timed: they compile, and the fourth micro-batch captures.
WARMUP = 5


class _Enough(Exception):
    """Ends learning before it writes a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is measured; its hash names the rows."""

    model: str
    blocks: int
    recipe: Recipe
    processes: int


def steps(bench: Bench, ranks: Ranks, device: str, count: int) -> tuple[list[float], list[dict[str, float]]]:
    """Seconds of each timed step, and what each step reported."""
    torch.manual_seed(0)
    model = build(bench.model, device, bench.blocks)
    spec, recipe = REGISTRY[bench.model], bench.recipe
    seen: list[dict[str, float]] = []

    def batches(step: int) -> Tensor:
        source = torch.Generator().manual_seed(step)
        return torch.randint(spec.vocab, (recipe.batch, recipe.length), generator=source)

    def on_step(entry: Mapping[str, float]) -> None:
        seen.append(dict(entry))
        if len(seen) == count + WARMUP:
            raise _Enough

    with tempfile.TemporaryDirectory() as work, contextlib.suppress(_Enough):
        learn(
            model, recipe, batches, sparsity=SPARSITY, tile=TILE, seed=0, prior=Prior(), work=Path(work),
            device=device, on_step=on_step, ranks=ranks,
        )  # fmt: skip
    tokens = recipe.batch * recipe.length
    return [tokens / entry["tokens_per_second"] for entry in seen[WARMUP:]], seen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("model", choices=REGISTRY)
    parser.add_argument("--blocks", type=int, help="fewer decoder blocks than the model has")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--microbatch", type=int, default=2, help="sequences a forward pass, of all processes together")
    parser.add_argument("--length", type=int, default=4096, help="tokens a sequence")
    parser.add_argument("--logits", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each block in the backward pass")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.time()
    recipe = dataclasses.replace(
        PATCH_JOINT,
        batch=asked.batch,
        microbatch=asked.microbatch,
        length=asked.length,
        logit_dtype=asked.logits,
        activation_checkpointing=asked.checkpointing,
        log_every=10**6,
        checkpoint_every=10**6,
    )
    blocks = asked.blocks or REGISTRY[asked.model].blocks
    with joined(device) as ranks:
        bench = Bench(asked.model, blocks, recipe, ranks.size)
        seconds, seen = steps(bench, ranks, device, asked.steps)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        if ranks.rank:
            return
        gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        write(bench, seconds, seen, peak, gpu, asked.results, started)


def write(
    bench: Bench,
    seconds: list[float],
    seen: list[dict[str, float]],
    peak: int,
    gpu: str,
    results: Path,
    started: float,
) -> None:
    """Rows in the format of `experiments.run.store`, and a line for the terminal."""
    spread = timing([1e3 * value for value in seconds])
    tokens = bench.recipe.batch * bench.recipe.length
    # Unlike what is learned, how long it takes depends on how a recipe runs.
    name = digest(definition(bench))
    common = {"schema": SCHEMA, "trial": name, "definition": definition(bench), "stage": "bench:learning"}
    common |= {"stderr": None, "p20": None, "p80": None, "runs": 1, "provenance": provenance(time.time() - started)}

    def row(metric: str, value: float, unit: str, **changes: Any) -> dict[str, Any]:
        return common | {"metric": metric, "value": value, "unit": unit, "labels": {}} | changes

    rows = [
        row("step", spread.median, "ms", p20=spread.p20, p80=spread.p80, runs=spread.runs),
        row("tokens_per_second", 1e3 * tokens / spread.median, "1/s", runs=spread.runs),
        row("peak_memory", peak, "B", labels={"of": "rank 0"}),
    ]
    for entry in seen:
        for metric in ("loss", "cross_entropy", "density", "grad_norm"):
            rows.append(row(metric, entry[metric], "1", labels={"step": int(entry["step"])}))
    path = results / "bench" / gpu_slug(gpu) / "learning" / f"{bench.model}-{name}.jsonl"
    write_atomic(path, to_lines(rows))
    print(
        f"{bench.model}, {bench.blocks} blocks, {bench.processes} processes, logits {bench.recipe.logit_dtype}: "
        f"step {spread.median:.1f} ms [{spread.p20:.1f}, {spread.p80:.1f}], "
        f"{1e3 * tokens / spread.median:.0f} tokens/s, {peak / 2**30:.1f} GiB, "
        f"losses {[round(entry['loss'], 5) for entry in seen]}"
    )
    print(path, flush=True)


if __name__ == "__main__":
    main()
