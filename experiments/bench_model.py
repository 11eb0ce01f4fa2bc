"""End-to-end speed: a whole model of the registry with hybrid weights against the same model dense.

Weights are random, which time does not mind; tile maps are random and uneven. Both models run the same way, the
strongest that a user has: every decoder block through ``torch.compile``, the whole pass replayed as a CUDA graph, the
cache of keys and values preallocated, logits of the last token only.

    decode   one step for a batch of sequences that are ``CONTEXT`` tokens long
    prefill  a batch of prompts

Rows go to ``<results>/bench/<gpu>/model/<model>.jsonl``.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.bench_kernels import Variant, random_mask
from experiments.models import REGISTRY
from patch.mask import TileShape
from patch.prunable import decoder_blocks, prunable_linears
from stoicc import configs
from stoicc.linear import Report, compile_model
from stoicc.timing import Call, time_in_turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 512


@dataclass(frozen=True)
class Workload:
    """``kind`` is ``decode`` or ``prefill``; ``length`` is the tokens of a prompt, 1 for decoding."""

    kind: str
    batch: int
    length: int


WORKLOADS = (
    Workload("decode", 1, 1),
    Workload("decode", 16, 1),
    Workload("prefill", 1, 2048),
    Workload("prefill", 8, 2048),
)


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
    for block in decoder_blocks(model):
        # One compiled block serves all: nothing in them may tell them apart, and each has a cache of its own.
        attention: Any = block.self_attn
        attention.layer_idx = 0
    return model.eval().requires_grad_(False)


def make_hybrid(model: "PreTrainedModel", sparsity: float, tile: TileShape) -> Report:
    """Pack the model's linears with random uneven maps, each at the same sparsity."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    variant = Variant(sparsity, tile, "uneven")
    masks = {
        name: random_mask(linear.out_features, linear.in_features, variant, linear.weight.abs(), generator)
        for name, linear in prunable_linears(model).items()
    }
    return compile_model(model, masks)


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
        shape = (work.batch, config.num_key_value_heads, config.head_dim)
        caches = [FullCache(*shape, body.embed_tokens.weight) for _ in blocks]

    @torch.no_grad()
    def run() -> Tensor:
        hidden = body.embed_tokens(ids)
        for block, cache in zip(blocks, caches, strict=True):
            hidden = block(hidden, position_ids=positions, past_key_values=cache, position_embeddings=rotary)
        return model.lm_head(body.norm(hidden[:, -1:]))

    return run


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
    torch._dynamo.config.cache_size_limit = 64
    compiled = functools.partial(torch.compile, dynamic=False)
    dense = build(name, device)
    rows: list[dict[str, Any]] = []
    for sparsity in sparsities:
        hybrid = build(name, device)
        report = make_hybrid(hybrid, sparsity, tile)
        cell = {"model": name, "sparsity": sparsity, "tile": list(tile), "tiles": "uneven"}
        for implementation, size in (("dense", report.bytes_before), ("hybrid", report.bytes_after)):
            rows.append({"metric": "bytes", "unit": "B", "cell": cell, "implementation": implementation, "value": size})
        for work in workloads:
            calls = {"dense": [make_pass(dense, work, compiled)], "hybrid": [make_pass(hybrid, work, compiled)]}
            for implementation, timing in time_in_turns(calls, rounds, flush=False).items():
                about = cell | {"kind": work.kind, "batch": work.batch, "length": work.length}
                measured = {"value": round(timing.median, 2), "p20": round(timing.p20, 2), "p80": round(timing.p80, 2)}
                rows.append(
                    {"metric": "time", "unit": "us", "cell": about, "implementation": implementation}
                    | measured
                    | {"runs": timing.runs}
                )
            on_done(work, sparsity)
        del hybrid, calls
        torch.cuda.empty_cache()
    return rows


def bench_file(results: Path, gpu: str, model: str) -> Path:
    return results / "bench" / configs.gpu_slug(gpu) / "model" / f"{model}.jsonl"
