"""`python -m gpu_worker.llama_cpp.server OPTIONS`: llama.cpp's server of one GGUF file, in a process of its own.

OPTIONS is a ServerOptions as JSON. Prints one line of JSON, the address, when the model is loaded, and ends when its
standard input closes. It is a process of its own because llama.cpp aborts on some errors, and because its
server never ends when it is told to before it listens. The process that started this one kills it.
"""

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Any

KEY_VARIABLE = "LLAMA_API_KEY"
"""The environment variable with the key that requests need; none where it is not set."""


@dataclass(frozen=True)
class ServerOptions:
    """What a server is started with; `context` tokens are shared by `slots` texts at a time."""

    path: str
    threads: int
    context: int
    slots: int = 1
    batch: int | None = None
    """Tokens processed in one go; None leaves it to llama.cpp."""
    hidden_states: bool = False
    """Answer /embeddings with the hidden states of every token, instead of text."""
    exact_cache: bool = False
    """The KV cache in F32 instead of F16."""
    in_memory: bool = False
    """Weights in memory of the server's own, and not mapped: how fast a mapped file is read depends on how its pages
    happen to lie in the system's cache."""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def parameters(options: ServerOptions) -> Any:
    """xllamacpp's parameters: quiet, on a free port, and without unused features."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.path
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = options.threads
        cpu.poll = 0  # the server that waits does not compute
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
    """Serve until standard input closes; returns 2 where llama.cpp cannot load the file."""
    import xllamacpp

    address = os.dup(1)
    os.dup2(2, 1)  # llama.cpp writes there what belongs into a log
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        server = xllamacpp.Server(parameters(ServerOptions(**json.loads(sys.argv[1]))))
    except RuntimeError:
        return 2
    try:
        os.write(address, (json.dumps({"address": server.listening_address}) + "\n").encode())
        threading.Event().wait()
    finally:
        os._exit(0)  # from here on nothing else ends it: see above


def _end_with_input() -> None:
    """End the process, even while it loads, when the process that started it is gone."""
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
