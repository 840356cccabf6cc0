"""Errors of a Redis server: transient ones are retried, all others are one sentence."""

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from protocol.errors import SelfPrunerError, SettingsError, StoreError
from protocol.plans.candidate import Measured
from protocol.queue.connection import RedisRetry, connect
from protocol.queue.control import Control
from protocol.queue.keys import GROUP
from tests.faults.kit import LEASE, PASSWORD, Daemon, Kit, candidates, eventually, fault_kit
from tests.faults.marks import fault, slow_fault
from tests.faults.proxy import Proxy
from tests.faults.searching import Search
from tests.support.scripted_llm import ScriptedLlm
from tests.support.servers import Server, server_binary

PASSING = [
    "-BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "-UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
    "-LOADING Redis is loading the dataset in memory",
    "-READONLY You can't write against a read only replica.",
    "-TRYAGAIN Multiple keys request during rehashing of slot",
    "-CLUSTERDOWN The cluster is down",
    "-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "-NOSCRIPT No matching script. Please use EVAL.",
    "-NOREPLICAS Not enough good replicas to write.",
    "-MISCONF Errors writing to the AOF file: No space left on device",
    "-OOM command not allowed when used memory > 'maxmemory'.",
    "-EXECABORT Transaction discarded because of previous errors.",
    "-ERR max number of clients reached",
    "-ERR Error running script: Script killed by user with SCRIPT KILL.",
]
LATER: list[str | bytes] = [
    "-NOAUTH Authentication required.",
    "-DENIED Redis is running in protected mode",
    b"\x00garbage\r\n",
]
"""Errors that are retried once the server has answered, and are permanent at the first contact."""
LASTING = [
    ("-NOPERM User x has no permissions to run the 'get' command", SettingsError, "refuses its user a command"),
    ("-MOVED 3999 127.0.0.1:6381", SettingsError, "cluster node"),
    ("-ASK 3999 127.0.0.1:6381", SettingsError, "cluster node"),
    ("-CROSSSLOT Keys in request don't hash to the same slot", SettingsError, "cluster node"),
    ("-WRONGTYPE Operation against a key holding the wrong kind of value", StoreError, "changed by another program"),
    ("-ERR unknown command 'GET'", StoreError, "answers with an error: unknown command"),
]


@pytest.fixture
async def proxy(own_server: Server) -> AsyncIterator[Proxy]:
    async with Proxy(own_server.socket) as proxy:
        yield proxy


@pytest.fixture
async def redis(proxy: Proxy) -> AsyncIterator[Any]:
    """A client of the server behind the proxy."""
    client = connect(proxy.url(PASSWORD))
    yield client
    await client.aclose()


@pytest.mark.parametrize("error", [*PASSING, *LATER], ids=lambda error: repr(error)[:20])
async def test_a_transient_error_is_retried(proxy: Proxy, redis: Any, error: str | bytes) -> None:
    retry = RedisRetry(redis, "a", longest_wait=0.1)
    await retry(lambda: redis.set("a", "1"))
    proxy.refuse(error)
    with capture_logs() as logs:
        reading = asyncio.create_task(retry(lambda: redis.get("a")))
        both = asyncio.create_task(retry(lambda: redis.pipeline(transaction=True).get("a").get("a").execute()))
        await eventually(lambda: proxy.refused.total() >= 12)
        proxy.refusals.clear()
        assert (await reading, await both) == ("1", ["1", "1"])
    assert [line["event"] for line in logs] == ["redis_unreachable", "redis_back"]
    assert retry.outages == 2


@pytest.mark.parametrize(("error", "kind", "sentence"), LASTING, ids=lambda value: repr(value)[:20])
async def test_a_permanent_error_is_a_sentence(
    proxy: Proxy, redis: Any, error: str, kind: type[SelfPrunerError], sentence: str
) -> None:
    retry = RedisRetry(redis, "a")
    await retry(redis.ping)
    proxy.refuse(error)
    with pytest.raises(kind, match=sentence):
        await retry(lambda: redis.get("a"))


@pytest.mark.parametrize("error", LATER, ids=lambda error: repr(error)[:20])
async def test_a_wrong_url_is_a_sentence_at_the_first_contact(proxy: Proxy, redis: Any, error: str | bytes) -> None:
    proxy.refuse(error)
    with pytest.raises(SettingsError, match=r"redis\.url: the server"):
        await RedisRetry(redis, "a")(lambda: redis.get("a"))


