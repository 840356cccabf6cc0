"""Faults of workers and of their evaluations."""

import asyncio
import signal

import pytest

from protocol.plans.candidate import Failed, Measured
from tests.faults.kit import LEASE, Kit, candidates, eventually
from tests.faults.marks import fault, slow_fault


@fault("1", "a worker is killed in mid-evaluation", "SIGKILL, a second worker idle", "one outcome, in time")
async def test_when_a_worker_is_killed_an_idle_one_takes_its_job_over(kit: Kit) -> None:
    one, two = candidates(2)
    daemon, (first,) = await kit.started({one.id: ["sleep:60", "instant"]})
    await kit.begun(daemon, one)
    await kit.worker()
    await daemon.issue([two])
    await daemon.measured(1)
    began = asyncio.get_running_loop().time()
    await first.kill()
    kit.disturbed[one.id] = 1
    await daemon.settled()
    assert asyncio.get_running_loop().time() - began < LEASE + 10
    assert isinstance(daemon.outcome(one), Measured)


@slow_fault("2", "the only worker is killed and started again", "SIGKILL, start", "one outcome, in time")
async def test_the_only_worker_is_killed_and_started_again(kit: Kit) -> None:
    (one,) = candidates(1)
    daemon, (worker,) = await kit.started({one.id: ["sleep:60", "instant"]})
    await kit.begun(daemon, one)
    await worker.kill()
    kit.disturbed[one.id] = 1
    await kit.worker()
    await daemon.settled()
    assert isinstance(daemon.outcome(one), Measured)


@slow_fault("3+4", "a long job whose process blocks", "GIL held for 5 leases, 2 workers idle", "evaluated once")
async def test_a_long_job_that_holds_the_gil_is_evaluated_once(kit: Kit) -> None:
    await _is_evaluated_once(kit, f"hold-gil:{5 * LEASE}")


@slow_fault("3", "a long job", "sleeps for 5 leases, 2 workers idle", "evaluated once")
async def test_a_long_job_is_evaluated_once(kit: Kit) -> None:
    await _is_evaluated_once(kit, f"sleep:{5 * LEASE}")


async def _is_evaluated_once(kit: Kit, behaviour: str) -> None:
    one, *others = candidates(4)
    daemon, _ = await kit.started({one.id: [behaviour]}, workers=3)
    await daemon.settle([one, *others])
    assert kit.evaluations[one.id] == 1


@slow_fault("5", "a worker's machine is suspended", "SIGSTOP 3 leases, SIGCONT", "job moves, late outcome ignored")
async def test_a_suspended_workers_job_moves_and_its_late_outcome_changes_nothing(kit: Kit) -> None:
    (one,) = candidates(1)
    daemon, (first,) = await kit.started({one.id: ["sleep:1", "instant"]})
    await kit.begun(daemon, one)
    first.send(signal.SIGSTOP)
    kit.disturbed[one.id] = 1
    await kit.worker()
    await daemon.settled()
    await asyncio.sleep(LEASE)
    first.send(signal.SIGCONT)
    await first.is_late()


@fault("6", "a candidate that kills its process", "os.abort() on one id", "dead after 3, others measured")
async def test_a_candidate_that_kills_is_given_up_after_three_deaths(kit: Kit) -> None:
    poison, *others = candidates(4)
    kit.disturbed[poison.id] = 2
    daemon, (worker,) = await kit.started({poison.id: ["abort"]})
    await daemon.settle([poison, *others])
    outcome = daemon.outcome(poison)
    assert isinstance(outcome, Failed) and outcome.reason == "crashed"
    assert all(isinstance(daemon.outcome(other), Measured) for other in others)
    (dead,) = await kit.dead()
    assert (dead["id"], dead["reason"], dead["worker"]) == (poison.id, "poison", await kit.owner(worker))
    assert "status -6" in dead["detail"]


@slow_fault("6", "a candidate that kills its workers", "SIGKILL of the worker at it, 3 times", "dead after 3")
async def test_a_candidate_on_which_three_workers_died_is_given_up(kit: Kit) -> None:
    (poison,) = candidates(1)
    kit.write_script({poison.id: ["sleep:60"]})
    kit.disturbed[poison.id] = 2
    daemon = await kit.daemon()
    await daemon.issue([poison])
    for death in (1, 2, 3):
        worker = await kit.worker()
        await kit.evaluating(poison.id, death)
        last = await kit.owner(worker)
        await worker.kill()
    await kit.worker()
    await daemon.settled()
    (dead,) = await kit.dead()
    assert (dead["id"], dead["reason"], dead["worker"]) == (poison.id, "poison", last)
    assert kit.evaluations[poison.id] == 3


TROUBLES = ("nan", "inf", "negative", "string", "missing", "empty")


@fault("7", "a score that is none", "NaN, inf, -1, a word, none, nothing", "failed, not tried again")
async def test_an_invalid_score_is_a_failure_and_enters_no_population(kit: Kit) -> None:
    bad = candidates(len(TROUBLES) + 1)
    good = bad.pop()
    daemon, _ = await kit.started({each.id: [trouble] for each, trouble in zip(bad, TROUBLES, strict=True)})
    await daemon.settle([*bad, good])
    for each in bad:
        outcome = daemon.outcome(each)
        assert isinstance(outcome, Failed) and outcome.reason == "invalid"
    assert [e.candidate for e in daemon.population.top(9)] == [good]
    assert not await kit.dead()


