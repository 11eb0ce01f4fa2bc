"""The model card of a checkpoint: what it is, what was measured of it, how it loads, and under which licence.

>>> text = card(folder, "me/llama-pruned", measured_of(folder, Path("runs")), "apache-2.0")
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.rows.load import load_rows, records
from experiments.data.models import EMBEDDED, REGISTRY, resolve
from patch.checkpoint import INFO_FILE, content_hash, load_info, load_masks
from patch.errors import UserError
from patch.files import existing, read_json
from patch.methods import label_of
from patch.structures import TILED
from stoicc.spec import METHOD

CARD = "README.md"
# What a packed checkpoint keeps of the masked one that it was made of.
KEPT = ("method", "structure", "precision", "target", "sparsity", "tile", "seed", "definition", "command", "provenance")
# Stages whose facts a reader of the card asks for, by their first word.
_STAGES = ("perplexity", "task", "packed", "speed")
_METRICS = ("perplexity", "packed_perplexity", "acc", "acc_norm", "exact_match", "word_perplexity", "speedup")


def origin(folder: Path) -> dict[str, Any]:
    """What is known of a checkpoint: of a masked one in its ``hybrid.json``, of a packed one of what it was made of.

    Raises:
        UserError: if it is neither, or says nothing of where it comes from.
    """
    if (folder / INFO_FILE).exists():
        info = load_info(folder)
        masks = load_masks(folder)
        tiles = sum(mask.dense.numel() for mask in masks.values())
        dense = sum(int(mask.dense.sum()) for mask in masks.values())
        kept = {name: info[name] for name in KEPT if name in info}
        return {**kept, "content": content_hash(folder), "dense_tiles": dense / tiles if tiles else None}
    about = read_json(existing(folder, "config.json")).get("quantization_config", {}).get("origin")
    if not isinstance(about, dict):
        raise UserError(f"{folder}: neither a hybrid checkpoint nor one that `hts pack` wrote: nothing is known of it")
    return about


def measured_of(folder: Path, results: Path) -> pd.DataFrame:
    """The rows of a results directory that were measured of a checkpoint; none if there is no such directory."""
    if not results.exists():
        return pd.DataFrame()
    rows = load_rows(results)
    own = rows[(rows.checkpoint == origin(folder)["content"]) & rows.metric.isin(_METRICS)]
    return own[own.stage.str.partition(":")[0].isin(_STAGES)]


def base_of(about: Mapping[str, Any]) -> str:
    """The dense model, by its hub id where it has one."""
    named = about.get("definition", {}).get("model", "unknown")
    return REGISTRY[named].source if named in REGISTRY else str(named)


def licence_of(base: str, offline: bool) -> str | None:
    """The licence that the dense model's card names; None where that cannot be had."""
    try:
        place = resolve(next((name for name, spec in REGISTRY.items() if spec.source == base), base))
    except UserError:
        return None
    if base == REGISTRY["embedded"].source:
        place = str(EMBEDDED)
    if isinstance(place, str) and (Path(place) / CARD).is_file():
        found = re.search(r"^license: *(\S+)", (Path(place) / CARD).read_text(encoding="utf-8"), re.MULTILINE)
        return found[1] if found else None
    if offline or "/" not in base:
        return None
    from huggingface_hub import HfApi

    try:
        about = HfApi().model_info(base).card_data
        return about.license if about else None
    # No network, a gated model, a card without one: it is asked for by name then.
    except Exception:
        return None


