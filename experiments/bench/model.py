"""End-to-end speed: a whole model with packed weights against the same model dense, in several precisions.

Any model of LLaMA's form can be timed (`measure`), as it was loaded; ``hts bench model`` makes its own, of a model of
the registry with random weights, which time does not mind, and random uneven tile maps. All models run the same way,
as servers run them: every decoder block through ``torch.compile``, whose kernels begin while the one before
them ends (``TORCHINDUCTOR_ENABLE_PDL=1`` sets the same), the whole pass replayed as a CUDA graph, the cache of keys and
values preallocated, logits of the last token only. The dense model that others are compared with computes query, key
and value as one product, and gate and up, as servers do and as packed weights are.

    decode   one step for a batch of sequences that are ``CONTEXT`` tokens long
    prefill  a batch of prompts

A case is a workload. Its entries are the dense models (part ``model:dense``), or the fused dense model and that whose
weights are packed at one sparsity (part ``model:25%``), in 16 bits and, beside dense models of the same precision, in
FP8 and INT4. Each of their blocks must compute what an eager block with the same masked weights does, up to the
rounding of its precision.
"""

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from analysis.rows.format import Fact
from experiments.bench import baselines
from experiments.bench.harness import BEGIN_EARLY, SECONDS, Bench, Case, Entry, Lab, Labels, Reading, Ready, read_gpu
from experiments.bench.kernels import Variant, random_mask
from experiments.data.registry import REGISTRY
from experiments.studies.trial import DENSE_PART, ModelGrid, Trial, Workload
from patch import simulate
from patch.errors import UserError
from patch.layers import decoder_blocks, prunable_linears
from patch.mask import HybridMask
from patch.quantise.precisions import PRECISIONS
from patch.quantise.values import quantise_groups
from patch.tiles import TileShape
from stoicc.format import SCALE_GROUP, unpack
from stoicc.linear import Fused, HybridLinear, Report, compile_model, install, packed_modules

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

CONTEXT = 512
# Buffers of packed modules whose length differs from block to block with how much is kept.
VARYING = ("records", "values")
# How often a block may be compiled, for all models and workloads of a process.
RECOMPILATIONS = 1024
# The fused dense model whose products `torch.compile` chooses by measuring, cuBLAS's among them.
AUTOTUNED = "autotuned"
# How far a block may be from the eager one (`disagreement`): what is timed must be no other model.
BOUNDS = {"bf16": 0.1, "fp8": 0.3, "int4": 0.6}
# Standard deviation of the states on which that is found.
SMALL = 0.1

# Architectures whose blocks take what `make_pass` gives them, and whose logits are the head of the normalised states.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Speed:
    """Of one model and workload: what was read, in microseconds a pass, and the bytes that model and pass take."""

    reading: Reading
    peak: int


class FullCache:
    """Keys and values of ``CONTEXT`` earlier tokens and of this one, which every step writes to the last place."""

    def __init__(self, batch: int, heads: int, head_dim: int, like: Tensor) -> None:
        self.keys, self.values = (like.new_zeros(batch, heads, CONTEXT + 1, head_dim).normal_() for _ in range(2))

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:] = keys
        self.values[:, :, -1:] = values
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


def config_of(name: str, blocks: int | None = None) -> "LlamaConfig":
    """Of a model of the registry's shapes, with all its blocks or fewer."""
    from transformers import LlamaConfig

    spec = REGISTRY[name]
    return LlamaConfig(
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=blocks or spec.blocks,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab,
    )


