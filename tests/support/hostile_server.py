"""A raw TCP server that sends hostile replies.

async with HostileServer(lambda request: rng.choice(KINDS)) as server:
    endpoint = Endpoint("hostile", server.base_url, "model")
"""

import asyncio
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Self

from tests.support.hostile_replies import Hostile, How

DRIP_SECONDS = 0.005
LONGEST_TALK_SECONDS = 60.0
"""How long the server sends to a client that does not hang up."""


class HostileServer:
    """A raw TCP server on a free loopback port that answers each request with the kind that `choose` returns for it.

    An async context manager. `served` counts the kinds by name. Whole bytes returned by `choose` are sent as they are,
    so that a test can answer some requests well.
    """

    def __init__(self, choose: Callable[[bytes], Hostile | bytes], rng: random.Random | None = None) -> None:
        self.served: Counter[str] = Counter()
        self.port = 0
        self._choose = choose
        self._rng = rng or random.Random(0)
        self._talks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for talk in self._talks:
            talk.cancel()
        await asyncio.gather(*self._talks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the next turn of the loop

    @property
    def base_url(self) -> str:
        """The URL for an endpoint's settings."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        task.add_done_callback(self._talks.discard)
        try:
            async with asyncio.timeout(LONGEST_TALK_SECONDS):
                await self._answer(await _whole_request(reader), reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has hung up, or the test is over; a cancelled task would be reported by asyncio.streams
        finally:
            writer.transport.abort()

    async def _answer(self, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chosen = self._choose(request)
        if isinstance(chosen, bytes):
            writer.write(chosen)
        else:
            self.served[chosen.name] += 1
            await self._send(chosen.make(self._rng, request), chosen.how, reader, writer)
        writer.close()
        await writer.wait_closed()

    async def _send(self, reply: bytes, how: How, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in (reply[i : i + 1] for i in range(len(reply))) if how == "drip" else (reply,):
            writer.write(piece)
            await writer.drain()
            if how == "drip":
                await asyncio.sleep(DRIP_SECONDS)
        while how == "repeat":
            writer.write(reply)
            await writer.drain()
            await asyncio.sleep(0)  # drain() itself does not let others run
        if how == "reset":
            await asyncio.sleep(DRIP_SECONDS)  # the client first reads what was sent
            no_linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        elif how in ("open", "drip"):
            await reader.read()  # until the client hangs up


async def _whole_request(reader: asyncio.StreamReader) -> bytes:
    """Read the whole request, so that the client does not fail while sending."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return head + await reader.readexactly(length)
