"""Puts a search together from its settings and runs it: in charge, card, endpoint, agents, search, summary."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

import structlog

from agents.asking import Asks
from agents.budget import Spent
from agents.chat import Chat
from agents.replay import Remembering
from daemon.display import Display
from daemon.http_api import HttpApi
from daemon.http_server import CannotListen
from daemon.http_token import Access
from daemon.journal import EVALUATIONS, Journal, write_json
from daemon.llm import make_agents, make_chat, read_replay, read_transcript
from daemon.observer import Observer
from daemon.pausing import Pausing, StopRequested
from daemon.recovery import recovered
from daemon.search import Search
from daemon.settings import EndpointSettings, Settings
from daemon.store import TICK_SECONDS, History, Memory, SearchStore
from daemon.summary import Summary, summarise
from protocol.card import ModelCard
from protocol.connection import connect
from protocol.control import Control
from protocol.errors import UsageError, first_error
from protocol.keys import Keys
from protocol.streams import CandidateQueue

REPAIR_SECONDS = 60.0

log = structlog.get_logger()


class Launch:
    """One process's work on a search. `embedded`: it also started the workers, and the server where none is set.

    With `access` it serves the HTTP API, whose URL `announce` is told.
    """

    def __init__(
        self,
        settings: Settings,
        redis_url: str,
        endpoints: Sequence[EndpointSettings],
        *,
        embedded: bool,
        access: Access | None = None,
        announce: Callable[[str], None] = lambda _: None,
        display: Display | None = None,
    ) -> None:
        self._settings = settings
        self._spec = settings.spec()
        self._endpoints = endpoints
        self._own_server = embedded and settings.redis.url is None
        self._display = display
        keys = Keys(settings.search.name)
        self._redis = connect(redis_url)
        self._store = SearchStore(self._redis, keys, self._spec)
        self._pausing = Pausing(Control(self._redis, keys))
        self._replay = read_replay(settings)
        self._journal = Journal(settings.folder)
        self._observer = Observer(self._redis, keys, self._spec, settings.folder)
        self._api = HttpApi(settings.http, access, self._observer, free_port=embedded) if access else None
        self._announce = announce
        self._search: Search | None = None
        self._counters: dict[str, float] = {}
        self._asked = asyncio.Event()
        self._seconds_before = 0.0
        self._since = time.monotonic()

    async def run(self) -> Summary | None:
        """Run the search to its end, or until it is stopped or cancelled: the summary then says so.

        None when it ended before the model card was there.
        """
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
            await self._serve(stack)
            # With a server of our own (and its folder locked) no other daemon can be alive.
            queue = await self._store.take_charge(previous_is_dead=self._own_server)
            if self._display:
                await stack.enter_async_context(self._display.following(self._store))
            await self._pausing.begin()
            history = await self._recovered(queue, await self._store.history())
            background = [
                group.create_task(self._store.stay_in_charge(queue, lambda: self._memory(history))),
                group.create_task(self._pausing.watch()),
                group.create_task(self._watch_workers()),
                group.create_task(_survived("observer_died", self._observer.run())),
            ]
            self._counters = history.counters  # which the observer shows too, as it grows
            self._seconds_before = history.counters.get("seconds", 0.0)
            self._observer.begin(history)
            if not history.ledger:
                self._journal.begin_transcript()
            await self._store.repair(queue, history)
            card = await self._wait_for_card()
            self._observer.chat = chat = await stack.enter_async_context(self._chat(history))
            background += [
                group.create_task(self._count_for_ever(chat)),
                group.create_task(self._repair_for_ever(queue, history)),
            ]
            search = Search(
                self._settings.search.name,
                self._spec,
                self._settings.search,
                card=card,
                agents=make_agents(self._settings.llm, self._asks(chat, history)),
                queue=queue,
                journal=self._journal,
                history=history,
                pausing=self._pausing,
                seconds=self._seconds,
            )
            self._search = self._observer.search = search
            if self._display:
                self._display.search = search
            if search.remaining_budget > 0:
                await chat.wait_ready(
                    lambda name: log.warning("endpoint_not_ready", endpoint=name),
                    at_most=self._settings.llm.start_wait_seconds,
                    refuse=not history.ledger,
                )
            try:
                await search.run()
                self._observer.finished = True
            finally:
                with contextlib.suppress(TimeoutError):  # the end must not wait for a server that is away
                    async with asyncio.timeout(2):
                        await self._count(chat)
                        await self._observer.look()
            for task in background:
                task.cancel()
        return True

    async def _serve(self, stack: AsyncExitStack) -> None:
        """Serve the HTTP API until the stack is closed; UsageError where it cannot listen."""
        if self._api is None:
            return
        try:
            self._announce(await stack.enter_async_context(self._api.serving()))
        except CannotListen:
            # Where it is this very search's daemon that listens there, that is what must be said.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self._store.wait_for_silence()
            raise

    async def _recovered(self, queue: CandidateQueue, history: History) -> History:
        """The search's history; what the server has lost of it comes back from the folder's copy."""
        known = recovered(self._settings.folder, self._spec, history)
        if known is None:
            return history
        await self._store.count(known.counters)
        await self._store.restore(queue, Memory(known, None), from_=EVALUATIONS)
        return await self._store.history()

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

    async def _repair_for_ever(self, queue: CandidateQueue, history: History) -> None:
        """Put candidates back whose jobs were lost: a trimmed stream, a server's last second."""
        while True:
            await asyncio.sleep(REPAIR_SECONDS)
            await self._store.repair(queue, self._memory(history).history)

    def _chat(self, history: History) -> Chat:
        counters = history.counters
        spent = Spent(
            requests=int(counters.get("requests", 0)),
            prompt_tokens=int(counters.get("prompt_tokens", 0)),
            completion_tokens=int(counters.get("completion_tokens", 0)),
            cost=counters.get("cost", 0.0),
        )
        return make_chat(self._settings.llm, self._endpoints, gate=self._pausing.gate, record=self._record, spent=spent)

    def _asks(self, chat: Chat, history: History) -> Asks:
        """What the agents ask: a transcript to be replayed; else `chat`, about what no killed process asked already."""
        if self._replay:
            return self._replay
        return Remembering(chat, read_transcript(self._journal.transcript_path)) if history.ledger else chat

    def _record(self, record: dict[str, object]) -> None:
        self._journal.transcript(record)
        self._asked.set()
        if self._api:
            self._api.metrics.observe(record)

    async def _count_for_ever(self, chat: Chat) -> None:
        """Make durable what is spent, at once when the LLM was asked: a crash must not make a budget larger."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._asked.wait()
            self._asked.clear()
            await self._count(chat)

    async def _count(self, chat: Chat) -> None:
        spent = chat.spent
        totals = {
            "requests": float(spent.requests),
            "prompt_tokens": float(spent.prompt_tokens),
            "completion_tokens": float(spent.completion_tokens),
            "cost": spent.cost,
            "seconds": self._seconds(),
        }
        self._counters |= totals
        await self._store.count(totals)

    def _seconds(self) -> float:
        """How long the search has run, over all its processes."""
        return self._seconds_before + time.monotonic() - self._since

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


async def _survived(event: str, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`; if it dies, say so once, and no more."""
    try:
        await work
    except Exception:
        log.exception(event)
