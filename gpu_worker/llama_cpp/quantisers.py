"""Calls llama.cpp's own quantisers in the library of xllamacpp.

The package `gguf` can read K-quants but not write them. xllamacpp has no Python function for quantisation, but its
extension module contains llama.cpp, whose public C interface has `ggml_quantize_chunk` (as used by `llama-quantize`).
"""

import ctypes
import sys
from functools import cache
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from protocol.errors import ModelError

HOW_TO_GET_IT = "pip install '.[local]' in the folder of Self-Pruner"


@cache
def ggml() -> Any:
    """Return the C function `ggml_quantize_chunk`. Raises ModelError if no installed library has it."""
    try:
        import xllamacpp
    except ImportError as error:
        raise ModelError(
            f"quantising to K-quants needs llama.cpp, from the package xllamacpp: {HOW_TO_GET_IT}"
        ) from error
    try:
        quantize = ctypes.CDLL(sys.modules[f"{xllamacpp.__name__}.xllamacpp"].__file__).ggml_quantize_chunk
    except (AttributeError, OSError) as error:
        raise ModelError(
            f"the xllamacpp {xllamacpp.__version__} on this machine does not export llama.cpp's quantisers; write the "
            "type f16 and convert it to K-quants with llama.cpp's program llama-quantize, or use q8_0"
        ) from error
    quantize.restype = ctypes.c_size_t
    # type, source, destination, first value, rows, values of a row, importance of the columns (none)
    quantize.argtypes = (ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p)
    return quantize


def quantize(values: NDArray[np.float32], kind: Any) -> NDArray[np.uint8]:
    """Quantise contiguous `values` [rows, columns] to llama.cpp's format: bytes [rows, bytes per row].

    `columns` must be a multiple of the kind's block size. Raises ModelError if the library is missing.
    """
    rows, columns = values.shape
    stored = np.empty(gguf.quant_shape_to_byte_shape(values.shape, kind), dtype=np.uint8)
    written = ggml()(int(kind), values.ctypes.data, stored.ctypes.data, 0, rows, columns, None)
    assert written == stored.nbytes, f"llama.cpp wrote {written} bytes of {stored.nbytes}"
    return stored
