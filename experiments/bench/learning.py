"""What learning costs on one GPU and on several: tokens per second, memory, and whether they learn the same.

Models of the registry's shapes with random weights in bfloat16, PATCH joint over tiles of 128x128, random tokens::

    hts bench learning llama-3.2-1b
    torchrun --nproc-per-node 2 -m experiments bench learning llama-3.2-1b
    hts bench learning llama-3.1-8b --logits bfloat16 --checkpointing

The step is the same whatever the number of processes: ``--batch`` sequences of 4096 tokens, in micro-batches of
``--microbatch``. The learning curve of the steps is among the rows, so that one can be laid over the other. Before
anything is timed, the first step of one block must have the loss that it has with the eager mask and nothing compiled.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from analysis.rows.format import Fact, digest
from experiments.bench import harness
from experiments.bench.harness import Lab, Verified
from experiments.bench.model import build, forget_compiled
from experiments.data.registry import REGISTRY
from experiments.studies.trial import definition
from patch.errors import UserError, check_name
from patch.learn import soft_mask
from patch.learn.distributed import Ranks, joined
from patch.learn.learner import Implementation, learn
from patch.learn.prior import Prior
from patch.learn.recipe import PATCH_JOINT, LogitDtype, Recipe
from stoicc.timing import timing

TILE = (128, 128)
SPARSITY = 0.45
# Steps that are not timed: they compile, and the fourth micro-batch captures.
WARMUP = 5
STEPS = 8
PART = "learning"
# How far, relatively, the first step's cross-entropy may be from that of eager masks, which draw other noise.
BOUND = 0.05


class _Enough(Exception):
    """Ends learning before it writes a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is measured; its hash names the rows."""

    model: str
    blocks: int
    recipe: Recipe
    processes: int


@dataclasses.dataclass(frozen=True)
class Case:
    """A bench among its processes.

    Attributes:
        steps: timed steps.
    """

    bench: Bench
    steps: int
    ranks: Ranks
    device: str


def bench_of(
    model: str, blocks: int | None, batch: int, microbatch: int, length: int, logits: LogitDtype, checkpointing: bool
) -> Bench:
    """What is measured, among the processes that ``torchrun`` started.

    Raises:
        UserError: if the model is not of the registry, or a field of the recipe is wrong.
    """
    check_name("model", model, REGISTRY)
    recipe = dataclasses.replace(
        PATCH_JOINT,
        batch=batch,
        microbatch=microbatch,
        length=length,
        logit_dtype=logits,
        activation_checkpointing=checkpointing,
        log_every=10**6,
        checkpoint_every=10**6,
    )
    return Bench(model, blocks or REGISTRY[model].blocks, recipe, int(os.environ.get("WORLD_SIZE", "1")))


def steps(case: Case, blocks: int, count: int, implementation: Implementation | None = None) -> list[dict[str, float]]:
    """What each of some steps reports.

    Args:
        blocks: of the model.
        implementation: as `patch.learn.learner.learn`.
    """
    bench, device = case.bench, case.device
    torch.manual_seed(0)
    model = build(bench.model, device, blocks)
    spec, recipe = REGISTRY[bench.model], bench.recipe
    seen: list[dict[str, float]] = []

    def batches(step: int) -> Tensor:
        source = torch.Generator().manual_seed(step)
        return torch.randint(spec.vocab, (recipe.batch, recipe.length), generator=source)

    def on_step(entry: Mapping[str, float]) -> None:
        seen.append(dict(entry))
        if len(seen) == count:
            raise _Enough

    with tempfile.TemporaryDirectory() as work, contextlib.suppress(_Enough):
        learn(
            model, recipe, batches, sparsity=SPARSITY, tile=TILE, seed=0, prior=Prior(), work=Path(work),
            device=device, on_step=on_step, ranks=case.ranks, implementation=implementation,
        )  # fmt: skip
    return seen


def cases(bench: Bench, parts: Sequence[str], lab: Lab, count: int = STEPS) -> Iterator[tuple[str, Iterator[Case]]]:
    """The one part, once for all processes together."""
    with joined(lab.device) as ranks:
        yield PART, iter([Case(bench, count, ranks, lab.device)])


def verify(case: Case) -> Verified:
    """The first step of one block costs what it costs with the eager mask; masks' noise differs, and little else.

    Raises:
        UserError: if it does not.
    """
    eager = Implementation(soft_mask.sampled_weight)
    fast, plain = (steps(case, 1, 1, way)[0]["cross_entropy"] for way in (None, eager))
    forget_compiled()
    error = abs(fast - plain) / plain
    if not error <= BOUND:
        raise UserError(f"the first step's cross-entropy is {fast:.4g}, with eager masks {plain:.4g}: not timed")
    return Verified([Fact("error", error, "1", {"of": "cross_entropy", "bound": BOUND, "status": "ok"})])


def time_case(case: Case, verified: Verified, lab: Lab) -> list[Fact]:
    """The timed steps, and the learning curve of all."""
    on_gpu = case.device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seen = steps(case, case.bench.blocks, case.steps + WARMUP)
    return facts_of(case.bench, seen, torch.cuda.max_memory_allocated() if on_gpu else 0)


def facts_of(bench: Bench, seen: Sequence[Mapping[str, float]], peak: int) -> list[Fact]:
    """Speed of all steps after the first `WARMUP`, memory in bytes, and what each step reported."""
    tokens = bench.recipe.batch * bench.recipe.length
    spread = timing([1e3 * tokens / entry["tokens_per_second"] for entry in seen[WARMUP:]])
    facts = [
        Fact("step", spread.median, "ms", {}, p20=spread.p20, p80=spread.p80, runs=spread.runs),
        Fact("tokens_per_second", 1e3 * tokens / spread.median, "1/s", {}, runs=spread.runs),
        Fact("peak_memory", peak, "B", {"of": "rank 0"}),
    ]
    for entry in seen:
        for metric in ("loss", "cross_entropy", "density", "grad_norm"):
            facts.append(Fact(metric, entry[metric], "1", {"step": int(entry["step"])}))
    return facts


def identity(bench: Bench) -> str:
    """Unlike what is learned, how long it takes depends on how a recipe runs."""
    return digest(definition(bench))


BENCH = harness.Bench(
    title="learning",
    parts=lambda bench: [PART],
    cases=cases,
    file=lambda bench, part: f"learning/{bench.model}-{identity(bench)}.jsonl",
    verify=verify,
    time=time_case,
    identity=identity,
    roof=False,
)
