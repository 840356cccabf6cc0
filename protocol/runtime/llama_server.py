"""`python -m protocol.runtime.llama_server OPTIONS`: serve one GGUF file with llama.cpp, in a separate process.

OPTIONS is a ServerOptions as JSON. Prints one line of JSON, {"address": …, "base_url": …, "model": …}, when the model
is loaded. Exits on SIGTERM, on SIGINT, and when the pipe at its standard input closes, so that it does not outlive the
process that started it. It is a separate process because llama.cpp aborts on some errors, and because llama.cpp's
server never ends if it is stopped before it listens.

If LLAMA_API_KEY is set, requests need that key. Without a key, a port of 127.0.0.1 is open to every user of the machine
and to web pages in their browsers, and one request with a large grammar keeps llama.cpp busy for minutes.
"""

import json
import os
import signal
import stat
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from protocol.errors import UsageError
from protocol.runtime.signals import END_SIGNALS

KEY_VARIABLE = "LLAMA_API_KEY"
"""The variable from which llama.cpp's own server reads its key."""


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server; `slots` concurrent texts share `context` tokens."""

    path: str
    threads: int
    context: int
    slots: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    """Port number; 0 takes a free port."""
    alias: str | None = None
    """Name of the model in the API; None takes the file's name."""
    warm_up: bool = False
    """Run the model once before the server is ready, so that the first request does not wait for it."""
    prompt_cache_mib: int = 0
    """Memory for the KV cache of earlier prompts."""
    batch: int | None = None
    """Number of tokens processed at once, if more than llama.cpp's default; None keeps the default."""
    hidden_states: bool = False
    """Serve the hidden states of every token at /embeddings, instead of generating text."""
    exact_cache: bool = False
    """Use an F32 KV cache instead of F16."""
    in_memory: bool = False
    """Load the weights instead of mapping the file, so that the speed does not depend on the page cache."""

    @property
    def model(self) -> str:
        """Return the name of the model in the API."""
        return self.alias or Path(self.path).stem

    def to_json(self) -> str:
        """Return the options as one line of JSON."""
        return json.dumps(asdict(self))


def serve(options: ServerOptions) -> None:
    """Serve until a signal, which ends the process. Raises UsageError if llama.cpp cannot load the file."""
    for number in END_SIGNALS:
        signal.signal(number, lambda *_: os._exit(0))
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_end_with_input, daemon=True).start()
    stdout = os.dup(1)
    os.dup2(2, 1)  # llama.cpp writes log lines to stdout
    try:
        import xllamacpp

        server = xllamacpp.Server(_parameters(options))
    except ImportError:
        raise UsageError(
            "a local LLM needs the package xllamacpp: pip install '.[local]' in the folder of Self-Pruner"
        ) from None
    except RuntimeError:
        raise UsageError(
            f"llama.cpp cannot serve {options.path!r} on port {options.port}: "
            "the file is damaged, the port is in use, or there is too little memory"
        ) from None
    try:
        address = server.listening_address
        ready = {"address": address, "base_url": f"{address}/v1", "model": options.model}
        os.write(stdout, (json.dumps(ready) + "\n").encode())
        threading.Event().wait()
    finally:
        # The server's threads may still be generating, and there is nothing to save.
        os._exit(0)


def _parameters(options: ServerOptions) -> Any:
    """Return xllamacpp's parameters: quiet, without unused features."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.path
    params.model_alias = {options.model}
    params.hostnames, params.port = [options.host], options.port
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = options.threads
        cpu.poll = 0  # do not spin while waiting
    params.ui = params.endpoint_slots = params.endpoint_props = False
    params.warmup = options.warm_up
    if key := os.environ.pop(KEY_VARIABLE, None):
        params.api_keys = [key]
    params.cache_ram_mib = options.prompt_cache_mib
    params.verbosity = 1
    params.n_ctx, params.n_parallel = options.context, options.slots
    if options.batch is not None:
        params.n_batch = max(params.n_batch, options.batch)
    if options.exact_cache:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if options.in_memory:
        if hasattr(xllamacpp, "llama_load_mode"):
            params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
        else:
            params.use_mmap = False
    if options.hidden_states:
        params.n_batch = params.n_ubatch = options.context
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    return params


def _end_with_input() -> None:
    """End the process, even while it is loading, when its parent has ended."""
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    try:
        serve(ServerOptions(**json.loads(sys.argv[1])))
    except UsageError:  # the parent says so
        sys.exit(2)
