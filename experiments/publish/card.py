"""The model card of a checkpoint: what it is, what was measured of it, how it loads, and under which licence.

>>> about = origin(folder)
>>> text = card(folder, about, "me/llama-pruned", measured_of(about["content"], Path("runs")), "apache-2.0")
"""

import html
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.rows.load import load_rows, records
from experiments.data.registry import EMBEDDED, REGISTRY, resolve
from experiments.eval import humaneval
from experiments.run.origin import definition_of, dense_model, steps_of
from patch import install
from patch.checkpoint import INFO_FILE, content_hash, load_info, load_masks
from patch.errors import UserError, one_line
from patch.files import existing, read_json
from patch.learn.recipe import HOW_IT_RUNS
from patch.methods import label_of
from patch.quantise.precisions import PRECISIONS, Precision
from patch.structures import TILED
from stoicc.quantizer import check_config, check_files
from stoicc.spec import CODE_FILE, METHOD

CARD = "README.md"
# What a packed checkpoint keeps of the masked one that it was made of.
KEPT = (
    *("method", "structure", "precision", "target", "sparsity", "tile", "seed"),
    *("definition", "recovered_from", "imported", "made_from", "command", "provenance"),
)
# Stages whose facts a reader of the card asks for, by their first word.
_STAGES = ("perplexity", "task", "packed", "speed")
_METRICS = (
    *("perplexity", "packed_perplexity", "acc", "acc_norm", "exact_match", "word_perplexity", "speedup"),
    humaneval.METRIC,
)
# Of these the unpacked model was measured, in the dtype of the checkpoint.
_UNPACKED = ("perplexity", "task")
# What the zeros of a structure are.
_ZEROS = {
    "hybrid": "each tile of a weight matrix is dense or 2:4 sparse",
    "2:4": "of every four neighbouring weights of a row two at most are kept",
    "unstructured": "the zeros may lie anywhere in a weight matrix",
}
# What Markdown, or a table of it, would read as its own.
_SPECIAL = str.maketrans({sign: f"&#{ord(sign)};" for sign in "|`*[]\\"})
_LOCAL_PATH = re.compile(r"(/|~|\.{1,2}/)")


def origin(folder: Path) -> dict[str, Any]:
    """What is known of a checkpoint: of a masked one in its ``hybrid.json``, of a packed one of what it was made of.

    ``dtype`` is that of the masked checkpoint's weights, ``packed`` that of the packed ones; ``content`` always is the
    content hash of the masked one.

    Raises:
        UserError: if it is neither, or says nothing of where it comes from.
    """
    if (folder / INFO_FILE).exists():
        info = load_info(folder)
        masks = load_masks(folder)
        tiles = sum(mask.dense.numel() for mask in masks.values())
        dense = sum(int(mask.dense.sum()) for mask in masks.values())
        kept = {name: info[name] for name in KEPT if name in info}
        return {
            **kept,
            "dtype": _weights_dtype(folder, PRECISIONS.get(info.get("precision", ""))),
            "content": content_hash(folder),
            "dense_tiles": dense / tiles if tiles else None,
        }
    packing = read_json(existing(folder, "config.json")).get("quantization_config", {})
    about = packing.get("origin")
    if not isinstance(about, dict):
        raise UserError(f"{folder}: neither a hybrid checkpoint nor one that `hts pack` wrote: nothing is known of it")
    # Those of before do not say it there.
    return {"packed": ", ".join(sorted({module["dtype"] for module in packing.get("modules", [])}))} | about


@contextmanager
def said_by(folder: Path) -> Iterator[None]:
    """What a checkpoint says of itself may be anything: where it cannot be read, the error names the checkpoint.

    Raises:
        UserError: if it is of another kind than what is saved.
    """
    try:
        yield
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: what it says of itself cannot be read ({one_line(error)}): damaged?") from error


def check_whole(folder: Path) -> None:
    """Raise if a file of a checkpoint is another than was saved; about a second per GiB.

    Raises:
        UserError: naming the file.
    """
    if (folder / INFO_FILE).exists():
        load_info(folder, verify=True)
    elif "files" in check_config(folder):
        check_files(folder, [file.name for file in folder.glob("*.safetensors")])


def _weights_dtype(folder: Path, precision: Precision | None) -> str:
    """As packed weights name it: values of 4 bits, which are held in 8, by their precision."""
    if precision is None:
        return _dtype_of(read_json(existing(folder, "config.json")))
    return precision.name if precision.grouped else precision.dtype


