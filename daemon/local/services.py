"""The local LLM and the workers of `selfpruner run`, as child processes."""

import asyncio
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from daemon.local.children import Child
from daemon.settings.llm import EndpointSettings
from daemon.settings.packages import need
from daemon.settings.settings import Settings
from protocol.errors import UsageError
from protocol.runtime.llama_server import KEY_VARIABLE

USAGE_EXIT = 2
"""Exit code of a child with invalid input."""
SOON_SECONDS = 60.0
"""The local LLM has this long to find that its file is broken."""


@dataclass(frozen=True)
class LocalLlm:
    """The local LLM, which may still load."""

    endpoint: EndpointSettings
    """Its endpoint, with a random key."""
    child: Child
    log_file: Path

    async def check_loads(self) -> None:
        """Raise UsageError if the LLM exits within the first minute because its file is broken."""
        try:
            code = await asyncio.wait_for(self.child.first_exit(), SOON_SECONDS)
        except TimeoutError:
            return
        if code == USAGE_EXIT:
            text = await asyncio.to_thread(self.log_file.read_text, encoding="utf-8", errors="replace")
            raise UsageError(next(reversed(text.splitlines()), "the local LLM cannot be served"))


@asynccontextmanager
async def local_llm(settings: Settings) -> AsyncIterator[LocalLlm]:
    """Run the local LLM as a child process."""
    need("xllamacpp", "local", "a local LLM", ", or give llm.endpoints")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chosen = settings.local_llm
    command = [sys.executable, "-m", "daemon.local.llm_server", "--gguf", chosen.gguf, "--port", str(port)]
    command += ["--context", str(chosen.context), "--slots", str(chosen.slots)]
    if chosen.threads:
        command += ["--threads", str(chosen.threads)]
    key = secrets.token_urlsafe(32)
    log_file = settings.folder / "local-llm.log"
    child = Child("local-llm", command, quiet=log_file, environment={KEY_VARIABLE: key})
    await child.start()
    try:
        endpoint = EndpointSettings(
            base_url=f"http://127.0.0.1:{port}/v1",
            model=Path(chosen.gguf).stem,
            api_key=SecretStr(key),
            name="local",
            context=chosen.context // chosen.slots,
            grammar=True,
        )
        yield LocalLlm(endpoint, child, log_file)
    finally:
        await child.end(grace_seconds=2)


@asynccontextmanager
async def workers(settings: Settings, redis_url: str, *, console: bool) -> AsyncIterator[Callable[[], bool]]:
    """Run the workers as child processes; yields a function that says whether all of them have exited for good.

    They log to the search's log file, and to the console if `console`.
    """
    need("torch", "worker", "a worker", ", or run workers elsewhere with `selfpruner daemon` here")
    command = [sys.executable, "-m", "gpu_worker", "--search", settings.search.name, "--in-run"]
    # They start before the daemon is in charge. The server may then still have the spec of an earlier try.
    command += ["--spec", settings.spec().fingerprint]
    command += ["--lease-seconds", str(settings.worker.lease_seconds), "--grace-seconds", "1"]
    command += ["--max-evaluation-seconds", str(settings.worker.max_evaluation_seconds)]
    command += ["--max-preparation-seconds", str(settings.worker.max_preparation_seconds)]
    command += ["--log-file", str(settings.folder / "log.jsonl")]
    if settings.worker.count > 1:
        command.append("--own-gpu")
    if not console:
        command.append("--quiet")
    options: dict[str, Any] = {
        "quiet": None if console else settings.folder / "worker.log",
        "final": USAGE_EXIT,
        "loads_models": True,
        # The URL already contains the password, which may have come from the file that this variable names.
        "environment": {
            "SELFPRUNER_REDIS__URL": redis_url,
            "SELFPRUNER_REDIS__PASSWORD_FILE": "",
        },
    }
    children = [Child(f"worker-{i}", command, **options) for i in range(settings.worker.count)]
    try:
        for child in children:
            await child.start()
        yield lambda: all(child.has_given_up for child in children)
    finally:
        await asyncio.gather(*(child.end(grace_seconds=5) for child in children))
