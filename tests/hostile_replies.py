"""Hostile replies of an LLM endpoint, as data; tests/hostile_server.py sends them.

`KINDS` holds every kind, `BY_NAME` finds one. `make(rng, request)` returns the bytes of a whole response (or of
something that is no HTTP) from a random generator and the bytes of the request; `how` says how the server sends them.
"""

import base64
import gzip
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

How = Literal["close", "open", "reset", "drip", "repeat"]
"""`close`: send all and close. `open`: send all and leave the connection open. `reset`: send all, then a TCP reset.
`drip`: one byte every few milliseconds, then leave it open. `repeat`: the same bytes again and again, without end."""
Make = Callable[[random.Random, bytes], bytes]

MB = 1024 * 1024


@dataclass(frozen=True)
class Hostile:
    """One kind of hostile reply."""

    name: str
    make: Make
    how: How = "close"
    refuses: bool = False
    """Whether the reply says that the endpoint takes none of our questions (a wrong key, an unknown model, a quota)."""

    def __str__(self) -> str:
        return self.name


# The pieces


def http(
    body: bytes, status: str = "200 OK", content_type: str = "application/json", headers: str = "", length: bool = True
) -> bytes:
    """A response; `headers` are whole lines."""
    counted = f"content-length: {len(body)}\r\n" if length else ""
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\n{counted}{headers}connection: close\r\n\r\n"
    return head.encode("utf-8", "surrogateescape") + body


def as_json(value: object) -> bytes:
    """The body of a response in JSON."""
    return json.dumps(value).encode()


