"""Measures a GGUF file's perplexity in llama.cpp, through xllamacpp's server in a separate process."""

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gguf
import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_worker.measuring.perplexity import perplexity_of
from gpu_worker.measuring.windows import predicted_tokens, token_ids
from gpu_worker.models.limits import LOGITS_CHUNK_BYTES
from gpu_worker.progress import Progress, no_progress, steps
from protocol.errors import ModelError
from protocol.runtime.environment import child_environment
from protocol.runtime.llama_server import KEY_VARIABLE, ServerOptions

MIN_CONTEXT = 512
_KEY = secrets.token_urlsafe(32)
"""API key of the servers that this process starts, because any local user or web page can reach their ports."""
TIMEOUT_SECONDS = 3600.0
"""Seconds that one request may take. A long window of a large model on a slow CPU takes minutes; a stopped or stuck
server never answers."""


@contextmanager
def running(options: ServerOptions) -> Iterator[str]:
    """Start a server with these options and yield its address. Raises ModelError if llama.cpp cannot load the file."""
    command = [sys.executable, "-m", "protocol.runtime.llama_server", options.to_json()]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**child_environment(), KEY_VARIABLE: _KEY},
        start_new_session=True,  # so that Ctrl-C in a terminal does not reach it
    ) as server:
        try:
            line = server.stdout.readline() if server.stdout else b""
            if not line:
                raise ModelError(f"llama.cpp cannot load {options.path!r}: the file is broken or memory is short")
            yield json.loads(line)["address"]
        finally:
            server.kill()


def serving(path: Path, *, context: int = MIN_CONTEXT, hidden_states: bool = False) -> AbstractContextManager[str]:
    """Serve the file for one text of up to `context` tokens at a time, and yield the server's address.

    The KV cache is F32, so that only the weights are rounded. Raises ModelError if llama.cpp cannot load the file.
    """
    threads, context = torch.get_num_threads(), max(MIN_CONTEXT, context)
    return running(ServerOptions(str(path), threads, context, hidden_states=hidden_states, exact_cache=True))


def ask(address: str, path: str, body: Mapping[str, Any]) -> Any:
    """Send a request and return the JSON answer. Raises ModelError if no answer comes or if it is an error."""
    server = urlsplit(address)
    connection = HTTPConnection(server.hostname or "", server.port, timeout=TIMEOUT_SECONDS)  # urllib would use a proxy
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {_KEY}"}
        connection.request("POST", path, json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
    except (OSError, HTTPException, ValueError) as error:
        raise ModelError(f"llama.cpp gave no answer ({error})") from error
    finally:
        connection.close()
    if isinstance(answer, dict) and "error" in answer:
        raise ModelError(f"llama.cpp answered with an error: {answer['error']}")
    return answer


def hidden_states(address: str, tokens: Tensor) -> Tensor:
    """Return normed final hidden states [tokens, hidden size] of a text, from a server with `hidden_states`."""
    (answer,) = ask(address, "/embeddings", {"content": tokens.tolist(), "embd_normalize": -1})
    return torch.tensor(answer["embedding"])


def read_head(path: Path) -> Tensor:
    """Return the file's output head or tied embedding: float32 [vocabulary, hidden size]."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    head = tensors.get("output.weight") or tensors["token_embd.weight"]
    return torch.from_numpy(gguf.dequantize(head.data, head.tensor_type))


def gguf_perplexity(path: Path, windows: Tensor, progress: Progress = no_progress) -> float:
    """Measure in llama.cpp the perplexity of `windows` (long, [n, seqlen]) as gpu_worker.measuring.perplexity does.

    Only the product with the file's output head is computed here, in float32. Raises ModelError if llama.cpp cannot
    load the file, and NotFiniteError if the result is not finite.
    """
    head, total = read_head(path), 0.0
    with serving(path, context=windows.shape[1], hidden_states=True) as address:
        for window in steps(progress, "measuring in llama.cpp", windows):
            total += _loss(hidden_states(address, token_ids(window)), head, window)
    return perplexity_of(total, predicted_tokens(windows))


def _loss(hidden: Tensor, head: Tensor, window: Tensor) -> float:
    """Return the summed loss of `window` [seqlen] in nats; logits are computed some rows at a time."""
    rows = max(1, LOGITS_CHUNK_BYTES["cpu"] // (4 * head.shape[0]))
    which = window[1:] >= 0
    parts = zip(torch.split(hidden[:-1][which], rows), torch.split(window[1:][which], rows), strict=True)
    return sum(F.cross_entropy(part @ head.t(), target, reduction="sum").item() for part, target in parts)
