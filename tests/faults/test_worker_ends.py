"""Faults of idle workers, and of workers that end because they can no longer work."""

from typing import Any

from gpu_worker.worker.evaluator import EXIT_STUCK
from protocol.plans.candidate import Failed, Measured
from protocol.queue.profile_board import ProfileBoard
from tests.faults.kit import Kit, candidates, eventually
from tests.faults.marks import fault
from tests.support.samples import PROFILE, SPEC, profile_for


@fault("18", "the data is gone while no daemon runs", "FLUSHALL, workers idle", "the profile is back")
async def test_an_idle_worker_publishes_its_profile_again_for_a_new_daemon(kit: Kit) -> None:
    daemon, _ = await kit.started()
    await has_profile(kit)
    await daemon.end()
    await kit.redis.flushall()
    daemon = await kit.daemon()
    await has_profile(kit)
    await daemon.settle(candidates(2))


@fault("18", "the search begins anew with another spec", "DEL, SET spec, worker idle", "loads that one")
async def test_an_idle_worker_loads_the_model_of_a_spec_that_has_changed(kit: Kit) -> None:
    other = SPEC.model_copy(update={"model": "another"})
    await kit.redis.set(kit.keys.spec, SPEC.model_dump_json())
    worker = await kit.worker()
    await has_profile(kit)
    kit.profile = profile_for(other)
    kit.write_script({})
    await kit.redis.set(kit.keys.spec, other.model_dump_json())
    await has_profile(kit, other.fingerprint)
    (changed,) = worker.events("spec_changed")
    assert (changed["current"], changed["loaded"]) == (other.fingerprint, SPEC.fingerprint)


async def has_profile(kit: Kit, fingerprint: str = PROFILE.fingerprint) -> None:
    await eventually(lambda: ProfileBoard(kit.redis, kit.keys).read(fingerprint))


@fault("9", "a GPU is lost for good", "child killed, the next cannot get ready", "exit 2, job handed back")
async def test_a_worker_that_can_work_no_more_hands_its_job_back_and_says_why(kit: Kit) -> None:
    (one,) = candidates(1)
    daemon, (worker,) = await kit.started({one.id: ["sleep:600", "instant"]}, lease_seconds=60)
    await kit.begun(daemon, one)
    owner = await kit.owner(worker)
    kit.write_script({one.id: ["sleep:600", "instant"]}, prepare="usage-error")
    (child,) = worker.children()
    child.kill()
    assert await worker.ended() == 2
    status = [w for w in await daemon.store.workers() if w.consumer == owner]
    assert [(w.stage, w.detail) for w in status] == [("unusable", "the GPU is gone")]
    await kit.has_released()
    kit.disturbed[one.id] = 1
    kit.write_script({one.id: ["sleep:600", "instant"]})
    await kit.worker(lease_seconds=60)
    await daemon.settled(30)  # well within the lease
    assert isinstance(daemon.outcome(one), Measured)


@fault("8", "a process that outlives its kill", "as the worker sees it", "the worker ends, the job moves")
async def test_a_worker_whose_process_cannot_be_killed_ends_and_its_job_goes_to_another(kit: Kit) -> None:
    (one,) = candidates(1)
    daemon, (stuck,) = await kit.started(
        {one.id: ["sleep:600", "instant"]}, max_evaluation_seconds=0.5, unkillable=True
    )
    await daemon.issue([one])
    assert await stuck.ended() == EXIT_STUCK
    (error,) = stuck.events("evaluation_process_stuck")
    assert error["level"] == "error"
    deaths: dict[str, Any] = await kit.redis.hgetall(kit.keys.deaths)
    assert not deaths
    kit.disturbed[one.id] = 1
    await kit.worker()
    await daemon.settled()
    assert not isinstance(daemon.outcome(one), Failed)
