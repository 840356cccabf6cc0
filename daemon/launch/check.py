"""Checks before a search: model, texts, memory, disk, Redis and endpoints, and what the search will take."""

import asyncio
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from agents.llm.dialect import Rung
from agents.llm.policy import Spent
from daemon.launch.expected_cost import Cost, expected_cost
from daemon.launch.llm import make_chat
from daemon.launch.run import check_files, lacks_llm
from daemon.search.checks import REPORT_ADVICE, check_lists_somewhere, is_searched_on
from daemon.search.rehearsal import ask_once, rehearse
from daemon.settings.llm import EndpointSettings
from daemon.settings.settings import Settings
from daemon.settings.target import check_lengths
from protocol.errors import DataError, SelfPrunerError, UsageError
from protocol.plans.shape import ModelShape
from protocol.queue.connection import check_server, connect, permanent_error
from protocol.results.needs import DeviceSpeed, Needs

State = Literal["ok", "warning", "error", "unknown"]
REDIS_SECONDS = 5.0
BRIEFLY = 0.05
"""Seconds after which an endpoint that does not answer is asked once more."""
ENDPOINT_SECONDS = 120.0
"""Time limit for one question to an endpoint, whose server may load the model first."""
RESERVE_BYTES = 10**9
"""Free disk space that a search should have beside the exported model, for its log and its history."""

LEAST_CALIBRATION_TOKENS = 4000
"""Fewer calibration tokens than this are warned of: see docs/lab-notes/reconstruction.md."""


@dataclass(frozen=True)
class Finding:
    """What was found about one part of the search."""

    what: str
    state: State
    says: str


@dataclass(frozen=True)
class Report:
    """All findings, and what the search takes, if the model's sizes are known."""

    findings: tuple[Finding, ...]
    cost: Cost | None
    device: str | None
    """For which the cost is estimated."""

    @property
    def errors(self) -> list[str]:
        """Return the names of what must be put right."""
        return [finding.what for finding in self.findings if finding.state == "error"]

    @property
    def record(self) -> dict[str, Any]:
        """Return the report as JSON."""
        cost = None
        if self.cost is not None:
            ranges = {n: v.values for n, v in vars(self.cost).items() if hasattr(v, "values")}
            money = None if self.cost.money is None else self.cost.money.values
            cost = ranges | {
                "money": money,
                "evaluations": self.cost.evaluations,
                "arithmetic": list(self.cost.arithmetic),
            }
        findings = [vars(finding) for finding in self.findings]
        return {"ok": not self.errors, "device": self.device, "findings": findings, "cost": cost}


@dataclass(frozen=True)
class _Asked:
    finding: Finding
    seconds: float | None = None


async def check(
    settings: Settings,
    find_needs: Callable[[], Needs],
    find_speed: Callable[[], DeviceSpeed],
    *,
    asks: bool = True,
    estimates: bool = False,
    said: Callable[[str], None] = lambda _: None,
) -> Report:
    """Check everything that the search of `settings` needs, and estimate what it takes.

    `find_needs` and `find_speed` measure the model and the device; they run in threads. With `asks`, each endpoint is
    asked one question. If something must be put right first, nothing is estimated, unless `estimates`. `said` is told
    what is being done.
    """
    findings = [_files(settings)]
    said("reading the model's config and the texts")
    needs = await asyncio.to_thread(find_needs)
    findings += [_model(settings, needs), _texts(settings, needs), _memory(needs), _disk(settings, needs)]
    if settings.redis.full_url:
        findings.append(await _redis(settings.redis.full_url))
    seconds: float | None = None
    for endpoint in settings.llm.endpoints if settings.search.asks_llm and not settings.llm.replay else ():
        said(f"asking {endpoint.name or endpoint.base_url}, for at most {ENDPOINT_SECONDS:g} s")
        asked = await _endpoint(settings, endpoint, needs.shape, asks=asks)
        findings.append(asked.finding)
        seconds = seconds or asked.seconds
    if lacks_llm(settings):
        findings.append(Finding("LLM", "warning", WITHOUT_ENDPOINT))
    report = Report(tuple(findings), None, None)
    if needs.shape is None or (report.errors and not estimates):
        return report
    said("measuring the device")
    speed = await asyncio.to_thread(find_speed)
    said("rehearsing the search")
    asks_llm = settings.search.asks_llm and not settings.llm.replay
    questions = await rehearse(settings, needs.shape) if asks_llm else None
    return replace(report, cost=expected_cost(settings, needs, speed, questions, seconds), device=speed.name)


WITHOUT_ENDPOINT = (
    "llm.endpoints is empty: a model of 135M parameters on this machine proposes, which is good to try things out; "
    "`selfpruner init` writes settings for a larger one"
)


def _files(settings: Settings) -> Finding:
    try:
        check_files(settings)
    except UsageError as error:
        return Finding("files", "error", str(error))
    return Finding("files", "ok", "the files that the settings name are there")


def _model(settings: Settings, needs: Needs) -> Finding:
    if needs.model_error is not None:
        known = "; its published sizes are known, so the estimates below hold" if needs.shape else ""
        return Finding("model", "error", needs.model_error + known)
    assert needs.shape is not None
    sizes = f"{needs.shape.total_parameters / 1e6:,.0f}M parameters; {needs.shape.words}"
    if size := settings.target.size:
        sizes += f"; {size.words} need a rate of {settings.target.known_rate}"
    return Finding("model", "ok", sizes)


