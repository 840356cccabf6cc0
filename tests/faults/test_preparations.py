"""Faults of a search whose workers are still preparing its model."""

import asyncio
from typing import Any

import psutil
import pytest

from protocol.plans.candidate import Measured
from protocol.plans.spec import SearchSpec
from protocol.queue.profile_board import ProfileBoard
from tests.faults.kit import LEASE, Kit, WorkerProcess, candidates, eventually
from tests.faults.marks import fault, slow_fault
from tests.support.samples import SPEC, profile_for

SECOND, THIRD = (SPEC.model_copy(update={"model": name}) for name in ("second", "third"))


async def preparing(kit: Kit, **options: Any) -> WorkerProcess:
    """Start a worker whose evaluation process never finishes preparing SPEC."""
    kit.write_script({}, prepare="hang")
    await set_spec(kit, SPEC)
    worker = await kit.worker(**options)
    await prepares(worker)
    return worker


async def set_spec(kit: Kit, spec: SearchSpec) -> None:
    await kit.redis.set(kit.keys.spec, spec.model_dump_json())


async def replace_spec(kit: Kit, *specs: SearchSpec) -> None:
    """Give the search one spec after the other; workers can prepare the last one."""
    kit.profile = profile_for(specs[-1])
    kit.write_script({})
    for spec in specs:
        await set_spec(kit, spec)
    await publishes(kit, specs[-1])


async def prepares(worker: WorkerProcess) -> None:
    """Wait until the evaluation process hangs, which has started a process itself."""
    await eventually(lambda: len(worker.children()) > 1)


async def publishes(kit: Kit, spec: SearchSpec) -> None:
    await eventually(lambda: ProfileBoard(kit.redis, kit.keys).read(spec.fingerprint), 15)


async def has_given_up(worker: WorkerProcess, reason: str) -> None:
    def reasons() -> list[str]:
        return [event["reason"] for event in worker.events("preparation_given_up")]

    await eventually(lambda: reasons() == [reason], 15)


@fault("63", "a spec replaced while a worker prepares it", "SET spec", "given up, the new one is prepared")
async def test_a_worker_stops_preparing_a_replaced_spec(kit: Kit) -> None:
    worker = await preparing(kit)
    old = worker.children()
    await replace_spec(kit, SECOND)
    await has_given_up(worker, f"the search has another spec ({SECOND.fingerprint})")
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in old)
    assert len(worker.events("model_ready")) == 1


@slow_fault("63", "a spec replaced twice", "SET spec, SET spec", "only the last one is prepared")
async def test_the_last_of_several_quickly_replaced_specs_is_prepared(kit: Kit) -> None:
    worker = await preparing(kit)
    await replace_spec(kit, SECOND, THIRD)
    await has_given_up(worker, f"the search has another spec ({THIRD.fingerprint})")


@slow_fault("63", "a search that is gone while a worker prepares", "DEL spec", "given up after a lease")
async def test_a_worker_stops_preparing_for_a_search_that_is_gone(kit: Kit) -> None:
    worker = await preparing(kit)
    await kit.redis.delete(kit.keys.spec)
    await has_given_up(worker, f"the search has been gone for {LEASE:g} seconds")
    await eventually(lambda: not worker.children())
    kit.write_script({})
    await set_spec(kit, SPEC)
    await publishes(kit, SPEC)


@slow_fault("63", "data that is lost and restored at once", "FLUSHALL, SET spec", "the preparation goes on")
async def test_a_worker_keeps_preparing_if_the_search_is_restored(kit: Kit) -> None:
    worker = await preparing(kit, lease_seconds=30)
    old = {child.pid for child in worker.children()}
    await kit.redis.flushall()
    await asyncio.sleep(2.5)  # longer than it takes to look
    await set_spec(kit, SPEC)
    await asyncio.sleep(2.5)
    assert {child.pid for child in worker.children()} == old
    assert not worker.events("preparation_given_up")


@slow_fault("63", "a search that is stopped while a worker prepares", "SET control stop", "waits for its start")
async def test_a_worker_prepares_nothing_for_a_search_that_is_stopped(kit: Kit) -> None:
    worker = await preparing(kit)
    await kit.redis.set(kit.keys.control, "stop")
    await has_given_up(worker, "the search is stopped")
    await eventually(lambda: not worker.children())
    kit.write_script({})
    await asyncio.sleep(2)
    assert not worker.children()
    await kit.redis.set(kit.keys.control, "run")
    await publishes(kit, SPEC)


@slow_fault("63", "what cannot be read in place of the spec", "SET spec, garbage", "the preparation goes on")
@pytest.mark.parametrize("garbage", [b"{", b"\xff\xfe", b"null"])
async def test_a_spec_that_cannot_be_read_ends_no_preparation(kit: Kit, garbage: bytes) -> None:
    worker = await preparing(kit)
    old = {child.pid for child in worker.children()}
    await kit.redis.set(kit.keys.spec, garbage)
    await asyncio.sleep(2 * LEASE)
    assert {child.pid for child in worker.children()} == old
    await replace_spec(kit, SECOND)


@slow_fault("63", "a replaced spec whose model cannot be had", "SET spec, then no model", "moves to the new one")
async def test_a_worker_does_not_end_for_the_model_of_a_spec_that_was_replaced(kit: Kit) -> None:
    kit.write_script({}, prepare="usage-error-when-replaced")
    await set_spec(kit, SPEC)
    worker = await kit.worker()
    await eventually(lambda: bool(worker.children()))
    kit.profile = profile_for(SECOND)
    await kit.redis.set(kit.keys.spec, SECOND.model_dump_json())
    kit.write_script({})
    await publishes(kit, SECOND)
    assert worker.process.returncode is None


@slow_fault("63", "a preparation ends beside a worker", "SET control stop", "the other measures on")
async def test_the_end_of_a_preparation_disturbs_no_other_worker(kit: Kit) -> None:
    daemon, (working,) = await kit.started()
    await publishes(kit, SPEC)
    (one,) = candidates(1)
    kit.write_script({one.id: ["sleep:6"]}, prepare="hang")
    late = await kit.worker()
    await prepares(late)
    await kit.begun(daemon, one)
    await kit.redis.set(kit.keys.control, "stop")
    await has_given_up(late, "the search is stopped")
    await daemon.settled()
    assert isinstance(daemon.outcome(one), Measured)
    assert len(working.events("model_ready")) == 1


@slow_fault("63", "a stop while a dead process is replaced", "child killed, stop", "the job is free")
async def test_a_job_is_handed_back_where_the_search_is_stopped_while_the_model_is_loaded_again(kit: Kit) -> None:
    (one,) = candidates(1)
    kit.write_script({one.id: ["sleep:600"]})
    kit.unsettled = True
    daemon, (worker,) = await kit.started(lease_seconds=60)
    await kit.begun(daemon, one)
    kit.write_script({one.id: ["sleep:600"]}, prepare="hang")
    (child,) = worker.children()
    child.kill()
    await prepares(worker)
    await kit.redis.set(kit.keys.control, "stop")
    await has_given_up(worker, "the search is stopped")
    await kit.has_released()
