"""Names that moved between the versions of Triton that the kernels compile with, 3.6 to 3.9."""

import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

from patch.errors import UserError

SUPPORTED = ((3, 6), (3, 9))
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

if not SUPPORTED[0] <= VERSION <= SUPPORTED[1]:
    raise UserError(f"triton {triton.__version__} is not supported: install one of 3.6 to 3.9")

# The newer name first.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
reinterpret = getattr(shared_memory_descriptor, "reinterpret", None) or shared_memory_descriptor._reinterpret
