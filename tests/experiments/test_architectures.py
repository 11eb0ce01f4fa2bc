"""Every family of decoders through the life of a mask: pruned, saved, audited, evaluated, restored, learned, packed.

What comes of it is the table of the docs (`decoder_lives`): a family that works otherwise than it says fails here.
"""

from pathlib import Path

import pytest
from decoder_families import FAMILIES
from decoder_lives import STAGES, life, recorded

# One of each kind; the others are made of the same parts.
KINDS = (
    "llama",
    "gemma3",  # wrapped: other names on disk
    "gemma4_text",  # caps logits
    "gpt2",  # Conv1D, under `transformer.h`
    "gpt_neox",
    "bloom",
    "mpt",
    "opt",
    "falcon",  # multiplies by a transposed weight
    "mixtral",  # experts that are split on disk
    "gpt_oss",  # experts the other way round
    "llama4_text",  # experts that cannot be covered
    "falcon_h1",  # multiplies logits
    "jamba",
    "mamba",  # multiplies by a weight without calling its linear
    "recurrent_gemma",
    "rwkv",  # writes to its weights
)


@pytest.mark.parametrize("family", KINDS)
def test_a_kind_of_family_lives_as_the_docs_say(family: str, tmp_path: Path) -> None:
    stages = [stage for stage in STAGES if stage != "calibrated"]
    found = life(family, tmp_path, stages, ["hybrid"])
    assert found == {name: told for name, told in recorded()[family].items() if name in found}


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_lives_as_the_docs_say(family: str, tmp_path: Path) -> None:
    """In every structure, and calibrated; where this changes, `python tests/decoder_lives.py` writes the table anew."""
    assert life(family, tmp_path) == recorded()[family]


def test_every_family_has_a_place() -> None:
    assert list(recorded()) == list(FAMILIES) and set(KINDS) < set(FAMILIES)
