"""Hostile replies in valid HTTP: hostile JSON, texts, numbers and errors."""

import base64
import itertools
import json
import random
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from tests.support.hostile_parts import MB, add, as_json, completion, error, http, key_in, noise, raw_usage


def add_json() -> None:
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
        add(name, http(body))


def ok_choices() -> bytes:
    """A list of choices with its key."""
    return b'"choices": [{"message": {"content": "fine"}}]'


def add_contents() -> None:
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
        "20,000 choices of moves": "\n".join(f'{{"moves": [{i}]}}' for i in range(15_000)),
        "20,000 proposals": json.dumps({"proposals": [{"moves": ["x"] * 3}] * 15_000}),
        "a proposal of 90,000 moves": json.dumps({"proposals": [{"moves": ["x"] * 60_000}]}),
        "a proposal of 90,000 changes": json.dumps({"parent": 1, "changes": [{"x": 1}] * 40_000}),
        "20,000 profiles": json.dumps([{"profile": [10, 20]}] * 15_000),
        "lists of NaN": "[NaN, Infinity, -Infinity, 1e999]",
        "lists of huge numbers": f"[{'9' * 4000}, 1]",
        "numbers that are too huge": f"[{'9' * 5000}, 1]" * 10,
        "a choice of huge numbers": json.dumps({"moves": [10**4000], "mix": 10**4000, "parents": [10**30, -1]}),
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
        add(f"text: {name}", http(completion(content)))
    add(
        "text: random letters", lambda rng, _: http(completion("".join(rng.choices('[]{}",:\\ 0.3e-<think>/', k=5000))))
    )


def add_usage() -> None:
    counts = {"400 digits": "9" * 400, "4,299 digits": "9" * 4299, "5,000 digits": "9" * 5000}
    counts |= {"10^30": "1" + "0" * 30, "a million": "1000000", "below zero": "-5", "a fraction": "10.5"}
    counts |= {"text": '"many"', "a list": "[1]", "an object": "{}"}
    counts |= {word: word for word in ("true", "null", "1e999", "NaN", "Infinity")}
    for name, count in counts.items():
        add(f"usage of {name}", http(raw_usage(count)))
    add("usage that is a list", http(completion("x", [1, 2])))
    add("usage that is text", http(completion("x", "none")))


def add_errors() -> None:
    for status in (400, 404, 408, 409, 413, 418, 422, 429, 500, 502, 503, 529, 599):
        add(f"error {status}", error("no", f"{status} No"))
    for status in (401, 402, 403):
        add(f"error {status}", error("no", f"{status} No"), refuses=True)
    add("any error", lambda rng, _: error("no", f"{rng.choice((400, 405, 410, 451, 500, 507, 511, 700))} No"))
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
            add(f"a message {name}, {status}", error(message, f"{status} No"))
    codes: dict[str, object] = {
        "a list": ["insufficient_quota"],
        "an object": {"a": {}},
        "a number": 10**400,
        "1 MB": "model " * 180_000,
        "true": True,
    }
    for name, code in codes.items():
        for status in (400, 429):
            add(f"a code that is {name}, {status}", error("no", f"{status} No", code=code))
    deep = b'{"error": {"message": "no", "code": ' + b"[" * 900 + b"]" * 900 + b"}}"
    add("a code of 900 levels", http(deep, "400 Bad Request"))
    add("an error of 100,000 levels", http(b"[" * 100_000, "500 Internal Server Error"))
    add("an error of random bytes", lambda rng, _: http(noise(rng, 5000), "500 Internal Server Error"))
    add("an error of HTML", http(b"<html>Bad Gateway</html>" * 1000, "502 Bad Gateway", "text/html"))
    add("an error byte by byte", http(b"no " * 100, "500 Internal Server Error", length=False), "drip")
    add("a quota", error("no money", "429 No", code="insufficient_quota"), refuses=True)
    add("an unknown model", error("The model does not exist", "404 No", code="model_not_found"), refuses=True)


