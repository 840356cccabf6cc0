"""Malformed HTTP requests as bytes, and a seeded random source of more."""

import gzip
import random
from collections.abc import Iterator

HOST = b"Host: localhost\r\n"


def get(path: bytes, headers: bytes = b"", host: bytes = HOST) -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\n" + host + headers + b"Connection: close\r\n\r\n"


def post(headers: bytes, body: bytes) -> bytes:
    head = b"POST /api/control HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nConnection: close\r\n"
    return head + headers + b"\r\n" + body


def posts() -> dict[str, bytes]:
    """Return requests whose bodies do not match their headers."""
    chunked, nine = b"Transfer-Encoding: chunked\r\n", b"Content-Length: 9\r\n"
    torn = gzip.compress(b'{"command":"pause"}' * 9)[:20]
    return {
        "length and chunks": post(b"Content-Length: 4\r\n" + chunked, b"0\r\n\r\nGET /livez HTTP/1.1\r\n\r\n"),
        "chunked twice": post(chunked + b"Transfer-Encoding: identity\r\n", b"0\r\n\r\n"),
        "xchunked": post(b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n"),
        "two lengths": post(b"Content-Length: 4\r\nContent-Length: 5\r\n", b"abcd"),
        **{
            f"length {name}": post(b"Content-Length: " + length + b"\r\n", b"abcd")
            for name, length in {
                "negative": b"-4",
                "signed": b"+4",
                "a word": b"four",
                "in Arabic": "\u0664".encode(),
                "of 23 digits": b"9" * 23,
                "of 5000 digits": b"9" * 5000,
            }.items()
        },
        "chunk size a word": post(chunked, b"zz\r\nabc\r\n0\r\n\r\n"),
        "chunk size negative": post(chunked, b"-1\r\nabc\r\n0\r\n\r\n"),
        "chunk size huge": post(chunked, b"f" * 18 + b"\r\nabc\r\n0\r\n\r\n"),
        "chunk longer than it says": post(chunked, b"2\r\nabcdef\r\n0\r\n\r\n"),
        "chunk extension": post(chunked, b"2;" + b"a" * 100_000 + b"\r\nab\r\n0\r\n\r\n"),
        "trailers": post(chunked, b"0\r\n" + b"X: y\r\n" * 20_000 + b"\r\n"),
        **{
            f"{encoding.decode()} that is none": post(b"Content-Encoding: " + encoding + b"\r\n" + nine, b"not gzip!")
            for encoding in (b"gzip", b"deflate", b"br", b"zstd", b"unknown")
        },
        "gzip torn": post(b"Content-Encoding: gzip\r\nContent-Length: 20\r\n", torn),
        "expects something else": post(b"Expect: 200-ok\r\n" + nine, b"not gzip!"),
        "deep JSON": post(b"Content-Length: 60000\r\n", b"[" * 60_000),
        "JSON that is not UTF-8": post(b"Content-Length: 4\r\n", b"\xff\xfe\xfd\xfc"),
    }


def gets() -> dict[str, bytes]:
    """Return request heads that are malformed or forbidden."""
    return {
        "two hosts": get(b"/livez", HOST),
        "no host": get(b"/livez", host=b""),
        **{
            f"host {host!r}": get(b"/livez", host=b"Host: " + host + b"\r\n")
            for host in (
                b"",
                b"evil@localhost",
                b"localhost:80@evil.example",
                b"[::1",
                b"[::1]evil.example",
                b"[::1%25eth0]",
                b"localhost:x",
                b"localhost/../x",
                b"\xff\xfe",
                b"a" * 8000,
            )
        },
        "path of 9 kB": get(b"/" + b"a" * 9000),
        "query of 100,000 parameters": get(b"/livez?" + b"a=1&" * 100_000),
        "header of 9 kB": get(b"/livez", b"X: " + b"a" * 9000 + b"\r\n"),
        "header name of 9 kB": get(b"/livez", b"X" * 9000 + b": a\r\n"),
        "5000 headers": get(b"/livez", b"X: y\r\n" * 5000),
        "header without a colon": get(b"/livez", b"nonsense\r\n"),
        "header without a name": get(b"/livez", b": a\r\n"),
        "folded header": get(b"/livez", b"X: a\r\n b\r\n"),
        "NUL in a header": get(b"/livez", b"Authorization: Bearer a\0b\r\n"),
        "NUL in the path": get(b"/li\0vez"),
        "bytes in the path": get(b"/api/candidates/\xff\xfe"),
        "path ..": get(b"/api/../../etc/passwd"),
        "no path": get(b""),
        "relative path": get(b"livez"),
        "spaces in the path": get(b"/a b c"),
        "a URL of another host": get(b"http://evil.example/livez"),
        "a URL with a user and another host": get(b"http://localhost@evil.example/livez"),
        "a URL with half an address": get(b"http://[::1/livez"),
        "a URL with a port that is none": get(b"http://localhost:99999999/livez"),
        "a file's URL": get(b"file:///etc/passwd"),
        "a script's URL": get(b"javascript:alert(1)"),
        "method G@T": b"G@T /livez HTTP/1.1\r\n" + HOST + b"\r\n",
        "method of 3000 letters": b"A" * 3000 + b" /livez HTTP/1.1\r\n" + HOST + b"\r\n",
        "version 9.9": b"GET /livez HTTP/9.9\r\n" + HOST + b"\r\n",
        "version x": b"GET /livez HTTP/x\r\n" + HOST + b"\r\n",
        "no version": b"GET /livez\r\n\r\n",
        "line feeds only": b"GET /livez HTTP/1.1\nHost: localhost\n\n",
        **{
            f"{method.decode()} {target.decode()}": get(target).replace(b"GET", method, 1)
            for method, target in ((b"OPTIONS", b"*"), (b"TRACE", b"/livez"), (b"CONNECT", b"localhost:22"))
        },
    }


def other_protocols() -> dict[str, bytes]:
    """Return requests of other protocols."""
    return {
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(20),
        "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(160),
        "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
        "Redis": b"*1\r\n$4\r\nPING\r\n",
        "NUL bytes": bytes(5000),
        "every byte": bytes(range(256)) * 20,
    }


CORPUS = {**gets(), **posts(), **other_protocols()}
"""Requests that get a 4xx answer even with the token."""


def with_token(request: bytes, token: str) -> bytes:
    """Return the request with the token added, if it has a Host header."""
    return request.replace(HOST, HOST + f"Authorization: Bearer {token}\r\n".encode(), 1)


def mutated(seed: int, count: int) -> Iterator[bytes]:
    """Yield requests of the corpus with bytes changed, removed, doubled, or joined to others."""
    draw = random.Random(seed)
    pieces = (b"\r\n", b"\0", b":", b" ", b"%", b"\xff", b"HTTP/1.1", b"9" * 30)
    known = [request[:3000] for request in CORPUS.values()]
    for _ in range(count):
        request = bytearray(draw.choice(known))
        for _ in range(draw.randint(1, 6)):
            place = draw.randrange(len(request) + 1)
            match draw.randrange(5):
                case 0:
                    request[place : place + 1] = draw.randbytes(1)
                case 1:
                    request[place : place + draw.randint(1, 20)] = b""
                case 2:
                    request[place:place] = request[place : place + draw.randint(1, 200)]
                case 3:
                    request[place:place] = draw.choice(pieces)
                case 4:
                    request += draw.choice(known)
        yield bytes(request)
