"""A substitute for the Hugging Face Hub's API on loopback, which keeps what is uploaded."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_a_token_that_may_write"


class Hub:
    """The repositories: their visibility, and their files."""

    def __init__(self) -> None:
        self.url = ""
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}
        """Large files by SHA-256."""

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        """Return the status and the JSON for a request."""
        if path.startswith("/stored/"):  # an upload by a signed URL
            self.stored[path.removeprefix("/stored/")] = body
            return 200, {}
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return 200, self._batch(json.loads(body))
        repository = "/".join(path.split("/")[3:5])
        if repository not in self.files:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": _mode(f), "shouldIgnore": False} for f in asked]}
        if "/commit/" in path:
            return self._commit(repository, body)
        return 404, {"error": f"no such path: {method} {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name.startswith("another/"):
            return 403, {"error": 'You don\'t have the rights to create a model under the namespace "another"'}
        url = {"url": f"{self.url}/{name}"}
        if name in self.files:
            return 409, url | {"error": "You already created this model repo"}
        self.files[name], self.private[name] = (
            {},
            asked["visibility"] == "private" if "visibility" in asked else bool(asked.get("private")),
        )
        return 200, url

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.url}/stored/{o['oid']}"}}}
            for o in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repository: str, body: bytes) -> tuple[int, Any]:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                content = self.stored[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                self.files[repository][value["path"]] = content
        url = f"{self.url}/{repository}/commit/{'0' * 40}"
        return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""}


def _mode(file: dict[str, Any]) -> str:
    return "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub on a free port."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            length = self.headers.get("Content-Length")
            body = self.rfile.read(int(length)) if length else self._chunks()
            status, answer = hub.answer(self.command, self.path.partition("?")[0], self.headers, body)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _chunks(self) -> bytes:
            """Read a chunked body, if there is one."""
            whole = b""
            while self.headers.get("Transfer-Encoding") == "chunked":
                size = int(self.rfile.readline(), 16)
                whole += self.rfile.read(size)
                self.rfile.readline()
                if size == 0:
                    break
            return whole

        do_GET = do_POST = do_PUT = do_HEAD = _handle  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
