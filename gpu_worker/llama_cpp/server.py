"""`python -m gpu_worker.llama_cpp.server OPTIONS`: serves one GGUF file with llama.cpp in a separate process.

OPTIONS is a ServerOptions as JSON. Prints its address as one line of JSON when the model is loaded, and ends when
standard input closes. It runs in a separate process because llama.cpp aborts on some errors, and because its server
does not stop if it is told to before it listens. The parent process kills it.
"""

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Any

KEY_VARIABLE = "LLAMA_API_KEY"
"""Environment variable with the API key; requests need no key if it is not set."""


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server; `slots` concurrent texts share `context` tokens."""

    path: str
    threads: int
    context: int
    slots: int = 1
    batch: int | None = None
    """Tokens processed in one go; None leaves it to llama.cpp."""
    hidden_states: bool = False
    """Serve the hidden states of every token at /embeddings, instead of generating text."""
    exact_cache: bool = False
    """Use an F32 KV cache instead of F16."""
    in_memory: bool = False
    """Load weights into memory instead of mapping the file, whose speed depends on the state of the page cache."""

    def to_json(self) -> str:
        """Return the options as one line of JSON."""
        return json.dumps(asdict(self))


def parameters(options: ServerOptions) -> Any:
    """Return xllamacpp's parameters: quiet, on a free port, without unused features."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.path
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = options.threads
        cpu.poll = 0  # do not spin while waiting
    params.ui = params.warmup = params.endpoint_slots = False
    if key := os.environ.get(KEY_VARIABLE):
        params.api_keys = [key]
    params.cache_ram_mib = 0
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


def main() -> int:
    """Serve until standard input closes; return 2 if llama.cpp cannot load the file."""
    import xllamacpp

    address = os.dup(1)
    os.dup2(2, 1)  # llama.cpp writes log lines to stdout
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        server = xllamacpp.Server(parameters(ServerOptions(**json.loads(sys.argv[1]))))
    except RuntimeError:
        return 2
    try:
        os.write(address, (json.dumps({"address": server.listening_address}) + "\n").encode())
        threading.Event().wait()
    finally:
        os._exit(0)  # nothing else ends the server from here on: see above


def _end_with_input() -> None:
    """End the process, even while it is loading, when its parent has ended."""
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
