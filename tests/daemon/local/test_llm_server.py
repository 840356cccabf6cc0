"""The local LLM server as a process: loads, answers within a schema, ends on a signal, and says what is wrong."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import openai
import psutil
import pytest

from agents.llm.chat import Chat
from agents.llm.endpoint import Endpoint, Question
from agents.prompting.schemas import lists_schema
from daemon.local.services import local_llm
from daemon.settings.llm import EndpointSettings
from daemon.settings.settings import Settings
from tests.agents.prompting.test_prompts import view_of
from tests.support.asked import ASKED
from tests.support.real_model import need_smollm2
from tests.support.servers import eventually

pytest.importorskip("xllamacpp")
need_smollm2()

SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {
        "numbers": {
            "type": "array",
            "minItems": 3,
            "maxItems": 3,
            "items": {"type": "integer", "minimum": -7, "maximum": 12},
        }
    },
    "required": ["numbers"],
    "additionalProperties": False,
}


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "daemon.local.llm_server", "--threads", "1", "--context", "2048", *options]


def question(content: str, schema: dict[str, object] | None = None, *, seed: int = 1, most: int = 200) -> Question:
    messages = [{"role": "user", "content": content}]
    return Question(messages, schema=schema, schema_name="asked", seed=seed, temperature=1.5, max_tokens=most)


def client_of(endpoint: Endpoint) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="none", max_retries=0)


@contextmanager
def serving() -> Iterator[tuple[subprocess.Popen[str], Endpoint]]:
    with subprocess.Popen(command("--gguf", "smollm2"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        try:
            yield process, Endpoint("local", told["base_url"], told["model"])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with serving() as (_, endpoint):
        yield endpoint


@pytest.mark.model
async def test_answers_keep_to_the_schema_and_its_integer_limits(endpoint: Endpoint) -> None:
    async with Chat([endpoint]) as chat:
        for seed in range(3):
            asked = question("Write the numbers 1000, -500 and 3.5 as JSON.", SCHEMA, seed=seed)
            answer = await chat.ask(asked)
            numbers = json.loads(answer.text)["numbers"]
            assert len(numbers) == 3
            assert all(isinstance(n, int) and -7 <= n <= 12 for n in numbers)
            assert answer.prompt_tokens > 0 and answer.completion_tokens > 0
        assert chat.usage["local"].requests == 3  # the schema was taken at once


@pytest.mark.model
async def test_a_grammar_leaves_no_room_for_blanks_and_holds_decimals_to_their_range(endpoint: Endpoint) -> None:
    async with Chat([replace(endpoint, grammar=True)]) as chat:
        for seed in range(3):
            asked = question("Write 1000, -500 and 3.5 as JSON, one a line.", lists_schema(4, 2), seed=seed)
            answer = await chat.ask(asked)
            configurations = json.loads(answer.text)["configurations"]
            assert [len(rates) for rates in configurations] == [4, 4]
            assert all(0 <= rate <= 1 for rates in configurations for rate in rates)
            assert not set(answer.text) & set(" \n\t")
        assert chat.usage["local"].requests == 3  # the grammar was taken at once


@pytest.mark.model
async def test_llama_cpp_takes_the_grammars_of_all_that_agents_ask_for(endpoint: Endpoint) -> None:
    """One that it could not read would be a second request, with a schema."""
    schemas = [ASKED[asked](view_of(granularity)) for granularity in ("layer", "block") for asked in ASKED]
    schemas.append({"enum": [-5, 15, "^a", "-a", "]a", 'with "quotes"', "back\\slash"]})
    async with Chat([replace(endpoint, grammar=True)]) as chat:
        for number, schema in enumerate(schemas, start=1):
            await chat.ask(question("Choose.", schema, most=2))
            assert chat.usage["local"].requests == number


@pytest.mark.model
async def test_the_model_is_listed_under_its_name(endpoint: Endpoint) -> None:
    async with client_of(endpoint) as client:
        assert [model.id async for model in client.models.list()] == ["smollm2"]


@pytest.mark.model
async def test_the_seed_decides_the_answer(endpoint: Endpoint) -> None:
    async with Chat([endpoint]) as chat:
        # The first answer leaves the prompt in the cache, for the others alike.
        answers = [await chat.ask(question("Tell a story.", seed=seed, most=12)) for seed in (1, 1, 1, 2)]
    _, first, again, other = (answer.text for answer in answers)
    assert first == again
    assert first != other


@pytest.mark.model
async def test_a_prompt_longer_than_the_context_is_a_clear_error(endpoint: Endpoint) -> None:
    async with client_of(endpoint) as client:
        with pytest.raises(openai.BadRequestError, match="context"):
            await client.chat.completions.create(
                model="smollm2", messages=[{"role": "user", "content": "word " * 3000}], max_tokens=5
            )


@pytest.mark.model
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_quietly_even_amid_an_answer(number: signal.Signals) -> None:
    with serving() as (process, endpoint):
        async with client_of(endpoint) as client:
            while True:
                try:
                    asking = await client.chat.completions.create(
                        model="smollm2",
                        messages=[{"role": "user", "content": "Tell a long story."}],
                        max_tokens=1500,
                        stream=True,
                    )
                    break
                except openai.InternalServerError:  # still loading
                    await asyncio.sleep(0.1)
            async with asking:
                process.send_signal(number)
                assert await asyncio.to_thread(process.wait, 60) == 0


REFUSED: dict[str, object] = {
    "no object": [],
    "no messages": {},
    "messages that are numbers": {"messages": [1, 2]},
    "a file as an image": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///a"}]}]
    },
    "a left-recursive grammar": {"grammar": 'root ::= root "a" | "b"'},
    "a grammar of 10^9 repeats": {"grammar": 'root ::= "a"{1000000000}'},
    "nested repeats": {"grammar": "root ::= " + "(" * 5 + '"a"' + "{1,99})" * 5 + "{1,99}"},
    "a rule that is missing": {"grammar": "root ::= missing"},
    "a cap that is a word": {"max_tokens": "x"},
    "a form that does not exist": {"response_format": {"type": "odd"}},
}
ODD: dict[str, object] = {
    "a cap of 10^12": {"max_tokens": 10**12, "stop": ["e", "a", " "]},
    "10^6 answers": {"n": 10**6},
    "a temperature of NaN": {"temperature": float("nan")},
    "a negative temperature": {"temperature": -1},
    "a temperature of 10^308": {"temperature": 1e308},
    "biases of tokens that do not exist": {"logit_bias": {"a": 1, "-5": 2, "99999999": 3}},
    "every token forbidden": {"logit_bias": [[i, False] for i in range(49152)]},
    "100,000 stops": {"stop": [f"x{i}" for i in range(100_000)]},
    "a seed of 2^80": {"seed": 2**80},
    "parentheses 5,000 deep": {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
    "a schema that leads to itself": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    },
}
"""What llama.cpp may answer or refuse, as its version likes."""


@pytest.mark.model
@pytest.mark.parametrize("name", [*REFUSED, *ODD])
async def test_a_senseless_request_leaves_the_server_alive(endpoint: Endpoint, name: str) -> None:
    given = REFUSED.get(name, ODD.get(name))
    usual = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    body = given if name.startswith("no ") else {**usual, **given}  # type: ignore[dict-item]
    async with aiohttp.ClientSession(endpoint.base_url + "/") as client:
        headers = {"Content-Type": "application/json"}
        async with client.post("chat/completions", data=json.dumps(body), headers=headers) as answer:
            assert (answer.status >= 400) if name in REFUSED else answer.status
        async with client.post("chat/completions", json=usual) as answer:
            assert answer.status == 200


@pytest.mark.model
@pytest.mark.parametrize("content", [b"", b"{{{", b"\xff" * 1000, b"[" * 100_000])
async def test_a_body_that_is_no_json_is_refused(endpoint: Endpoint, content: bytes) -> None:
    async with aiohttp.ClientSession(endpoint.base_url + "/") as client:
        headers = {"Content-Type": "application/json"}
        async with client.post("chat/completions", data=content, headers=headers) as answer:
            assert answer.status >= 400


@pytest.mark.model
async def test_clients_that_go_away_amid_their_answers_leave_it_alive(endpoint: Endpoint) -> None:
    async def leave() -> None:
        _, writer = await asyncio.open_connection(url.hostname, url.port)
        body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.transport.abort()

    url = urlsplit(endpoint.base_url)
    await asyncio.gather(*(leave() for _ in range(50)))
    async with Chat([endpoint]) as chat:
        assert (await chat.ask(question("Hi", most=2))).completion_tokens > 0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    given = {"run": {"folder": str(tmp_path)}, "target": {"model": "smollm2", "rate": 0.3}}
    settings = Settings.model_validate(given)
    settings.folder.mkdir()
    return settings


async def say_hi(endpoint: EndpointSettings, key: str | None) -> int:
    """The status of the answer to one question; 0 where the server is not there."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            aiohttp.ClientSession(endpoint.base_url + "/") as client,
            client.post("chat/completions", json=body, headers=headers) as answer,
        ):
            return answer.status
    except aiohttp.ClientError:
        return 0


@pytest.mark.model
async def test_that_of_a_run_answers_this_run_alone(settings: Settings) -> None:
    async with local_llm(settings) as llm:
        endpoint = llm.endpoint
        assert endpoint.grammar
        assert endpoint.api_key is not None
        key = endpoint.api_key.get_secret_value()

        async def answers() -> bool:
            return await say_hi(endpoint, key) == 200

        await eventually(answers, 60)
        assert [await say_hi(endpoint, wrong) for wrong in (None, "wrong")] == [401, 401]
        commands = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
        assert not any(key in command for command in commands)
    assert key not in (settings.folder / "local-llm.log").read_text()


def test_what_cannot_be_served_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    for path in (tmp_path / "missing.gguf", text, broken):
        ended = subprocess.run(command("--gguf", str(path)), capture_output=True, text=True, check=False)
        assert ended.returncode == 2
        assert str(path) in ended.stderr
        assert "Traceback" not in ended.stderr
        assert ended.stdout == ""
