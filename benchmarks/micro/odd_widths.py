"""Time of one multiplication at odd MLP widths: a linear layer in torch, and llama.cpp's product of two F16 rows.

    python -m benchmarks.micro.odd_widths [--widths 896 921 928 1536] [--json FILE]

Reports the minimum of many repeats, to reduce the effect of other processes. All data fits the CPU's cache.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from torch.nn import functional as F

HIDDEN, ROWS = 576, (1, 256)
WIDTHS = (896, 897, 904, 912, 920, 921, 922, 928, 960, 1024, 1536)


def least_nanoseconds(call: Callable[[], object], calls: int, repeats: int) -> float:
    """Return the time of one call: the minimum over repeats of the mean of `calls`."""
    call()
    found = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        found.append((time.perf_counter_ns() - start) / calls)
    return min(found)


def row_product() -> Callable[[int], float]:
    """Return a function from width to the nanoseconds of llama.cpp's dot product of two F16 rows, without the call."""
    library = ctypes.CDLL(sys.modules["xllamacpp.xllamacpp"].__file__)
    library.ggml_cpu_init()
    dot = library.ggml_vec_dot_f16
    dot.restype = None
    place, size = ctypes.c_void_p, ctypes.c_size_t
    dot.argtypes = (ctypes.c_int, place, size, place, size, place, size, ctypes.c_int)
    x, y = (torch.randn(max(WIDTHS) * 4).half() for _ in range(2))
    result = torch.zeros(1)

    def timed(width: int) -> float:
        pointers = [tensor.data_ptr() for tensor in (result, x, y)]
        return least_nanoseconds(lambda: dot(width, pointers[0], 0, pointers[1], 0, pointers[2], 0, 1), 200, 500)

    empty = timed(0)
    return lambda width: timed(width) - empty


def linear(width: int, rows: int, dtype: torch.dtype, *, down: bool) -> float:
    """Return the microseconds of the MLP's up or down projection of this width, for a text of `rows` tokens."""
    inputs, outputs = (width, HIDDEN) if down else (HIDDEN, width)
    weight, hidden = torch.randn(outputs, inputs).to(dtype), torch.randn(1, rows, inputs).to(dtype)
    with torch.inference_mode():
        return least_nanoseconds(lambda: F.linear(hidden, weight), 1 + 20 // rows, 30) / 1000


def figures_of(width: int, product: Callable[[int], float]) -> dict[str, Any]:
    """Return one line of the table."""
    found: dict[str, Any] = {"width": width, "llama.cpp F16 row": product(width)}
    for dtype in (torch.float32, torch.bfloat16):
        for rows in ROWS:
            for down in (False, True):
                name = f"{str(dtype).removeprefix('torch.')} {'down' if down else 'up'} {rows}"
                found[name] = linear(width, rows, dtype, down=down)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"llama.cpp {xllamacpp.__version__}: ns; torch {torch.__version__}: µs, by tokens")
    product = row_product()
    rows = []
    for width in options.widths:
        rows.append(figures_of(width, product))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
        print("| " + " | ".join(f"{value:.0f}" for value in rows[-1].values()) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