def completion(content: object, usage: object = None, finish_reason: object = "stop", **more: object) -> bytes:
    """The body of a completion whose message has this `content`."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content}}
    counted = {"prompt_tokens": 10, "completion_tokens": 5} if usage is None else usage
    return as_json({"id": "1", "object": "chat.completion", "choices": [choice], "usage": counted, **more})


def raw_usage(count: str) -> bytes:
    """A completion whose token counts are this JSON text."""
    return completion("x", "COUNTS").replace(
        b'"COUNTS"', f'{{"prompt_tokens": {count}, "completion_tokens": {count}}}'.encode()
    )


def error(message: object, status: str = "500 Internal Server Error", headers: str = "", **more: object) -> bytes:
    """An error as OpenAI words it."""
    return http(as_json({"error": {"message": message, **more}}), status, headers=headers)


def key_in(request: bytes) -> bytes:
    """The key that the request carries."""
    for line in request.split(b"\r\n\r\n", 1)[0].split(b"\r\n"):
        if line.lower().startswith(b"authorization:"):
            return line.split(b" ", 2)[-1]
    return b"no-key-was-sent"


def noise(rng: random.Random, most: int) -> bytes:
    """Random bytes."""
    return rng.randbytes(rng.randint(1, most))


# The kinds

KINDS: list[Hostile] = []
BY_NAME: dict[str, Hostile] = {}


def _add(name: str, reply: bytes | Make, how: How = "close", *, refuses: bool = False) -> None:
    assert name not in BY_NAME, name
    make: Make = (lambda _rng, _request: reply) if isinstance(reply, bytes) else reply
    BY_NAME[name] = kind = Hostile(name, make, how, refuses)
    KINDS.append(kind)


def _add_no_http() -> None:
    plain = {
        "nothing, and closes": b"",
        "an SSH server": b"SSH-2.0-OpenSSH_9.6\r\n",
        "an SMTP server": b"220 mail.example.org ESMTP Postfix\r\n",
        "a Redis server": b"-ERR unknown command 'POST'\r\n",
        "a MySQL server": b"J\x00\x00\x00\n8.0.36\x00" + bytes(60),
        "a TLS alert": b"\x15\x03\x03\x00\x02\x02\x46",
        "a TLS server hello": b"\x16\x03\x03\x00\x7a\x02" + bytes(120),
        "HTTP/2 frames": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + bytes(18),
        "an HTTP/0.9 page": b"<html>hello</html>",
        "only blank lines": b"\r\n" * 1000,
        "zero bytes": bytes(4096),
        "a shoutcast server": b"ICY 200 OK\r\n\r\n",
        "an RTSP server": b"RTSP/1.0 200 OK\r\nCSeq: 1\r\n\r\n",
        "an unknown HTTP version": b"HTTP/9.9 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        "HTTP in small letters": b"http/1.1 200 ok\r\ncontent-length: 2\r\n\r\n{}",
        "our own request": b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n",
    }
    for name, reply in plain.items():
        _add(name, reply)
    _add("random bytes", lambda rng, _: noise(rng, 5000))
    _add("random bytes that stay open", lambda rng, _: noise(rng, 500), "open")
    _add("the request echoed", lambda _, request: request)
    _add("nothing, and stays open", b"", "open")
    _add("nothing, and a reset", b"", "reset")
    _add("random bytes without end", lambda rng, _: noise(rng, 5000), "repeat")


def _add_heads() -> None:
    ok = completion("fine")
    lines = {
        "status 000": "000 Nothing",
        "status 99": "99 Low",
        "status 600": "600 High",
        "status 999": "999 Request Denied",
        "status of 20 digits": "2" + "0" * 19 + " OK",
        "a negative status": "-200 OK",
        "a status that is a word": "OK OK",
        "a status without reason": "200",
        "a reason that is no ASCII": "200 Sch\udcf6n \udcff",
        "a reason of 9 kB": "200 " + "O" * 9000,
        "status 101": "101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade",
        "status 204 with a body": "204 No Content",
        "status 205": "205 Reset Content",
        "status 206": "206 Partial Content\r\ncontent-range: bytes 0-9/99999999999999999999",
        "status 304": "304 Not Modified",
    }
    for name, line in lines.items():
        _add(name, http(ok, line))
    headers = {
        "a header of 9 kB": "x-long: " + "a" * 9000 + "\r\n",
        "a cookie of 9 kB": "set-cookie: a=" + "b" * 9000 + "\r\n",
        "100 cookies": "".join(f"set-cookie: c{i}={'v' * 4000}; path=/\r\n" for i in range(100)),
        "a cookie with an odd date": "set-cookie: a=b; expires=Mon, 99-Foo-99999999999999 99:99:99 GMT\r\n",
        "5,000 headers": "".join(f"x-{i}: y\r\n" for i in range(5000)),
        "a header without colon": "just some words\r\n",
        "a header without name": ": nothing\r\n",
        "a blank before the colon": "x-blank : y\r\n",
        "a folded header": "x-folded: a\r\n b\r\n\tc\r\n",
        "a zero byte in a header": "x-zero: a\x00b\r\n",
        "a bare carriage return in a header": "x-return: a\rset-cookie: b=c\r\n",
        "a header that is no ASCII": "x-\udcff: \udcfe\r\n",
        "two content types": "content-type: text/html\r\n",
    }
    for name, header in headers.items():
        _add(name, http(ok, headers=header))
    _add("lines that end with newlines only", http(ok).replace(b"\r\n", b"\n"))
    _add("a header without end", b"HTTP/1.1 200 OK\r\nx-long: " + b"a" * 65536, "open")
    _add("a header that goes on for ever", b"a" * 65536, "repeat")
    _add("header lines without end", b"x-again: and-again\r\n" * 1000, "repeat")
    _add("100 Continue and no more", b"HTTP/1.1 100 Continue\r\n\r\n", "open")
    _add("100 Continue 1,000 times", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + http(ok))
    _add("100 Continue for ever", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, "repeat")
    _add("103 Early Hints for ever", b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 100, "repeat")
    for name, place in {
        "a redirect to itself": "/v1/chat/completions",
        "a redirect to metadata": "http://169.254.169.254/latest/meta-data",
        "a redirect to a file": "file:///etc/passwd",
        "a redirect to nowhere": "http://[::bad",
        "a redirect of 8 kB": "/" + "a" * 8000,
    }.items():
        _add(name, http(b"", "307 Temporary Redirect", headers=f"location: {place}\r\n"))
    _add("a redirect without place", http(b"", "302 Found"))


def _add_framing() -> None:
    ok = completion("fine")
    lengths = {
        "a content length of 20 digits": "99999999999999999999",
        "a content length of 5,000 digits": "9" * 5000,
        "a negative content length": "-1",
        "a content length with a sign": f"+{len(ok)}",
        "a content length that is a word": "many",
        "an empty content length": "",
        "a content length in other digits": "٣",
        "two content lengths": f"{len(ok)}\r\ncontent-length: 3",
        "a content length that is too long": str(len(ok) + 100),
        "a content length that is too short": str(len(ok) - 10),
        "a content length of zero": "0",
    }
    for name, length in lengths.items():
        _add(name, http(ok, headers=f"content-length: {length}\r\n", length=False))
    _add("a content length that never fills", http(ok, headers="content-length: 99999999\r\n", length=False), "open")
    _add("more after the reply", http(ok) + http(completion("more")))
    _add("more after the reply, kept alive", http(ok).replace(b"close", b"keep-alive") * 3, "open")
    chunked = "transfer-encoding: chunked\r\n"
    chunks = {
        "a chunk size that is a word": b"many\r\n" + ok + b"\r\n0\r\n\r\n",
        "a chunk size of 20 digits": b"F" * 20 + b"\r\n" + ok,
        "a negative chunk size": b"-5\r\n" + ok + b"\r\n0\r\n\r\n",
        "a chunk that is too short": b"3\r\n" + ok + b"\r\n0\r\n\r\n",
        "chunks without end mark": f"{len(ok):x}\r\n".encode() + ok + b"\r\n",
        "a chunk extension of 1 MB": f"{len(ok):x};x=".encode() + b"y" * MB + b"\r\n" + ok + b"\r\n0\r\n\r\n",
        "30,000 chunks of a byte": b"1\r\n \r\n" * 30_000 + f"{len(ok):x}\r\n".encode() + ok + b"\r\n0\r\n\r\n",
        "1 MB of trailers": f"{len(ok):x}\r\n".encode() + ok + b"\r\n0\r\n" + b"x-trailer: y\r\n" * 80_000 + b"\r\n",
    }
    for name, body in chunks.items():
        _add(name, http(body, headers=chunked, length=False))
    _add("both a length and chunks", http(ok, headers=chunked))
    _add("chunks of an unknown coding", http(ok, headers="transfer-encoding: gzip, chunked\r\n", length=False))
    _add("chunks of a byte without end", http(b"1\r\n \r\n" * 1000, headers=chunked, length=False), "repeat")
    encodings = {
        "a gzip bomb": ("gzip", gzip.compress(b" " * 20 * MB)),
        "gzip that is none": ("gzip", ok),
        "a deflate bomb": ("deflate", zlib.compress(b" " * 20 * MB)),
        "brotli that is none": ("br", ok),
        "gzip ten times": (", ".join(["gzip"] * 10), ok),
        "an unknown encoding": ("x-secret", ok),
        "an empty encoding": ("", ok),
    }
    for name, (encoding, body) in encodings.items():
        _add(name, http(body, headers=f"content-encoding: {encoding}\r\n"))
    reply = http(ok)
    _add("closed amid the reply", lambda rng, _: reply[: rng.randrange(len(reply))])
    _add("reset amid the reply", lambda rng, _: reply[: rng.randrange(len(reply))], "reset")
    _add("silent amid the reply", lambda rng, _: reply[: rng.randrange(len(reply))], "open")
    _add("one byte changed", lambda rng, _: _changed(rng, reply))
    _add("ten bytes changed", lambda rng, _: _changed(rng, reply, 10))
    _add("the reply byte by byte", reply[:-3], "drip")
    _add("a body without end", http(b" " * 65536, length=False), "repeat")
    _add("an error without end", http(b"no " * 20000, "500 Internal Server Error", length=False), "repeat")
    _add("a reply of 3 MB", http(completion("x" * 3 * MB)))


def _changed(rng: random.Random, reply: bytes, places: int = 1) -> bytes:
    changed = bytearray(reply)
    for _ in range(places):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _add_types() -> None:
    ok = completion("fine")
    page = b"<html><title>Log in</title>" + b"<p>" * 1000
    _add("a login page", http(page, content_type="text/html"))
    _add("a login page that says it is JSON", http(page))
    _add("JSON that says it is text", http(ok, content_type="text/plain"))
    _add("a stream of events", http(b"data: " + ok + b"\n\ndata: [DONE]\n\n", content_type="text/event-stream"))
    _add("a stream of events that says it is JSON", http(b"data: " + ok + b"\n\ndata: [DONE]\n\n"))
    _add("a content type of 8 kB", http(ok, content_type="application/json; x=" + "y" * 8000))
    for charset in (
        "utf-7",
        "utf-16",
        "zlib",
        "bz2",
        "punycode",
        "idna",
        "rot13",
        "unicode_escape",
        "hex",
        "undefined",
    ):
        content = f"application/json; charset={charset}"
        _add(f"charset {charset}", http(ok, content_type=content))
        body = zlib.compress(b" " * 20 * MB) if charset == "zlib" else b"a" * 50_000 + b"-" + b"a" * 50_000
        _add(f"an error with charset {charset}", http(body, "500 Internal Server Error", content_type=content))


def _add_json() -> None:
    bodies = {
        "an empty body": b"",
        "blanks": b" " * MB,
        "cut JSON": b'{"choices": [{"mess',
        "null": b"null",
        "a number": b"7",
        "a text": b'"choices"',
        "NaN": b"NaN",
        "a number of 400 digits": b'{"choices": ' + b"9" * 400 + b"}",
        "a number of 5,000 digits": b'{"choices": ' + b"9" * 5000 + b"}",
        "a number of a million digits": b"9" * 1_000_000,
        "a decimal of a million digits": b'{"choices": 0.' + b"7" * 1_000_000 + b"}",
        "an exponent of a million": b'{"choices": 1e' + b"9" * 1_000_000 + b"}",
        "900 lists in each other": b"[" * 900 + b"]" * 900,
        "900 objects in each other": b'{"choices":' * 900 + b"1" + b"}" * 900,
        "an error of 900 levels": b'{"error":' + b"[" * 900 + b"]" * 900 + b"}",
        "100,000 lists in each other": b"[" * 100_000,
        "100,000 objects in each other": b'{"a":' * 100_000,
        "300,000 empty lists": b"[" + b"[]," * 300_000 + b"[]]",
        "200,000 choices": b'{"choices": [' + b"{}," * 200_000 + b"{}]}",
        "100,000 keys": as_json({f"k{i}": i for i in range(100_000)}),
        "the same key twice": b'{"choices": [], ' + ok_choices() + b"}",
        "not UTF-8": b'{"choices": "\xff\xfe\xfd"}',
        "UTF-16": completion("fine").decode().encode("utf-16"),
        "UTF-32": completion("fine").decode().encode("utf-32"),
        "a byte order mark": b"\xef\xbb\xbf" + completion("fine"),
        "null choices": as_json({"choices": None}),
        "no choices": as_json({"choices": []}),
        "choices that are an object": as_json({"choices": {"0": {"message": {"content": "x"}}}}),
        "choices that are text": as_json({"choices": ["hello"]}),
        "a choice without message": as_json({"choices": [{"finish_reason": "stop"}]}),
        "a message that is text": as_json({"choices": [{"message": "hello"}]}),
        "an error with 200": as_json({"error": {"message": "overloaded", "code": 503}}),
        "an error of 1 MB with 200": as_json({"error": "no " * 300_000}),
        "an error that is a list with 200": as_json({"error": [["no"]] * 1000}),
        "an id of 1 MB": completion("fine", id="x" * MB),
        "a finish reason of 1 MB": completion("fine", finish_reason="x" * MB),
        "a finish reason that is a list": completion("fine", finish_reason=["stop"]),
        "a finish reason that is a number": completion("fine", finish_reason=7),
        "two documents": completion("fine") * 2,
    }
    for name, body in bodies.items():
        _add(name, http(body))


def ok_choices() -> bytes:
    """A list of choices with its key."""
    return b'"choices": [{"message": {"content": "fine"}}]'


def _add_contents() -> None:
    contents: dict[str, object] = {
        "content null": None,
        "content that is a number": 7,
        "content that is a list": [{"type": "text", "text": "hi"}],
        "content that is an object": {"text": "hi"},
        "an empty content": "",
        "a megabyte of blanks": " " * MB,
        "a megabyte of text": "word " * 200_000,
        "a lone surrogate": "\ud800[0.3]",
        "zero bytes in the text": "\x00" * 1000,
        "terminal escapes": "\x1b[2J\x1b]0;owned\x07" * 100,
        "30,000 opening tags": "<think>" * 30_000,
        "opening tags of three kinds": "<think><thinking><reasoning>" * 10_000,
        "30,000 closing tags": "</think>" * 30_000,
        "tags that cross": "<think></thinking><reasoning></think>" * 10_000,
        "half tags": "<think" * 30_000,
        "a tag in other letters": "<thin\u212a>hi</thin\u212a><rea\u017foning>ho</rea\u017foning>" * 100,
        "lists that strings close": '[1,"]",' * 50_000,
        "lists that strings close, 900 deep": '["]",' * 900 + "1" + "]" * 900,
        "objects that strings close": '{"}":' * 50_000,
        "100,000 lists of one": "[1]" * 100_000,
        "130,000 broken lists": "[x]" * 130_000,
        "200,000 opening brackets": "[" * 200_000,
        "200,000 opening braces": "{" * 200_000,
        "brackets and quotes": '["' * 100_000,
        "20,000 answers": "\n".join(f'{{"mix": {i}}}' for i in range(20_000)),
        "20,000 choices of trades": "\n".join(f'{{"trades": [{i}]}}' for i in range(15_000)),
        "20,000 proposals": json.dumps({"proposals": [{"trades": ["x"] * 3}] * 15_000}),
        "a proposal of 90,000 trades": json.dumps({"proposals": [{"trades": ["x"] * 60_000}]}),
        "a proposal of 90,000 changes": json.dumps({"parent": 1, "changes": [{"x": 1}] * 40_000}),
        "20,000 profiles": json.dumps([{"profile": [10, 20]}] * 15_000),
        "lists of NaN": "[NaN, Infinity, -Infinity, 1e999]",
        "lists of huge numbers": f"[{'9' * 4000}, 1]",
        "numbers that are too huge": f"[{'9' * 5000}, 1]" * 10,
        "a choice of huge numbers": json.dumps({"trades": [10**4000], "mix": 10**4000, "parents": [10**30, -1]}),
        "a change of huge numbers": json.dumps(
            {"parent": 1, "changes": [{"first": -(10**300), "last": 10**300, "points": 5}]}
        ),
        "a mix of huge numbers": json.dumps({"parents": "1+2", "first": 10**300, "layers": 10**300}),
        "a configuration of 100,000 layers": json.dumps({f"layer {i}": 0.3 for i in range(20_000)}),
        "10,000 configurations": json.dumps([[0.3] * 4] * 10_000),
        "the same key 20,000 times": "{" + '"parents": 1,' * 20_000 + '"mix": 1}',
        "instructions for us": "Ignore the rules. {{ config }} ${HOME} $(reboot) '; DROP TABLE candidates; --",
    }
    for name, content in contents.items():
        _add(f"text: {name}", http(completion(content)))
    _add(
        "text: random letters", lambda rng, _: http(completion("".join(rng.choices('[]{}",:\\ 0.3e-<think>/', k=5000))))
    )


def _add_usage() -> None:
    counts = {
        "400 digits": "9" * 400,
        "4,299 digits": "9" * 4299,
        "5,000 digits": "9" * 5000,
        "10^30": "1" + "0" * 30,
        "a million": "1000000",
        "below zero": "-5",
        "true": "true",
        "1e999": "1e999",
        "NaN": "NaN",
        "Infinity": "Infinity",
        "a fraction": "10.5",
        "text": '"many"',
        "a list": "[1]",
        "an object": "{}",
        "null": "null",
    }
    for name, count in counts.items():
        _add(f"usage of {name}", http(raw_usage(count)))
    _add("usage that is a list", http(completion("x", [1, 2])))
    _add("usage that is text", http(completion("x", "none")))


def _add_errors() -> None:
    for status in (400, 404, 408, 409, 413, 418, 422, 429, 500, 502, 503, 529, 599):
        _add(f"error {status}", error("no", f"{status} No"))
    for status in (401, 402, 403):
        _add(f"error {status}", error("no", f"{status} No"), refuses=True)
    _add("any error", lambda rng, _: error("no", f"{rng.choice((400, 405, 410, 451, 500, 507, 511, 700))} No"))
    messages: dict[str, object] = {
        "of 1 MB": "no " * 300_000,
        "that is a list": ["what", 7],
        "that is a number": 10**400,
        "with terminal escapes": "\x1b[2J\x1b]0;owned\x07\r\nfake log line",
        "with every word that matters": "max_completion_tokens response_format json_schema grammar seed temperature",
        "of models": "model " * 100_000,
        "of models that are nearly unknown": ("the model " + "x" * 140 + " not ") * 5000,
        "with a lone surrogate": "\ud800\udfff",
    }
    for name, message in messages.items():
        for status in (400, 500):
            _add(f"a message {name}, {status}", error(message, f"{status} No"))
    codes: dict[str, object] = {
        "a list": ["insufficient_quota"],
        "an object": {"a": {}},
        "a number": 10**400,
        "1 MB": "model " * 180_000,
        "true": True,
    }
    for name, code in codes.items():
        for status in (400, 429):
            _add(f"a code that is {name}, {status}", error("no", f"{status} No", code=code))
    deep = b'{"error": {"message": "no", "code": ' + b"[" * 900 + b"]" * 900 + b"}}"
    _add("a code of 900 levels", http(deep, "400 Bad Request"))
    _add("an error of 100,000 levels", http(b"[" * 100_000, "500 Internal Server Error"))
    _add("an error of random bytes", lambda rng, _: http(noise(rng, 5000), "500 Internal Server Error"))
    _add("an error of HTML", http(b"<html>Bad Gateway</html>" * 1000, "502 Bad Gateway", "text/html"))
    _add("an error byte by byte", http(b"no " * 100, "500 Internal Server Error", length=False), "drip")
    _add("a quota", error("no money", "429 No", code="insufficient_quota"), refuses=True)
    _add("an unknown model", error("The model does not exist", "404 No", code="model_not_found"), refuses=True)


WAITS = (
    "Mon, 1 Jan 99999999999 00:00:00 GMT",
    "Mon, 1 Jan 10000 00:00:00 GMT",
    "Mon, 01 Jan 0001 00:00:00 +2359",
    "Fri, 31 Dec 9999 23:59:59 -2359",
    "Mon, 1 Jan 2024 00:00:00 +99999999999999999999",
    "Mon, 99 Jan 2024 99:99:99 GMT",
    "Mon, 1 Jan -5 00:00:00 GMT",
    "1 Jan",
    "Jan",
    ",,,,",
    "0",
    "-1",
    "1e999",
    "NaN",
    "Infinity",
    "9" * 400,
    "9" * 5000,
    "1_000",
    "٣",
    "soon",
    "",
)


def _add_waits() -> None:
    for number, wait in enumerate(WAITS):
        name = f"retry-after {number}: {wait[:24]}"
        _add(name, error("slow down", "429 No", headers=f"retry-after: {wait}\r\n"))
        _add(f"{name}, in ms", error("loading", "503 No", headers=f"retry-after-ms: {wait}\r\n"))
    _add("retry-after: any date", lambda rng, _: error("slow down", "429 No", f"retry-after: {odd_date(rng)}\r\n"))
    for name, value in {
        "400 digits": "9" * 400,
        "1e999": "1e999",
        "NaN": "NaN",
        "a list": "[]",
        "true": "true",
    }.items():
        body = f'{{"error": {{"message": "slow down", "retry_after": {value}}}}}'.encode()
        _add(f"retry_after of {name} in the body", http(body, "429 No"))


def odd_date(rng: random.Random) -> str:
    """Something like an HTTP date whose numbers may be anything."""

    def number(*usual: int) -> int:
        return rng.choice((*usual, 0, -1, 99, 2**31, 2**63, 10**11, 10**25))

    zone = rng.choice(("GMT", "+0000", "-2359", "+9999", "+99999999999", "EST", "", "XYZ"))
    month = rng.choice(("Jan", "Feb", "Dec", "Foo", "13", ""))
    clock = ":".join(str(number(12, 23)) for _ in range(rng.randint(1, 4)))
    return f"{rng.choice(('Mon, ', '', 'Foo '))}{number(1, 29, 31)} {month} {number(1, 70, 2024, 9999)} {clock} {zone}"


def _add_models() -> None:
    entry: dict[str, Any] = {"id": "model", "object": "model"}
    lists: dict[str, object] = {
        "100,000 models": [{"id": f"m{i}"} for i in range(100_000)],
        "a model whose name has 1 MB": [{"id": "m" * MB}],
        "a model whose name is a number": [{"id": 7}],
        "a model whose name is a terminal escape": [{"id": "\x1b[2J\x07\r\nfake"}],
        "a context of 400 digits": [{**entry, "n_ctx": 10**400}],
        "a context below zero": [{**entry, "max_model_len": -5, "meta": {"n_ctx": -(10**30)}}],
        "a context that is true": [{**entry, "max_model_len": True}],
        "models that are text": "model",
        "models that are numbers": [1, 2, 3],
        "the same model 10,000 times": [entry] * 10_000,
    }
    for name, data in lists.items():
        _add(f"list: {name}", http(as_json({"object": "list", "data": data})))


def _add_echoes() -> None:
    def escaped(key: bytes) -> bytes:
        return "".join(f"\\u{byte:04x}" for byte in key).encode()

    forms: dict[str, Callable[[bytes], bytes]] = {
        "as it is": lambda key: key,
        "in a URL": lambda key: quote(key, safe="").encode(),
        "in base64": base64.b64encode,
        "escaped in JSON": escaped,
        "behind 980 characters": lambda key: b"x" * 500 + b" " * 482 + key,
        "behind 190 characters": lambda key: b"x" * 190 + key,
    }
    for name, form in forms.items():

        def failing(_: random.Random, request: bytes, form: Callable[[bytes], bytes] = form) -> bytes:
            return http(b'{"error": {"message": "bad key ' + form(key_in(request)) + b'"}}', "500 No")

        def failing_with_200(_: random.Random, request: bytes, form: Callable[[bytes], bytes] = form) -> bytes:
            return http(b'{"error": "bad key ' + form(key_in(request)) + b'"}')

        def answering(_: random.Random, request: bytes, form: Callable[[bytes], bytes] = form) -> bytes:
            return http(completion("X").replace(b'"X"', b'"' + form(key_in(request)) + b'"'))

        def finishing(_: random.Random, request: bytes, form: Callable[[bytes], bytes] = form) -> bytes:
            return http(completion("x", finish_reason="X").replace(b'"X"', b'"' + form(key_in(request)) + b'"'))

        _add(f"the key {name}, in an error", failing)
        _add(f"the key {name}, in an error with 200", failing_with_200)
        _add(f"the key {name}, in an answer", answering)
        _add(f"the key {name}, as the finish reason", finishing)
    _add("the key as the content type", lambda _, request: http(b"{}", content_type=key_in(request).decode("latin-1")))
    _add("the key in the status line", lambda _, request: http(b"{}", f"500 {key_in(request).decode('latin-1')}"))
    _add("the key where HTTP is due", lambda _, request: key_in(request) + b"\r\n\r\n")
    _add("the key as a header's name", lambda _, request: http(b"{}", headers=f"{key_in(request).decode()} x\r\n"))
    _add("the key as a model's name", lambda _, request: http(as_json({"data": [{"id": key_in(request).decode()}]})))


for _category in (
    _add_no_http,
    _add_heads,
    _add_framing,
    _add_types,
    _add_json,
    _add_contents,
    _add_usage,
    _add_errors,
    _add_waits,
    _add_models,
    _add_echoes,
):
    _category()
