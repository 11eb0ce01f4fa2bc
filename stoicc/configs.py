"""Which kernel with which configuration: what can run, what is worth trying, and what the tables say.

A table is one JSON file per GPU model: the fastest configuration found for each shape and number of tokens. Those in
``stoicc/tuning`` are committed; a GPU without one gets its own, kept in the user's cache directory, from ``hts tune``.
Of such tables the nearest shape counts. What none of them knows is measured when it is first used, and kept beside
them: that tells of the very shape and number of tokens that it was measured with, and of no other.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from patch.cache import cache_directory
from patch.errors import UserError
from patch.files import from_json, write_atomic
from patch.leases import lease
from stoicc.compat import VERSION
from stoicc.format import GROUPED
from stoicc.kernels.decode import DecodeConfig
from stoicc.kernels.expand import ExpandConfig
from stoicc.kernels.hopper import HopperConfig
from stoicc.kernels.hopper_decode import HopperDecodeConfig
from stoicc.kernels.portable import PortableConfig

Config = HopperConfig | HopperDecodeConfig | DecodeConfig | PortableConfig | ExpandConfig
KERNELS: dict[str, type[Config]] = {
    "hopper": HopperConfig,
    "hopper_decode": HopperDecodeConfig,
    "decode": DecodeConfig,
    "portable": PortableConfig,
    "expand": ExpandConfig,
}
# Names that tables of earlier versions, in users' caches, give them.
_FORMER = {"stream": "decode"}

# Token counts that tables are made for; others use the nearest.
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# The largest of them at which values of 4 bits are widened as they are multiplied: products of up to 90 tokens.
MOST_OF_FOUR = 64


@dataclass(frozen=True)
class Entry:
    """The fastest configuration found for one shape.

    Attributes:
        n, k: shape of the weight.
        band: its band, 1 or 2; a weight whose band is 2 may use configurations that one whose band is 1 may not.
        tokens: how many it was measured with.
        config: what was fastest.
        microseconds: the median time it took, with three quarters of the blocks 2:4.
        dense_microseconds: the median time cuBLAS took for a dense weight of this shape and dtype, of FP8 with a scale
            for each feature and token; of bfloat16 where that is ``int4``, which it does not know.
        dtype: of the values, ``bfloat16`` (which serves ``float16``), ``float8_e4m3fn``, ``int8`` or ``int4``.
    """

    n: int
    k: int
    band: int
    tokens: int
    config: Config
    microseconds: float
    dense_microseconds: float
    dtype: str = "bfloat16"


# Of the lines of a table.
_COLUMNS = [field.name for field in fields(Entry)]


def kernel_name(config: Config) -> str:
    """Its key in ``KERNELS``."""
    return next(name for name, kind in KERNELS.items() if isinstance(config, kind))


# Triton 3.9 keeps more in registers than there are.
_SPILLED_BY_39 = {
    *(DecodeConfig(128, 32, (1, 4, 1), 2, 3, blocks) for blocks in (4, 8)),
    DecodeConfig(64, 32, (1, 4, 1), 1, 4, 4),
    DecodeConfig(128, 32, (2, 4, 1), 1, 4, 2),
}


def table_dtype(dtype: torch.dtype) -> str:
    """The ``dtype`` of the entries that serve weights of a dtype."""
    return "bfloat16" if dtype == torch.float16 else str(dtype).removeprefix("torch.")


def runs(config: Config, capability: tuple[int, int], band: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether a GPU of this compute capability can run ``config`` on a weight of this band and dtype."""
    if isinstance(config, ExpandConfig) or (dtype == GROUPED and not isinstance(config, DecodeConfig)):
        return isinstance(config, ExpandConfig) and dtype == GROUPED
    if isinstance(config, HopperConfig):
        return capability[0] == 9 and config.cluster <= band and (config.tokens <= 128 or dtype != torch.int8)
    if isinstance(config, HopperDecodeConfig):
        return capability[0] == 9 and (config.rows <= 64 or band == 2)
    if isinstance(config, DecodeConfig):
        clusters = config.blocks == 1 or capability[0] == 9
        # Ada's instruction; on Hopper the assembler makes it of wider ones, and spills.
        if VERSION >= (3, 9) and config in _SPILLED_BY_39:
            return False
        known = capability >= (8, 0) if dtype != torch.float8_e4m3fn else capability == (8, 9) or capability[0] > 9
        return known and clusters and (config.rows <= 64 or band == 2)
    return isinstance(config, PortableConfig)


