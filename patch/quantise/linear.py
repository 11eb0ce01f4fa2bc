"""A linear of few bits, computed as kernels of its precision compute it: on any device, and slowly.

With 8 bits activations are quantised too, a scale for each token on the fly, and products of values are exact and
summed in float32. With 4 bits activations stay as they are and weights are widened to their dtype.
"""

import torch
from torch import Tensor, nn

from patch.contexts import short_float32
from patch.quantise.precisions import Precision
from patch.quantise.values import Quantised, quantise_rows


class QuantisedLinear(nn.Linear):
    """A ``Linear`` whose weight has few bits.

    Its ``weight`` is what values and scales stand for, rounded to the dtype of activations: for whoever looks at the
    weight. What is computed takes ``values`` and ``scales``.
    """

    def __init__(self, precision: Precision, quantised: Quantised, bias: Tensor | None, dtype: torch.dtype) -> None:
        rows, columns = quantised.values.shape
        super().__init__(columns, rows, bias=bias is not None, device="meta", dtype=dtype)
        self.precision = precision
        self.weight = nn.Parameter(quantised.dequantised().to(dtype), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        self.register_buffer("values", quantised.values, persistent=False)
        self.register_buffer("scales", quantised.scales, persistent=False)
        self.values: Tensor
        self.scales: Tensor

    @property
    def quantised(self) -> Quantised:
        """Values and scales."""
        return Quantised(self.values, self.scales)

    def forward(self, input: Tensor) -> Tensor:
        if self.precision.grouped:
            return nn.functional.linear(input, self.weight, self.bias)
        tokens = input.reshape(-1, self.in_features)
        values, token_scales = quantise_rows(tokens, self.values.dtype)
        with short_float32():
            y = values.float() @ self.values.float().T
        y = y * self.scales.T * token_scales[:, None]
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision.name}"
