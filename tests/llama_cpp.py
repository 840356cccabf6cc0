"""llama.cpp in this process, by xllamacpp: a second opinion on what an exported GGUF computes."""

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    """A running server."""

    def __init__(self, server: Any) -> None:
        self._url = server.listening_address

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to this body."""
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
