"""`selfpruner …`, called in this process."""

import json
from typing import Any

import pytest

from daemon.cli import main


class Cli:
    """Runs commands and returns what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def run(self, *arguments: object) -> tuple[int, str, str]:
        """Return the exit code, stdout and stderr of a command."""
        self._capsys.readouterr()
        code = main([str(each) for each in arguments])
        out, err = self._capsys.readouterr()
        return code, out, err

    def answer(self, *arguments: object) -> dict[str, Any]:
        """Return the JSON object of a command that succeeds."""
        code, out, err = self.run(*arguments, "--json")
        assert code == 0, err
        answer: dict[str, Any] = json.loads(out)
        return answer

    def error(self, *arguments: object, code: int = 2) -> str:
        """Return the sentence of a command that fails with `code`: its only output besides log lines."""
        found, out, err = self.run(*arguments)
        assert (found, out) == (code, "") and "Traceback" not in err
        sentence = err.splitlines()[-1]
        assert sentence.startswith("selfpruner: ")
        return sentence.removeprefix("selfpruner: ")