def _dtype_of(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype", config.get("torch_dtype", "unknown")))


def public(value: Any) -> Any:
    """JSON data without the folders of this machine: of a path from the root, from home or from ``.`` its last name."""
    if isinstance(value, dict):
        return {public(name): public(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [public(part) for part in value]
    return Path(value).name or value if isinstance(value, str) and _LOCAL_PATH.match(value) else value


def public_origin(about: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a checkpoint, as it may be published: see `public`."""
    shown: dict[str, Any] = public(dict(about)) | {"base": public(base_of(about))}
    if command := about.get("command"):
        words = (re.split("([=,])", word) for word in shlex.split(command))
        shown["command"] = shlex.join("".join(public(part) for part in word) for word in words)
    if before := about.get("made_from"):
        shown["made_from"] = public_origin(before)
    return shown


def measured_of(content: str, results: Path) -> pd.DataFrame:
    """What a results directory holds of the checkpoint of a content hash; nothing if there is no such directory."""
    if not results.exists():
        return pd.DataFrame()
    rows = load_rows(results)
    own = rows[(rows.checkpoint == content) & rows.metric.isin(_METRICS)]
    return own if own.empty else own[own.stage.str.partition(":")[0].isin(_STAGES)]


def base_of(about: Mapping[str, Any]) -> str:
    """The dense model, by its hub id where it has one."""
    if "base" in about:
        return str(about["base"])
    named = dense_model(about) or "unknown"
    return REGISTRY[named].source if named in REGISTRY else named


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
        return found[1].strip("\"'") if found else None
    if offline or "/" not in base:
        return None
    from huggingface_hub import HfApi

    try:
        about = HfApi().model_info(base).card_data
        return about.license if about else None
    # No network, a gated model, a card without one: it is asked for by name then.
    except Exception:
        return None


def card(folder: Path, about: Mapping[str, Any], repo: str, measured: pd.DataFrame, licence: str | None) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    Args:
        about: the checkpoint's `origin`, which takes about a second per GiB.
    """
    about = public_origin(about)
    base, definition = base_of(about), definition_of(about)
    config = read_json(folder / "config.json")
    packed = config.get("quantization_config", {}).get("quant_method") == METHOD
    sections = [
        _front_matter(base, licence, about, packed),
        f"# {_escaped(repo.rpartition('/')[2])}",
        _summary(about, base),
        _pairs(_facts(about, definition, base, config)),
        *(_measured_of_packed(measured, about) if packed else ("## Measured", _measurements(measured))),
        "## Load",
        _packed_loading(repo) if packed else _loading(repo, about),
        "## Licence",
        f"That of the model it was made of, {_escaped(base)}: {_escaped(licence or 'see its card')}.",
    ]
    return "\n\n".join(sections) + "\n"


def _escaped(value: object) -> str:
    """Any text as one line of Markdown that shows it as it is, in a cell of a table too."""
    return html.escape(" ".join(str(value).split()), quote=False).translate(_SPECIAL)


def _front_matter(base: str, licence: str | None, about: Mapping[str, Any], packed: bool) -> str:
    # Every value as JSON, which is YAML too: 2:4 would be a number, and a newline would begin another key.
    lines = ["---", f"license: {json.dumps(licence or 'other')}"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: quantized"]
    tags = ["hybrid-tile-sparsity", *(["2:4"] if about.get("structure") in TILED else [])]
    tags += [*(["pruning"] if about.get("structure") != "dense" else []), *(["stoicc"] if packed else [])]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", f"tags: {json.dumps(tags)}", "---"]
    return "\n".join(lines)


def _summary(about: Mapping[str, Any], base: str) -> str:
    structure, share = about.get("structure"), f"{100 * float(about.get('sparsity', 0)):.2f}%"
    method, precision = label_of(str(about.get("method"))), PRECISIONS.get(about.get("precision", ""))
    if structure == "dense":
        done = "not pruned"
    elif structure == "shallow":
        done = f"without some of its blocks, {share} of their weights (chosen by {_escaped(method)})"
    else:
        kind = f"{_escaped(structure)}{f': {_ZEROS[structure]}' if structure in _ZEROS else ''}"
        done = f"pruned by {_escaped(method)} to {share} zeros among the weights of its blocks ({kind})"
    trained = " The weights that were kept were then trained towards the dense model." if _recovery(about) else ""
    quantised = f" The weights of its blocks are quantised to {precision.label}." if precision else ""
    made = "Made by Hybrid Tile Sparsity."
    return f"{_escaped(base)}, {done}.{trained}{quantised} {made}"


def _recovery(about: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe, text and tokens of a checkpoint whose kept weights were trained; {} of others."""
    trained, came = definition_of(about).get("recovery") or {}, _recovered_from(about)
    recipe = trained.get("recipe") or came.get("recipe")
    found = {"recipe": recipe, "text": trained.get("source"), "tokens": came.get("tokens")}
    return {name: value for name, value in found.items() if value is not None}


def _recovered_from(about: Mapping[str, Any]) -> dict[str, Any]:
    return next((step["recovered_from"] for step in steps_of(about) if step.get("recovered_from")), {})


def _facts(
    about: Mapping[str, Any], definition: Mapping[str, Any], base: str, config: Mapping[str, Any]
) -> dict[str, str]:
    tile, learning = about.get("tile"), definition.get("learning")
    texts = {"Calibration": definition, "Rounded on": definition.get("quantisation") or {}}
    kinds, dtype, recovery = about.get("packed"), _dtype_of(config), _recovery(about)
    facts: dict[str, str] = {
        "Base model": base,
        "Method": label_of(str(about.get("method"))),
        "Structure": str(about.get("structure")),
        "Sparsity": f"{float(about.get('sparsity', 0)):.4f} (asked for: {about.get('target')})",
        "Tiles": f"{tile[0]}x{tile[1]}" if tile else "none",
        "Weights": f"{kinds}, packed; the rest {dtype}" if kinds else about.get("precision", dtype),
    }
    if about.get("dense_tiles") is not None:
        facts["Dense tiles"] = f"{100 * about['dense_tiles']:.1f}%"
    for what, step in texts.items():
        if seen := step.get("calibration"):
            facts[what] = f"{seen['windows']} windows of {seen['length']} tokens of {seen['source']}"
    if learning:
        facts["Learned on"] = str(learning.get("source"))
    if recipe := recovery.get("recipe"):
        told = ", ".join(f"{name} {value}" for name, value in recipe.items() if name not in HOW_IT_RUNS)
        facts["Recovery, which trained the kept weights"] = told
    if "text" in recovery:
        facts["Recovered on"] = str(recovery["text"])
    if "tokens" in recovery:
        facts["Tokens of recovery"] = f"{recovery['tokens']:,}"
    if came := _recovered_from(about):
        facts["Recovered from"] = f"{came.get('path')}, content {came.get('checkpoint')}"
    facts["Seed"] = str(about.get("seed"))
    if revision := about.get("provenance", {}).get("git"):
        dirty = about["provenance"].get("dirty")
        facts["Code"] = f"{revision}{', with uncommitted changes' if dirty else ''}"
    if commands := [step["command"] for step in steps_of(about) if step.get("command")]:
        facts["Made by"] = " && ".join(commands)
    facts["Content, before packing" if kinds else "Content"] = str(about.get("content"))
    return facts


def _pairs(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_escaped(value)} |" for name, value in facts.items())])


def _measured_of_packed(measured: pd.DataFrame, about: Mapping[str, Any]) -> list[str]:
    """The rows that hold of the packed weights, and, under a heading of their own, those of what they were made of."""
    if measured.empty:
        return ["## Measured", _measurements(measured)]
    held, packed = about.get("dtype", "unknown"), about.get("packed")
    # Rows of packed weights say what they were packed as: of few bits, their values are those of the checkpoint.
    kinds = measured.labels.map(lambda labels: held if about.get("precision") else labels.get("dtype", held))
    same, unpacked = kinds == packed, measured.stage.str.partition(":")[0].isin(_UNPACKED)
    sections = ["## Measured", _measurements(measured[same])]
    if len(others := measured[~same & unpacked]):
        sections += [
            "## Measured of the unpacked checkpoint that it was made of",
            f"Not of these weights, which are {_escaped(packed)}: those were {_escaped(held)}.",
            _measurements(others),
        ]
    return sections


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
        on, gpu = _escaped(public(on)), _escaped(row.gpu or "")
        lines.append(f"| {_escaped(row.metric)} | {on}{limited} | {row.value:.4f} | {error} | {gpu} |")
    return "\n".join(lines)


def _packed_loading(repo: str) -> str:
    return (
        f"The weights are packed, and need `{install.PACKAGE}`, on a server beside vLLM: {install.how()}.\n\n"
        "```python\nimport stoicc  # reads packed weights\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(repo)})\n```\n\n"
        f"```console\nvllm serve {repo}\n```\n\n"
        "`trust_remote_code=True` is not needed then. It would run whatever the repository's file "
        f"`{CODE_FILE}` holds: use it only if you trust the repository, and pin `revision` to a commit that you know."
    )


def _loading(repo: str, about: Mapping[str, Any]) -> str:
    structure = about.get("structure")
    if "precision" in about:
        what = (
            "Its weights are quantised in the format of compressed-tensors: transformers needs that package "
            "(`pip install compressed-tensors`), vLLM loads it as it is."
        )
    elif structure == "shallow":
        what = "An ordinary checkpoint of fewer blocks: transformers and every server load it."
    elif structure == "dense":
        what = "An ordinary checkpoint: transformers and every server load it."
    else:
        what = "An ordinary checkpoint with zeros in its weights: transformers and every server load it."
    fast = (
        f"\n\nOn packed weights, with `{install.PACKAGE}` beside vLLM ({install.how('vllm')}):\n\n"
        f"```console\nvllm serve {repo} --quantization stoicc\n```"
    )
    return (
        f"{what}\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(repo)})\n```"
        f"{fast if structure in TILED and 'precision' not in about else ''}"
    )
