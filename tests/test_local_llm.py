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

import openai
import pytest

from agents.chat import Chat
from agents.endpoint import Endpoint
from agents.lists import lists_schema
from daemon.embedded import local_llm
from daemon.settings import Settings
from tests.asked import ASKED
from tests.real_model import need_smollm2
from tests.test_prompts import view_of

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
    return [sys.executable, "-m", "daemon.local_llm", "--threads", "1", "--context", "2048", *options]


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
            answer = await chat.ask(
                [{"role": "user", "content": "Write the numbers 1000, -500 and 3.5 as JSON."}],
                schema=SCHEMA,
                schema_name="numbers",
                seed=seed,
                temperature=1.5,
                max_tokens=200,
            )
            numbers = json.loads(answer.text)["numbers"]
            assert len(numbers) == 3
            assert all(isinstance(n, int) and -7 <= n <= 12 for n in numbers)
            assert answer.prompt_tokens > 0 and answer.completion_tokens > 0
        assert chat.usage["local"].requests == 3  # the schema was taken at once


@pytest.mark.model
async def test_a_grammar_leaves_no_room_for_blanks_and_holds_decimals_to_their_range(endpoint: Endpoint) -> None:
    async with Chat([replace(endpoint, grammar=True)]) as chat:
        for seed in range(3):
            answer = await chat.ask(
                [{"role": "user", "content": "Write the numbers 1000, -500 and 3.5 as JSON, one a line."}],
                schema=lists_schema(4, 2),
                schema_name="lists",
                seed=seed,
                temperature=1.5,
                max_tokens=200,
            )
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
            await chat.ask(
                [{"role": "user", "content": "Choose."}],
                schema=schema,
                schema_name="asked",
                seed=1,
                temperature=1.0,
                max_tokens=2,
            )
            assert chat.usage["local"].requests == number


@pytest.mark.model
async def test_the_model_is_listed_under_its_name(endpoint: Endpoint) -> None:
    async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="none") as client:
        assert [model.id async for model in client.models.list()] == ["smollm2"]


@pytest.mark.model
async def test_the_seed_decides_the_answer(endpoint: Endpoint) -> None:
    async def ask(seed: int) -> str:
        answer = await chat.ask(
            [{"role": "user", "content": "Tell a story."}],
            schema=None,
            schema_name="",
            seed=seed,
            temperature=1.0,
            max_tokens=12,
        )
        return answer.text

    async with Chat([endpoint]) as chat:
        await ask(1)  # afterwards the prompt is in the cache, for all alike
        first, again, other = await ask(1), await ask(1), await ask(2)
    assert first == again
    assert first != other


@pytest.mark.model
async def test_a_prompt_longer_than_the_context_is_a_clear_error(endpoint: Endpoint) -> None:
    async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="context"):
            await client.chat.completions.create(
                model="smollm2", messages=[{"role": "user", "content": "word " * 3000}], max_tokens=5
            )


@pytest.mark.model
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_quietly_even_amid_an_answer(number: signal.Signals) -> None:
    with serving() as (process, endpoint):
        async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="none", max_retries=0) as client:
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


@pytest.mark.model
async def test_that_of_a_run_gets_grammars(tmp_path: Path) -> None:
    given = {"run": {"folder": str(tmp_path)}, "target": {"model": "smollm2", "rate": 0.3}}
    settings = Settings.model_validate(given)
    settings.folder.mkdir()
    async with local_llm(settings) as endpoint:
        assert endpoint.grammar


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