def build(name: str, device: torch.device | str, blocks: int | None = None) -> "PreTrainedModel":
    """A model of the registry's shapes with random bfloat16 weights, all its blocks or fewer."""
    from transformers import LlamaForCausalLM

    config = config_of(name, blocks)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
            model.set_attn_implementation("sdpa")
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def make_hybrid(
    model: "PreTrainedModel",
    sparsity: float | Mapping[str, float],
    tile: TileShape,
    keep_dense: bool = True,
    dtype: torch.dtype | None = None,
) -> Report:
    """Pack the model's linears with random uneven maps, all at one sparsity or each at its own, by name.

    Args:
        keep_dense, dtype: as `stoicc.linear.compile_model`.
    """
    return compile_model(model, random_masks(model, sparsity, tile), keep_dense=keep_dense, dtype=dtype)


def random_masks(
    model: "PreTrainedModel", sparsity: float | Mapping[str, float], tile: TileShape
) -> dict[str, HybridMask]:
    """Random uneven maps of the model's linears, by name: all at one sparsity or each at its own."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    masks = {}
    for name, linear in prunable_linears(model).items():
        variant = Variant(sparsity[name] if isinstance(sparsity, Mapping) else sparsity, tile, "uneven")
        masks[name] = random_mask(linear.out_features, linear.in_features, variant, linear.weight.abs(), generator)
    return masks


def make_hybrid_int4(model: "PreTrainedModel", sparsity: float, tile: TileShape) -> list[Report]:
    """As `make_hybrid`, rounded to nearest INT4; a block at a time, so that no second model is in memory meanwhile."""
    masks = random_masks(model, sparsity, tile)
    reports = []
    for block in sorted({name.rpartition(".layers.")[2].partition(".")[0] for name in masks}, key=int):
        here = {name: mask for name, mask in masks.items() if f".layers.{block}." in name}
        linears = prunable_linears(model)
        weights = {name: quantise_groups(mask.apply(linears[name].weight), SCALE_GROUP) for name, mask in here.items()}
        simulate.install(model, weights, PRECISIONS["int4"])
        del linears, weights
        reports.append(compile_model(model, here, keep_dense=False))
    return reports


def prepare(model: "PreTrainedModel") -> None:
    """Make the blocks of a model alike, so that one compiled block serves all; it cannot generate afterwards.

    Raises:
        UserError: if the model is not of a form that `make_pass` runs.
    """
    if model.config.model_type not in MODEL_TYPES:
        raise UserError(f"a {model.config.model_type} model cannot be timed: only {', '.join(MODEL_TYPES)} can")
    for block in decoder_blocks(model):
        # Each block has a cache of its own, so nothing needs its number.
        attention: Any = block.self_attn
        attention.layer_idx = 0
    for module in model.modules():
        for name in VARYING:
            part = getattr(module, name, None)
            if isinstance(part, Tensor):
                torch._dynamo.maybe_mark_dynamic(part, 0)


@dataclass(frozen=True)
class Pass:
    """A forward pass of a model: called, it returns the logits of each sequence's last token, ``[batch, 1, vocab]``."""

    model: Any
    blocks: Sequence[Any]
    caches: Sequence[FullCache | None]
    ids: Tensor
    positions: Tensor
    rotary: tuple[Tensor, Tensor]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        hidden = self.embedded()
        for index in range(len(self.blocks)):
            hidden = self.block(index, hidden)
        return self.model.lm_head(self.model.model.norm(hidden[:, -1:]))

    def embedded(self) -> Tensor:
        return self.model.model.embed_tokens(self.ids)

    def block(self, index: int, hidden: Tensor) -> Tensor:
        return self.blocks[index](
            hidden,
            position_ids=self.positions,
            past_key_values=self.caches[index],
            position_embeddings=self.rotary,
        )


def make_caches(model: "PreTrainedModel", work: Workload) -> list[FullCache | None]:
    """Random cached keys and values of each block; none where a workload has no earlier tokens."""
    config = model.config
    blocks = decoder_blocks(model)
    if work.kind != "decode":
        return [None] * len(blocks)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (work.batch, config.num_key_value_heads, head_dim)
    return [FullCache(*shape, model.model.embed_tokens.weight) for _ in blocks]


