"""The whole life of a mask on a small random model of each family, and what came of it: the table of the docs.

python tests/decoder_lives.py [family ...]      # writes docs/families.csv anew, or those lines of it
"""

import csv
import dataclasses
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from decoder_families import FAMILIES, make, windows
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import stoicc
from experiments.data.models import load_model
from experiments.embedded import MODEL
from experiments.eval.perplexity import perplexity
from patch.audit import audit
from patch.checkpoint import content_hash, load_masks, restore_checkpoint, save_checkpoint
from patch.errors import UserError
from patch.files import write_atomic
from patch.layers import check_coverage, coverage, prunable_matrices
from patch.learn.learner import Prior, learn
from patch.methods import published_recipe
from patch.oneshot import STRUCTURES, prune_model
from patch.positions import longest

TABLE = Path(__file__).parents[1] / "docs" / "families.csv"
STAGES = ("one-shot", "calibrated", "learning", "packing")
TILE = (16, 16)
SHARE = {"2:4": 0.5, "unstructured": 0.35, "hybrid": 0.35}


def life(family: str, folder: Path, stages: Sequence[str] = STAGES, structures: Sequence[str] = STRUCTURES) -> dict:
    """What came of each stage: ``yes``, or why not. What is done and is wrong is an AssertionError."""
    found = {"family": family, "left dense": _left(make(family))}
    yes = "with --partial" if found["left dense"] else "yes"
    lives: Mapping[str, Callable[[], object]] = {
        "one-shot": lambda: [one_shot(family, each, folder / each.replace(":", "")) for each in structures],
        "calibrated": lambda: [calibrated(family, method) for method in ("wanda", "sparsegpt")],
        "learning": lambda: learned(family, folder / "learned"),
        "packing": lambda: packed(family, folder / "hybrid", folder / "packed"),
    }
    for stage in stages:
        try:
            lives[stage]()
            found[stage] = yes
        except UserError as error:
            assert "\n" not in str(error)
            found[stage] = f"no: {_why(str(error))}"
    return found


def _left(model: PreTrainedModel) -> str:
    """The kinds of matrices that stay dense under ``--partial``, by the ends of their names."""
    kinds = {re.sub(r"\.\d+\b", "", name.removesuffix(".weight")).split(".")[-1] for name in coverage(model).left}
    return " ".join(sorted(kinds))


def _why(message: str) -> str:
    """A refusal without the layer and the class that it met first, and without numbers."""
    return re.sub(r"^(?:\w+\.)+\w+: |^\w+For\w+ | \(.*\)$|, such as \S+$", "", message)


@torch.no_grad()
def one_shot(family: str, structure: str, folder: Path) -> PreTrainedModel:
    """Prune, save, audit, load, evaluate, restore."""
    model = make(family)
    check_coverage(model, partial=True)
    layers = prune_model(model, "magnitude", structure, SHARE[structure], TILE, None, "cpu")
    masks = {name: layer.mask for name, layer in layers.items() if layer.mask is not None}
    zeros = {name: layer.zeros for name, layer in layers.items()}
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    save_checkpoint(folder, model, tokenizer, masks, {"structure": structure, "method": "magnitude", "zeros": zeros})
    rows = audit(folder)
    assert [row.layer for row in rows] == list(prunable_matrices(model))
    assert not any(row.violating for row in rows)
    dropped = sum(row.sparsity * row.shape[0] * row.shape[1] for row in rows)
    elements = sum(row.shape[0] * row.shape[1] for row in rows)
    assert abs(dropped - SHARE[structure] * elements) <= TILE[0] * TILE[1] / 2, dropped / elements
    loaded, _ = load_model(str(folder))
    assert torch.equal(loaded(windows()).logits, model(windows()).logits), "loaded logits differ"
    text = windows()[:, : longest(model.config)]
    for one in text:
        found = perplexity(loaded, one[None], "cpu", 1).mean_loss
        own = float(model(input_ids=one[None], labels=one[None]).loss)
        assert abs(found - own) < 1e-4 * own, (found, own)
    if masks:
        kept = folder.with_name("masks")
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        for name in ("hybrid.json", "hybrid.masks"):
            shutil.copyfile(folder / name, kept / name)
        restore_checkpoint(kept, make(family), tokenizer, folder.with_name(f"{folder.name}-restored"))
        assert content_hash(folder.with_name(f"{folder.name}-restored")) == content_hash(folder)
    return model


def calibrated(family: str, method: str) -> None:
    model = make(family)
    layers = prune_model(model, method, "2:4", 0.5, TILE, windows(), "cpu", batch=2)
    for name, matrix in prunable_matrices(model).items():
        mask = layers[name].mask
        assert mask is not None and not matrix.weight[~mask.keep()].any()


def learned(family: str, folder: Path) -> None:
    model = make(family)
    short = dataclasses.replace(published_recipe("patch-joint"), steps=5, batch=2, microbatch=2, length=16)

    def text(step: int) -> Tensor:
        return windows()[:2, :16]

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcome = learn(model, short, text, sparsity=0.35, tile=TILE, seed=0, device="cpu", prior=Prior(), work=folder)
    assert outcome.masks.keys() == prunable_matrices(model).keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "weights changed"


@torch.no_grad()
def packed(family: str, path: Path, folder: Path) -> None:
    """Pack the checkpoint in ``path``, save, load."""
    if not path.exists():
        one_shot(family, "hybrid", path)
    masked, tokenizer = load_model(str(path), dtype=torch.bfloat16)
    model, _ = load_model(str(path), dtype=torch.bfloat16)
    stoicc.compile_model(model, load_masks(path))
    stoicc.save_packed(folder, model, tokenizer)
    loaded, _ = load_model(str(folder), quantised=True)
    logits = loaded(windows()).logits
    # Falcon Mamba adds and subtracts a bias where weights are quantised.
    assert family == "falcon_mamba" or torch.equal(logits, model(windows()).logits), "loaded logits differ"
    torch.testing.assert_close(logits, masked(windows()).logits, rtol=0.02, atol=0.02)


def recorded() -> dict[str, dict[str, str]]:
    """The table of the docs, by family."""
    with open(TABLE, encoding="utf-8", newline="") as file:
        return {row["family"]: row for row in csv.DictReader(file)}


def write(rows: Iterable[Mapping[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["family", *STAGES, "left dense"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(TABLE, text.getvalue())


def main(families: Sequence[str]) -> None:
    known = recorded() if TABLE.exists() else {}
    for family in families or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            known[family] = life(family, Path(folder))
        print(known[family], flush=True)
    write(known[family] for family in FAMILIES if family in known)


if __name__ == "__main__":
    main(sys.argv[1:])
