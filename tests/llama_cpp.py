"""llama.cpp in this process, by xllamacpp: a second opinion on what an exported GGUF computes."""

import gc
import json
import math
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
import xllamacpp
from torch import Tensor
from torch.nn import functional as F


class LlamaCpp:
    """A running server of one GGUF."""

    def __init__(self, server: Any) -> None:
        self._url = server.listening_address

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; special tokens are put around it and read in it where asked for."""
        return list(self.post("/tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"])

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self.post("/detokenize", {"tokens": list(tokens)})["content"])

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest next token, `count` times or until a token that ends a text."""
        body = {"prompt": list(prompt), "n_predict": count, "temperature": 0.0, "return_tokens": True}
        return list(self.post("/completion", body)["tokens"])

    def chat(self, message: str, count: int) -> str:
        """The answer to one message of a user, through the OpenAI-compatible endpoint."""
        body = {"messages": [{"role": "user", "content": message}], "max_tokens": count, "temperature": 0.0}
        return str(self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def hidden_states(self, tokens: Sequence[int]) -> Tensor:
        """Normed final hidden states [tokens, hidden size]. The server must have been started with `embeddings`."""
        (answer,) = self.post("/embeddings", {"content": list(tokens), "embd_normalize": -1})
        return torch.tensor(answer["embedding"])

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to this body."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)


@contextmanager
def serving(path: Path, *, context: int = 512, embeddings: bool = False) -> Iterator[LlamaCpp]:
    """A server of that file on one thread, with the KV cache in F32 so that only the weights are rounded."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = params.n_batch = params.n_ubatch = context
    params.n_parallel = 1
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = 1
        cpu.poll = 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.ui = params.warmup = False
    params.cache_ram_mib = 0
    params.verbosity = 1
    if embeddings:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    server = xllamacpp.Server(params)
    try:
        yield LlamaCpp(server)
    finally:
        del server
        gc.collect()


def read_tensors(path: Path, *names: str) -> dict[str, Tensor]:
    """The tensors of a GGUF file by name, all or those `names` that there are: float32 [rows, columns] or [columns]."""
    tensors = [tensor for tensor in gguf.GGUFReader(path).tensors if not names or tensor.name in names]
    return {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in tensors}


def read_field(path: Path, key: str) -> Any:
    """One entry of a GGUF file's metadata."""
    return gguf.GGUFReader(path).fields[key].contents()


def logits(path: Path, windows: Tensor) -> Tensor:
    """Logits [windows, seqlen, vocabulary] by llama.cpp; only the multiplication with the head is done here."""
    tensors = read_tensors(path, "output.weight", "token_embd.weight")
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    with serving(path, context=max(512, windows.shape[1]), embeddings=True) as server:
        return torch.stack([server.hidden_states(window) @ head.t() for window in windows.tolist()])


def perplexity(path: Path, windows: Tensor) -> float:
    """Perplexity of `windows` [n, seqlen] by llama.cpp, as gpu_worker.perplexity defines it."""
    losses = F.cross_entropy(logits(path, windows)[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    return math.exp(losses.item())