@fault("47", "a storm of errors", "proxy: 15 kinds, 30 % of the commands", "waited for; one outcome each")
async def test_daemon_and_workers_outlast_a_storm_of_errors(kit: Kit) -> None:
    many = candidates(8)
    kit.disturbed["*"] = 2  # a beat that is refused for a lease
    async with Proxy(kit.server.socket, seed=47) as proxy:
        redis = connect(proxy.url(PASSWORD))
        daemon = Daemon(redis, kit.keys)
        await daemon.begin()
        kit.daemons.append(daemon)
        workers = [await kit.worker(url=proxy.url(PASSWORD), lease_seconds=4 * LEASE) for _ in range(2)]
        await kit.beating(len(workers))  # LATER are permanent errors at the first contact
        for error in [*PASSING, *LATER]:
            proxy.refuse(error, share=0.02)
        await daemon.settle(many, 120)
        proxy.refusals.clear()
        assert len(proxy.refused) > 3
        assert all(worker.process.returncode is None for worker in workers)
        assert all(isinstance(daemon.outcome(each), Measured) for each in many)
        await kit.end()
        await redis.aclose()


@slow_fault("47", "failover and back under a worker", "REPLICAOF, later NO ONE", "waited for")
async def test_a_failover_is_waited_for(kit: Kit) -> None:
    """Blocked readers get UNBLOCKED, and writers READONLY."""
    daemon, (worker,) = await kit.started()
    first, second = candidates(2)
    await daemon.measure([first])
    await kit.redis.replicaof("127.0.0.1", "9")
    issuing = asyncio.create_task(daemon.issue([second]))
    await asyncio.sleep(2)
    assert worker.process.returncode is None and not issuing.done()
    await kit.redis.replicaof("NO", "ONE")
    await issuing
    await daemon.settled()


@slow_fault("47", "another client's long script", "EVAL of 3 s, busy-reply-threshold 100 ms", "waited for")
async def test_another_clients_long_script_is_waited_for(kit: Kit) -> None:
    await kit.redis.config_set("busy-reply-threshold", "100")
    daemon, (worker,) = await kit.started()
    many = candidates(4)
    await daemon.measure(many[:1])
    other: Any = connect(kit.server.url)
    code = "local e = redis.call('TIME')[1] + 3 while redis.call('TIME')[1] + 0 < e do end return 1"
    script = asyncio.ensure_future(other.eval(code, 0))
    await asyncio.sleep(0.3)
    await daemon.settle(many[1:])
    assert await script == 1
    assert len(worker.events("redis_unreachable")) == 1
    await other.aclose()


BYTES = b"\xff\xfe not UTF-8 \x80"


@fault("48", "bytes that are not UTF-8", "in jobs, results, control, worker, profile", "discarded or dead")
async def test_bytes_that_are_no_text_end_neither_daemon_nor_worker(kit: Kit) -> None:
    first, second = candidates(2)
    daemon, (worker,) = await kit.started()
    await daemon.measure([first])
    redis, keys = kit.redis, kit.keys
    await redis.set(keys.control, BYTES)
    await redis.set(keys.worker("other"), BYTES)
    await redis.set(keys.profile, BYTES)
    await redis.xadd(keys.results, {"id": BYTES, "outcome": BYTES})
    await redis.xadd(keys.results, {BYTES: BYTES})
    await redis.xadd(keys.jobs, {"id": BYTES, "candidate": BYTES, "fingerprint": "x"})
    await redis.xadd(keys.jobs, {BYTES: BYTES})
    await daemon.settle([second])
    assert isinstance(daemon.outcome(second), Measured)
    assert [dead["reason"] for dead in await kit.dead()] == ["unreadable", "unreadable"]
    assert len(worker.events("control_not_understood")) == 1
    assert await daemon.store.workers()
    await redis.delete(keys.worker("other"))


@slow_fault("49", "the data is gone while paused", "pause, FLUSHALL", "stays paused; then resumes")
async def test_a_pause_outlives_a_flushed_server(kit: Kit, llm: ScriptedLlm, search: Search) -> None:
    daemon, _ = await search.begun("sleep:0.1")
    await search.has_applied(4)
    await Control(kit.redis, search.keys).write("pause")
    await asyncio.sleep(3)
    asked = len(llm.asked)
    for _ in range(3):
        await kit.redis.flushall()
        await asyncio.sleep(4)
    assert (len(llm.asked), daemon.returncode) == (asked, None)
    assert await kit.redis.get(search.keys.control) == await kit.redis.get(search.keys.last_command) == "pause"
    await Control(kit.redis, search.keys).write("run")
    kit.disturbed["*"] = 3
    await search.ends_well(daemon)