def make_pass(
    model: "PreTrainedModel",
    work: Workload,
    wrap: Callable[[Any], Any],
    caches: Sequence[FullCache | None] | None = None,
) -> Pass:
    """A pass on random tokens, after random cached keys and values.

    Args:
        wrap: applied to each decoder block, such as ``torch.compile``.
        caches: of `make_caches`, which passes that run in turns may share; None makes them.
    """
    body: Any = model.model
    config = model.config
    device = body.embed_tokens.weight.device
    ids = torch.randint(config.vocab_size, (work.batch, work.length), device=device)
    first = CONTEXT if work.kind == "decode" else 0
    positions = torch.arange(first, first + work.length, device=device)[None]
    rotary = body.rotary_emb(body.embed_tokens(ids), positions)
    blocks = [wrap(block) for block in decoder_blocks(model)]
    return Pass(model, blocks, make_caches(model, work) if caches is None else caches, ids, positions, rotary)


def seeded_pass(
    model: "PreTrainedModel",
    work: Workload,
    wrap: Callable[[Any], Any],
    caches: Sequence[FullCache | None] | None = None,
) -> Pass:
    """`make_pass` on the same tokens, and cached keys and values, every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_pass(model, work, wrap, caches)


def plain_pass(model: "PreTrainedModel", work: Workload, caches: Sequence[FullCache | None] | None = None) -> Pass:
    """`seeded_pass` without compilation."""
    return seeded_pass(model, work, lambda block: block, caches)


def ready(
    model: "PreTrainedModel",
    work: Workload,
    reference: "PreTrainedModel",
    bound: float,
    mode: str | None = None,
    caches: Sequence[FullCache | None] | None = None,
) -> Ready:
    """A model's pass, compiled, with the peak of memory that it takes.

    Args:
        model: `prepare` was called on it.
        reference: each block must compute what this model's computes of the same states.
        bound: how far from them it may be, as `disagreement`.
        mode: of ``torch.compile``.
        caches: as `make_pass`; they count as this model's memory.
    """
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    before -= sum(cache.nbytes for cache in caches or () if cache is not None)
    run = seeded_pass(model, work, partial(torch.compile, dynamic=False, mode=mode), caches)

    def call() -> Tensor:
        with compiling(RECOMPILATIONS):
            return run()

    call()  # compiles
    peak = 0
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before + tensor_bytes(model)

    def check(logits: Tensor) -> tuple[float, float]:
        with compiling(RECOMPILATIONS):
            error = disagreement(run, plain_pass(reference, work, caches))
        return error if bool(logits.isfinite().all()) else float("nan"), bound

    return Ready([call], check, facts=[Fact("peak_memory", peak, "B", {})])


@torch.no_grad()
def disagreement(found: Pass, expected: Pass) -> float:
    """The largest error of a block, relative to what the expected pass's block adds to the states that both are given.

    Logits say less: over tens of blocks of random weights rounding grows until nothing is left to compare. The states
    are small and random. Of real models' own states a feature may be hundreds of times as large as all that a block
    adds, and bfloat16 rounds it by more than that (Qwen2.5: 750, in steps of 4, where blocks add 3.5 in all).
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hidden = SMALL * torch.randn_like(expected.embedded())
    errors = []
    for index in range(len(expected.blocks)):
        right = expected.block(index, hidden)
        errors.append((found.block(index, hidden) - right).float().norm() / (right - hidden).float().norm())
    return float(torch.stack(errors).max())


