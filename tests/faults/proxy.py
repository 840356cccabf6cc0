"""A TCP proxy in front of a server: latency, cut connections, and a blackhole."""

import asyncio
import random
import socket
import struct
from pathlib import Path
from typing import Self


class Proxy:
    """Forwards to a unix socket. Change `latency`, `cut_share` (of forwarded blocks) and `blackhole` at any time."""

    def __init__(self, target: Path, seed: int = 0) -> None:
        self.latency = 0.0
        self.cut_share = 0.0
        self.blackhole = False
        self.cuts = 0
        self._target = target
        self._random = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
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
        try:
            there_reader, there_writer = await asyncio.open_unix_connection(str(self._target))
        except OSError:
            reset(writer)
            return
        ways = {
            asyncio.create_task(self._pump(reader, there_writer, writer)),
            asyncio.create_task(self._pump(there_reader, writer, writer)),
        }
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            writer.close()
            there_writer.close()
            self._tasks.discard(task)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, client: asyncio.StreamWriter
    ) -> None:
        while block := await source.read(65536):
            await asyncio.sleep(self.latency)
            while self.blackhole:
                await asyncio.sleep(0.05)
            if self._random.random() < self.cut_share:
                self.cuts += 1
                reset(client)
                return
            sink.write(block)
            await sink.drain()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a RST instead of a FIN."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