def card(folder: Path, repo: str, measured: pd.DataFrame, licence: str | None) -> str:
    """The card as Markdown, with the front matter that the hub reads."""
    about = origin(folder)
    base, definition = base_of(about), about.get("definition", {})
    config = read_json(folder / "config.json")
    packed = config.get("quantization_config", {}).get("quant_method") == METHOD
    sections = [
        _front_matter(base, licence, packed),
        f"# {repo.rpartition('/')[2]}",
        f"{base}, pruned by {label_of(str(about.get('method')))} to {100 * float(about.get('sparsity', 0)):.2f}% zeros "
        f"among the weights of its blocks ({about.get('structure')}). Made by "
        "Hybrid Tile Sparsity (`pip install hybrid-tile-sparsity`): each tile of a weight matrix is dense "
        "or 2:4 sparse.",
        _pairs(_facts(about, definition, base, config)),
        "## Measured",
        _measurements(measured),
        "## Load",
        _loading(repo, packed, about.get("structure") in TILED and "precision" not in about),
        "## Licence",
        f"That of the model it was made of, {base}: {licence or 'see its card'}.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(base: str, licence: str | None, packed: bool) -> str:
    lines = ["---", f"license: {licence or 'other'}"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    tags = ["hybrid-tile-sparsity", "2:4", "pruning", *(["stoicc"] if packed else [])]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]", "---"]
    return "\n".join(lines)


def _facts(
    about: Mapping[str, Any], definition: Mapping[str, Any], base: str, config: Mapping[str, Any]
) -> dict[str, str]:
    tile, seen, learning = about.get("tile"), definition.get("calibration"), definition.get("learning")
    kinds = {module["dtype"] for module in config.get("quantization_config", {}).get("modules", [])}
    dtype = str(config.get("dtype", config.get("torch_dtype", "unknown")))
    facts: dict[str, str] = {
        "Base model": base,
        "Method": label_of(str(about.get("method"))),
        "Structure": str(about.get("structure")),
        "Sparsity": f"{float(about.get('sparsity', 0)):.4f} (asked for: {about.get('target')})",
        "Tiles": f"{tile[0]}x{tile[1]}" if tile else "none",
        "Weights": f"{', '.join(sorted(kinds))}, packed; the rest {dtype}" if kinds else about.get("precision", dtype),
    }
    if about.get("dense_tiles") is not None:
        facts["Dense tiles"] = f"{100 * about['dense_tiles']:.1f}%"
    if seen:
        facts["Calibration"] = f"{seen['windows']} windows of {seen['length']} tokens of {seen['source']}"
    if learning:
        facts["Learned on"] = str(learning.get("text"))
    facts["Seed"] = str(about.get("seed"))
    if revision := about.get("provenance", {}).get("git"):
        dirty = about["provenance"].get("dirty")
        facts["Code"] = f"{revision}{', with uncommitted changes' if dirty else ''}"
    if command := about.get("command"):
        facts["Made by"] = f"`{command}`"
    facts["Content"] = f"`{about.get('content')}`"
    return facts


def _pairs(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def _measurements(measured: pd.DataFrame) -> str:
    if measured.empty:
        return "Nothing was measured of this checkpoint where the card was written."
    lines = ["| what | on | value | standard error | GPU |", "|---|---|---:|---:|---|"]
    for row in records(measured):
        if not row.labels.get("primary", True):
            continue
        if row.stage.startswith("task:"):
            on = row.task
        else:
            on = (
                f"{row.source}, windows of {row.length}" if isinstance(row.source, str) else row.stage.partition(":")[2]
            )
        error = f"{row.stderr:.4f}" if row.stderr == row.stderr and row.stderr is not None else ""
        limited = f" ({row.limit} items only)" if not pd.isna(row.limit) else ""
        lines.append(f"| {row.metric} | {on}{limited} | {row.value:.4f} | {error} | {row.gpu or ''} |")
    return "\n".join(lines)


def _loading(repo: str, packed: bool, tiled: bool) -> str:
    if packed:
        load = f'AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True)  # the code is the package\'s'
        return (
            "The weights are packed: `pip install hybrid-tile-sparsity`, and on a server beside vLLM.\n\n"
            f"```python\nfrom transformers import AutoModelForCausalLM\n\nmodel = {load}\n```\n\n"
            f"```console\nvllm serve {repo}\n```"
        )
    fast = (
        f"\n\nOn packed weights, with `pip install hybrid-tile-sparsity` beside vLLM:\n\n"
        f"```console\nvllm serve {repo} --quantization stoicc\n```"
    )
    return (
        "An ordinary checkpoint with zeros in its weights: transformers and every server load it.\n\n"
        f"```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo}")\n```{fast if tiled else ""}'
    )