def measure(
    models: Mapping[str, "PreTrainedModel"], work: Workload, rounds: int, eight_bits: Collection[str] = ()
) -> dict[str, Speed]:
    """Time models in turns, on the GPU that they are on, with their energy and the memory that each takes.

    Args:
        models: by name, each of its own weights; `prepare` is called on them.
        rounds: timed runs of each.
        eight_bits: the models that round activations to 8 bits, where the last bit of 16 decides between two values.

    Raises:
        UserError: as `prepare`, and if a compiled pass returns something else than the blocks as they are.
    """
    made: dict[str, Ready] = {}
    for name, model in models.items():
        prepare(model)
        made[name] = ready(model, work, model, BOUNDS["fp8" if name in eight_bits else "bf16"])
        error, bound = made[name].check(made[name].calls[0]())
        if not error <= bound:
            raise UserError(f"the {name} model's compiled pass is wrong: a block is off by {error:.2g}")
    readings = read_gpu({name: each.calls for name, each in made.items()}, rounds, False, SECONDS)
    return {name: Speed(readings[name], int(made[name].facts[0].value or 0)) for name in models}


@contextmanager
def compiling(limit: int) -> Iterator[None]:
    """Settings under which blocks are compiled: one compilation serves lengths of buffers that vary (see `VARYING`).

    Args:
        limit: how often a block may be compiled; beyond it dynamo raises, where it would silently run it as it is.
    """
    with (
        torch._dynamo.config.patch(
            recompile_limit=limit,
            accumulated_recompile_limit=16 * limit,
            fail_on_recompile_limit_hit=True,
            force_nn_module_property_static_shapes=False,
            force_parameter_static_shapes=False,
        ),
        # For the dense model too.
        torch._inductor.config.patch(BEGIN_EARLY),
    ):
        yield


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for part in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def largest_inputs(model: "PreTrainedModel", works: Sequence[Workload]) -> dict[str, Tensor]:
    """The largest magnitude of what each prunable linear is applied to in some workloads, by its name.

    The tokens are random: this is for time, not for accuracy. `prepare` is called on the model.
    """
    prepare(model)
    largest: dict[str, Tensor] = {}
    with baselines.watching(model, largest):
        for work in works:
            plain_pass(model, work)()
    return largest


def single_scales(dense: "PreTrainedModel", work: Workload) -> "PreTrainedModel":
    """A dense model in FP8 with one scale a weight, and one for what it is applied to, that is known beforehand."""
    model = baselines.sharing(dense)
    baselines.quantised(model, "fp8_tensorwise", largest_inputs(model, (work,)))
    return model


def cases(trial: Trial, parts: Sequence[str], lab: Lab) -> Iterator[tuple[str, Iterator[Case]]]:
    """The dense models and each sparsity, with every workload."""
    grid = trial.evaluation.grid
    assert isinstance(grid, ModelGrid)
    dense = build(trial.pruning.model, lab.device, grid.blocks)
    largest = largest_inputs(dense, grid.workloads)
    fused = baselines.sharing(dense)
    baselines.fused(fused)
    # Weights of four bits cannot be arranged for its kernel elsewhere.
    ways = [way for way in baselines.WAYS if way != "int4" or lab.device != "cpu"]
    few = {way: baselines.sharing(dense) for way in ways}
    for way, model in few.items():
        baselines.quantised(model, way, largest)
    if DENSE_PART in parts:
        models = {"dense": dense, "fused": fused, AUTOTUNED: fused} | few
        yield DENSE_PART, workloads(trial, DENSE_PART, lambda: Side(models, dict.fromkeys(models, dense), {}), lab)
        models.clear()
    for sparsity in grid.sparsities:
        if (part := grid.part(sparsity)) in parts:
            make = partial(beside, {"fused": fused} | few, dense, sparsity, grid.tile)
            yield part, workloads(trial, part, make, lab)
    forget_compiled()


@dataclass(frozen=True)
class Side:
    """Models that are timed side by side, by implementation, and what each must compute.

    Attributes:
        references: what each is compared with.
        about: labels of each.
    """

    models: Mapping[str, "PreTrainedModel"]
    references: Mapping[str, "PreTrainedModel"]
    about: Mapping[str, Labels]


