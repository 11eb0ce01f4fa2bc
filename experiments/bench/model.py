"""End-to-end speed: a whole model with packed weights against the same model dense.

Any model of LLaMA's form can be timed (`measure`), as it was loaded; ``hts bench model`` makes its own, of a model of
the registry with random weights, which time does not mind, and random uneven tile maps. All models run the same way,
the strongest that a user has: every decoder block through ``torch.compile``, whose kernels begin while the one before
them ends (``TORCHINDUCTOR_ENABLE_PDL=1`` sets the same), the whole pass replayed as a CUDA graph, the cache of keys and
values preallocated, logits of the last token only.

    decode   one step for a batch of sequences that are ``CONTEXT`` tokens long
    prefill  a batch of prompts

Rows go to ``<results>/bench/<gpu>/model/<model>.jsonl``.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.bench.kernels import Variant, random_mask
from experiments.data.models import REGISTRY
from experiments.studies.trial import Workload
from patch.errors import UserError
from patch.layers import decoder_blocks, prunable_linears
from patch.mask import TileShape
from stoicc import configs
from stoicc.linear import Report, compile_model
from stoicc.timing import Call, Timing, time_in_turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 512
# Buffers of packed modules whose length differs from block to block with how much is kept.
VARYING = ("records", "values")


# Architectures whose blocks take what `make_pass` gives them, and whose logits are the head of the normalised states.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Speed:
    """Of one model and workload: microseconds a pass, and the bytes of GPU memory that the model and a pass take."""

    time: Timing
    peak: int


class FullCache:
    """Keys and values of ``CONTEXT`` earlier tokens and of this one, which every step writes to the last place."""

    def __init__(self, batch: int, heads: int, head_dim: int, like: Tensor) -> None:
        self.keys, self.values = (like.new_zeros(batch, heads, CONTEXT + 1, head_dim).normal_() for _ in range(2))

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:] = keys
        self.values[:, :, -1:] = values
        return self.keys, self.values


def build(name: str, device: torch.device | str, blocks: int | None = None) -> "PreTrainedModel":
    """A model of the registry's shapes with random bfloat16 weights, all its blocks or fewer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = REGISTRY[name]
    config = LlamaConfig(
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=blocks or spec.blocks,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
            model.set_attn_implementation("sdpa")
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def make_hybrid(model: "PreTrainedModel", sparsity: float | Mapping[str, float], tile: TileShape) -> Report:
    """Pack the model's linears with random uneven maps, all at one sparsity or each at its own, by name."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    masks = {}
    for name, linear in prunable_linears(model).items():
        variant = Variant(sparsity[name] if isinstance(sparsity, Mapping) else sparsity, tile, "uneven")
        masks[name] = random_mask(linear.out_features, linear.in_features, variant, linear.weight.abs(), generator)
    return compile_model(model, masks)


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


def make_pass(model: "PreTrainedModel", work: Workload, wrap: Callable[[Any], Any]) -> Call:
    """A call that runs one forward pass and returns the logits of each sequence's last token, ``[batch, 1, vocab]``.

    Args:
        wrap: applied to each decoder block, such as ``torch.compile``.
    """
    body: Any = model.model
    config = model.config
    device = body.embed_tokens.weight.device
    ids = torch.randint(config.vocab_size, (work.batch, work.length), device=device)
    first = CONTEXT if work.kind == "decode" else 0
    positions = torch.arange(first, first + work.length, device=device)[None]
    rotary = body.rotary_emb(body.embed_tokens(ids), positions)
    blocks = [wrap(block) for block in decoder_blocks(model)]
    caches: list[FullCache | None] = [None] * len(blocks)
    if work.kind == "decode":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (work.batch, config.num_key_value_heads, head_dim)
        caches = [FullCache(*shape, body.embed_tokens.weight) for _ in blocks]

    @torch.no_grad()
    def run() -> Tensor:
        hidden = body.embed_tokens(ids)
        for block, cache in zip(blocks, caches, strict=True):
            hidden = block(hidden, position_ids=positions, past_key_values=cache, position_embeddings=rotary)
        return model.lm_head(body.norm(hidden[:, -1:]))

    return run


def measure(models: Mapping[str, "PreTrainedModel"], work: Workload, rounds: int) -> dict[str, Speed]:
    """Time models in turns, on the GPU that they are on, and measure the memory that each takes.

    Args:
        models: by name, each of its own weights; `prepare` is called on them.
        rounds: timed runs of each.

    Raises:
        UserError: as `prepare`.
    """
    blocks = max(len(decoder_blocks(model)) for model in models.values())
    for model in models.values():
        prepare(model)
    compiled = functools.partial(torch.compile, dynamic=False)
    calls: dict[str, list[Call]] = {}
    peaks = {}
    with compiling(limit=64 + 4 * blocks * len(models)):
        for name, model in models.items():
            before = torch.cuda.memory_allocated()
            call = make_pass(model, work, compiled)
            call()  # compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() - before + tensor_bytes(model)
            calls[name] = [call]
        times = time_in_turns(calls, rounds, flush=False)
    return {name: Speed(times[name], peaks[name]) for name in models}


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
        # For the dense model too: the baseline is the strongest that there is.
        torch._inductor.config.patch({"triton.enable_pdl": True}),
    ):
        yield


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for part in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def bench_model(
    name: str,
    sparsities: Sequence[float],
    tile: TileShape,
    workloads: Sequence[Workload],
    rounds: int,
    on_done: Callable[[Workload, float], None],
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """Rows of dense and hybrid times for every workload and sparsity, and of the bytes of the masked weights."""
    dense = build(name, device)
    rows: list[dict[str, Any]] = []
    for sparsity in sparsities:
        hybrid = build(name, device)
        report = make_hybrid(hybrid, sparsity, tile)
        cell = {"model": name, "sparsity": sparsity, "tile": list(tile), "tiles": "uneven"}
        for implementation, size in (("dense", report.bytes_before), ("hybrid", report.bytes_after)):
            rows.append({"metric": "bytes", "unit": "B", "cell": cell, "implementation": implementation, "value": size})
        for work in workloads:
            for implementation, speed in measure({"dense": dense, "hybrid": hybrid}, work, rounds).items():
                timing = speed.time
                about = cell | {"kind": work.kind, "batch": work.batch, "length": work.length}
                measured = {"value": round(timing.median, 2), "p20": round(timing.p20, 2), "p80": round(timing.p80, 2)}
                rows.append(
                    {"metric": "time", "unit": "us", "cell": about, "implementation": implementation}
                    | measured
                    | {"runs": timing.runs}
                )
            on_done(work, sparsity)
        del hybrid
        forget_compiled()
    return rows


def forget_compiled() -> None:
    """Drop compiled blocks, which hold on to nothing of models that are gone, and give memory back."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def bench_file(results: Path, gpu: str, model: str) -> Path:
    return results / "bench" / configs.gpu_slug(gpu) / "model" / f"{model}.jsonl"
