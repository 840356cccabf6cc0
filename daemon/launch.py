"""Puts a search together from its settings and runs it: in charge, card, endpoint, agents, search, summary."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from pydantic import SecretStr

from agents.chat import Chat
from agents.crossover import Crossover
from agents.endpoint import ChatPolicy, Endpoint
from agents.initializer import Initializer
from agents.mutator import Mutator
from agents.prompt import Prompts
from agents.selector import Selector
from agents.settings import AgentSettings
from daemon.display import Display
from daemon.journal import Journal, write_json
from daemon.pausing import Pausing, StopRequested
from daemon.search import Agents, Search
from daemon.settings import EndpointSettings, LlmSettings, Settings
from daemon.store import TICK_SECONDS, History, Memory, SearchStore
from daemon.summary import Summary, summarise
from protocol.card import ModelCard
from protocol.connection import connect
from protocol.control import Control
from protocol.errors import SettingsError, UsageError, first_error
from protocol.keys import Keys
from protocol.streams import CandidateQueue

REPAIR_SECONDS = 60.0

log = structlog.get_logger()


class Launch:
    """One process's work on a search. `embedded`: it also started the workers, and the server where none is set."""

    def __init__(
        self,
        settings: Settings,
        redis_url: str,
        endpoints: Sequence[EndpointSettings],
        *,
        embedded: bool,
        display: Display | None = None,
    ) -> None:
        self._settings = settings
        self._spec = settings.spec()
        self._endpoints = [make_endpoint(e) for e in endpoints]
        self._own_server = embedded and settings.redis.url is None
        self._display = display
        keys = Keys(settings.search.name)
        self._redis = connect(redis_url)
        self._store = SearchStore(self._redis, keys, self._spec)
        self._pausing = Pausing(Control(self._redis, keys))
        self._journal = Journal(settings.folder)
        self._search: Search | None = None
        self._counters: dict[str, float] = {}
        self._counted: dict[str, float] = {}
        self._since = time.monotonic()

    async def run(self) -> Summary | None:
        """Run the search to its end, or until it is stopped or cancelled: the summary then says so.

        None when it ended before the model card was there.
        """
        structlog.contextvars.bind_contextvars(search=self._settings.search.name)
        finished = False
        try:
            finished = await self._in_group()
        except asyncio.CancelledError:
            log.info("search_interrupted")
        finally:
            await self._close()
        return self._summary(finished=finished)

    async def _in_group(self) -> bool:
        finished = False
        try:
            async with asyncio.TaskGroup() as group:
                finished = await self._work(group)
        except BaseExceptionGroup as group:
            error = first_error(group)
            if error is None:
                raise
            if not isinstance(error, StopRequested):
                raise error from None
            log.info("search_stopped")
        return finished

    async def _work(self, group: asyncio.TaskGroup) -> bool:
        async with AsyncExitStack() as stack:
            # With a server of our own (and its folder locked) no other daemon can be alive.
            queue = await self._store.take_charge(previous_is_dead=self._own_server)
            if self._display:
                await stack.enter_async_context(self._display.following(self._store))
            await self._pausing.begin()
            history = await self._store.history()
            background = [
                group.create_task(self._store.stay_in_charge(queue, lambda: self._memory(history))),
                group.create_task(self._pausing.watch()),
                group.create_task(self._watch_workers()),
            ]
            self._counters = history.counters
            if requeued := await self._store.repair(queue, history):
                log.warning("candidates_requeued", count=requeued)
            card = await self._wait_for_card()
            chat = await stack.enter_async_context(self._chat())
            background += [
                group.create_task(self._count_for_ever(chat)),
                group.create_task(self._repair_for_ever(queue)),
            ]
            search = Search(
                self._settings.search.name,
                self._spec,
                self._settings.search,
                card=card,
                agents=make_agents(self._settings.llm, chat),
                queue=queue,
                journal=self._journal,
                history=history,
                pausing=self._pausing,
            )
            self._search = search
            if self._display:
                self._display.search = search
            if search.remaining_budget:
                await chat.wait_ready(lambda name: log.warning("endpoint_not_ready", endpoint=name))
            try:
                await search.run()
            finally:
                with contextlib.suppress(TimeoutError):  # the end must not wait for a server that is away
                    async with asyncio.timeout(2):
                        await self._count(chat)
            for task in background:
                task.cancel()
        return True

    def _memory(self, history: History) -> Memory:
        """What this process knows of the search; `history` is what it found at its start."""
        if self._search is None:
            return Memory(history, None)
        outcomes = {e.candidate.id: e.outcome for e in self._search.population}
        now = History(ledger=self._search.ledger, outcomes=outcomes, selections=self._search.selections)
        return Memory(now, self._search.card)

    async def _wait_for_card(self) -> ModelCard:
        """The model card; logs once that it waits."""
        waiting = False
        while (card := await self._store.card()) is None:
            if not waiting:
                log.info("waiting_for_worker", needs="the model card")
            waiting = True
            await asyncio.sleep(0.5)
        log.info("model_card", dense_perplexity=round(card.dense.perplexity, 3), units=len(card.sensitivity))
        return card

    async def _watch_workers(self) -> None:
        """Tell of workers that cannot work; where all are our own and none can, that ends the search."""
        complained: set[str] = set()
        while True:
            workers = await self._store.workers()
            unusable = [worker for worker in workers if worker.stage == "unusable"]
            for worker in unusable:
                if worker.detail not in complained:
                    log.error("worker_unusable", worker=worker.consumer, detail=worker.detail)
                complained.add(worker.detail)
            if self._own_server and unusable and len(unusable) == len(workers):
                raise UsageError(unusable[0].detail)
            await asyncio.sleep(0.5)

    async def _repair_for_ever(self, queue: CandidateQueue) -> None:
        """Put candidates back whose jobs were lost: a trimmed stream, a server's last second."""
        while True:
            await asyncio.sleep(REPAIR_SECONDS)
            if requeued := await self._store.repair(queue, await self._store.history()):
                log.warning("candidates_requeued", count=requeued)

    def _chat(self) -> Chat:
        llm = self._settings.llm
        policy = ChatPolicy(
            attempts=llm.attempts,
            deadline=llm.deadline_seconds,
            byte_cap=llm.max_reply_bytes,
            concurrency=llm.concurrency,
        )
        return Chat(self._endpoints, policy, gate=self._pausing.gate, record=self._journal.transcript)

    async def _count_for_ever(self, chat: Chat) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            await self._count(chat)

    async def _count(self, chat: Chat) -> None:
        """Make the tokens used and the seconds spent since the last call durable."""
        now = time.monotonic()
        usage = chat.usage.values()
        totals = {
            "requests": float(sum(u.requests for u in usage)),
            "prompt_tokens": float(sum(u.prompt_tokens for u in usage)),
            "completion_tokens": float(sum(u.completion_tokens for u in usage)),
            "seconds": now - self._since,
        }
        for name, total in totals.items():
            self._counters[name] = self._counters.get(name, 0.0) + total - self._counted.get(name, 0.0)
        self._counted = totals
        await self._store.count({name: self._counters[name] for name in totals})

    def _summary(self, *, finished: bool) -> Summary | None:
        search = self._search
        if search is None:
            return None
        summary = summarise(
            search.name,
            self._spec,
            search.card,
            search.ledger,
            search.population,
            self._counters,
            finished=finished,
        )
        write_json(self._settings.folder / "summary.json", summary.model_dump())
        return summary

    async def _close(self) -> None:
        self._journal.close()
        try:
            async with asyncio.timeout(2):
                await self._store.step_down()
        except Exception as error:  # noqa: BLE001  (a boundary: the end must not fail for a server that is gone)
            log.debug("not_stepped_down", error=str(error))
        await self._redis.aclose()