def beside(others: Mapping[str, "PreTrainedModel"], dense: "PreTrainedModel", sparsity: float, tile: TileShape) -> Side:
    """A dense model packed in 16 bits, FP8 and, beside dense INT4, INT4, with the same masks, and other dense ones."""
    models, about = {}, dict[str, Labels]()
    makers: dict[str, Callable[..., Sequence[Report]]] = {
        "hybrid": lambda model: [make_hybrid(model, sparsity, tile, keep_dense=False)],
        "hybrid_fp8": lambda model: [make_hybrid(model, sparsity, tile, keep_dense=False, dtype=baselines.FP8)],
    }
    if "int4" in others:
        makers["hybrid_int4"] = lambda model: make_hybrid_int4(model, sparsity, tile)
    for name, make in makers.items():
        models[name] = baselines.sharing(dense)
        reports = make(models[name])
        before, after = sum(report.bytes_before for report in reports), sum(report.bytes_after for report in reports)
        about["fused"] = {"bytes": before}
        about[name] = {"sparsity": sparsity, "tile": list(tile), "tiles": "uneven", "bytes": after}
    references = dict.fromkeys(others, dense) | dict.fromkeys(models, unpacked(models["hybrid"]))
    return Side({**others, **models}, references, about)


def workloads(trial: Trial, part: str, make: Callable[[], Side], lab: Lab) -> Iterator[Case]:
    """Every workload with some models, which are made here so that they are gone before those of another part are."""
    side = make()
    models, references, about = side.models, side.references, side.about
    grid = trial.evaluation.grid
    assert isinstance(grid, ModelGrid)
    for model in models.values():
        prepare(model)
    for done, work in enumerate(grid.workloads):
        gc.collect()
        lab.progress(f"{trial.pruning.model} {part.partition(':')[2]}", done, len(grid.workloads))
        entries = []
        # Of all models alike: caches of their own would not fit beside each other.
        caches = make_caches(references["fused"], work)
        for implementation, model in models.items():
            precision = next((name for name in BOUNDS if name in implementation.split("_")), "bf16")
            # The kernel of 4-bit weights is for decoding, and there alone max-autotune finds what cuBLAS does not have.
            if (precision != "int4" and implementation != AUTOTUNED) or work.kind == "decode":
                # Of what is packed the precision tells the rest.
                shown = "hybrid" if implementation.startswith("hybrid") else implementation
                labels = {"implementation": shown, "precision": precision} | about.get(implementation, {})
                mode = "max-autotune-no-cudagraphs" if implementation == AUTOTUNED else None
                prepared = partial(ready, model, work, references[implementation], BOUNDS[precision], mode, caches)
                entries.append(Entry(labels, prepared))
        cell = {"model": trial.pruning.model, "kind": work.kind, "batch": work.batch, "length": work.length}
        yield Case(cell, entries, grid.rounds, flush=False, tokens=work.batch * work.length)
        del entries, caches


class Unpacked(Fused):
    """A packed module that computes dense, of the weight that it stands for, made anew each time: it has no bytes."""

    def __init__(self, packed: HybridLinear) -> None:
        super().__init__(packed.parts, packed.in_features)
        # In a tuple, so that it is not a module of this one.
        self._packed = (packed,)

    def product(self, x: Tensor) -> Tensor:
        packed = self._packed[0]
        return torch.nn.functional.linear(x, unpack(packed.checked()), packed.bias)


def unpacked(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of a packed model that computes dense, with the weights that the packed ones stand for."""
    copied = baselines.sharing(model)
    for module in packed_modules(copied):
        install(copied, Unpacked(module))
    return copied


def forget_compiled() -> None:
    """Drop compiled blocks, which hold on to nothing of models that are gone, and give memory back."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


BENCH = Bench(
    title="a whole model, end to end",
    parts=lambda trial: trial.evaluation.grid.parts,
    cases=cases,
    file=lambda trial, part: f"model/{trial.pruning.model}.jsonl",
)
