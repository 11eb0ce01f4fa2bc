"""Models by name: the registry, with the shapes that benchmarks use, and loading from the hub, a path, or this package.

A model is named by a name of the `REGISTRY`, by the path of a model directory, or by a Hugging Face hub id
``organisation/name``, looked up in this order.

    >>> REGISTRY["llama-3.2-1b"].linear_shapes()["k_proj"]
    (512, 2048)
    >>> model, tokenizer = load_model("embedded", device="cuda")
"""

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.data import qwen_coder, smollm2
from experiments.data.packaged import Packaged
from experiments.embedded import MODEL as EMBEDDED
from patch.checkpoint import INFO_FILE, content_hash, load_info
from patch.compressed import precision_of
from patch.errors import UserError, check_name
from patch.files import check_inside, sha256
from patch.positions import longest
from patch.simulate import load_quantised
from patch.weights import prunable_shapes, quantisation

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# All that decides what a model computes: configuration, weights, tokenizer. Not its card or its training log.
_CONTENT = ("*.json", "*.safetensors", "*.bin", "*.model", "merges.txt", "*.jinja")

# Of images, videos and sound, and of all together; and its chat template where that is no tokenizer's.
_PROCESSORS = ("*processor_config.json", "chat_template.json")


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
_PINNED: dict[str, Callable[[], Packaged]] = {
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
    if _HUB_ID.fullmatch(name) and name[0] not in "./~":
        return name
    if "/" in name:
        raise UserError(f"{name}: no such model directory")
    return REGISTRY[check_name("model", name, REGISTRY)]


def check_directory(path: Path) -> None:
    """Raise if a directory is not one of a model, or a file of it that goes with every checkpoint is of elsewhere.

    Raises:
        UserError: naming the folder of models in it, if there is one, as a results directory has; or the file.
    """
    if not (path / "config.json").is_file():
        model = next((file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/config.json")), None)
        hint = f": name one of those in {model.parent}" if model else ""
        raise UserError(f"{path}: not a model directory, it has no config.json{hint}")
    for file in _processors_in(path):
        check_inside(file, path)


def load_model(
    name: str,
    *,
    device: str = "cpu",
    dtype: "torch.dtype | None" = None,
    data: Path | None = None,
    quantised: bool = False,
    commit: str | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A causal language model and its tokenizer, ready to be pruned or evaluated: eval mode, weights frozen.

    Args:
        name: of the registry, a path, or a hub id.
        dtype: of the weights; None takes them as they are stored. Packed weights, which float32 does not run, are taken
            as they are stored for it too.
        data: data directory that may hold the file of a model that is converted (see `experiments.data.packaged`).
        quantised: weights of few bits will do, a packed checkpoint of `stoicc` too; to be pruned they must not be. What
            a quantised one computes is simulated.
        commit: of a model on the hub, that of `hub_commit`, where it is noted what is loaded; None takes the newest.

    Raises:
        UserError: if the model cannot be had (unknown, gated, no network), its weights are quantised, or its files are
            damaged or incomplete.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _directory_or_hub_id(name, data)
    # All files of one commit, whatever is pushed while they are fetched.
    at: dict[str, Any] = {} if Path(source).is_dir() else {"revision": commit or _hub_commit(source)}
    # Without, whoever sits at a terminal is asked whether to run what the model brings.
    at["trust_remote_code"] = False
    stored = _check_quantisation(name, source, quantised, at.get("revision"))
    if (Path(source) / INFO_FILE).is_file():
        load_info(source, verify=True)
    auto: Any = AutoModelForCausalLM
    try:
        if stored == "simulated":
            model, missing = load_quantised(Path(source), dtype)
        else:
            # Which attention is transformers' choice: not every family has the fused one.
            as_stored = dtype is None or (dtype == torch.float32 and stored == "packed")
            model, report = auto.from_pretrained(
                source, dtype="auto" if as_stored else dtype, output_loading_info=True, **at
            )
            missing = sorted(report["missing_keys"])
        tokenizer = AutoTokenizer.from_pretrained(source, **at)
    except (torch.OutOfMemoryError, UserError):
        raise
    # What transformers makes of damaged files may be any error.
    except Exception as error:
        raise UserError(f"{name}: cannot be loaded from {source}: {_first_line(error)}") from error
    # transformers fills these with random numbers and goes on.
    if missing:
        raise UserError(f"{name}: its weights lack {missing[0]} and {len(missing) - 1} more tensors: incomplete copy?")
    _check_finite(name, model)
    model.requires_grad_(False)
    return model.eval().to(device), tokenizer


def _check_finite(name: str, model: "PreTrainedModel") -> None:
    """Raise if a weight is NaN or infinite: whatever is computed with it says something else, or blames the text."""
    import torch

    for tensor, values in model.named_parameters():
        # A sum in one pass tells most: few weights add up to infinity.
        if values.is_meta or not values.is_floating_point() or values.itemsize < 2:
            continue
        if not torch.isfinite(values.detach().sum(dtype=torch.float32)) and not torch.isfinite(values).all():
            raise UserError(
                f"{name}: {tensor} holds values that are not finite, as {values.dtype}: the files are damaged, which a "
                "new copy mends, or the dtype is too narrow for them"
            )


def load_packable(
    name: str, *, device: str = "cpu", data: Path | None = None, commit: str | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """`load_model` of a checkpoint, quantised or not, in the dtype that it is packed in: its own 16 bits, or bfloat16.

    What was made on a CPU holds float32, which no packed weight does. It is loaded anew, since a cast of the model
    would change scales and values of few bits too.
    """
    import torch

    model, tokenizer = load_model(name, device=device, data=data, quantised=True, commit=commit)
    if model.dtype in (torch.bfloat16, torch.float16):
        return model, tokenizer
    return load_model(name, device=device, dtype=torch.bfloat16, data=data, quantised=True, commit=commit)


def _config(source: str, commit: str | None) -> dict[str, Any]:
    """The configuration of a model directory, or of a hub model of which it is in the cache already; {} without one."""
    from transformers import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(source, local_files_only=True, revision=commit)[0]
    except (OSError, ValueError, RecursionError):
        return {}  # loading it says what is wrong


def _check_quantisation(
    name: str, source: str, wanted: bool, commit: str | None
) -> Literal["packed", "simulated"] | None:
    """Refuse weights that are codes: without their scales they are other weights, and no zeros can be told in them.

    Args:
        wanted: those that can be evaluated are not refused.

    Returns:
        How weights of few bits are computed with; None for any other.
    """
    config = _config(source, commit)
    kind = quantisation(config)
    if kind is None:
        return None
    # Importing it registers the quantizer that reads packed checkpoints.
    from stoicc.quantizer import check_config
    from stoicc.spec import METHOD, StoiccConfig

    if kind == METHOD and Path(source).is_dir():
        check_config(Path(source))
    ours = (Path(source) / INFO_FILE).is_file() and precision_of(config) is not None
    if kind != METHOD and not ours:
        raise UserError(
            f"{name}: its weights are quantised (quantization_config: {kind}): take the model in bfloat16, float16 or "
            "float32 that it was made of, and quantise after pruning"
        )
    if not wanted:
        what, made = ("quantised", "made of") if ours else ("packed", "packed from")
        raise UserError(
            f"{name}: a {what} checkpoint, which can be evaluated but not pruned or quantised again: take the "
            f"checkpoint or the model that it was {made}"
        )
    about = config.get("quantization_config")
    modules = about.get("modules") if kind == METHOD and isinstance(about, dict) else None
    if isinstance(modules, list) and all(isinstance(module, dict) for module in modules):
        # transformers copies and prints it several times over: a damaged one may be long.
        StoiccConfig(modules=modules).specs()
    return "simulated" if ours else "packed"


def processor_files(name: str, data: Path | None = None, commit: str | None = None) -> list[Path]:
    """The files by which a model of several parts, such as text and images, turns these into its inputs.

    They go with every checkpoint that is made of the model, as they are. A model of text alone has none.

    Args:
        commit: of a model on the hub, the one that was loaded.

    Raises:
        UserError: if the hub has them and they cannot be fetched.
    """
    source = _directory_or_hub_id(name, data)
    folder = Path(source)
    if not folder.is_dir():
        if not any(isinstance(part, dict) and "model_type" in part for part in _config(source, commit).values()):
            return []
        folder = _fetched(source, _PROCESSORS, commit)
    return _processors_in(folder)


def _processors_in(folder: Path) -> list[Path]:
    return sorted({file for pattern in _PROCESSORS for file in folder.glob(pattern)})


def _fetched(repository: str, patterns: Sequence[str], commit: str | None) -> Path:
    """The folder of some files of a hub model, fetched or in the cache."""
    from huggingface_hub import snapshot_download

    fetched = functools.partial(snapshot_download, repository, revision=commit, allow_patterns=list(patterns))
    try:
        return Path(fetched())
    # Without a network its clients raise errors of their own.
    except Exception as error:
        # What files a commit has is asked of the hub, even if the cache has them all.
        with contextlib.suppress(OSError, ValueError):
            return Path(fetched(local_files_only=True))
        raise UserError(f"{repository}: cannot be fetched from the hub: {_first_line(error)}") from error


def longest_text(name: str, data: Path | None = None) -> int | None:
    """Most tokens that a model has positions for; None if it has no such limit or its configuration is not here yet."""
    from transformers import AutoConfig

    if name in _LOCAL and name != "embedded":
        return None  # converting it takes minutes
    try:
        return longest(
            AutoConfig.from_pretrained(_directory_or_hub_id(name, data), local_files_only=True, trust_remote_code=False)
        )
    except UserError:
        raise
    # What transformers makes of a damaged configuration may be any error, and loading the model says what is wrong.
    except Exception:
        return None


def fingerprint(name: str) -> str:
    """What tells one version of a model from another: it changes when the files change that ``name`` stands for.

    Returns:
        Of a model on the hub its commit (that of the local cache if there is no network), of one that is converted the
        SHA-256 of the published file and the version of its conversion, of any other the SHA-256 of its files.

    Raises:
        UserError: if the model cannot be had.
    """
    if name in _PINNED:
        return _PINNED[name]().fingerprint
    source = Path(_directory_or_hub_id(name, None))
    if not source.is_dir():
        return _hub_commit(str(source))
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _CONTENT for file in source.glob(pattern)}):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def content(name: str, data: Path | None = None, commit: str | None = None) -> str:
    """The content hash of a model's weights (`patch.checkpoint.content_hash`); of a model on the hub, its commit.

    Args:
        commit: that one, where it is known.

    Raises:
        UserError: if the model cannot be had or its files are damaged.
    """
    source = Path(_directory_or_hub_id(name, data))
    if not source.is_dir():
        return commit or _hub_commit(str(source))
    # Older formats than safetensors are hashed as files.
    return content_hash(source) if any(source.glob("*.safetensors")) else fingerprint(str(source))


def hub_commit(name: str) -> str | None:
    """The commit of a model that is loaded from the hub; None of any other, whose files a trial or a name pins.

    Raises:
        UserError: if the hub has no such model, or cannot be reached and the cache has none.
    """
    found = resolve(name)
    if isinstance(found, ModelSpec):
        return None if found.name in _LOCAL else _hub_commit(found.source)
    return None if Path(found).is_dir() else _hub_commit(found)


def linear_shapes(name: str) -> set[tuple[int, int]]:
    """``(N, K)`` of every kind of prunable ``Linear``, without loading a weight; empty for a hub id, not yet here."""
    found = resolve(name)
    if isinstance(found, ModelSpec):
        return set(found.linear_shapes().values())
    return set(prunable_shapes(Path(found)).values()) if Path(found).is_dir() else set()


def local_revision(name: str) -> str | None:
    """`fingerprint` of a model whose files are on this machine, None of one that a name and its source pin."""
    found = resolve(name)
    local = found == name and Path(name).is_dir()
    return fingerprint(name) if local or name == "embedded" else None


def _directory_or_hub_id(name: str, data: Path | None) -> str:
    found = resolve(name)
    if isinstance(found, str):
        return found
    return str(_LOCAL[found.name](data)) if found.name in _LOCAL else found.source


def _hub_commit(repository: str) -> str:
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
        problem = "the Hugging Face hub cannot be reached, and it is not in the local cache: give the path of a copy"
        raise UserError(f"{repository}: {problem}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{repository}: cannot be fetched from the hub: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
