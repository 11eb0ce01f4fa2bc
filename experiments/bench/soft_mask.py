"""How fast soft masks are built: the fused mask beside the eager one, and what a step of learning costs with each.

The linears of LLaMA-3.2-1B, random weights in bfloat16, tiles of 128x128, logits in float32 and bfloat16, one process,
one GPU.

First the fused mask is compared with the eager one in float64 on every shape, given the same noise: values, sums and
gradients, and that it repeats bit by bit. What is wrong is not timed. Then, in turns:

* forward and backward pass of every mask of the model (`time`: launches queued ahead of the GPU; `time_with_host`: as
  Python launches them), and the peak of transient memory, one weight at a time and with a block's masks held at once;
* a whole step of learning on 1 x 4096 tokens, and that of the frozen model alone: forward pass and backward pass to the
  embeddings.
"""

import contextlib
import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.rows.format import Fact
from experiments.bench import harness, model
from experiments.bench.harness import Lab, Verified
from experiments.data.registry import REGISTRY
from patch.errors import UserError
from patch.layers import decoder_blocks
from patch.learn import philox, soft_mask, soft_mask_triton
from patch.learn.cuda_graph import Replayed
from patch.learn.learner import Implementation, learn
from patch.learn.masked_model import with_usual_mask
from patch.learn.prior import Prior
from patch.learn.recipe import PATCH_JOINT, Temperatures
from patch.learn.soft_mask import Masked, SampledWeight
from patch.tiles import GROUP, TileShape, tile_grid
from stoicc.timing import Timing, timing

MODEL = "llama-3.2-1b"
MODES = ("joint", "tile", "maskllm")
MASKS_PART, STEPS_PART = "soft_mask:masks", "soft_mask:steps"
# Of the masks that are timed.
TEMPERATURES = Temperatures(2.0, 300.0, 190.0)
# Steps of learning that are not timed: they compile, and the fourth captures.
WARMUP = 5
MASKS: dict[str, SampledWeight] = {"fused": soft_mask_triton.sampled_weight, "eager": soft_mask.sampled_weight}


@dataclass(frozen=True)
class Bench:
    """What is measured; its hash names the rows.

    Attributes:
        linears: of one block, name and ``(N, K)``.
        blocks: of the model.
        tile: ``(rows, cols)``.
        length: tokens of a step.
        rounds: timed runs.
        steps: timed steps of learning.
    """

    linears: tuple[tuple[str, tuple[int, int]], ...] = tuple(REGISTRY[MODEL].linear_shapes().items())
    blocks: int = 16
    tile: TileShape = (128, 128)
    length: int = 4096
    rounds: int = 11
    steps: int = 9


@dataclass(frozen=True)
class Weight:
    """A weight, what is learned about it, and the gradient that arrives at it."""

    weight: Tensor
    patterns: Tensor
    tiles: Tensor | None
    tile: TileShape
    grad: Tensor
    packed: Tensor

    def learned(self) -> list[Tensor]:
        return [logits for logits in (self.patterns, self.tiles) if logits is not None and logits.requires_grad]


def _times(metric: str, spread: Timing, labels: dict[str, Any]) -> Fact:
    return Fact(metric, spread.median, "ms", labels, p20=spread.p20, p80=spread.p80, runs=spread.runs)


def draw(
    shape: tuple[int, int],
    mode: str,
    tile: TileShape,
    logits: torch.dtype = torch.float32,
    grad: Tensor | None = None,
    device: str = "cuda",
) -> Weight:
    """A random weight with the logits of ``mode`` at their initial spread."""
    rows, groups = shape[0], shape[1] // GROUP

    def initial(*size: int) -> Tensor:
        return torch.empty(size, device=device, dtype=logits).normal_(0, 0.014).requires_grad_()

    fixed = mode == "tile"
    return Weight(
        torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[1] ** 0.5,
        torch.randint(6, (rows, groups), device=device, dtype=torch.uint8) if fixed else initial(6, rows, groups),
        None if mode == "maskllm" else initial(*tile_grid(shape, tile)),
        tile,
        torch.randn(shape, device=device, dtype=torch.bfloat16) if grad is None else grad,
        soft_mask_triton.pack(TEMPERATURES, [(0, 0, 0, 0)])[0].to(device),
    )


