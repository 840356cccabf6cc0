"""llama.cpp (xllamacpp) as an independent check of exported GGUF files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from gpu_worker.llama_cpp.client import ask, hidden_states, read_head
from gpu_worker.llama_cpp.client import serving as served


class LlamaCpp:
    """A running server of one GGUF."""

    def __init__(self, address: str) -> None:
        self._address = address

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of `text`, with special tokens added and parsed if requested."""
        return list(self.post("/tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"])

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self.post("/detokenize", {"tokens": list(tokens)})["content"])

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Generate greedily: `count` tokens, or up to the end token."""
        body = {"prompt": list(prompt), "n_predict": count, "temperature": 0.0, "return_tokens": True}
        return list(self.post("/completion", body)["tokens"])

    def chat(self, message: str, count: int) -> str:
        """The answer to one message of a user, through the OpenAI-compatible endpoint."""
        body = {"messages": [{"role": "user", "content": message}], "max_tokens": count, "temperature": 0.0}
        return str(self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to this body."""
        return ask(self._address, path, body)


@contextmanager
def serving(path: Path) -> Iterator[LlamaCpp]:
    """A server of that file."""
    with served(path) as address:
        yield LlamaCpp(address)


def read_tensors(path: Path, *names: str) -> dict[str, Tensor]:
    """The tensors of a GGUF file by name, all or those `names` that there are: float32 [rows, columns] or [columns]."""
    tensors = [tensor for tensor in gguf.GGUFReader(path).tensors if not names or tensor.name in names]
    return {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in tensors}


def read_field(path: Path, key: str) -> Any:
    """One entry of a GGUF file's metadata."""
    return gguf.GGUFReader(path).fields[key].contents()


def logits(path: Path, windows: Tensor) -> Tensor:
    """Logits [windows, seqlen, vocabulary] by llama.cpp; only the multiplication with the head is done here."""
    head = read_head(path)
    with served(path, context=windows.shape[1], hidden_states=True) as address:
        return torch.stack([hidden_states(address, window) @ head.t() for window in windows])