@slow_fault("50", "a job looks abandoned", "XCLAIM IDLE, signs of life deleted", "evaluated once")
async def test_a_job_that_looks_abandoned_again_and_again_is_left_to_its_living_owner(kit: Kit) -> None:
    """Idle time jumps, and keys with an expiry are gone."""
    (one,) = candidates(1)
    daemon, _ = await kit.started({one.id: [f"sleep:{4 * LEASE}"]}, workers=3)
    await kit.begun(daemon, one)
    for _ in range(10):
        await asyncio.sleep(LEASE / 4)
        for row in await kit.pending():
            owner, message = row["consumer"], row["message_id"]
            await kit.redis.xclaim(kit.keys.jobs, GROUP, owner, 0, [message], idle=120_000, justid=True)
            await kit.redis.delete(kit.keys.worker(owner))
    await daemon.settled()
    assert kit.evaluations[one.id] == 1


def fake_clock_library() -> str:
    found = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if found is None:
        pytest.skip("no libfaketime on this machine (Debian: faketime)")
    return str(found)


@slow_fault("50", "the server's clock steps by 120 s", "libfaketime, 4 times", "evaluated once")
async def test_a_step_of_the_servers_clock_takes_no_job_from_a_living_worker(tmp_path: Path) -> None:
    library = fake_clock_library()
    binary = server_binary("valkey")
    assert binary is not None
    folder, clock = Path(tempfile.mkdtemp(prefix="sp-fault-")), tmp_path / "clock"
    server = Server(binary, folder, password=PASSWORD)
    server.environment = {"LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(clock)}
    server.environment |= {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    clock.write_text("+0")
    server.start()
    try:
        async with fault_kit(server, tmp_path) as kit:
            (one,) = candidates(1)
            kit.write_script({one.id: [f"sleep:{8 * LEASE}"]})
            daemon = await kit.daemon()
            for _ in range(3):
                await kit.worker()
            await kit.begun(daemon, one)
            for step in range(1, 5):
                await asyncio.sleep(1.5 * LEASE)
                clock.write_text(f"+{120 * step}")
            seconds, _ = await kit.redis.time()
            assert seconds - time.time() > 400, "the clock has stepped"
            await daemon.settled()
            assert kit.evaluations[one.id] == 1
    finally:
        server.kill()
        shutil.rmtree(folder)


@fault("53", "entries of the history damaged", "HSET, HDEL, bytes that are not UTF-8", "from the copy, or anew")
async def test_damaged_entries_of_the_history_are_left_out_and_may_be_issued_again(kit: Kit) -> None:
    many = candidates(6)
    daemon, _ = await kit.started()
    await daemon.settle(many)
    await daemon.end()
    redis, keys = kit.redis, kit.keys
    await redis.hset(keys.candidates, many[0].id, BYTES)
    await redis.hset(keys.outcomes, many[1].id, BYTES)
    await redis.hset(keys.outcomes, many[2].id, json.dumps(["a list"]))
    await redis.hdel(keys.candidates, many[3].id)
    await redis.hset(keys.selections, "1", BYTES)
    history = await daemon.store.history()
    assert list(history.ledger) == [many[i].id for i in (1, 2, 4, 5)]
    assert [e.candidate for e in history.population] == [many[4], many[5]]
    assert history.damaged == 7 and not history.selections
    kit.unsettled = True


@fault("54", "the password is changed under a search", "CONFIG SET requirepass, CLIENT KILL", "waits for it")
async def test_a_password_that_is_changed_in_mid_search_ends_neither_daemon_nor_worker(kit: Kit) -> None:
    daemon, (worker,) = await kit.started()
    first, second = candidates(2)
    await daemon.measure([first])
    operator = connect(kit.server.url)
    await operator.config_set("requirepass", "another")
    await operator.client_kill_filter(_type="normal", skipme=True)
    issuing = asyncio.create_task(daemon.issue([second]))
    await eventually(lambda: bool(worker.events("redis_unreachable")))
    await operator.config_set("requirepass", PASSWORD)
    await issuing
    await daemon.settled()
    await operator.aclose()
