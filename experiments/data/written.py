"""Text that a model wrote itself, to learn from its predictions on, for which nothing but the model is needed.

    python -m experiments.data.written --model smollm2-135m --out data/train/written.jsonl --texts 4096 --device cuda

A mask that learns from a dense model's predictions learns them where the text leads it: a mask of SmolLM2 that was
learned on novels is near the dense model there, and two to three times as far from it in an encyclopedia. What the
model writes is of all that it knows (as quantisation-aware training does it: Liu et al., LLM-QAT, arXiv:2305.17888).

Each text begins with a random token of the vocabulary and goes on by sampling from the model's whole distribution. The
text source ``written`` is such a file in a data directory; which model wrote it, its rows do not say, but their digest
of it tells one from another. Another kind of device, or another number of texts side by side, writes other texts from
the same seed.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.data import models
from patch.errors import UserError
from patch.files import replacing


def written(model: Any, first: Tensor, length: int, at_once: int) -> Iterator[Tensor]:
    """Texts of ``length`` tokens, int64 ``[1..at_once, length]`` at a time, sampled with torch's own generator.

    What a model's directory says of how to generate, such as a penalty of repetition, is left out: it changes the
    distribution.

    Args:
        model: a transformers causal language model on its device; it is left without a configuration of generation.
        first: what each begins with, int64 ``[texts]``.
    """
    from transformers import GenerationConfig

    device, model.generation_config = model.get_input_embeddings().weight.device, GenerationConfig()
    for part in first.split(at_once):
        with torch.no_grad():
            yield model.generate(
                part[:, None].to(device),
                attention_mask=torch.ones_like(part[:, None], device=device),
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                eos_token_id=None,
                pad_token_id=0,
            ).cpu()


def write(
    name: str, out: Path, texts: int, length: int, seed: int, device: str, at_once: int, data: Path | None
) -> None:
    """Let a model write texts, one a line of ``out``.

    Raises:
        UserError: if the model cannot be had, or there is nothing to write.
    """
    if texts < 1 or length < 2:
        raise UserError(f"{texts} texts of {length} tokens: ask for one or more of two or more")
    model, tokenizer = models.load_model(name, device=device, data=data)
    plain = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    torch.manual_seed(seed)
    first = plain[torch.randint(len(plain), (texts,))]
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for part in written(model, first, length, at_once):
            file.writelines(json.dumps({"text": text}) + "\n" for text in tokenizer.batch_decode(part))


def main() -> None:
    """Let a model write the text that masks of it are learned on."""
    parser = argparse.ArgumentParser(prog="python -m experiments.data.written", description=main.__doc__)
    parser.add_argument("--model", required=True, help="a name of the registry, a directory, or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .jsonl")
    parser.add_argument("--texts", type=int, default=4096, help="how many")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at-once", type=int, default=512, help="texts written side by side")
    parser.add_argument("--data", type=Path, help="data directory, for a model that is converted")
    given = parser.parse_args()
    try:
        write(given.model, given.out, given.texts, given.length, given.seed, given.device, given.at_once, given.data)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
