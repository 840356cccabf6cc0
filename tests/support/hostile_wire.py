"""Hostile replies that violate HTTP, or use it in unusual ways."""

import gzip
import random
import zlib

from tests.support.hostile_parts import MB, add, completion, http, noise


def add_no_http() -> None:
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
        add(name, reply)
    add("random bytes", lambda rng, _: noise(rng, 5000))
    add("random bytes that stay open", lambda rng, _: noise(rng, 500), "open")
    add("the request echoed", lambda _, request: request)
    add("nothing, and stays open", b"", "open")
    add("nothing, and a reset", b"", "reset")
    add("random bytes without end", lambda rng, _: noise(rng, 5000), "repeat")


def add_heads() -> None:
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
        add(name, http(ok, line))
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
        add(name, http(ok, headers=header))
    add("lines that end with newlines only", http(ok).replace(b"\r\n", b"\n"))
    add("a header without end", b"HTTP/1.1 200 OK\r\nx-long: " + b"a" * 65536, "open")
    add("a header that goes on for ever", b"a" * 65536, "repeat")
    add("header lines without end", b"x-again: and-again\r\n" * 1000, "repeat")
    add("100 Continue and no more", b"HTTP/1.1 100 Continue\r\n\r\n", "open")
    add("100 Continue 1,000 times", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + http(ok))
    add("100 Continue for ever", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, "repeat")
    add("103 Early Hints for ever", b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 100, "repeat")
    for name, place in {
        "a redirect to itself": "/v1/chat/completions",
        "a redirect to metadata": "http://169.254.169.254/latest/meta-data",
        "a redirect to a file": "file:///etc/passwd",
        "a redirect to nowhere": "http://[::bad",
        "a redirect of 8 kB": "/" + "a" * 8000,
    }.items():
        add(name, http(b"", "307 Temporary Redirect", headers=f"location: {place}\r\n"))
    add("a redirect without place", http(b"", "302 Found"))


def add_framing() -> None:
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
        add(name, http(ok, headers=f"content-length: {length}\r\n", length=False))
    add("a content length that never fills", http(ok, headers="content-length: 99999999\r\n", length=False), "open")
    add("more after the reply", http(ok) + http(completion("more")))
    add("more after the reply, kept alive", http(ok).replace(b"close", b"keep-alive") * 3, "open")
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
        add(name, http(body, headers=chunked, length=False))
    add("both a length and chunks", http(ok, headers=chunked))
    add("chunks of an unknown coding", http(ok, headers="transfer-encoding: gzip, chunked\r\n", length=False))
    add("chunks of a byte without end", http(b"1\r\n \r\n" * 1000, headers=chunked, length=False), "repeat")
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
        add(name, http(body, headers=f"content-encoding: {encoding}\r\n"))
    reply = http(ok)
    add("closed amid the reply", lambda rng, _: reply[: rng.randrange(len(reply))])
    add("reset amid the reply", lambda rng, _: reply[: rng.randrange(len(reply))], "reset")
    add("silent amid the reply", lambda rng, _: reply[: rng.randrange(len(reply))], "open")
    add("one byte changed", lambda rng, _: _changed(rng, reply))
    add("ten bytes changed", lambda rng, _: _changed(rng, reply, 10))
    add("the reply byte by byte", reply[:-3], "drip")
    add("a body without end", http(b" " * 65536, length=False), "repeat")
    add("an error without end", http(b"no " * 20000, "500 Internal Server Error", length=False), "repeat")
    add("a reply of 3 MB", http(completion("x" * 3 * MB)))


def _changed(rng: random.Random, reply: bytes, places: int = 1) -> bytes:
    changed = bytearray(reply)
    for _ in range(places):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def add_types() -> None:
    ok = completion("fine")
    page = b"<html><title>Log in</title>" + b"<p>" * 1000
    add("a login page", http(page, content_type="text/html"))
    add("a login page that says it is JSON", http(page))
    add("JSON that says it is text", http(ok, content_type="text/plain"))
    add("a stream of events", http(b"data: " + ok + b"\n\ndata: [DONE]\n\n", content_type="text/event-stream"))
    add("a stream of events that says it is JSON", http(b"data: " + ok + b"\n\ndata: [DONE]\n\n"))
    add("a content type of 8 kB", http(ok, content_type="application/json; x=" + "y" * 8000))
    charsets = ("utf-7", "utf-16", "zlib", "bz2", "punycode", "idna", "rot13", "unicode_escape", "hex", "undefined")
    for charset in charsets:
        content = f"application/json; charset={charset}"
        add(f"charset {charset}", http(ok, content_type=content))
        body = zlib.compress(b" " * 20 * MB) if charset == "zlib" else b"a" * 50_000 + b"-" + b"a" * 50_000
        add(f"an error with charset {charset}", http(body, "500 Internal Server Error", content_type=content))


def add_wire() -> None:
    """Add all of them to the list."""
    add_no_http()
    add_heads()
    add_framing()
    add_types()
