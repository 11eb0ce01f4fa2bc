"""Models by name: what a name stands for, where that comes from, and what tells one version of it from another.

A model is named by a name of the `REGISTRY`, by the path of a model directory, or by a Hugging Face hub id
``organisation/name``, looked up in this order. Nothing is loaded here, so definitions of experiments need no torch.

    >>> REGISTRY["llama-3.2-1b"].linear_shapes()["k_proj"]
    (512, 2048)
"""

import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.data import qwen_coder, smollm2
from experiments.data.packaged import Packaged
from experiments.embedded import MODEL as EMBEDDED
from patch.errors import UserError, check_name
from patch.files import check_inside, sha256

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# All that decides what a model computes: configuration, weights, tokenizer. Not its card or its training log.
_CONTENT = ("*.json", "*.safetensors", "*.bin", "*.model", "merges.txt", "*.jinja")

# Of images, videos and sound, and of all together; and its chat template where that is no tokenizer's.
PROCESSORS = ("*processor_config.json", "chat_template.json")


@dataclass(frozen=True)
class ModelSpec:
    """A model of the registry: where it comes from, and the shape of its decoder.

    Attributes:
        name: what it is called here.
        source: hub id, or what the model comes from if it is not on the hub.
        dtype: of the published weights, by torch's name.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        blocks: decoder blocks.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head; ``heads * head_dim`` need not be ``hidden``.
        vocab: rows of the embedding.
        parameters: published count, tied embeddings once.
    """

    name: str
    source: str
    dtype: str
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    parameters: int

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """``(N, K)``, out by in features, of each kind of prunable ``Linear``; every block has one of each."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }


_SPECS = (
    ModelSpec("embedded", "experiments.embedded", "bfloat16", 256, 768, 4, 4, 2, 64, 4096, 4_196_608),
    ModelSpec("smollm2-135m", smollm2.PACKAGE, "bfloat16", 576, 1536, 30, 9, 3, 64, 49152, 134_515_008),
    ModelSpec("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", "bfloat16", 896, 4864, 24, 14, 2, 64, 151936, 494_032_768),
    ModelSpec(
        "qwen2.5-coder-0.5b", qwen_coder.package("qwen2.5-coder-0.5b").source, "bfloat16",
        896, 4864, 24, 14, 2, 64, 151936, 494_032_768,
    ),
    ModelSpec(
        "qwen2.5-coder-1.5b", qwen_coder.package("qwen2.5-coder-1.5b").source, "bfloat16",
        1536, 8960, 28, 12, 2, 128, 151936, 1_543_714_304,
    ),
    ModelSpec("llama-3.2-1b", "meta-llama/Llama-3.2-1B", "bfloat16", 2048, 8192, 16, 32, 8, 64, 128256, 1_235_814_400),
    ModelSpec("gemma-3-1b", "google/gemma-3-1b-pt", "bfloat16", 1152, 6912, 26, 4, 1, 256, 262144, 999_885_952),
    ModelSpec("llama-2-7b", "meta-llama/Llama-2-7b-hf", "float16", 4096, 11008, 32, 32, 32, 128, 32000, 6_738_415_616),
    ModelSpec(
        "llama-3.1-8b", "meta-llama/Llama-3.1-8B", "bfloat16", 4096, 14336, 32, 32, 8, 128, 128256, 8_030_261_248
    ),
)  # fmt: skip
REGISTRY = {spec.name: spec for spec in _SPECS}
BY_SOURCE = {spec.source: spec for spec in _SPECS}

# The models of the registry that are not on the hub: where their directory is, given the data directory.
_LOCAL: dict[str, Callable[[Path | None], Path]] = {
    "embedded": lambda data: EMBEDDED,
    "smollm2-135m": smollm2.converted,
    **{name: functools.partial(qwen_coder.converted, name) for name in qwen_coder.NAMES},
}
# Of those that are converted, what tells one version from another without having it.
PINNED: dict[str, Callable[[], Packaged]] = {
    "smollm2-135m": smollm2.package,
    **{name: functools.partial(qwen_coder.package, name) for name in qwen_coder.NAMES},
}


def resolve(name: str) -> ModelSpec | str:
    """What ``name`` means: an entry of the registry, the path of a model directory, or a hub id.

    Only looks, without a network: a hub id is taken at its word.

    Raises:
        UserError: if it is none of them; for an unknown name the nearest ones are suggested.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    path = Path(name).expanduser()
    if path.is_dir():
        check_directory(path)
        return str(path)
    if path.exists():
        raise UserError(f"{name}: is a file, not a model: name the directory of one, with its config.json")
    if _HUB_ID.fullmatch(name) and name[0] not in "./~":
        return name
    if "/" in name:
        raise UserError(f"{name}: no such model directory")
    return REGISTRY[check_name("model or directory", name, REGISTRY)]


