"""Packed models of few bits write what their simulation writes.

``HTS_GREEDY_MODEL`` names another model than the embedded one, on a GPU where there is one:

    HTS_GREEDY_MODEL=qwen2.5-coder-0.5b HTS_DATA=DIR python -m pytest -s tests/experiments/run/test_greedy.py
"""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stoicc
from experiments.data import models, text
from experiments.run.greedy import Agreement, agreement, continued
from experiments.run.packed import LOGIT_BOUND
from patch import simulate
from patch.layers import prunable_linears
from patch.oneshot import prune_model
from patch.oneshot.gptq import quantise_model
from patch.quantise.precisions import PRECISIONS
from patch.quantise.values import quantise_groups
from stoicc.format import SCALE_GROUP
from stoicc.linear import packed_modules

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODEL = os.environ.get("HTS_GREEDY_MODEL", "embedded")
DATA = Path(os.environ["HTS_DATA"]) if "HTS_DATA" in os.environ else None
PROMPTS, PROMPT, TOKENS = (16, 32, 64) if DEVICE == "cuda" else (16, 16, 3)


@pytest.fixture(scope="module")
def prompts() -> Tensor:
    _, tokenizer = models.load_model(MODEL, data=DATA)
    documents = text.load_documents("embedded/validation", None)
    return text.perplexity_windows(documents, tokenizer, PROMPT)[:PROMPTS].to(DEVICE)


def simulated(precision: str) -> tuple[Any, Any, dict[str, Any]]:
    """The model at 25% by magnitude, rounded, as it is evaluated, also in float32, and its masks."""
    model, _ = models.load_model(MODEL, dtype=torch.bfloat16, data=DATA)
    layers = prune_model(model, "magnitude", "hybrid", 0.25, (128, 128), None, DEVICE)
    masks = {name: layer.mask for name, layer in layers.items() if layer.mask is not None}
    about, kept = PRECISIONS[precision], {name: each.weight.detach() for name, each in prunable_linears(model).items()}
    if about.grouped:
        # Rounded to nearest, which takes seconds of any model.
        weights = {name: quantise_groups(weight, SCALE_GROUP) for name, weight in kept.items()}
    else:
        weights = quantise_model(model, about, None, DEVICE, masks).weights
    both = [copy.deepcopy(model).to(DEVICE, dtype) for dtype in (torch.bfloat16, torch.float32)]
    for each in both:
        simulate.install(each, weights, about)
    return *both, masks


@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_a_packed_model_writes_what_its_simulation_writes(precision: str, prompts: Tensor) -> None:
    unpacked, exact, masks = simulated(precision)
    packed = copy.deepcopy(unpacked)
    stoicc.compile_model(packed, masks)
    assert packed_modules(packed)
    found = agreement(packed, unpacked, exact, prompts, TOKENS, LOGIT_BOUND)
    print(f"{MODEL} {precision} on {DEVICE}: {found}")
    assert found.decided_same == found.decided > 0


class Counting(nn.Module):
    """Says that the token after ``t`` is ``t + 1``, by a lead of its own for each."""

    def __init__(self, leads: list[float]) -> None:
        super().__init__()
        self.leads = torch.tensor(leads)

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        logits = torch.zeros(*input_ids.shape, len(self.leads) + 1)
        logits.scatter_(2, (input_ids + 1)[..., None], self.leads[input_ids][..., None])
        return type("Out", (), {"logits": logits, "past_key_values": None})


def test_what_rounding_decides_is_not_counted() -> None:
    start = torch.tensor([[0]])
    assert continued(Counting([1.0] * 5), start, 4).tolist() == [[0, 1, 2, 3, 4]]
    # After 2 the unpacked model would say another, but in float32 not: after 0 and 1 it says the same, by much.
    unpacked, exact = Counting([5.0, 5.0, -0.1, 0.1, 5.0]), Counting([5.1, 5.1, 0.1, 0.2, 5.1])
    found = agreement(Counting([1.0] * 5), unpacked, exact, start, 4, 1.0)
    assert found == Agreement(4, 3, 2, 2)
    assert found.shares() == {"greedy_agreement": 1.0, "greedy_same": 0.75, "greedy_decided": 0.5}
    # Of no token is nothing said.
    assert Agreement(4, 3, 0, 0).shares() == {"greedy_same": 0.75, "greedy_decided": 0.0}
    other = Counting([1.0, -1.0, 1.0, 1.0, 1.0])
    assert agreement(other, unpacked, exact, start, 2, 1.0) == Agreement(2, 1, 2, 1)
