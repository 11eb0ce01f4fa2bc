"""What a packed checkpoint says of its packed modules, in the ``quantization_config`` of its ``config.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from patch import install
from patch.errors import UserError
from stoicc.format import SCALED, bits_of, check_dtype

METHOD = "stoicc"
# The first version of the format that knows weights of so many bits; a checkpoint is written in the oldest that it can.
_KNOWN_SINCE = {16: 1, 8: 2, 4: 3}
FORMAT = max(_KNOWN_SINCE.values())

# What a packed checkpoint says to those who do not know us. transformers, which reads no entry points, loads a file of
# code if it is told to trust it. Otherwise it would skip the quantization that it does not know and start from random
# weights: so the configuration names as the file of weights one that is not there, called by what to do.
CODE_FILE = "hybrid_tile_sparsity.py"
CODE = f'''"""Loads this checkpoint, whose weights are packed; the code is that of the package {install.PACKAGE}."""

try:
    from stoicc.remote import PackedForCausalLM
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] != "stoicc":
        raise
    raise ImportError("the weights of this checkpoint are packed: {install.how()}") from None
'''
AUTO_MAP = {"AutoModelForCausalLM": f"{CODE_FILE.removesuffix('.py')}.PackedForCausalLM"}
NEEDED = f"install-{install.PACKAGE}-and-import-stoicc.safetensors"
# What checkpoints name that were written before.
FORMER_NEEDED = "pip-install-hybrid-tile-sparsity.safetensors"


@dataclass(frozen=True)
class Spec:
    """What must be known of a packed module to make an empty one and load its tensors.

    Attributes:
        parts: full names of the linears it replaces, with the output features of each.
        in_features: inputs of all of them.
        tile, band: of the ``HybridWeight``.
        units: rows of its records.
        bias: whether it has one.
        dtype: of the weight: ``bfloat16`` or ``float16``, whose records mean nothing in the other, ``float8_e4m3fn``,
            ``int8`` or ``int4``.
    """

    parts: tuple[tuple[str, int], ...]
    in_features: int
    tile: tuple[int, int]
    band: int
    units: int
    bias: bool
    dtype: str

    @property
    def values(self) -> torch.dtype:
        """What its weight is packed from.

        Raises:
            UserError: if nothing is packed in that dtype.
        """
        found = getattr(torch, self.dtype, None)
        return check_dtype(found if isinstance(found, torch.dtype) else self.dtype)

    @property
    def eight_bits(self) -> bool:
        """Whether its weight has values of 8 bits, and scales."""
        return self.values in SCALED

    @property
    def quantised(self) -> bool:
        """Whether its weight has fewer bits than activations."""
        return bits_of(self.values) < 16

    @property
    def format(self) -> int:
        """The oldest format that can say it."""
        return _KNOWN_SINCE[bits_of(self.values)]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(rows for _, rows in self.parts), self.in_features


@register_quantization_config(METHOD)
class StoiccConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed checkpoint: format version, and one spec for each packed module.

    Attributes:
        files: SHA-256 of every other file of the directory, by name; None in checkpoints of before, and of a model in
            memory, whose files are still to be written.
        digest: SHA-256 of all that ``config.json`` says but this.
    """

    def __init__(
        self,
        format: int = FORMAT,
        modules: Sequence[Mapping[str, Any]] = (),
        files: Mapping[str, str] | None = None,
        digest: str | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # the mixin names its own methods only
        self.format = format
        try:
            self.modules = [dict(module) for module in modules]
        except (TypeError, ValueError) as error:
            raise UserError(f"packed checkpoint: quantization_config is damaged (modules: {error})") from None
        self.files = files
        self.digest = digest

    @classmethod
    def of(cls, specs: Sequence[Spec]) -> "StoiccConfig":
        """Of packed modules, in the oldest format that can say it."""
        return cls(max((spec.format for spec in specs), default=1), [asdict(spec) for spec in specs])

    def specs(self) -> list[Spec]:
        """What must be known of each packed module.

        Raises:
            UserError: if the format is newer than this code or a spec is not one.
        """
        if self.format not in range(1, FORMAT + 1):
            raise UserError(f"packed checkpoint has format {self.format}, this version reads up to {FORMAT}: update it")
        try:
            specs = [_spec(**module) for module in self.modules]
        except (TypeError, ValueError, OverflowError, LookupError) as error:
            raise UserError(f"packed checkpoint: quantization_config is damaged ({error})") from None
        names = [name for spec in specs for name, _ in spec.parts]
        if len(set(names)) < len(names):
            raise UserError("packed checkpoint: quantization_config is damaged (a linear is packed twice)")
        for spec in specs:
            if spec.format > self.format:
                said = f"{spec.parts[0][0]}: {spec.dtype} in format {self.format}, known since {spec.format}"
                raise UserError(f"packed checkpoint: quantization_config is damaged ({said})")
        return specs


def _spec(parts: Any, in_features: int, tile: Any, band: int, units: int, bias: bool, dtype: str) -> Spec:
    named = tuple((str(name), rows) for name, rows in parts)
    sizes = [in_features, *tile, band, units, *(rows for _, rows in named)]
    if not named or len(tile) != 2 or any(type(size) is not int or not 0 <= size < 2**31 for size in sizes):
        raise ValueError(f"sizes of {named[0][0] if named else 'a module'}: {sizes}")
    if type(bias) is not bool or not isinstance(dtype, str):
        raise ValueError(f"{named[0][0]}: bias {bias!r}, dtype {dtype!r}")
    spec = Spec(named, in_features, (tile[0], tile[1]), band, units, bias, dtype)
    try:
        check_dtype(spec.values)
    except UserError as error:
        raise ValueError(f"{named[0][0]}: {error}") from None
    return spec
