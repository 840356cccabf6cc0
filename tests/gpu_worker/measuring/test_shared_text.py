"""Text that the model writes itself is the same for all workers of a search, wherever they run."""

import asyncio
import shutil
import signal
import zlib
from base64 import b64encode
from pathlib import Path

import pytest
import torch
from redis.asyncio import Redis
from safetensors.torch import load_file, save_file

from gpu_worker.measuring.self_text import self_text, share_text
from gpu_worker.models.loading import load_model
from gpu_worker.progress import no_progress
from protocol.errors import StoreError
from protocol.plans.candidate import Measured
from protocol.plans.spec import SearchSpec, TextSpec
from protocol.queue.keys import Keys
from protocol.queue.self_text import LARGEST_BYTES, SelfText, SelfTextBoard
from tests.gpu_worker.worker.test_worker import Daemon, worker_process
from tests.support.servers import Server, eventually
from tests.support.tiny_models import save_tiny_folder, tiny_windows

pytestmark = pytest.mark.one_server

TOKENS = tiny_windows(3, 8)


def never() -> torch.Tensor:
    raise AssertionError("it should have been taken")


def test_what_one_worker_wrote_is_what_another_takes() -> None:
    offered: list[str] = []

    def first_of_all(text: str) -> str:
        offered.append(text)
        return text

    written = share_text(None, first_of_all, 3, 8, lambda: TOKENS)
    taken = share_text(offered[0], first_of_all, 3, 8, never)
    assert torch.equal(written, TOKENS) and torch.equal(taken, TOKENS)
    assert taken.dtype == torch.long and len(offered) == 1


def test_of_two_workers_who_write_at_once_the_first_counts_for_both() -> None:
    other = SelfText.pack(3, 8, (TOKENS + 1).numpy().astype("<i4").tobytes())
    assert other is not None
    assert torch.equal(share_text(None, lambda _: other.model_dump_json(), 3, 8, lambda: TOKENS), TOKENS + 1)


async def test_the_board_keeps_the_first_text_of_a_spec(redis: Redis, keys: Keys) -> None:
    first, other = (SelfTextBoard(redis, keys, fingerprint) for fingerprint in ("a", "b"))
    assert await first.read() is None
    assert [await first.publish("{}"), await first.publish("{ }"), await first.read()] == ["{}"] * 3
    assert await other.publish("{  }") == "{  }"


def test_a_text_that_is_too_long_to_travel_stays_where_it_was_written() -> None:
    windows = LARGEST_BYTES // 4 // 1024 + 1
    written = torch.zeros(windows, 1024, dtype=torch.long)
    assert share_text(None, lambda _: "never", windows, 1024, lambda: written) is written


def packed(content: bytes) -> str:
    return b64encode(zlib.compress(content)).decode()


@pytest.mark.parametrize(
    ("published", "sentence"),
    [
        ("{}", "written by another version"),
        ('{"windows": 3, "length": 8, "packed": "no base64!"}', "cannot be read"),
        ('{"windows": 3, "length": 8, "packed": "AAAA"}', "cannot be read"),
        (f'{{"windows": 3, "length": 8, "packed": "{packed(bytes(95))}"}}', "is not of 3 × 8 tokens"),
        (f'{{"windows": 3, "length": 8, "packed": "{packed(bytes(40_000_000))}"}}', "is not of 3 × 8 tokens"),
        (f'{{"windows": 4, "length": 8, "packed": "{packed(bytes(128))}"}}', "4 windows of 8 tokens, where 3 of 8"),
    ],
)
def test_a_published_text_that_is_none_is_an_error(published: str, sentence: str) -> None:
    with pytest.raises(StoreError, match=sentence):
        share_text(published, lambda text: text, 3, 8, never)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SearchSpec:
    """A spec whose only text the model writes: six windows."""
    folder = save_tiny_folder(tmp_path_factory.mktemp("shared") / "model", hidden_size=48)
    return SearchSpec(
        model=str(folder),
        rate=0.4,
        calibration=TextSpec(source="self", windows=4, seqlen=32),
        fitness=TextSpec(source="self", windows=2, seqlen=32),
        dtype="float32",
    )


def two_machines(spec: SearchSpec, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two cache folders in which the model has written different texts, as on two machines."""
    caches = [folder / "cache-a", folder / "cache-b"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches[0]))
    self_text(load_model(spec.model, spec.dtype), 6, 32, spec.seed, no_progress)
    shutil.copytree(caches[0], caches[1])
    (file,) = caches[1].rglob("tokens.safetensors")
    save_file({"tokens": load_file(file)["tokens"].flip(1).contiguous()}, file)
    return caches


async def test_two_workers_whose_models_write_different_texts_measure_on_the_same_one(
    server: Server, redis: Redis, keys: Keys, spec: SearchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = two_machines(spec, tmp_path, monkeypatch)
    daemon = Daemon(redis, keys, spec)
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches[0]))
    async with worker_process(server) as first:
        monkeypatch.setenv("XDG_CACHE_HOME", str(caches[1]))
        async with worker_process(server) as second:
            profile = await daemon.begin()

            async def both_idle() -> bool:
                names = [name async for name in daemon.redis.scan_iter(match=keys.worker_prefix + "*")]
                return sum('"idle"' in (text or "") for text in await daemon.redis.mget(names)) == 2 if names else False

            await eventually(both_idle, 120)
            issued = await daemon.issue(profile, 6)
            await eventually(lambda: daemon.collected(len(issued)), 60)
            for process in (first, second):
                process.send_signal(signal.SIGTERM)
                assert await asyncio.wait_for(process.wait(), 30) == 0
    assert all(isinstance(result.outcome, Measured) for result in daemon.results)
    assert await daemon.redis.exists(keys.self_text(spec.fingerprint)) == 1
