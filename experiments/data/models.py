"""Loading models by name (`experiments.data.registry`): from the hub, a path, or this package.

>>> model, tokenizer = load_model("embedded", device="cuda")
"""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.data.registry import (
    PINNED,
    PROCESSORS,
    ModelSpec,
    directory_or_hub_id,
    fingerprint,
    first_line,
    newest_commit,
    processors_in,
    resolve,
)
from patch.checkpoint import INFO_FILE, content_hash, fetch_whole
from patch.compressed import precision_of
from patch.errors import UserError
from patch.positions import longest
from patch.simulate import load_quantised
from patch.weights import prunable_shapes, quantisation

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        commit: of a model on the hub (`registry.hub_commit`), where it is noted what is loaded; None takes the newest.

    Raises:
        UserError: if the model cannot be had (unknown, gated, no network), its weights are quantised, or its files are
            damaged or incomplete.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = directory_or_hub_id(name, data)
    # All files of one commit, whatever is pushed while they are fetched.
    commit = None if Path(source).is_dir() else commit or newest_commit(source)
    # Without, whoever sits at a terminal is asked whether to run what the model brings.
    at: dict[str, Any] = {"trust_remote_code": False} | ({"revision": commit} if commit else {})
    stored = _check_quantisation(name, source, quantised, commit)
    fetch_whole(functools.partial(_fetched, source, commit=commit) if commit else lambda _: Path(source))
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
        raise UserError(f"{name}: cannot be loaded from {source}: {first_line(error)}") from error
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


def check_changeable(name: str) -> None:
    """What cannot be pruned or quantised is told before anything else is, of a model in a directory.

    Raises:
        UserError: if its weights are quantised already.
    """
    source = resolve(name)
    if isinstance(source, str) and Path(source).is_dir():
        _check_quantisation(name, source, wanted=False, commit=None)


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
    source = directory_or_hub_id(name, data)
    folder = Path(source)
    if not folder.is_dir():
        if not any(isinstance(part, dict) and "model_type" in part for part in _config(source, commit).values()):
            return []
        folder = _fetched(source, PROCESSORS, commit)
    return processors_in(folder)


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
        raise UserError(f"{repository}: cannot be fetched from the hub: {first_line(error)}") from error


def longest_text(name: str, data: Path | None = None) -> int | None:
    """Most tokens that a model has positions for; None if it has no such limit or its configuration is not here yet."""
    from transformers import AutoConfig

    if name in PINNED:
        return None  # converting it takes minutes
    try:
        return longest(
            AutoConfig.from_pretrained(directory_or_hub_id(name, data), local_files_only=True, trust_remote_code=False)
        )
    except UserError:
        raise
    # What transformers makes of a damaged configuration may be any error, and loading the model says what is wrong.
    except Exception:
        return None


def content(name: str, data: Path | None = None, commit: str | None = None) -> str:
    """The content hash of a model's weights (`patch.checkpoint.content_hash`); of a model on the hub, its commit.

    Args:
        commit: that one, where it is known.

    Raises:
        UserError: if the model cannot be had or its files are damaged.
    """
    source = Path(directory_or_hub_id(name, data))
    if not source.is_dir():
        return commit or newest_commit(str(source))
    # Older formats than safetensors are hashed as files.
    return content_hash(source) if any(source.glob("*.safetensors")) else fingerprint(str(source))


def linear_shapes(name: str) -> set[tuple[int, int]]:
    """``(N, K)`` of every kind of prunable ``Linear``, without loading a weight; empty for a hub id, not yet here."""
    found = resolve(name)
    if isinstance(found, ModelSpec):
        return set(found.linear_shapes().values())
    return set(prunable_shapes(Path(found)).values()) if Path(found).is_dir() else set()
