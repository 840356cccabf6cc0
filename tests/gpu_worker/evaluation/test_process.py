import asyncio
import json
import os
import queue
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from gpu_worker.evaluation.process import EXIT_USAGE, Lines, Replies, serve
from gpu_worker.progress import no_progress
from gpu_worker.worker.evaluator import ChildDied, EvaluationChild
from protocol.errors import UsageError
from protocol.plans.candidate import Candidate, Failed, Measured, Provenance, Text
from protocol.plans.plan import Plan
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec


def candidate_for(plan: Plan, text: Text = "fitness") -> Candidate:
    provenance = Provenance(agent="baseline", source="allocation", round=0)
    return Candidate(id="0123456789abcdef", rates=(), plan=plan, provenance=provenance, text=text)


async def started(spec: SearchSpec) -> tuple[EvaluationChild, ModelProfile]:
    child = EvaluationChild(spec)
    return child, await child.start(no_progress, sensitivity=False)


def process_of(child: EvaluationChild) -> asyncio.subprocess.Process:
    assert child._process is not None
    return child._process


@pytest.mark.usefixtures("own_cache")
async def test_the_profile_comes_after_the_stages_and_candidates_are_measured(spec: SearchSpec) -> None:
    """What the process logs is in the parent's log."""
    stages: list[str] = []
    child = EvaluationChild(spec)
    with structlog.testing.capture_logs() as events:
        profile = await child.start(lambda stage, done, total: stages.append(stage), sensitivity=False)
    (estimate,) = [event for event in events if event["event"] == "memory_estimate"]
    assert (estimate["log_level"], estimate["model"]) == ("info", spec.model)
    assert estimate["needs"].startswith("about ")
    plan = spec.uniform_plan(profile.shape)
    outcomes = [await child.evaluate(candidate_for(plan, text), limit_seconds=60) for text in ("fitness", "report")]
    await child.kill()
    dense = ["measuring dense", "measuring dense on the report text"]
    assert list(dict.fromkeys(stages)) == ["loading model", "reading texts", "calibrating", "scoring", *dense]
    assert profile.fingerprint == spec.fingerprint
    fitness, report = outcomes
    assert isinstance(fitness, Measured) and isinstance(report, Measured)
    assert fitness.perplexity != report.perplexity
    assert fitness.tokens == profile.dense.tokens


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
async def test_its_threads_wait_passively_unless_the_environment_says_otherwise(
    spec: SearchSpec, monkeypatch: pytest.MonkeyPatch, given: str | None, used: str
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    says = "import json, os; print(json.dumps({'usage_error': os.environ['OMP_WAIT_POLICY']}), flush=True)"
    child = EvaluationChild(spec, (sys.executable, "-c", says))
    with pytest.raises(UsageError, match=f"^{used}$"):
        await child.start(no_progress, sensitivity=False)


async def test_a_plan_of_another_model_has_failed_as_invalid_and_the_next_is_measured(spec: SearchSpec) -> None:
    child, profile = await started(spec)
    plan = spec.uniform_plan(profile.shape)
    short = await child.evaluate(candidate_for(Plan(layers=plan.layers[1:])), limit_seconds=60)
    good = await child.evaluate(candidate_for(plan), limit_seconds=60)
    assert isinstance(short, Failed) and short.reason == "invalid"
    assert isinstance(good, Measured)
    stdin = process_of(child).stdin
    assert stdin is not None
    stdin.close()  # as when the parent has died
    assert await process_of(child).wait() == -signal.SIGKILL  # its whole group, itself included


async def test_a_killed_process_is_reported_as_dead(spec: SearchSpec) -> None:
    child, profile = await started(spec)
    os.kill(process_of(child).pid, signal.SIGKILL)
    with pytest.raises(ChildDied, match="status -9: killed, as the system does when main memory runs out"):
        await child.evaluate(candidate_for(spec.uniform_plan(profile.shape)), limit_seconds=60)
    assert not child.alive


async def test_an_evaluation_over_its_time_limit_has_failed_and_the_process_is_gone(spec: SearchSpec) -> None:
    child, profile = await started(spec)
    process_of(child).send_signal(signal.SIGSTOP)  # a hang
    outcome = await child.evaluate(candidate_for(spec.uniform_plan(profile.shape)), limit_seconds=0.1)
    assert isinstance(outcome, Failed) and outcome.reason == "timeout"
    assert not child.alive


async def test_a_text_that_is_too_short_is_the_users_to_mend(spec: SearchSpec, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    lacking = spec.fitness.model_copy(update={"source": str(text)})
    child = EvaluationChild(spec.model_copy(update={"fitness": lacking}))
    with pytest.raises(UsageError, match="too short"):
        await child.start(no_progress, sensitivity=False)
    assert not child.alive


def test_the_process_ends_even_while_it_gets_ready() -> None:
    command = [sys.executable, "-m", "gpu_worker.evaluation.process"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, b"")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation"),
            r"the model '.*' does not fit into memory \(CUDA out of memory\. Tried to allocate 2 GiB\.\); use shorter",
        ),
        (MemoryError(), r"does not fit into memory \(MemoryError\); use shorter windows \(seqlen\)"),
    ],
)
def test_what_ends_the_preparation_again_and_again_is_the_users_to_mend(
    spec: SearchSpec, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    code, (message,) = served(spec, monkeypatch, error)
    assert code == EXIT_USAGE
    assert re.search(sentence, message["usage_error"]) and "\n" not in message["usage_error"]


def test_an_error_in_the_preparation_that_nobody_expected_is_not_hidden(
    spec: SearchSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        served(spec, monkeypatch, RuntimeError("shapes cannot be multiplied"))


def served(spec: SearchSpec, monkeypatch: pytest.MonkeyPatch, error: Exception) -> tuple[int, list[dict[str, Any]]]:
    """Serve, in this process, a spec whose preparation ends with `error`: the exit code and what was sent."""

    class Unprepared:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise error

    monkeypatch.setattr("gpu_worker.evaluation.session.Session", Unprepared)
    lines: Lines = queue.SimpleQueue()
    lines.put(json.dumps({"spec": spec.model_dump(mode="json"), "sensitivity": False}).encode())
    reading, writing = os.pipe()
    replies = Replies(writing)
    try:
        code = serve(lines, replies)
        return code, [json.loads(line) for line in os.read(reading, 1 << 16).splitlines()]
    finally:
        replies._file.close()
        os.close(reading)


def test_what_libraries_print_does_not_reach_the_parent() -> None:
    script = (
        "from gpu_worker.evaluation.process import take_stdout\n"
        "replies = take_stdout()\nprint('a library speaks', flush=True)\nreplies.send({'profile': 1})"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == '{"profile": 1}\n'
    assert "a library speaks" in ended.stderr


def test_the_module_itself_brings_no_torch() -> None:
    script = "import sys, gpu_worker.evaluation.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
