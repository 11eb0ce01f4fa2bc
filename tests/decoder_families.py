"""Small random models of every family of decoders, for tests of what is prunable in them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 97
POSITIONS = 64
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
    # Of some the default is no word of so small a vocabulary.
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Kernels that are compiled for a GPU.
    "use_mamba_kernels": False,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8}
_DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "image_size": 8,
    "patch_size": 4,
}
_GEMMA4 = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}

# What a family's configuration has beside `SIZES`, by the family's name in transformers.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    # Linears alone.
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bloom": {},
    "codegen": {"n_ctx": POSITIONS, "rotary_dim": 8, "n_head": 4},
    "cohere": {},
    "cohere2": {},
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3": {"text_config": {"model_type": "gemma3_text", **SIZES}, "vision_config": _VISION},
    "gemma3n_text": {"hidden_size_per_layer_input": 16, "laurel_rank": 16, "num_kv_shared_layers": 0},
    "gemma4_text": _GEMMA4,
    "gemma4": {
        "text_config": {"model_type": "gemma4_text", **SIZES, **_GEMMA4},
        "vision_config": _VISION,
        "audio_config": None,
    },
    "glm": {},
    "glm4": {},
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "llama": {},
    "mistral": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {"ffn_dim": 64},
    # Conv1D.
    "gpt2": {},
    # Mixtures of experts.
    "deepseek_v2": {**_LATENT, **_EXPERTS},
    "deepseek_v3": {**_LATENT, **_EXPERTS},
    "ernie4_5_moe": {"moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_intermediate_size": 48},
    "glm4_moe": {**_LATENT, **_EXPERTS},
    "gpt_oss": _EXPERTS,
    "granitemoe": _EXPERTS,
    "jetmoe": {**_EXPERTS, "kv_channels": 16},
    "llama4_text": {**_EXPERTS, "intermediate_size_mlp": 64},
    "mixtral": _EXPERTS,
    "olmoe": _EXPERTS,
    "phimoe": _EXPERTS,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_moe": _EXPERTS,
    # State spaces and other recurrences, alone or beside attention.
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "lm_head_multiplier": 0.5},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 16},
    "granitemoehybrid": {
        **_MAMBA,
        **_EXPERTS,
        "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention"],
    },
    "jamba": {
        **_EXPERTS,
        "mamba_d_state": 8,
        "mamba_dt_rank": 16,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_offset": 0,
    },
    "lfm2": {"block_multiple_of": 16, "layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8, "time_step_rank": 16},
    "mamba2": {"num_heads": 4, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "nemotron_h": {
        **_EXPERTS,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 48,
    },
    "qwen3_5_text": _DELTA,
    "qwen3_next": {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 48},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 32, "block_types": ["recurrent", "attention"]},
    "rwkv": {"rescale_every": 1},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "chunk_size": 8,
        "adapter_rank": 16,
    },
}


def config(family: str, **changes: Any) -> PretrainedConfig:
    """A small configuration of a family; of `SIZES` it has what it knows, under its own names."""
    kind = CONFIG_MAPPING[family]
    fields = {field.name for field in dataclasses.fields(kind)}
    own = {kind.attribute_map.get(name, name): value for name, value in SIZES.items()}
    found: PretrainedConfig = kind(
        **{name: value for name, value in own.items() if name in fields} | dict(FAMILIES[family]) | changes
    )
    return found


def make(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family, **changes)).eval()
    for parameter in model.parameters():
        # Routers of zeros would send all tokens to the same experts.
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def windows(count: int = 6) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, 24), generator=torch.Generator().manual_seed(1))
