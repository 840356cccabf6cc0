"""The order of the turns does not depend on who is ready first."""

import asyncio
import itertools

import pytest

from agents.proposer import RoundRobin


async def order_of(delays: list[list[float]]) -> list[tuple[int, int]]:
    """(member, step) in the order of the turns, where member i waits `delays[i][step]` before each of its turns."""
    turns, taken = RoundRobin(range(len(delays))), []

    async def member(number: int) -> None:
        async with turns.membership(number):
            for step, delay in enumerate(delays[number]):
                await asyncio.sleep(delay)
                async with turns.turn(number):
                    taken.append((number, step))
                    await asyncio.sleep(0)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for number in range(len(delays)):
            group.create_task(member(number))
    return taken


@pytest.mark.parametrize("delays", list(itertools.permutations([0.0, 0.01, 0.03])))
async def test_turns_go_by_step_and_then_by_member_in_any_order_of_arrival(delays: tuple[float, ...]) -> None:
    steps = [[delays[0]], [delays[1], delays[2], 0.0], [delays[2], delays[0]]]
    assert await order_of(steps) == [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (1, 2)]


async def test_no_member_waits_for_one_that_failed_or_was_cancelled() -> None:
    turns, taken = RoundRobin(range(3)), []

    async def fails() -> None:
        async with turns.membership(0), turns.turn(0):
            raise ValueError

    async def hangs() -> None:
        async with turns.membership(1):
            await asyncio.Event().wait()

    async def takes() -> None:
        async with turns.membership(2), turns.turn(2):
            taken.append(2)

    tasks = [asyncio.create_task(member()) for member in (takes, fails, hangs)]
    await asyncio.sleep(0.01)
    assert not taken
    tasks[2].cancel()
    async with asyncio.timeout(10):
        await asyncio.wait(tasks)
    assert taken == [2] and isinstance(tasks[1].exception(), ValueError)


async def test_only_one_member_at_a_time_has_its_turn() -> None:
    turns, inside, most = RoundRobin(range(5)), 0, 0

    async def member(number: int) -> None:
        nonlocal inside, most
        async with turns.membership(number):
            for _ in range(3):
                async with turns.turn(number):
                    inside += 1
                    most = max(most, inside)
                    await asyncio.sleep(0.001)
                    inside -= 1

    async with asyncio.timeout(10):
        await asyncio.gather(*(member(number) for number in range(5)))
    assert most == 1


@pytest.mark.parametrize("turns_before", [[0, 0, 0], [3, 1, 0], [0, 1, 2]])
async def test_last_turns_come_after_all_others_in_the_order_of_the_members(turns_before: list[int]) -> None:
    turns, taken = RoundRobin(range(3)), []

    async def member(number: int) -> None:
        async with turns.membership(number):
            for _ in range(turns_before[number]):
                async with turns.turn(number):
                    taken.append("turn")
                    await asyncio.sleep(0.001)
            async with turns.last_turn(number):
                taken.append(f"last {number}")
                await asyncio.sleep(0.001)

    async with asyncio.timeout(10):
        await asyncio.gather(*(member(number) for number in reversed(range(3))))
    assert taken == ["turn"] * sum(turns_before) + ["last 0", "last 1", "last 2"]