WAITS = (
    "Mon, 1 Jan 99999999999 00:00:00 GMT",
    "Mon, 1 Jan 10000 00:00:00 GMT",
    "Mon, 01 Jan 0001 00:00:00 +2359",
    "Fri, 31 Dec 9999 23:59:59 -2359",
    "Mon, 1 Jan 2024 00:00:00 +99999999999999999999",
    "Mon, 99 Jan 2024 99:99:99 GMT",
    "Mon, 1 Jan -5 00:00:00 GMT",
    *("1 Jan", "Jan", ",,,,", "soon", ""),
    *("0", "-1", "1e999", "NaN", "Infinity", "9" * 400, "9" * 5000, "1_000", "٣"),
)


def add_waits() -> None:
    for number, wait in enumerate(WAITS):
        name = f"retry-after {number}: {wait[:24]}"
        add(name, error("slow down", "429 No", headers=f"retry-after: {wait}\r\n"))
        add(f"{name}, in ms", error("loading", "503 No", headers=f"retry-after-ms: {wait}\r\n"))
    add("retry-after: any date", lambda rng, _: error("slow down", "429 No", f"retry-after: {odd_date(rng)}\r\n"))
    values = {"400 digits": "9" * 400, "1e999": "1e999", "NaN": "NaN", "a list": "[]", "true": "true"}
    for name, value in values.items():
        body = f'{{"error": {{"message": "slow down", "retry_after": {value}}}}}'.encode()
        add(f"retry_after of {name} in the body", http(body, "429 No"))


def odd_date(rng: random.Random) -> str:
    """Return an HTTP date with arbitrary numbers."""

    def number(*usual: int) -> int:
        return rng.choice((*usual, 0, -1, 99, 2**31, 2**63, 10**11, 10**25))

    zone = rng.choice(("GMT", "+0000", "-2359", "+9999", "+99999999999", "EST", "", "XYZ"))
    month = rng.choice(("Jan", "Feb", "Dec", "Foo", "13", ""))
    clock = ":".join(str(number(12, 23)) for _ in range(rng.randint(1, 4)))
    return f"{rng.choice(('Mon, ', '', 'Foo '))}{number(1, 29, 31)} {month} {number(1, 70, 2024, 9999)} {clock} {zone}"


def add_models() -> None:
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
        add(f"list: {name}", http(as_json({"object": "list", "data": data})))


def add_echoes() -> None:
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
    places = {
        "in an error": (b'{"error": {"message": "bad key X"}}', "500 No"),
        "in an error with 200": (b'{"error": "bad key X"}', "200 OK"),
        "in an answer": (completion("X"), "200 OK"),
        "as the finish reason": (completion("x", finish_reason="X"), "200 OK"),
    }
    for (name, form), (place, (body, status)) in itertools.product(forms.items(), places.items()):

        def echo(_: random.Random, request: bytes, form: Any = form, body: bytes = body, status: str = status) -> bytes:
            return http(body.replace(b"X", form(key_in(request))), status)

        add(f"the key {name}, {place}", echo)
    add("the key as the content type", lambda _, request: http(b"{}", content_type=key_in(request).decode("latin-1")))
    add("the key in the status line", lambda _, request: http(b"{}", f"500 {key_in(request).decode('latin-1')}"))
    add("the key where HTTP is due", lambda _, request: key_in(request) + b"\r\n\r\n")
    add("the key as a header's name", lambda _, request: http(b"{}", headers=f"{key_in(request).decode()} x\r\n"))
    add("the key as a model's name", lambda _, request: http(as_json({"data": [{"id": key_in(request).decode()}]})))


def add_bodies() -> None:
    """Add all of them to the list."""
    add_json()
    add_contents()
    add_usage()
    add_errors()
    add_waits()
    add_models()
    add_echoes()