def check_directory(path: Path) -> None:
    """Raise if a directory is not one of a model, or a file of it that goes with every checkpoint is of elsewhere.

    Raises:
        UserError: naming the folder of models in it, if there is one, as a results directory has; or the file.
    """
    if not (path / "config.json").is_file():
        model = next((file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/config.json")), None)
        hint = f": name one of those in {model.parent}" if model else ""
        raise UserError(f"{path}: not a model directory, it has no config.json{hint}")
    for file in processors_in(path):
        check_inside(file, path)


def fingerprint(name: str) -> str:
    """What tells one version of a model from another: it changes when the files change that ``name`` stands for.

    Returns:
        Of a model on the hub its commit (that of the local cache if there is no network), of one that is converted the
        SHA-256 of the published file and the version of its conversion, of any other the SHA-256 of its files.

    Raises:
        UserError: if the model cannot be had.
    """
    if name in PINNED:
        return PINNED[name]().fingerprint
    source = Path(directory_or_hub_id(name, None))
    if not source.is_dir():
        return newest_commit(str(source))
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _CONTENT for file in source.glob(pattern)}):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def hub_commit(name: str) -> str | None:
    """The commit of a model that is loaded from the hub; None of any other, whose files a trial or a name pins.

    Raises:
        UserError: if the hub has no such model, or cannot be reached and the cache has none.
    """
    found = resolve(name)
    if isinstance(found, ModelSpec):
        return None if found.name in _LOCAL else newest_commit(found.source)
    return None if Path(found).is_dir() else newest_commit(found)


def local_revision(name: str) -> str | None:
    """`fingerprint` of a model whose files are on this machine, None of one that a name and its source pin."""
    found = resolve(name)
    local = found == name and Path(name).is_dir()
    return fingerprint(name) if local or name == "embedded" else None


def directory_or_hub_id(name: str, data: Path | None) -> str:
    found = resolve(name)
    if isinstance(found, str):
        return found
    return str(_LOCAL[found.name](data)) if found.name in _LOCAL else found.source


def processors_in(folder: Path) -> list[Path]:
    return sorted({file for pattern in PROCESSORS for file in folder.glob(pattern)})


def newest_commit(repository: str) -> str:
    """The commit of a hub model, by fetching its configuration (or finding it in the cache)."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(repository, "config.json")).parent.name
    except GatedRepoError as error:
        page = f"https://huggingface.co/{repository}"
        problem = f"is gated: accept its licence at {page}, then `hf auth login`; or give the path of a copy"
        raise UserError(f"{repository} {problem}") from error
    except RepositoryNotFoundError as error:
        problem = "no such directory here, and no such model on the hub (a private one needs `hf auth login`)"
        raise UserError(f"{repository}: {problem}") from error
    except RemoteEntryNotFoundError as error:
        raise UserError(f"{repository} has no config.json on the hub: not a transformers model") from error
    except LocalEntryNotFoundError as error:
        problem = "the Hugging Face hub cannot be reached, and it is not in its cache: give the path of a copy"
        raise UserError(f"{repository}: no such directory here, {problem}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{repository}: cannot be fetched from the hub: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