def make_agents(llm: LlmSettings, chat: Chat) -> Agents:
    """The four agents that ask this LLM."""
    settings = AgentSettings(
        reply=llm.reply,
        proposals_per_call=llm.proposals_per_call,
        reasks=llm.reasks,
        temperature=llm.temperature,
        max_tokens=llm.max_tokens,
    )
    prompts = Prompts()
    return Agents(
        initializer=Initializer(chat, prompts, settings),
        selector=Selector(chat, prompts, settings),
        mutator=Mutator(chat, prompts, settings),
        crossover=Crossover(chat, prompts, settings),
    )


def make_endpoint(settings: EndpointSettings) -> Endpoint:
    """The endpoint with its key, read from its file where it has one."""
    key = settings.api_key
    if settings.api_key_file is not None:
        key = SecretStr(_read_key(settings.api_key_file))
    url = urlsplit(settings.base_url)  # which may hold a password, and then the name must not
    name = settings.name or (f"{url.hostname}:{url.port}" if url.port else str(url.hostname))
    return Endpoint(name=name, base_url=settings.base_url, model=settings.model, api_key=key)


def secrets_of(settings: Settings) -> list[str]:
    """Every secret value in the settings, for the log's redaction."""
    keys = [make_endpoint(e).api_key for e in settings.llm.endpoints]
    urls = [settings.redis.url or "", *(e.base_url for e in settings.llm.endpoints)]
    passwords = [urlsplit(url).password for url in urls]
    return [key.get_secret_value() for key in keys if key] + [password for password in passwords if password]


def _read_key(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(f"llm.endpoints: the key file {str(path)!r} cannot be read: {error.strerror}") from error
