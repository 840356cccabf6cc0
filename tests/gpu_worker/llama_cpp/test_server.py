"""llama.cpp's server as a process: it ends whatever happens, and what it dies of is told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from gpu_worker.export.writer import ExportContent, export_model
from gpu_worker.llama_cpp import client as llama_cpp
from gpu_worker.llama_cpp.client import ask, hidden_states, running, serving
from protocol.errors import ModelError
from protocol.results.formats import Destination
from protocol.runtime.llama_server import ServerOptions
from tests.support.exports import facts_of, pruned, with_tokenizer
from tests.support.root import ROOT
from tests.support.tiny_models import tiny_model

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "small"
    model = pruned(with_tokenizer(tiny_model("llama")))
    export_model(ExportContent(model, facts_of(model)), Destination(out, ("gguf",)))
    (path,) = out.glob("*.gguf")
    return path


def servers_of(path: Path) -> list[int]:
    """Process ids of the servers of that file."""
    commands = {each.pid: each.info["cmdline"] or [] for each in psutil.process_iter(["cmdline"])}
    return [
        pid for pid, words in commands.items() if "protocol.runtime.llama_server" in words and str(path) in words[-1]
    ]


@pytest.mark.parametrize("in_memory", [False, True])
def test_its_weights_may_be_in_memory_of_its_own(gguf: Path, in_memory: bool) -> None:
    with running(ServerOptions(str(gguf), threads=1, context=256, in_memory=in_memory)):
        (server,) = servers_of(gguf)
        mapped = {each.path for each in psutil.Process(server).memory_maps()}
    assert (str(gguf) not in mapped) == in_memory


def test_it_ends_with_an_error_of_whoever_asks(gguf: Path) -> None:
    """Without ever being asked."""
    with pytest.raises(KeyboardInterrupt), serving(gguf):
        assert len(servers_of(gguf)) == 1
        raise KeyboardInterrupt
    assert not servers_of(gguf)


def test_what_it_dies_of_is_an_error_of_the_model(gguf: Path) -> None:
    with serving(gguf, hidden_states=True) as address:
        assert hidden_states(address, torch.arange(5)).shape[0] == 5
        (server,) = servers_of(gguf)
        os.kill(server, signal.SIGABRT)  # as llama.cpp's own assertions do
        with pytest.raises(ModelError, match=r"^llama\.cpp gave no answer \("):
            hidden_states(address, torch.arange(5))


def test_it_answers_only_to_the_process_that_started_it(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(gguf) as address:
        assert "content" in ask(address, "/completion", {"prompt": "a", "n_predict": 1})
        monkeypatch.setattr(llama_cpp, "_KEY", "another")
        with pytest.raises(ModelError, match=r"answered with an error: .*401"):
            ask(address, "/completion", {"prompt": "a", "n_predict": 1})


def test_a_server_that_is_stopped_is_not_waited_for_without_end(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "TIMEOUT_SECONDS", 1.0)
    with serving(gguf) as address:
        (server,) = servers_of(gguf)
        os.kill(server, signal.SIGSTOP)
        with pytest.raises(ModelError, match=r"gave no answer \(timed out\)"):
            ask(address, "/completion", {"prompt": "a", "n_predict": 1})


def test_it_is_given_no_secrets(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "hush-hush")
    monkeypatch.setenv("SELFPRUNER_REDIS__URL", "redis://:hush-hush@host")
    with serving(gguf):
        (server,) = servers_of(gguf)
        assert "hush-hush" not in " ".join(psutil.Process(server).environ().values())


def test_it_ends_where_nobody_waits_until_it_has_loaded(gguf: Path) -> None:
    options = ServerOptions(str(gguf), threads=1, context=512)
    command = [sys.executable, "-m", "protocol.runtime.llama_server", options.to_json()]
    for _ in range(3):
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            assert server.stdin is not None and server.stdout is not None
            server.stdin.close()
            server.stdout.close()
            assert server.wait(30) == 0


def test_it_does_not_outlive_whoever_started_it(gguf: Path) -> None:
    code = "import sys, time; from pathlib import Path; from gpu_worker.llama_cpp.client import serving\n"
    code += "with serving(Path(sys.argv[1])): print('ready', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(gguf)], cwd=ROOT, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None and starter.stdout.readline() == b"ready\n"
        starter.kill()
    deadline = time.monotonic() + 20
    while servers_of(gguf):
        assert time.monotonic() < deadline
        time.sleep(0.05)
