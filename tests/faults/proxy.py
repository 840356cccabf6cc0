"""A TCP proxy in front of a server: latency, cut connections, a blackhole, and errors in place of answers.

`refuse` makes it answer commands itself, at random from a seed, so that a client meets errors that a server gives only
at a failover, at the end of its memory or in a cluster:

    async with Proxy(server.socket, seed=7) as proxy:
        proxy.refuse("-BUSY Redis is busy running a script", share=0.05)
        proxy.refuse("-NOSCRIPT No matching script", share=0.5, commands=["EVALSHA"])
        …  # run processes with the URL proxy.url(password)
        proxy.refusals.clear()  # from here on everything is answered by the server again
    assert proxy.refused  # a Counter of the error lines that were sent

A refused command does not reach the server. Any bytes may stand in place of an error line: `proxy.refuse(b"garbage")`.
"""

import asyncio
import random
import socket
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

HANDSHAKE = frozenset({"AUTH", "CLIENT", "HELLO", "SELECT", "MULTI"})
"""Commands that open a connection or a transaction. Servers answer them in most troubles, so they are refused only
where named."""
DISCARD = b"*1\r\n$7\r\nDISCARD\r\n"
LARGEST_LINE = 1 << 16


@dataclass(frozen=True)
class Refusal:
    """Answer `share` of the commands with the bytes `line`; `commands` names them, empty means all but HANDSHAKE."""

    line: bytes
    share: float
    commands: frozenset[str]

    def concerns(self, command: str) -> bool:
        return command in self.commands if self.commands else command not in HANDSHAKE


class Proxy:
    """Forwards to a unix socket. `latency`, `cut_share` (of commands and answers) and `blackhole` may be changed."""

    def __init__(self, target: Path, seed: int = 0) -> None:
        self.latency = 0.0
        self.cut_share = 0.0
        self.blackhole = False
        self.cuts = 0
        self.refusals: list[Refusal] = []
        self.refused: Counter[str] = Counter()
        self._target = target
        self._random = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()

    def refuse(self, error: str | bytes, *, share: float = 1.0, commands: Iterable[str] = ()) -> None:
        """Answer `share` of the commands with `error`, a line such as `-BUSY …` (see the head of this file)."""
        line = error if isinstance(error, bytes) else error.encode() + b"\r\n"
        self.refusals.append(Refusal(line, share, frozenset(name.upper() for name in commands)))

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=LARGEST_LINE)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def url(self, password: str) -> str:
        return f"redis://:{password}@127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there_writer = None
        try:
            there_reader, there_writer = await asyncio.open_unix_connection(str(self._target), limit=LARGEST_LINE)
            while await self._exchange(reader, writer, there_reader, there_writer):
                pass
        except (OSError, EOFError):  # either end is gone, and so the other goes
            if there_writer is None:
                reset(writer)
        finally:
            writer.close()
            if there_writer:
                there_writer.close()
            self._tasks.discard(task)

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        there_reader: asyncio.StreamReader,
        there_writer: asyncio.StreamWriter,
    ) -> bool:
        """Forward one command and its answer; returns False if the connection was cut."""
        command = await read_value(reader)
        if not await self._delayed(writer):
            return False
        refusal = self._refusal(name_of(command))
        if refusal is not None:
            self.refused[refusal.line.decode(errors="replace").strip()] += 1
            answer = refusal.line
            if name_of(command) == "EXEC":  # a server that refuses a transaction also discards it
                there_writer.write(DISCARD)
                await read_value(there_reader)
                answer = b"-EXECABORT Transaction discarded because of: " + refusal.line.lstrip(b"-")
        else:
            there_writer.write(command)
            await there_writer.drain()
            answer = await read_value(there_reader)
        if not await self._delayed(writer):
            return False
        writer.write(answer)
        await writer.drain()
        return True

    async def _delayed(self, client: asyncio.StreamWriter) -> bool:
        """Wait for the latency of one block of bytes; returns False if the connection is cut."""
        await asyncio.sleep(self.latency)
        while self.blackhole:
            await asyncio.sleep(0.05)
        if self._random.random() >= self.cut_share:
            return True
        self.cuts += 1
        reset(client)
        return False

    def _refusal(self, command: str) -> Refusal | None:
        concerned = (refusal for refusal in self.refusals if refusal.concerns(command))
        return next((refusal for refusal in concerned if self._random.random() < refusal.share), None)


async def read_value(reader: asyncio.StreamReader) -> bytes:
    """The bytes of one command, or of one answer (RESP2 or RESP3)."""
    line = await reader.readuntil(b"\r\n")
    kind, size = line[:1], line[1:-2]
    if kind in (b"$", b"=", b"!"):
        return line + (await reader.readexactly(int(size) + 2) if int(size) >= 0 else b"")
    if kind in (b"*", b"~", b">", b"%"):
        parts = [await read_value(reader) for _ in range(int(size) * (2 if kind == b"%" else 1))]
        return line + b"".join(parts)
    return line


def name_of(command: bytes) -> str:
    """The name in a command: `*2\\r\\n$3\\r\\nGET\\r\\n…` -> `GET`."""
    return command.split(b"\r\n", 3)[2].decode(errors="replace").upper()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a RST instead of a FIN."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
