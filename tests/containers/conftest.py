"""The deployment that the tests share, and the table of steps at the end."""

from collections.abc import Iterator

import pytest

from tests.containers.project import Project, check_engine, steps_taken


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A copy of the repository in which `docker compose` is run; everything is removed at the end."""
    check_engine()
    with Project(tmp_path_factory.mktemp("deployment")) as project:
        yield project


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table: step, how, what held, and its seconds."""
    if not steps_taken:
        return
    terminalreporter.section("Docker Compose")
    for step in steps_taken:
        verdict = "held" if step.held else "FAILED"
        terminalreporter.line(f"{step.name:<34} | {step.how:<48} | {step.holds} [{verdict}, {step.seconds:.0f} s]")
