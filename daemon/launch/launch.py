"""Assembles a search from its settings and runs it: waits for the model profile and the LLM, and makes the agents."""

import asyncio
import contextlib
import importlib
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from agents.llm.endpoint import ChatClient
from agents.llm.replay import CachedChat
from daemon.http_api.api import HttpApi
from daemon.http_api.server import CannotListen
from daemon.http_api.token import TOKEN_MODE, Access, kept_text, page_file
from daemon.launch.background import repair_forever, wait_for_profile, watch_workers
from daemon.launch.front import read_other_rates
from daemon.launch.lessons import TOLD, add_lesson, read_lessons
from daemon.launch.llm import make_chat, read_replay, read_transcript
from daemon.launch.usage import UsageTracker
from daemon.local.children import log_if_it_dies
from daemon.monitor.follower import Follower
from daemon.monitor.observer import Observer
from daemon.monitor.report import REPORT, render_report
from daemon.monitor.summary import Summary, summarise
from daemon.search.checks import check_budget, check_lists, check_lists_somewhere, check_windows, warn_of_texts
from daemon.search.control import ControlWatcher, StopRequested
from daemon.search.in_flight import MOST_TOGETHER
from daemon.search.make_agents import make_agents
from daemon.search.modes import rounds_of
from daemon.search.search import Search
from daemon.search.state import SearchState
from daemon.settings.llm import EndpointSettings
from daemon.settings.settings import Settings
from daemon.state.history import History, Memory
from daemon.state.journal import EVALUATIONS, Journal
from daemon.state.recovery import counters, recovered, saved_command
from daemon.state.store import SearchStore
from daemon.trackers.trackers import Trackers
from protocol.errors import first_error
from protocol.plans.profile import ModelProfile
from protocol.queue.connection import connect
from protocol.queue.control import Control
from protocol.queue.keys import Keys
from protocol.queue.streams import CandidateQueue

if TYPE_CHECKING:
    from agents.llm.chat import Chat

log = structlog.get_logger()


