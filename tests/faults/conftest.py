"""A server for each fault test, and the table of faults at the end.

marks.py puts a test into the table; `NOT_TESTED` holds the rows that have none.
"""

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from daemon.state import store as store_module
from tests.faults.kit import PASSWORD, Kit, fault_kit
from tests.faults.searching import Search, answer
from tests.support.scripted_llm import ScriptedLlm
from tests.support.servers import Server, server_binary

NOT_TESTED: dict[str, tuple[str, str]] = {
    "12": (
        "Ctrl-C to the whole group, embedded server",
        "tests/end_to_end/test_run.py does it: a run starts all its processes",
    ),
    "28": (
        "a server that a killed run left behind",
        "tests/end_to_end/test_run.py: a killed run is gone with all it started",
    ),
    "32": ("an export that is killed or has no disk", "tests/gpu_worker/export/test_folder.py: whole or not at all"),
    "39": ("the HTTP API's faults", "with the HTTP API's own tests"),
    "40": (
        "secrets in logs",
        "the server's password is looked for in every log here; tests/protocol/runtime/test_logs.py for the rest",
    ),
    "62": (
        "settings and secrets that are none",
        "tests/daemon/settings/test_file.py: one sentence at once, no secret shown",
    ),
    "": ("loss of power", "not simulated: it loses the server's last second at most"),
}
"""Row -> (fault, where it is tested instead, or why it is not tested)."""

_rows: dict[tuple[str, ...], dict[str, str]] = {}


@pytest.fixture(params=["valkey", "redis"])
def own_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server for one test, with a password, an append-only file and a folder; the test may kill and restart it."""
    binary = server_binary(request.param)
    if binary is None:
        pytest.skip("no redis-server on this machine (Debian: redis-server)")
    folder = Path(tempfile.mkdtemp(prefix="sp-fault-"))
    server = Server(binary, folder, password=PASSWORD)
    server.start()
    yield server
    server.kill()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _short_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SIGN_OF_LIFE_SECONDS", 1.2)
    monkeypatch.setattr(store_module, "TICK_SECONDS", 0.3)


@pytest.fixture
async def kit(own_server: Server, tmp_path: Path) -> AsyncIterator[Kit]:
    async with fault_kit(own_server, tmp_path) as kit:
        yield kit


@pytest.fixture
async def llm() -> AsyncIterator[ScriptedLlm]:
    async with ScriptedLlm(answer) as llm:
        yield llm


@pytest.fixture
def search(kit: Kit, llm: ScriptedLlm, tmp_path: Path) -> Search:
    return Search(kit, [llm.settings], tmp_path)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Record each phase of a test with a table row; the invariants are checked in its teardown."""
    outcome = yield
    marker = item.get_closest_marker("fault")
    if marker is None:
        return
    report = outcome.get_result()  # type: ignore[attr-defined]
    server = "redis" if "[redis" in item.name or "-redis" in item.name else "valkey"
    results = _rows.setdefault(marker.args, {})
    if not report.passed:
        results[server] = report.outcome
    elif report.when == "call":
        results.setdefault(server, "held")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table: row, fault, how it was injected, what held, and on which server."""
    if not _rows:
        return
    terminalreporter.section("faults")
    for (number, fault, how, holds), results in sorted(_rows.items(), key=lambda row: int(row[0][0].split("+")[0])):
        verdict = ", ".join(f"{server}: {result}" for server, result in sorted(results.items()))
        terminalreporter.line(f"{number:>5}  {fault:<46} | {how:<46} | {holds} [{verdict}]")
    for number, (fault, why) in NOT_TESTED.items():
        terminalreporter.line(f"{number:>5}  {fault:<46} | {'not tested here':<46} | {why}")
