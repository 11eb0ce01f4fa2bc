"""Every family of decoders through the whole life of a mask: pruned, saved, audited, loaded, learned, packed."""

import dataclasses
from pathlib import Path

import pytest
import torch
from decoder_families import FAMILIES, WHOLE, make, windows
from transformers import AutoModelForCausalLM

import stoicc
from patch.audit import audit
from patch.checkpoint import load_masks, save_checkpoint
from patch.errors import UserError
from patch.layers import prunable_linears, prunable_matrices
from patch.learn.learner import Prior, learn
from patch.methods import published_recipe
from patch.oneshot import prune_model

TILE = (16, 16)


def pruned(family: str, structure: str, out: Path) -> torch.nn.Module:
    model = make(family)
    sparsity = 0.5 if structure == "2:4" else 0.35
    layers = prune_model(model, "magnitude", structure, sparsity, TILE, None, "cpu")
    masks = {name: layer.mask for name, layer in layers.items() if layer.mask is not None}
    zeros = {name: layer.zeros for name, layer in layers.items()}
    save_checkpoint(out, model, None, masks, {"structure": structure, "method": "magnitude", "zeros": zeros})
    return model


@pytest.mark.parametrize(
    "structure", ["hybrid", *(pytest.param(each, marks=pytest.mark.thorough) for each in ("2:4", "unstructured"))]
)
@pytest.mark.parametrize("family", WHOLE)
def test_a_checkpoint_is_audited_and_loads_as_it_was(family: str, structure: str, tmp_path: Path) -> None:
    """Also where names on disk are not those in memory, as of Mixtral's experts."""
    model = pruned(family, structure, tmp_path / "out")
    rows = audit(tmp_path / "out")
    assert [row.layer for row in rows] == list(prunable_matrices(model))
    assert not any(row.violating for row in rows)
    zeros = sum(row.sparsity * row.shape[0] * row.shape[1] for row in rows)
    target = 0.5 if structure == "2:4" else 0.35
    assert zeros / sum(row.shape[0] * row.shape[1] for row in rows) == pytest.approx(target, abs=0.01)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(windows()).logits, model(windows()).logits)


@pytest.mark.parametrize("family", WHOLE)
def test_it_is_learned_or_refused_in_one_line(family: str, tmp_path: Path) -> None:
    model = make(family)
    short = dataclasses.replace(published_recipe("patch-joint"), steps=5, batch=2, microbatch=2, length=16)

    def run() -> dict[str, object]:
        return dict(
            learn(
                model,
                short,
                lambda _: windows()[:2, :16],
                sparsity=0.35,
                tile=TILE,
                seed=0,
                device="cpu",
                prior=Prior(),
                work=tmp_path,
            ).masks
        )

    if prunable_linears(model).keys() == prunable_matrices(model).keys():
        assert run().keys() == prunable_linears(model).keys()
    else:
        with pytest.raises(UserError, match="learning covers Linear weights alone"):
            run()


@pytest.mark.parametrize("family", WHOLE)
@torch.no_grad()
def test_it_is_packed_and_reloaded_or_refused_in_one_line(family: str, tmp_path: Path) -> None:
    masked = pruned(family, "hybrid", tmp_path / "out").to(torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    masks = load_masks(tmp_path / "out")
    if prunable_linears(model).keys() != prunable_matrices(model).keys():
        with pytest.raises(UserError):
            stoicc.compile_model(model, masks)
        return
    stoicc.compile_model(model, masks)
    stoicc.save_packed(tmp_path / "packed", model, None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    logits = loaded(windows()).logits
    assert torch.equal(logits, model(windows()).logits)
    torch.testing.assert_close(logits, masked(windows()).logits, rtol=0.02, atol=0.02)


def test_every_family_has_a_place() -> None:
    assert set(WHOLE) < set(FAMILIES)
