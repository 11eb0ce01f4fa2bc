"""Small random models of every kind of decoder, for tests of what is prunable in them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    MptConfig,
    OlmoeConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=16),
    "gpt2": lambda: GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "gpt-neox": lambda: GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "opt": lambda: OPTConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "falcon": lambda: FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
    "bloom": lambda: BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=2),
    "mpt": lambda: MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=2),
    "mixtral": lambda: MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4),
    "qwen2-moe": lambda: Qwen2MoeConfig(
        **SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=48, shared_expert_intermediate_size=48
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=48, head_dim=16),
    "olmoe": lambda: OlmoeConfig(**SIZES, **EXPERTS, num_experts=4),
    "gpt-oss": lambda: GptOssConfig(**SIZES, **EXPERTS, num_local_experts=4, head_dim=16),
    "llama4": lambda: Llama4TextConfig(
        **SIZES, **EXPERTS, num_local_experts=4, intermediate_size_mlp=64, head_dim=16, pad_token_id=0
    ),
    "jamba": lambda: JambaConfig(
        **SIZES, **EXPERTS, num_experts=4, use_mamba_kernels=False, mamba_d_state=8, mamba_dt_rank=4
    ),
    "recurrent-gemma": lambda: RecurrentGemmaConfig(
        **SIZES, lru_width=32, attention_window_size=32, block_types=["recurrent", "attention"]
    ),
}
WHOLE = [name for name in FAMILIES if name not in ("jamba", "recurrent-gemma", "llama4")]
MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss")


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()


def windows(count: int = 6) -> Tensor:
    return torch.randint(0, 97, (count, 24), generator=torch.Generator().manual_seed(1))
