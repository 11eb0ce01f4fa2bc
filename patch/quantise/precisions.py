"""The precisions that weights are quantised to: plain data, without torch."""

from dataclasses import dataclass

from patch.errors import UserError


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        name: on the command line, in definitions and in rows.
        label: in tables and figures.
        bits: of a value.
        dtype: what values are held in, by torch's name; those of 4 bits are packed on disk alone.
        grouped: whether every group of inputs has a scale of its own, which is found on calibration text; else every
            output feature has one, its largest magnitude decides it, and activations are quantised too, a scale for
            each token.
    """

    name: str
    label: str
    bits: int
    dtype: str
    grouped: bool = False


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp8", "FP8", 8, "float8_e4m3fn"),
        Precision("int8", "INT8", 8, "int8"),
        Precision("int4", "INT4", 4, "int8", grouped=True),
    )
}

# Inputs that share a scale: the most that divide all weights of a model, since servers take whole groups alone.
GROUPS = (128, 64, 32)


def group_size(inputs: dict[str, int]) -> int:
    """How many inputs share a scale in a model.

    Args:
        inputs: of every weight, by its name.

    Raises:
        UserError: naming the first weight that has no whole groups of any size.
    """
    for name, count in inputs.items():
        if count % GROUPS[-1]:
            raise UserError(f"{name}: {count} inputs: INT4 needs a multiple of {GROUPS[-1]}, the smallest group")
    return next(size for size in GROUPS if not any(count % size for count in inputs.values()))