def promoting(config: Config) -> Config:
    """A configuration that adds up products of ``float8_e4m3fn`` in float32, as near to another as registers allow.

    Hopper's alone keep fewer bits within a sum; the others' are returned as they are.
    """
    if isinstance(config, HopperConfig):
        return replace(config, tokens=min(config.tokens, 128), promote=True)
    if isinstance(config, HopperDecodeConfig):
        config = replace(config, tokens=min(config.tokens, 64), promote=True)
        if config.tokens == 64:
            # There are registers for both sums and the records of two blocks, not four.
            config = replace(config, together=2, stages=config.stages * config.together // 2)
        return config
    return config


def candidates(
    tokens: int, capability: tuple[int, int], band: int, dtype: torch.dtype = torch.bfloat16
) -> list[Config]:
    """What is worth measuring for this many tokens, best guesses first.

    The lists are the survivors of wider sweeps on an H200 and an H100; none of them spills registers.
    """
    if dtype == GROUPED:
        found = list(_few_of_four(tokens))
        return [config for config in found if runs(config, capability, band, dtype)] or [ExpandConfig()]
    found = [*_few_on_hopper(tokens, dtype), *_few(tokens), *_many(tokens, dtype)]
    usable = [config for config in found if runs(config, capability, band, dtype)]
    # The portable kernel is for GPUs that can run nothing else.
    return usable or [PortableConfig(min(64, max(16, tokens)))]


def _few_on_hopper(tokens: int, dtype: torch.dtype) -> Iterator[Config]:
    if tokens <= 8:
        # With a single token of 16 bits the other kernel is faster.
        if dtype.itemsize == 1:
            yield from (HopperDecodeConfig(64, 8, 4, 2, blocks) for blocks in (4, 2, 1))
            yield from (HopperDecodeConfig(64, 8, 2, 4, blocks) for blocks in (4, 2, 1, 8))
    elif tokens <= 32:
        width = 16 if tokens <= 16 else 32
        yield from (HopperDecodeConfig(64, width, 4, 2, blocks) for blocks in (4, 2, 1))
        yield from (HopperDecodeConfig(64, width, 2, 4, blocks) for blocks in (4, 2, 1, 8))
    elif tokens <= 256:
        yield from (HopperDecodeConfig(64, 64, 4, 2, blocks) for blocks in (2, 1, 4))
        yield from (HopperDecodeConfig(64, 64, 2, 4, blocks) for blocks in (2, 1, 4))
    if 64 < tokens <= 256:
        yield from (HopperDecodeConfig(64, 128, 4, 2, blocks) for blocks in (2, 1, 4))
        yield from (HopperDecodeConfig(64, 128, 2, 2, blocks) for blocks in (2, 1, 4))
        yield from (HopperDecodeConfig(128, 128, 2, 4, blocks) for blocks in (2, 1, 4))


def _few(tokens: int) -> Iterator[Config]:
    if tokens <= 8:
        for warps, records, blocks in product(((1, 1, 1), (2, 1, 1), (4, 1, 1)), (2, 1), (4, 2, 1)):
            yield DecodeConfig(16, 8, warps, records, 0, blocks)
        yield from (DecodeConfig(32, 8, (1, 1, 1), 1, 0, blocks) for blocks in (4, 2, 1))
        yield DecodeConfig(32, 8, (2, 1, 1), 1, 0)
    elif tokens <= 16:
        for rows, warps, records, blocks in (
            *((64, (1, 2, 1), 2, blocks) for blocks in (8, 4, 2, 1)),
            *((32, (1, 1, 1), 2, blocks) for blocks in (8, 4, 2, 1)),
            *((64, (1, 4, 1), 4, blocks) for blocks in (4, 2)),
            *((64, (1, 4, 1), 2, blocks) for blocks in (4, 2, 1)),
            (32, (2, 1, 1), 2, 1),
            (128, (1, 4, 1), 2, 8),
            (128, (1, 4, 1), 2, 4),
        ):
            yield DecodeConfig(rows, 16, warps, records, 4 if records == 2 else 3, blocks)
    elif tokens <= 32:
        for rows, warps, records, blocks in (
            *((128, (1, 4, 1), 2, blocks) for blocks in (8, 4, 2)),
            *((64, (1, 2, 1), 1, blocks) for blocks in (8, 4, 2, 1)),
            *((64, (1, 4, 1), 2, blocks) for blocks in (8, 4, 2, 1)),
        ):
            yield DecodeConfig(rows, 32, warps, records, 3, blocks)
    else:
        yield from (DecodeConfig(64, 128, (1, 2, 4), 1, 4), DecodeConfig(64, 64, (1, 2, 2), 1, 4))
    if 32 < tokens <= 64:
        for rows, warps, blocks in (
            *((128, (1, 4, 2), blocks) for blocks in (8, 4, 2, 1)),
            *((64, (1, 2, 2), blocks) for blocks in (8, 4, 2)),
            *((64, (1, 4, 1), blocks) for blocks in (8, 4, 2)),
        ):
            yield DecodeConfig(rows, 64, warps, 1, 4, blocks)


def _few_of_four(tokens: int) -> Iterator[Config]:
    if tokens <= 8:
        for rows, warps, records in (
            (16, (4, 1, 1), 2),
            (16, (4, 1, 1), 1),
            (16, (2, 1, 1), 2),
            (32, (4, 1, 1), 1),
            (32, (2, 1, 1), 1),
            (32, (8, 1, 1), 1),
            (64, (4, 1, 1), 1),
        ):
            yield from (DecodeConfig(rows, 8, warps, records, 0, blocks) for blocks in (1, 2, 4))
    elif tokens <= 16:
        for rows, warps, stages in (
            (64, (4, 1, 1), 4),
            (64, (2, 2, 1), 4),
            (32, (4, 1, 1), 3),
            (32, (2, 1, 1), 4),
            (128, (2, 2, 1), 4),
            (128, (2, 4, 1), 4),
        ):
            yield from (DecodeConfig(rows, 16, warps, 1, stages, blocks) for blocks in (1, 2, 4))
    elif tokens <= 32:
        for rows, warps in ((64, (1, 4, 1)), (64, (2, 4, 1)), (64, (2, 2, 1)), (128, (2, 4, 1)), (128, (1, 8, 1))):
            yield from (DecodeConfig(rows, 32, warps, 1, 4, blocks) for blocks in (1, 2, 4))
    elif tokens <= MOST_OF_FOUR:
        for rows, width, warps in ((64, 64, (1, 4, 2)), (64, 64, (1, 2, 4)), (128, 32, (1, 8, 1)), (64, 32, (1, 4, 1))):
            yield from (DecodeConfig(rows, width, warps, 1, 3 + (width == 32), blocks) for blocks in (1, 2, 4))


def _many(tokens: int, dtype: torch.dtype) -> Iterator[Config]:
    # Triton 3.6 fails to compile that many tokens of integers.
    if tokens > 128 and dtype != torch.int8:
        yield from (HopperConfig(256, 5, together, cluster) for cluster in (2, 1) for together in (8, 4, 16))
    if tokens > 32:
        yield from (HopperConfig(64, 8, 8, 1), HopperConfig(64, 8, 8, 2))
    if tokens > 64:
        yield from (HopperConfig(128, 6, 8, 1), HopperConfig(128, 6, 8, 2))


def nearest(
    entries: Iterable[Entry],
    n: int,
    k: int,
    band: int,
    tokens: int,
    capability: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
) -> Entry | None:
    """The entry measured closest to this shape: first by tokens, then by features and inputs, as ratios."""

    def distance(entry: Entry) -> tuple[float, float]:
        shape = abs(math.log(entry.n / n)) + abs(math.log(entry.k / k)) + (entry.band != band)
        return abs(math.log(entry.tokens / tokens)), shape

    known = table_dtype(dtype)
    usable = [entry for entry in entries if entry.dtype == known and runs(entry.config, capability, band, dtype)]
    return min(usable, key=distance, default=None)


def gpu_slug(device_name: str) -> str:
    """A GPU's name as a file name: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def committed_table(device_name: str) -> Path:
    return Path(__file__).parent / "tuning" / f"{gpu_slug(device_name)}.json"


def user_table(device_name: str) -> Path:
    """Where a GPU's own table is kept, in the user's cache directory."""
    return cache_directory() / "tuning" / f"{gpu_slug(device_name)}.json"


def measured_table(device_name: str) -> Path:
    """Where what was measured at its first use is kept, beside `user_table`."""
    return user_table(device_name).with_suffix(".measured.json")


def read_table(path: Path) -> tuple[Entry, ...]:
    """The entries of a table; none if there is no such file.

    Raises:
        UserError: if the file is not a table, naming it and what to do.
    """
    if not path.exists():
        return ()
    try:
        return tuple(map(_checked, _entries(from_json(path.read_text(encoding="utf-8")))))
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"tuning table {path} cannot be read ({error}): delete it and run `hts tune`") from None


def write_table(path: Path, entries: Iterable[Entry], provenance: dict[str, Any]) -> None:
    """Write a table atomically, sorted, one entry a line, each configuration once; entries tell theirs by its number.

    Args:
        provenance: where the entries are from, by their ``dtype``, the latest first.
    """
    ordered = sorted(entries, key=_about)
    numbers = {config: number for number, config in enumerate(sorted({e.config for e in ordered}, key=str))}
    rows = [[numbers[e.config] if name == "config" else getattr(e, name) for name in _COLUMNS] for e in ordered]
    configs = [{"kernel": kernel_name(config), **asdict(config)} for config in numbers]
    parts = (
        f'"provenance": {json.dumps(provenance)}',
        f'"configs": {_lines(configs)}',
        f'"columns": {json.dumps(_COLUMNS)}',
        f'"entries": {_lines(rows)}',
    )
    write_atomic(path, "{\n" + ",\n".join(parts) + "\n}\n")


def _lines(items: Iterable[Any]) -> str:
    return "[\n" + ",\n".join(json.dumps(item, separators=(",", ":")) for item in items) + "\n]"


@cache
def tables(device_name: str) -> tuple[Entry, ...]:
    """What was tuned of a GPU: the user's own entries, and the committed ones of shapes of which there are none.

    Who tunes one model, or with some numbers of tokens, leaves the others as they were.
    """
    own, committed = (read_table(path(device_name)) for path in (user_table, committed_table))
    tuned = set(map(_about, own))
    return (*own, *(entry for entry in committed if _about(entry) not in tuned))


@cache
def measured(device_name: str) -> tuple[Entry, ...]:
    """What was measured of a GPU at its first use."""
    return read_table(measured_table(device_name))


def known(
    device_name: str,
    n: int,
    k: int,
    band: int,
    tokens: int,
    capability: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
) -> Entry | None:
    """The entry that decides for a shape: of what was tuned with so many tokens the nearest, else its very own."""
    bucket = token_bucket(tokens)
    tuned = (entry for entry in tables(device_name) if entry.tokens == bucket)
    own = (entry for entry in measured(device_name) if _about(entry) == (table_dtype(dtype), n, k, band, bucket))
    about = (n, k, band, bucket, capability, dtype)
    return nearest(tuned, *about) or nearest(own, *about)


def remember(path: Path, entries: Iterable[Entry], provenance: dict[str, Any]) -> None:
    """Add entries of one provenance to a table, replacing those of the same shapes; other processes may do so too."""
    added = {_about(entry): entry for entry in entries}
    with lease(path.with_name(f".{path.name}.lock")):
        before = {_about(entry): entry for entry in read_table(path)}
        left = {dtype for dtype, *_ in before.keys() - added.keys()}
        known = _provenance(path)
        for dtype in {dtype for dtype, *_ in added}:
            known[dtype] = [provenance, *(known.get(dtype, []) if dtype in left else [])]
        write_table(path, (before | added).values(), known)
    tables.cache_clear()
    measured.cache_clear()


def _about(entry: Entry) -> tuple[str, int, int, int, int]:
    """What an entry tells of; a table has one of each."""
    return entry.dtype, entry.n, entry.k, entry.band, entry.tokens


def _provenance(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Where a table's entries are from, by their dtype, the latest first; earlier tables have one for all."""
    if not path.exists():
        return {}
    table = from_json(path.read_text(encoding="utf-8"))
    found = table.get("provenance")
    if not isinstance(found, dict):
        return {}
    if all(isinstance(each, list) for each in found.values()):
        return found
    return {dtype: [found] for dtype in {entry.dtype for entry in _entries(table)}}


def token_bucket(tokens: int) -> int:
    """The number of tokens of ``TOKENS`` that is nearest as a ratio."""
    return min(TOKENS, key=lambda known: abs(math.log(known / tokens)))


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; ``(0, 0)`` for GPUs that are not NVIDIA's."""
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


def config_named(kernel: str, fields: dict[str, Any]) -> Config:
    """A configuration as tables and rows write it: its kernel's name, then or now, and its fields."""
    kind: Any = KERNELS[_FORMER.get(kernel, kernel)]
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


def _checked(entry: Entry) -> Entry:
    """An entry whose numbers are such as can be compared: what is wrong is told where it is read."""
    whole = (entry.n, entry.k, entry.band, entry.tokens)
    times = (entry.microseconds, entry.dense_microseconds)
    settings = [part for value in vars(entry.config).values() for part in (value if type(value) is tuple else (value,))]
    if not all(isinstance(each, int) and each > 0 for each in whole):
        raise ValueError(f"shape, band and tokens {whole} are not whole numbers from 1")
    if not all(isinstance(each, int | float) and 0 < each < math.inf for each in times):
        raise ValueError(f"microseconds {times} are not positive numbers")
    if not all(isinstance(each, int) for each in settings):
        raise ValueError(f"{entry.config} has settings that are not whole numbers")
    return entry


def _entries(table: dict[str, Any]) -> Iterator[Entry]:
    known = [_config(**fields) for fields in table.get("configs", ())]
    for item in table["entries"]:
        if isinstance(item, list):
            entry = dict(zip(table["columns"], item, strict=True))
            yield Entry(**entry | {"config": known[entry["config"]]})
        else:  # of an earlier version: with the names of its fields, and its configuration in full
            yield Entry(**item | {"config": _config(**item["config"])})


def _config(kernel: str, **settings: Any) -> Config:
    return config_named(kernel, settings)