def outcome(masked: Masked, held: Weight) -> dict[str, Tensor]:
    """Values, and gradients of a loss in which all three outputs have a part."""
    ones = torch.ones_like(masked.kept)
    outputs = [masked.weight, masked.squares] + ([masked.kept] if held.tiles is not None else [])
    grads = [held.grad.to(masked.weight.dtype), ones.to(masked.squares.dtype)] + [ones] * (len(outputs) - 2)
    learned = torch.autograd.grad(outputs, held.learned(), grads)
    named = {"weight": masked.weight, "kept": masked.kept, "squares": masked.squares}
    return {name: value.detach() for name, value in named.items()} | {
        "tile_gradient" if logits is held.tiles else "pattern_gradient": value
        for logits, value in zip(held.learned(), learned, strict=True)
    }


def compare(
    shape: tuple[int, int], mode: str, tile: TileShape, logits: torch.dtype, temperatures: Temperatures
) -> list[Fact]:
    """Relative errors of the fused mask against the eager one in float64 with the same noise.

    Raises:
        UserError: if one is too large, or a second run gives other bits.
    """
    held, stream = draw(shape, mode, tile, logits), (0, 1, 2, 3)
    first, second = (
        outcome(
            soft_mask_triton.sampled_weight(held.weight, held.patterns, held.tiles, tile, temperatures, stream), held
        )
        for _ in range(2)
    )
    noise_key = soft_mask.stream_seed("masks", *stream)
    pattern_noise = philox.pattern_noise(noise_key, shape[0], shape[1] // GROUP, "cuda") if mode != "tile" else None
    tile_noise = None if held.tiles is None else philox.tile_noise(noise_key, *tile_grid(shape, tile), "cuda")
    eager = soft_mask.masked_weight(
        held.weight.double(), held.patterns, held.tiles, tile, temperatures, pattern_noise, tile_noise
    )
    exact = outcome(eager, held)
    # Gradients of a saturated mask are nothing beside those of a soft one, and so are their errors.
    slope = held.weight.double().mul(held.grad).norm() / temperatures.tau
    typical = {"pattern_gradient": temperatures.pattern_scale * slope, "tile_gradient": temperatures.tile_scale * slope}
    about = {"shape": list(shape), "mode": mode, "tile": list(tile), "logits": str(logits), "tau": temperatures.tau}
    facts = []
    for name, value in exact.items():
        size = max(float(value.double().norm()), 1e-3 * float(typical.get(name, 0)))
        error = float((first[name].double() - value.double()).norm()) / size
        # What is stored in bfloat16 is rounded to eight bits, the rest suffers from the logarithm's last ones.
        limit = 5e-3 if first[name].dtype == torch.bfloat16 else 1e-3
        if not error <= limit:
            raise UserError(f"{name} of the fused mask is wrong: relative error {error:.1e} above {limit}, {about}")
        if not torch.equal(first[name], second[name]):
            raise UserError(f"{name} of the fused mask differs between two runs, {about}")
        facts.append(Fact("error", error, "1", about | {"part": name}))
    return facts


@dataclass(frozen=True)
class Case:
    """Masks of one mode, with logits of one dtype: verified, then timed, alone or within steps of learning."""

    bench: Bench
    mode: str
    logits: torch.dtype
    steps: bool


def cases(bench: Bench, parts: Sequence[str], lab: Lab) -> Iterator[tuple[str, Iterator[Case]]]:
    """Masks of every mode, then steps."""
    torch.manual_seed(0)
    if MASKS_PART in parts:
        both = (torch.float32, torch.bfloat16)
        wanted = ((mode, logits) for mode in MODES for logits in (both if mode == "joint" else both[:1]))
        yield MASKS_PART, (Case(bench, mode, logits, steps=False) for mode, logits in wanted)
    if STEPS_PART in parts:
        yield STEPS_PART, iter([Case(bench, "joint", torch.float32, steps=True)])


def verify(case: Case) -> Verified:
    """Every shape of the bench and some odd ones, from the first step's temperatures to the last one's.

    Raises:
        UserError: if a mask is wrong.
    """
    bench = case.bench
    schedule = [Temperatures(4.0, 100.0, 25.0), Temperatures(2.0, 300.0, 190.0), Temperatures(0.05, 500.0, 350.0)]
    shapes = [(shape, bench.tile) for shape in dict.fromkeys(shape for _, shape in bench.linears)]
    shapes += [((576, 1536), (64, 64)), ((1000, 1004), (96, 100)), ((300, 500), (300, 500)), ((64, 2048), (1, 2048))]
    facts = []
    for shape, tile in shapes:
        for temperatures in schedule:
            facts += compare(shape, case.mode, tile, case.logits, temperatures)
    return Verified(facts)


def time_case(case: Case, verified: Verified, lab: Lab) -> list[Fact]:
    """What `measure_steps` or `measure_masks` finds."""
    facts = measure_steps(case.bench) if case.steps else measure_masks(case.bench, case.mode, case.logits)
    torch.cuda.empty_cache()
    return facts


def build(held: Weight, sampled_weight: SampledWeight, index: int) -> Masked:
    return sampled_weight(
        held.weight, held.patterns, held.tiles, held.tile, TEMPERATURES, (0, 0, 0, index), packed=held.packed
    )


def backward(masked: Masked, held: Weight, one: Tensor) -> Sequence[Tensor]:
    if held.tiles is None:
        return torch.autograd.grad((masked.weight, masked.squares), held.learned(), (held.grad, one))
    return torch.autograd.grad(tuple(masked), held.learned(), (held.grad, one, one))


def all_masks(model: Sequence[Weight], sampled_weight: SampledWeight, one: Tensor) -> None:
    """Forward and backward pass, one weight after the other."""
    for index, held in enumerate(model):
        backward(build(held, sampled_weight, index), held, one)


def timed(calls: Mapping[str, Callable[[], None]], rounds: int, ahead: bool) -> dict[str, Timing]:
    """Milliseconds of each, measured in turns.

    Args:
        ahead: let the GPU wait until the launches are queued, so that host time does not count.
    """
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            if ahead:
                torch.cuda._sleep(500_000_000)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn > 1:
                measured[name].append(start.elapsed_time(end))
    return {name: timing(times) for name, times in measured.items()}


def bytes_moved(model: Sequence[Weight]) -> int:
    """What both passes must read and write: inputs twice, gradients and the masked weight once each."""
    total = 0
    for held in model:
        inputs = held.weight.nbytes + sum(part.nbytes for part in (held.patterns, held.tiles) if part is not None)
        total += 2 * inputs + held.weight.nbytes + held.grad.nbytes + sum(logits.nbytes for logits in held.learned())
    return total


def transient_memory(block: Sequence[Weight], sampled_weight: SampledWeight, one: Tensor, held_at_once: bool) -> int:
    """Peak bytes beyond what is there before, but for the logits' gradients, in a block's passes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if held_at_once:
        masks = [build(held, sampled_weight, index) for index, held in enumerate(block)]
        kept: list[Tensor] = []
        while masks:
            held = block[len(masks) - 1]
            kept += backward(masks.pop(), held, one)
    else:
        kept = [
            grad for index, held in enumerate(block) for grad in backward(build(held, sampled_weight, index), held, one)
        ]
    return torch.cuda.max_memory_allocated() - before - sum(grad.nbytes for grad in kept)


def measure_masks(bench: Bench, mode: str, logits: torch.dtype) -> list[Fact]:
    """Time and transient memory of all masks of the model, fused and eager."""
    grads = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _, shape in bench.linears]
    model = [
        draw(shape, mode, bench.tile, logits, grad)
        for _ in range(bench.blocks)
        for (_, shape), grad in zip(bench.linears, grads, strict=True)
    ]
    one = torch.ones((), device="cuda")
    about = {"mode": mode, "logits": str(logits), "bytes": bytes_moved(model)}
    facts = []
    calls = {name: lambda masks=masks: all_masks(model, masks, one) for name, masks in MASKS.items()}
    for metric, ahead in (("time", True), ("time_with_host", False)):
        for name, spread in timed(calls, bench.rounds, ahead).items():
            facts.append(_times(metric, spread, about | {"implementation": name}))
    block = model[: len(bench.linears)]
    for name, masks in MASKS.items():
        for held_at_once in (False, True):
            peak = transient_memory(block, masks, one, held_at_once)
            labels = {"implementation": name, "masks": "of a block" if held_at_once else "one at a time"}
            facts.append(Fact("transient_memory", peak, "B", about | labels))
    return facts


class _Enough(Exception):
    """Ends learning before it writes a checkpoint."""


def frozen_steps(bench: Bench, model: Any, captured: bool) -> tuple[list[float], bool]:
    """Milliseconds of the model's forward pass and of its backward pass to the embeddings.

    Args:
        captured: replay both as one CUDA graph, as learning does.

    Returns:
        The times, and whether they are of a replayed graph.
    """
    tokens = torch.randint(REGISTRY[MODEL].vocab, (1, bench.length), device="cuda")

    def step() -> Tensor:
        embedded = model.get_input_embeddings()(tokens).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:])
        loss.backward()
        return loss.detach()

    replayed = Replayed(step, lambda: None) if captured else None
    times = []
    for _ in range(bench.steps + WARMUP):
        torch.cuda.synchronize()
        started = time.perf_counter()
        (replayed or step)().item()
        times.append(1e3 * (time.perf_counter() - started))
    return times[WARMUP:], replayed is not None and replayed.captured


def compiled_blocks(model: nn.Module) -> nn.Module:
    """The model with its decoder blocks through ``torch.compile``, as learning runs them."""
    for block in decoder_blocks(model):
        forward: Any = with_usual_mask(torch.compile(block.forward, dynamic=False))
        block.forward = forward
    return model


def learning_steps(bench: Bench, model: nn.Module, implementation: Implementation, checkpointing: bool) -> list[float]:
    """Milliseconds of steps of PATCH joint, optimizer included."""
    recipe = dataclasses.replace(
        PATCH_JOINT,
        batch=1,
        length=bench.length,
        warmup=0,
        steps=1000,
        log_every=1000,
        checkpoint_every=1000,
        activation_checkpointing=checkpointing,
    )
    times: list[float] = []

    def on_step(entry: Mapping[str, float]) -> None:
        times.append(1e3 * bench.length / entry["tokens_per_second"])
        if len(times) == bench.steps + WARMUP:
            raise _Enough

    def batches(step: int) -> Tensor:
        return torch.randint(128256, (1, bench.length), generator=torch.Generator().manual_seed(step))

    with tempfile.TemporaryDirectory() as work, contextlib.suppress(_Enough):
        learn(
            model,
            recipe,
            batches,
            sparsity=0.35,
            tile=bench.tile,
            seed=0,
            prior=Prior(),
            work=Path(work),
            device="cuda",
            on_step=on_step,
            implementation=implementation,
        )
    return times[WARMUP:]


def measure_steps(bench: Bench) -> list[Fact]:
    """Steps of the frozen model and of learning, each with the peak of device memory of a model of its own."""
    facts: list[Fact] = []

    def add(measure: Callable[[nn.Module], tuple[list[float], dict[str, Any]]]) -> None:
        gc.collect()
        model.forget_compiled()
        torch.cuda.reset_peak_memory_stats()
        times, labels = measure(model.build(MODEL, "cuda", bench.blocks))
        facts.append(_times("step", timing(times), labels))
        facts.append(Fact("step_memory", torch.cuda.max_memory_allocated(), "B", labels))

    for compiled, captured in ((False, False), (True, False), (True, True)):

        def frozen(model: nn.Module, compiled: bool = compiled, captured: bool = captured) -> Any:
            times, replays = frozen_steps(bench, compiled_blocks(model) if compiled else model, captured)
            return times, {"implementation": "frozen", "compiled": compiled, "captured": replays}

        add(frozen)
    # The eager masks of the whole model at once do not fit.
    for name, compiled, captured, checkpointing in (
        ("fused", True, True, False),
        ("fused", True, True, True),
        ("fused", True, False, False),
        ("fused", False, False, False),
        ("eager", False, False, True),
    ):
        ways = {"compiled": compiled, "captured": captured, "activation_checkpointing": checkpointing}

        def learned(model: nn.Module, name: str = name, ways: dict[str, bool] = ways) -> Any:
            implementation = Implementation(MASKS[name], ways["compiled"], ways["captured"])
            times = learning_steps(bench, model, implementation, ways["activation_checkpointing"])
            return times, {"implementation": name} | ways

        add(learned)
    return facts


BENCH = harness.Bench(
    title="soft masks and steps of learning",
    parts=lambda bench: [MASKS_PART, STEPS_PART],
    cases=cases,
    file=lambda bench, part: "soft_mask.jsonl",
    verify=verify,
    time=time_case,
    roof=False,
)
