"""`selfpruner run` as a person starts it: real processes, signals, the embedded server; only the LLM is scripted."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.root import ROOT
from tests.support.schema_answers import answer
from tests.support.scripted_llm import ScriptedLlm
from tests.support.servers import Server, eventually, server_binary
from tests.support.tiny_specs import tiny_search

CANDIDATES = 6 + 3 * (3 + 2)


@pytest.fixture
async def llm() -> AsyncIterator[ScriptedLlm]:
    """Slow enough for a kill to find the search at work."""
    async with ScriptedLlm(partial(answer, after=0.03)) as llm:
        yield llm


class Run:
    """`selfpruner run` in `folder`."""

    def __init__(self, folder: Path, target: Path, llm: ScriptedLlm) -> None:
        self.folder = folder
        self.config = folder / "search.yaml"
        settings = tiny_search("s", target / "model", target / "text.txt", [llm.settings])
        settings["data"] |= {"report": str(target / "text.txt"), "report_windows": 2}
        self.write(settings | {"worker": {"lease_seconds": 2}})

    def write(self, settings: dict[str, Any]) -> None:
        self.config.write_text(json.dumps(settings))

    async def start(self, *overrides: str) -> asyncio.subprocess.Process:
        return await self.command("run", str(self.config), "--json", *(w for o in overrides for w in ("--set", o)))

    async def command(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "daemon", *arguments),
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )

    async def answer(self, command: str) -> dict[str, Any]:
        return await ended(await self.command(command, "--search", "s", "--json"))

    async def steer(self, command: str) -> None:
        process = await self.command(command, "--search", "s")
        _, err = await process.communicate()
        assert process.returncode == 0, err.decode()

    async def refused(self, *overrides: str) -> str:
        """The sentence in which a run with these settings is refused."""
        process = await self.start(*overrides)
        out, err = await asyncio.wait_for(process.communicate(), 120)
        assert (process.returncode, out) == (2, b"")
        last = err.decode().strip().splitlines()[-1]
        assert last.startswith("selfpruner: ")
        return last

    def evaluations(self) -> list[dict[str, Any]]:
        path = self.folder / "runs" / "s" / "evaluations.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def measured(self, count: int) -> bool:
        return len(self.evaluations()) >= count


async def ended(process: asyncio.subprocess.Process, code: int = 0) -> dict[str, Any]:
    """The JSON object of a command, once it ends."""
    out, err = await asyncio.wait_for(process.communicate(), 180)
    assert process.returncode == code, err.decode()
    answer: dict[str, Any] = json.loads(out)
    return answer


@pytest.fixture
def run(tmp_path: Path, target: Path, llm: ScriptedLlm) -> Run:
    return Run(tmp_path, target, llm)


@asynccontextmanager
async def nothing_left_behind(folder: Path) -> AsyncIterator[None]:
    """No process of a run in `folder` may be alive shortly after the block."""
    yield

    await eventually(lambda: not [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(folder)], 20)


def check_finished(run: Run, answer: dict[str, Any]) -> None:
    """What must be true of a search that ended, whatever happened to it on the way."""
    records = run.evaluations()
    proposals = [r for r in records if r["agent"] != "baseline"]
    assert len({r["id"] for r in records}) == len(records)
    assert len(proposals) == CANDIDATES
    assert all(r["outcome"]["kind"] == "measured" for r in records)
    assert answer["finished"]
    assert answer["candidates"]["by_outcome"] == {"measured": CANDIDATES, "failed": 0, "stopped": 0}
    assert answer["best"]["perplexity"] == min(r["outcome"]["perplexity"] for r in proposals)


async def test_a_run_ends_with_one_json_object_and_leaves_its_files_and_no_process(run: Run) -> None:
    async with nothing_left_behind(run.folder):
        process = await run.start()
        out, err = await asyncio.wait_for(process.communicate(), 180)
    assert process.returncode == 0, err.decode()
    answer = json.loads(out)
    check_finished(run, answer)
    assert {"dense", "uniform", "best", "candidates", "rates", "tokens", "seconds"} <= set(answer)
    for row in (answer["dense"], answer["uniform"], answer["best"]):
        assert row["perplexity"] > 1 and row["report_perplexity"] > 1
        assert row["tokens"] == 62 and row["seqlen"] == 32
        assert set(row["parameters"]) == {"decoder_before", "decoder_after", "total_before", "total_after"}
    assert answer["candidates"]["by_agent"] == {"initializer": 6, "mutator": 9, "crossover": 6}
    assert answer["candidates"]["by_source"]["llm"] > CANDIDATES / 2
    assert answer["tokens"]["prompt"] > 0
    folder = run.folder / "runs" / "s"
    files = {"spec.json", "profile.json", "best.json", "summary.json", "report.html"}
    files |= {"evaluations.jsonl", "transcript.jsonl", "log.jsonl"}
    assert files <= {path.name for path in folder.iterdir()}
    assert f"finished after {CANDIDATES} candidates" in (folder / "report.html").read_text()
    for line in (folder / "log.jsonl").read_text().splitlines() + err.decode().splitlines():
        json.loads(line)
    assert (await run.answer("best"))["rates"] == answer["rates"]


async def test_a_run_on_a_server_that_is_there_passes_its_password_on_to_the_worker(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = server_binary("valkey")
    assert binary is not None
    folder = Path(tempfile.mkdtemp(prefix="sp-"))  # short, for the path of the socket
    server = Server(binary, folder, password="open-sesame-5309")
    (tmp_path / "password").write_text("open-sesame-5309\n")
    monkeypatch.setenv("SELFPRUNER_REDIS__PASSWORD_FILE", str(tmp_path / "password"))
    server.start()
    try:
        process = await run.start(f"redis.url=unix://{server.socket}", "search.rounds=0")
        out, err = await asyncio.wait_for(process.communicate(), 180)
    finally:
        server.kill()
        shutil.rmtree(folder)
    assert process.returncode == 0, err.decode()
    assert json.loads(out)["finished"] and b"open-sesame" not in err


async def test_a_run_that_is_killed_or_interrupted_is_gone_with_all_it_started_and_goes_on_when_started_again(
    run: Run,
) -> None:
    async with nothing_left_behind(run.folder):
        process = await run.start()
        await eventually(partial(run.measured, 5), 120)
        process.kill()
        await process.communicate()
    killed_at = len(run.evaluations())
    assert killed_at < CANDIDATES
    async with nothing_left_behind(run.folder):
        process = await run.start()
        await eventually(partial(run.measured, killed_at + 2), 120)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        interrupted = await ended(process, code=130)
    assert not interrupted["finished"] and interrupted["best"]["perplexity"] > 1
    check_finished(run, await ended(await run.start()))


async def test_a_run_that_minimises_divergence_ends_with_the_least_divergent_and_shows_both_figures(run: Run) -> None:
    answer = await ended(await run.start("search.fitness=kl", "search.rounds=1"))
    outcomes = [r["outcome"] for r in run.evaluations() if r["agent"] != "baseline"]
    assert len(outcomes) == 6 + 3 + 2
    least = min(outcomes, key=lambda outcome: outcome["kl"])
    best = answer["best"]
    assert (answer["fitness"], best["kl"], best["perplexity"]) == ("kl", least["kl"], least["perplexity"])
    assert answer["dense"]["kl"] == answer["dense"]["report_kl"] == 0
    for row in (answer["uniform"], best):
        assert row["kl"] > 0 and row["report_kl"] > 0 and row["perplexity"] > 1
    record = await run.answer("best")
    assert (record["kl"], record["perplexity"], record["spec"]["measure"]) == (best["kl"], best["perplexity"], "kl")
    for line in (run.folder / "runs" / "s" / "transcript.jsonl").read_text().splitlines():
        assert "KL divergence" in line and "perplexity" not in line


async def test_killing_the_worker_and_its_child_in_a_run_loses_nothing(run: Run) -> None:
    process = await run.start()
    for number, module in ((3, "gpu_worker.evaluation.process"), (9, "gpu_worker")):
        await eventually(partial(run.measured, number), 120)
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # the killed child's child goes by itself
                if module in child.cmdline():
                    child.kill()
    check_finished(run, await ended(process))


async def test_a_running_search_is_watched_paused_resumed_and_stopped_from_another_process(
    run: Run, llm: ScriptedLlm
) -> None:
    process = await run.start("search.rounds=200")
    await eventually(partial(run.measured, 1), 120)
    watching = await run.command("watch", "--search", "s", "--json")
    await eventually(partial(run.measured, 3), 120)
    assert "already running" in await run.refused()

    await run.steer("pause")
    await asyncio.sleep(2)
    asked, measured = len(llm.asked), len(run.evaluations())
    await asyncio.sleep(2)
    assert len(llm.asked) == asked and len(run.evaluations()) == measured
    status = await run.answer("status")
    assert status["control"] == "pause" and status["workers"][0]["stage"] in ("idle", "evaluating")
    assert status["daemon"] and status["parents_source"] in (None, "llm", "fallback") and status["degraded"] is False
    (worker,), (endpoint,) = status["workers"], status["endpoints"].values()
    assert 0 < worker["busy_seconds"] < worker["ready_seconds"] and endpoint["answer_seconds"] > 0
    assert status["questions"]["initializer"]["asked"] >= 1

    await run.steer("resume")
    await eventually(partial(run.measured, measured + 3), 60)
    await run.steer("stop")
    assert not (await ended(process))["finished"]
    watched, _ = await asyncio.wait_for(watching.communicate(), 20)
    assert watching.returncode == 0
    events = [json.loads(line) for line in watched.splitlines()]
    assert set(events[0]) == {"event", *status} and events[0]["event"] == "status"
    assert [e["control"] for e in events if e["event"] == "control_changed"][:2] == ["pause", "run"]
    assert len([e for e in events if e["event"] == "candidate_measured"]) >= 3
    assert events[-1] == {"event": "search_ended", "finished": False}

    last = await run.answer("status")
    assert set(last) == set(status)
    assert (last["daemon"], last["workers"], last["finished"]) == (None, [], False)
    assert last["measured"] == len([e for e in run.evaluations() if e["agent"] != "baseline"])


def the_line_that_pauses_by_hand(search: str) -> list[str]:
    """As the guide to long searches has it."""
    guide = (ROOT / "docs" / "guides" / "long-searches.md").read_text()
    (line,) = re.findall(r"^(redis-cli -s .*? pause)\s+#", guide, re.MULTILINE)
    return str(line).replace("NAME", search).split()


@pytest.mark.parametrize("depth", [0, 120])
async def test_a_run_is_paused_and_stopped_by_redis_cli_wherever_its_folder_is(
    tmp_path: Path, target: Path, llm: ScriptedLlm, depth: int
) -> None:
    if shutil.which("redis-cli") is None:
        pytest.skip("no redis-cli on this machine (Debian: redis-tools)")
    folder = tmp_path / ("x" * depth)  # a socket's path has room for about a hundred bytes
    folder.mkdir(exist_ok=True)
    run = Run(folder, target, llm)
    line = the_line_that_pauses_by_hand("s")

    async def by_hand(command: str) -> bytes:
        cli = await asyncio.create_subprocess_exec(*line[:-1], command, cwd=folder, stdout=asyncio.subprocess.PIPE)
        return (await cli.communicate())[0]

    async with nothing_left_behind(folder):
        process = await run.start("search.rounds=200")
        await eventually(partial(run.measured, 1), 120)
        assert await by_hand("pause") == b"OK\n"

        await eventually(lambda: '"command": "pause"' in (folder / "runs" / "s" / "log.jsonl").read_text())
        assert await by_hand("stop") == b"OK\n"
        assert not (await ended(process))["finished"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("search.popluation=3", "did you mean 'search.population'?"),
        ("target.model=nobody/no-such-model", "the hub cannot be reached; pass a folder"),
        ("data.fitness=nowhere.txt", "there is no text file 'nowhere.txt'"),
        ("data.fitness_windows=100000", "too short"),
        ("data.fitness=wikitext2", "pass a text file, or `self`"),
    ],
)
async def test_bad_input_gets_one_sentence_and_exit_code_2(
    run: Run, override: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    async with nothing_left_behind(run.folder):
        assert sentence in await run.refused(override)


async def test_a_search_that_was_refused_gives_its_name_to_the_next_and_its_workers_nothing(run: Run) -> None:
    """Workers start before the daemon is in charge: they find the refused spec, and must not begin on it."""
    async with nothing_left_behind(run.folder):
        told = await run.refused("data.fitness_windows=null", "search.first_windows=100000")
        assert "must be smaller than the number of windows of the fitness text" in told
        assert "there is no folder '/nowhere/model'" in await run.refused("target.model=/nowhere/model")


async def test_an_endpoint_that_is_not_there_at_the_start_is_waited_for(run: Run, llm: ScriptedLlm) -> None:
    late = ScriptedLlm(llm.script)
    async with late:
        pass  # takes a free port, and gives it back
    process = await run.start(f"llm.endpoints=[{{base_url: '{late.base_url}', model: model}}]")
    log = run.folder / "runs" / "s" / "log.jsonl"

    await eventually(lambda: log.exists() and log.read_text().count("endpoint_not_ready") == 1, 60)
    async with late:
        check_finished(run, await ended(process))
    assert log.read_text().count("endpoint_not_ready") == 1


async def test_what_only_a_worker_finds_out_is_said_once(run: Run) -> None:
    process = await run.start("data.seqlen=300", "data.fitness_windows=2")
    out, err = await asyncio.wait_for(process.communicate(), 120)
    told = [line for line in (out + err).decode().splitlines() if line.startswith("selfpruner: ")]
    assert process.returncode == 2
    assert told == ["selfpruner: windows of 300 tokens are longer than the 256 positions that the model supports"]


@pytest.mark.one_server
async def test_a_run_on_a_server_of_the_users_ends_when_its_model_cannot_be_used(run: Run, server: Server) -> None:
    async with nothing_left_behind(run.folder):
        told = await run.refused(f"redis.url={server.url}", "target.model=/nowhere/model", "worker.count=2")
    assert "there is no folder '/nowhere/model'" in told


async def test_what_a_run_starts_is_told_none_of_its_secrets(
    run: Run, llm: ScriptedLlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoints = [{"base_url": llm.base_url, "model": "scripted", "api_key": "sk-of-the-endpoint"}]
    monkeypatch.setenv("SELFPRUNER_LLM__ENDPOINTS", json.dumps(endpoints))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.setenv("SELFPRUNER_HTTP__TOKEN", "sk-of-the-http-api")
    monkeypatch.setenv("HF_TOKEN", "of-the-hub")
    settings = json.loads(run.config.read_text())
    del settings["llm"]["endpoints"]
    run.write(settings)
    process = await run.start("search.rounds=200")
    await eventually(partial(run.measured, 2), 120)
    seen = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            seen[" ".join(child.cmdline())] = child.environ()
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert llm.asked[-1].headers["Authorization"] == "Bearer sk-of-the-endpoint"
    wanted = {"valkey-server": False, "-m gpu_worker --search": True, "gpu_worker.evaluation.process": True}
    for command, is_told_of_the_hub in wanted.items():
        (environment,) = [environment for words, environment in seen.items() if command in words]
        assert "sk-of" not in str(environment), command
        assert ("HF_TOKEN" in environment) == is_told_of_the_hub, command
    assert "SELFPRUNER_REDIS__URL" not in environment  # the evaluation process's
