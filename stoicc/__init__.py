"""STOICC: hybrid weights, tiles of which are dense and the others 2:4, on sparse tensor cores.

>>> import stoicc
>>> report = stoicc.compile_model(model, masks)     # an ordinary transformers model now runs packed
>>> y = stoicc.linear(x, stoicc.pack(weight, mask)) # or one product
>>> report = stoicc.compile_model(model, masks, dtype=torch.float8_e4m3fn)  # weights and activations of eight bits
"""

from patch.quantise.values import quantise_weight
from stoicc.format import HybridWeight, pack, pack_masked, unpack
from stoicc.linear import HybridLinear, add_up_precisely, compile_model
from stoicc.matmul import linear
from stoicc.quantise import quantise_tokens
from stoicc.quantizer import save_packed
from stoicc.spec import StoiccConfig

__all__ = [
    "HybridLinear",
    "HybridWeight",
    "StoiccConfig",
    "add_up_precisely",
    "compile_model",
    "linear",
    "pack",
    "pack_masked",
    "quantise_tokens",
    "quantise_weight",
    "save_packed",
    "unpack",
]