def _texts(settings: Settings, needs: Needs) -> Finding:
    if needs.texts_error is not None:
        return Finding("texts", "error", needs.texts_error)
    if not needs.windows:
        try:
            check_lengths(settings.spec().texts)
        except DataError as error:
            return Finding("texts", "error", str(error))
        return Finding("texts", "unknown", "they cannot be read without the model's tokeniser")
    each = ", ".join(f"{count:,} windows for {role}" for role, count in needs.windows.items())
    said = f"{each}, of {settings.data.seqlen} tokens each"
    calibration = needs.windows.get("calibration", 0) * settings.data.seqlen
    if settings.search.reconstruction == "least-squares" and calibration < LEAST_CALIBRATION_TOKENS:
        few = f"{calibration:,} calibration tokens are few for least squares: a fit on 2,000 is worse than none"
        return Finding("texts", "warning", f"{said}; {few}")
    data = settings.data
    if data.report is not None and is_searched_on(data.report, data.fitness):
        return Finding("texts", "warning", f"{said}; the search and the report use the same text: {REPORT_ADVICE}")
    return Finding("texts", "ok", said)


def _memory(needs: Needs) -> Finding:
    if needs.shape is None:
        return Finding("memory", "unknown", "the model's sizes are not known")
    if needs.memory_error is not None:
        return Finding("memory", "error", needs.memory_error)
    on = f"; it is spread over {needs.gpus} GPUs" if needs.gpus > 1 else ""
    return Finding("memory", "ok", needs.memory + on)


def _disk(settings: Settings, needs: Needs) -> Finding:
    folder = settings.run.folder.absolute()
    place = next(each for each in (folder, *folder.parents) if each.is_dir())
    free = shutil.disk_usage(place).free
    wanted = int(needs.weight_bytes * (1 - settings.target.known_rate)) + RESERVE_BYTES
    says = f"{free / 1e9:,.1f} GB free in {place}; an exported model and the search's files take {wanted / 1e9:,.1f} GB"
    return Finding("disk", "ok" if free > wanted else "warning", says)


async def _redis(url: str) -> Finding:
    redis = connect(url)
    try:
        async with asyncio.timeout(REDIS_SECONDS):
            await check_server(redis)
    except SelfPrunerError as error:
        return Finding("Redis", "error", str(error))
    except Exception as error:  # noqa: BLE001  (anything may answer there)
        refusal = permanent_error(error) or f"redis.url cannot be reached: {error or 'no answer'}"
        return Finding("Redis", "error", str(refusal))
    finally:
        await redis.aclose()
    return Finding("Redis", "ok", "the server answers and can keep a search")


async def _endpoint(settings: Settings, given: EndpointSettings, shape: ModelShape | None, *, asks: bool) -> _Asked:
    """Ask one endpoint whether it answers with this key and model, and one question of the search."""
    name = f"LLM {given.name or given.model}"
    records: list[dict[str, object]] = []
    silent: list[str] = []
    usable = 0

    async def open_gate() -> None:
        return

    try:
        chat = make_chat(settings.llm, [given], gate=open_gate, record=records.append, spent=Spent())
        async with chat:
            await chat.wait_ready(lambda _, why: silent.append(why), at_most=BRIEFLY, refuse=True)
            if silent:
                return _Asked(Finding(name, "error", f"{given.base_url} does not answer: {silent[0]}"))
            if shape is not None:
                units = len(shape.units(settings.search.granularity))
                check_lists_somewhere(settings, chat.contexts, units)
            if not asks or shape is None:
                return _Asked(Finding(name, "ok", f"{given.base_url} does not refuse the key and {given.model}"))
            with suppress(TimeoutError):  # what it has answered until then is judged below
                async with asyncio.timeout(ENDPOINT_SECONDS):
                    usable = await ask_once(settings, shape, chat)
            form = next(iter(chat.forms.values()))
    except SelfPrunerError as error:
        return _Asked(Finding(name, "error", str(error)))
    answers = [record for record in records if record["text"] is not None]
    if not answers:
        errors = [f"{given.base_url} fails to answer: {record['error']}" for record in records if record["error"]]
        late = f"{given.base_url} did not answer within {ENDPOINT_SECONDS:g} s"
        return _Asked(Finding(name, "error", errors[0] if errors else late))
    seconds = [float(str(record["seconds"])) for record in answers]
    tokens = sum(int(str(record["completion_tokens"])) for record in answers)
    says = (
        f"answered in {seconds[0]:.1f} s, asked for {FORMS[form]}; "
        f"{'usable' if usable else 'not usable'} after {len(answers)} question{'s' * (len(answers) > 1)}, "
        f"{tokens:,} tokens of replies"
    )
    if usable:
        return _Asked(Finding(name, "ok", says), seconds[0])
    advice = "another model may answer better"
    if settings.llm.reply != "moves":
        advice = f"llm.reply `{settings.llm.reply}` may ask too much of it: try `moves`, which asks for the least"
    return _Asked(Finding(name, "warning", f"{says}; {advice}"), seconds[0])


FORMS: dict[Rung, str] = {"grammar": "a grammar", "json_schema": "a JSON schema", "json_object": "JSON", "text": "text"}