@fault("8", "a hang", "endless, ignores SIGTERM, has a grandchild", "failed(timeout), none left")
async def test_a_hanging_evaluation_is_killed_with_its_grandchild(kit: Kit) -> None:
    one, two = candidates(2)
    daemon, _ = await kit.started({one.id: ["hang"]}, max_evaluation_seconds=1)
    await daemon.settle([one, two])
    outcome = daemon.outcome(one)
    assert isinstance(outcome, Failed) and outcome.reason == "timeout"
    assert isinstance(daemon.outcome(two), Measured)


@slow_fault("8", "a hang while getting ready", "sleeps for ever before its profile", "killed 3 times, one sentence")
async def test_a_preparation_that_hangs_is_killed_with_its_grandchild(kit: Kit) -> None:
    kit.write_script({}, prepare="hang")
    await kit.daemon()
    worker = await kit.worker(max_preparation_seconds=0.5)
    assert await worker.ended(30) == 2
    (last,) = worker.events("ended")
    assert "not ready within 0.5 seconds" in last["error"]


@slow_fault("8", "a death that leaves a grandchild", "abort, the grandchild holds stdout", "noticed, none left")
async def test_a_process_that_dies_while_a_grandchild_holds_its_stdout_is_dead_all_the_same(kit: Kit) -> None:
    (one,) = candidates(1)
    kit.disturbed[one.id] = 1
    daemon, _ = await kit.started({one.id: ["abort-with-grandchild", "instant"]}, max_evaluation_seconds=60)
    await daemon.settle([one], 30)
    assert isinstance(daemon.outcome(one), Measured)


@fault("9", "out of memory; a lost device", "failed outcomes of that kind", "one more try each")
async def test_a_lack_of_memory_and_a_lost_device_are_tried_once_more(kit: Kit) -> None:
    memory, device, small, broken = candidates(4)
    fails_once = {memory.id: ["out-of-memory", "instant"], device.id: ["device-lost", "instant"]}
    kit.disturbed["*"] = 1
    daemon, (worker,) = await kit.started(fails_once | {small.id: ["out-of-memory"], broken.id: ["device-lost"]})
    await daemon.settle([memory, device, small, broken])
    assert isinstance(daemon.outcome(memory), Measured) and isinstance(daemon.outcome(device), Measured)
    outcomes = [daemon.outcome(small), daemon.outcome(broken)]
    assert [o.reason for o in outcomes if isinstance(o, Failed)] == ["out-of-memory", "crashed"]
    assert len(worker.events("model_ready")) == 1 + 2  # a new process when it is needed again
    assert not await kit.dead()


@fault("10", "SIGTERM", "idle; in a short job; in a long one", "exit 0; committed; handed back, no death")
async def test_a_worker_told_to_end_commits_a_short_job_and_hands_a_long_one_back(kit: Kit) -> None:
    short, long = candidates(2)
    daemon, (idle,) = await kit.started({short.id: ["sleep:1"], long.id: ["sleep:60", "instant"]})
    await eventually(lambda: kit.redis.exists(kit.keys.profile))
    idle.send(signal.SIGTERM)
    assert await idle.ended(5) == 0

    finishing = await kit.worker(grace_seconds=10)
    await kit.begun(daemon, short)
    finishing.send(signal.SIGTERM)
    assert await finishing.ended(15) == 0
    await daemon.measured(1)

    busy = await kit.worker(grace_seconds=0.2, lease_seconds=30)
    await kit.begun(daemon, long)
    busy.send(signal.SIGTERM)
    assert await busy.ended(10) == 0
    kit.disturbed[long.id] = 1
    await kit.has_released()
    assert not await kit.redis.hlen(kit.keys.deaths)
    await kit.worker(lease_seconds=30)
    await daemon.settled(15)  # well within the lease: what was handed back is free at once


@slow_fault("11", "Ctrl-C twice", "2 SIGINT, 0.2 s apart", "ends at once; nothing lost after a restart")
async def test_a_second_signal_ends_a_worker_at_once(kit: Kit) -> None:
    (one,) = candidates(1)
    daemon, (worker,) = await kit.started({one.id: ["sleep:60", "instant"]}, grace_seconds=60)
    await kit.begun(daemon, one)
    worker.send(signal.SIGINT)
    await asyncio.sleep(0.2)
    worker.send(signal.SIGINT)
    assert await worker.ended(5) == 128 + signal.SIGINT
    kit.disturbed[one.id] = 1
    await kit.worker()
    await daemon.settled()


@pytest.mark.parametrize("point", ["claimed", "measured", "committed"])
@slow_fault("14", "a worker dies between two steps", "SIGKILL at claim, measurement, commit", "one outcome each")
async def test_a_worker_that_dies_between_two_steps_loses_nothing(kit: Kit, point: str) -> None:
    many = candidates(3)
    daemon = await kit.daemon()
    await daemon.issue(many)
    crashing = await kit.worker(crash_at=point)
    assert await crashing.ended() == -signal.SIGKILL
    kit.disturbed["*"] = int(point == "measured")
    await kit.worker()
    await daemon.settled()
