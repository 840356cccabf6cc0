"""The heartbeat notices what keeps the event loop from running, and tells busy code from a busy machine."""

import asyncio
import time
from collections.abc import Callable

import pytest
from structlog.testing import capture_logs

from daemon.monitor.heartbeat import Heartbeat


def compute(seconds: float) -> None:
    """Use so much processor time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


async def beat_through(block: Callable[[float], None], *seconds: float) -> Heartbeat:
    heartbeat = Heartbeat()
    task = asyncio.create_task(heartbeat.run())
    await asyncio.sleep(0.1)
    for each in seconds:
        block(each)
        await asyncio.sleep(0.1)
    task.cancel()
    return heartbeat


async def test_a_computation_in_the_event_loop_is_measured_and_reported() -> None:
    with capture_logs() as logs:
        heartbeat = await beat_through(compute, 0.7)
    assert heartbeat.longest_block >= 0.6 and heartbeat.longest_busy_block >= 0.6
    (line,) = logs
    assert line["event"] == "event_loop_blocked" and line["log_level"] == "warning"
    assert line["seconds"] == round(heartbeat.longest_block, 2)


async def test_a_loop_that_only_waits_for_the_machine_used_no_processor_time() -> None:
    heartbeat = await beat_through(time.sleep, 0.7)
    assert heartbeat.longest_block >= 0.6 and heartbeat.longest_busy_block < 0.3


async def test_only_the_longest_block_so_far_is_reported() -> None:
    with capture_logs() as logs:
        await beat_through(time.sleep, 1.5, 0.7, 0.7)
    assert len(logs) == 1


@pytest.mark.parametrize("seconds", [0.0, 0.2])
async def test_short_blocks_are_not_reported(seconds: float) -> None:
    with capture_logs() as logs:
        heartbeat = await beat_through(time.sleep, seconds)
    assert not logs and heartbeat.longest_block >= seconds - 0.06