class Launch:
    """The work of one process on a search.

    `embedded` says that this process also started the workers, the server if redis.url is not set, and an LLM if
    llm.endpoints is empty.
    `workers_are_unusable` returns whether all of these workers have exited because they cannot work. If `access` is
    given, the HTTP API is served, and `announce` is called with its URL. `more_duties` are further tasks that run
    beside the search.
    """

    def __init__(
        self,
        settings: Settings,
        redis_url: str,
        endpoints: Sequence[EndpointSettings],
        *,
        embedded: bool,
        workers_are_unusable: Callable[[], bool] = lambda: False,
        access: Access | None = None,
        announce: Callable[[str], None] = lambda _: None,
        display: Follower | None = None,
        more_duties: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
    ) -> None:
        self._settings = settings
        self._spec = settings.spec()
        self._endpoints = endpoints
        self._own_server = embedded and settings.redis.url is None
        self._own_llm = embedded and not settings.llm.endpoints
        self._workers_are_unusable = workers_are_unusable
        self._display = display
        keys = Keys(settings.search.name)
        self._redis = connect(redis_url)
        self._store = SearchStore(self._redis, keys, self._spec)
        self._usage = UsageTracker(self._store)
        self._control = ControlWatcher(Control(self._redis, keys))
        self._replay = read_replay(settings)
        self._lessons = read_lessons(settings)
        self._at_other_rates = read_other_rates(settings)
        self._journal = Journal(settings.folder)
        if access and access.token and access.kept_in:
            self._journal.keep(access.kept_in.name, kept_text(access.token), mode=TOKEN_MODE)
        self._observer = Observer(self._redis, keys, self._spec, settings.folder, self._journal.folder_errors)
        self._api = HttpApi(settings.http, access, self._observer, free_port=embedded) if access else None
        self._access, self._announce = access, announce
        self._more_duties = more_duties
        self._trackers = Trackers(
            settings, lambda: self._search.state if self._search else None, lambda: self._usage.counters
        )
        self._search: Search | None = None
        self._is_heard = asyncio.Event()
        """Whether an endpoint has answered, or it is known why none does."""

    async def run(self) -> Summary | None:
        """Run the search until it ends, is stopped or cancelled. Return its summary, which says whether it finished.

        Return None if it ended before there was a model profile.
        """
        finished = False
        try:
            try:
                finished = await self._run_tasks()
            except asyncio.CancelledError:
                log.info("search_interrupted")
            summary = self._summary(finished=finished)
            if summary:
                await asyncio.to_thread(self._journal.write, "summary.json", summary.model_dump())
                await asyncio.to_thread(self._write_report, finished)
                if finished and self._settings.llm.lessons and self._search:
                    shape = self._search.state.profile.shape
                    await asyncio.to_thread(add_lesson, self._settings.llm.lessons, summary, shape)
            return summary
        finally:
            try:
                await self._trackers.end(finished=finished)
            finally:
                await self._close()

    async def _run_tasks(self) -> bool:
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
            url = await self._serve(stack)
            # Import this before taking charge. From a cold disk it may take longer than a heartbeat lasts.
            await asyncio.to_thread(importlib.import_module, "agents.llm.chat")
            queue = await self._take_charge(stack)
            stack.enter_context(page_file(self._access, url, self._settings.folder))
            # Renew the heartbeat meanwhile, because reading a long history takes longer than a heartbeat lasts.
            alive = group.create_task(self._store.show_life())
            history = await self._recovered(queue, await self._store.history())
            alive.cancel()
            duties = [group.create_task(duty) for duty in self._duties(queue, history)]
            await self._resume(history, queue)
            duties.append(group.create_task(self._usage.save_forever()))
            is_new = not history.ledger
            self._usage.chat = self._observer.chat = chat = await stack.enter_async_context(self._chat())
            # Until the LLM has taken part, endpoints may be refused. They are asked now, so that a wrong key is known
            # before the worker has prepared the model.
            may_refuse = not any(each.provenance.source in ("llm", "fallback") for each in history.ledger.values())
            asking = group.create_task(self._wait_for_llm(chat, may_refuse=True)) if may_refuse else None
            profile = await wait_for_profile(self._store)
            check_windows(self._settings.search, profile.dense.windows)
            if is_new:
                check_budget(self._settings.search, profile.dense.tokens)
            units = len(profile.shape.units(self._spec.granularity))
            check_lists(self._settings, chat.contexts, units)
            duties.append(group.create_task(repair_forever(self._store, queue, lambda: self._memory(history).history)))
            asks = await asyncio.to_thread(self._agents_chat, chat, history)
            # In a thread, because a long history takes a second. self._search is None until this is done.
            search = await asyncio.to_thread(self._make_search, profile, asks, queue, history)
            if asking is None and search.budget.remaining > 0:
                asking = group.create_task(self._wait_for_llm(chat, may_refuse=False))
            if asking is not None:
                duties.append(asking)
                # A refusal comes before the search begins. While no endpoint answers, only questions wait.
                await self._is_heard.wait()
            if asking is not None and may_refuse:
                if asking.done():
                    asking.result()  # raises what it has raised
                    check_lists_somewhere(self._settings, chat.contexts, units)
                else:
                    duties.append(group.create_task(self._check_lists(asking, chat, units)))
            await self._search_to_its_end(search)
            for duty in duties:
                duty.cancel()
        return True

    async def _take_charge(self, stack: AsyncExitStack) -> CandidateQueue:
        # If we started the server, its folder is locked, so no other daemon can be alive.
        queue = await self._store.take_charge(previous_is_dead=self._own_server)
        if self._display:
            await stack.enter_async_context(self._display.following(self._store))
        await self._control.begin()
        return queue

    def _duties(self, queue: CandidateQueue, history: History) -> list[Coroutine[Any, Any, None]]:
        """Return the tasks that run beside the search once this process is in charge."""
        return [
            self._store.stay_in_charge(queue, lambda: self._memory(history)),
            self._control.watch(),
            watch_workers(self._store, self._workers_are_unusable),
            self._journal.keep_forever(),
            log_if_it_dies("observer_died", self._observer.run()),
            self._trackers.run(),
            self._observer.heartbeat.run(),
            *(duty() for duty in self._more_duties),
        ]

    async def _resume(self, history: History, queue: CandidateQueue) -> None:
        warn_of_texts(self._settings)
        if self._settings.llm.lessons:
            self._journal.keep(TOLD, self._lessons, mode=0o666)
        self._usage.begin(history)
        self._observer.begin(history)
        if not history.ledger:
            self._journal.begin_transcript()
        await self._store.repair(queue, history)

    def _make_search(self, profile: ModelProfile, chat: ChatClient, queue: CandidateQueue, history: History) -> Search:
        llm = self._settings.llm
        fixes_length = llm.reply == "lists" or llm.proposals_per_call is not None
        search = Search(
            self._settings.search,
            SearchState.of(self._spec, profile, history, self._lessons, self._at_other_rates),
            make_agents(self._settings.search, self._settings.llm, chat),
            queue,
            self._journal,
            seconds=self._usage.seconds,
            count_workers=self._count_workers,
            questions_at_once=self._settings.llm.concurrency * max(1, len(self._settings.llm.endpoints)),
            most_together=1 if fixes_length else MOST_TOGETHER,
        )
        self._search = self._observer.search = search
        if self._display:
            self._display.follow(search, self._control)
        return search

    async def _count_workers(self) -> int:
        return sum(worker.is_ready for worker in await self._store.workers())

    async def _wait_for_llm(self, chat: "Chat", *, may_refuse: bool) -> None:
        most = self._settings.llm.start_wait_seconds

        def announce(name: str, why: str) -> None:
            self._is_heard.set()
            if self._own_llm:
                log.info("local_llm_loading", endpoint=name, waits_s=most)
                return
            advice = "start its server, or name another endpoint; after this time, operators without an LLM propose"
            log.warning("endpoint_not_ready", endpoint=name, reason=why, waits_s=most, advice=advice)

        try:
            if self._settings.search.asks_llm:
                await chat.wait_ready(announce, at_most=most, refuse=may_refuse)
        finally:
            self._is_heard.set()

    async def _check_lists(self, asking: asyncio.Task[None], chat: "Chat", units: int) -> None:
        """When an endpoint has answered, raise SettingsError if no endpoint has a context for lists of rates."""
        await asking
        check_lists_somewhere(self._settings, chat.contexts, units)

    async def _search_to_its_end(self, search: Search) -> None:
        """Run the search. Even if it fails, save its usage and publish its status at the end."""
        try:
            await search.run(rounds_of(self._settings.search))
            self._observer.finished = True
        finally:
            with contextlib.suppress(TimeoutError):  # do not wait for an unreachable server
                async with asyncio.timeout(2):
                    await self._usage.save()
                    await self._observer.look()

    async def _serve(self, stack: AsyncExitStack) -> str | None:
        """Serve the HTTP API until the stack is closed; return its URL. Raises UsageError if it cannot listen."""
        if self._api is None or self._access is None:
            return None
        try:
            url = await stack.enter_async_context(self._api.serving())
            self._announce(url)
        except CannotListen:
            # If another daemon of this search listens there, raise SearchExistsError instead.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self._store.wait_for_silence()
            raise
        return url

    async def _recovered(self, queue: CandidateQueue, history: History) -> History:
        """Return the search's history, after restoring lost data from the folder's copy."""
        folder = self._settings.folder
        known = await asyncio.to_thread(recovered, folder, self._spec, history)
        if known is None and not history.damaged:
            return history
        if known is None:
            whole = replace(history, counters=await asyncio.to_thread(counters, folder, history))
            memory, from_ = Memory(whole, None), "its undamaged entries"
        else:
            memory, from_ = Memory(known, None, saved_command(folder)), EVALUATIONS
        await self._store.replace_counters(memory.history.counters)
        await self._store.restore(queue, lambda: memory, from_=from_)
        await self._control.begin()  # the command may have been restored too
        return await self._store.history()

    def _memory(self, history: History) -> Memory:
        """Return all that this process knows about the search; `history` was read at the start."""
        if self._search is None:
            return Memory(history, None, self._control.command)
        state = self._search.state
        now = History(state.ledger, state.population, selections=state.selections)
        return Memory(now, state.profile, self._control.command)

    def _chat(self) -> "Chat":
        gate, spent = self._control.gate, self._usage.spent
        return make_chat(self._settings.llm, self._endpoints, gate=gate, record=self._record, spent=spent)

    def _agents_chat(self, chat: "Chat", history: History) -> ChatClient:
        """Return the chat that the agents ask: the transcript of llm.replay, or else `chat`.

        In a resumed search, `chat` first looks for earlier answers in the search's own transcript. Call this in a
        thread, because that transcript may be long.
        """
        if self._replay:
            return self._replay
        return CachedChat(chat, read_transcript(self._journal.transcript_path)) if history.ledger else chat

    def _record(self, record: dict[str, object]) -> None:
        self._journal.transcript(record)
        self._usage.request_made()
        self._observer.count_question(record)
        if self._api:
            self._api.metrics.observe(record)

    def _summary(self, *, finished: bool) -> Summary | None:
        search = self._search
        if search is None:
            return None
        return summarise(search.settings.name, search.state, self._usage.counters, finished=finished)

    def _write_report(self, finished: bool) -> None:
        """Write the report. An error costs the search nothing else."""
        try:
            record = self._observer.record
            if record is not None and record.status is not None:
                status = record.status.model_copy(update={"finished": finished})
                self._journal.write_text(REPORT, render_report([replace(record, status=status)]))
        except Exception:
            log.exception("report_not_written")

    async def _close(self) -> None:
        try:
            await asyncio.to_thread(self._journal.close)
        finally:
            try:
                async with asyncio.timeout(2):
                    await self._store.step_down()
            except Exception as error:  # noqa: BLE001  (shutdown must not fail because the server is unreachable)
                log.debug("not_stepped_down", error=str(error))
            await self._redis.aclose()
