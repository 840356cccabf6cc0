"""Broken or hostile target models, and a real worker."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_worker.worker.evaluator import EVALUATION_PROCESS
from protocol.plans.spec import SearchSpec
from tests.faults.kit import Kit
from tests.faults.marks import slow_fault
from tests.support.broken_models import with_array, with_config, with_index, with_pipe
from tests.support.tiny_models import save_tiny_folder
from tests.support.tiny_specs import tiny_spec

BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "layers": (lambda folder: with_config(folder, num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "labels": (lambda folder: with_config(folder, num_labels=10**9), "num_labels 1000000000"),
    "index": (lambda folder: with_index({"a": "../outside"}).on(folder), "'../outside', which is outside the folder"),
    "pipe": (lambda folder: with_pipe("model.safetensors").on(folder), "is not an ordinary file"),
    "array": (lambda folder: with_array(folder / "a.gguf", 2**40), "claims 1,099,511,627,776 elements"),
}
"""How a folder is broken, and a part of the error message."""


@pytest.mark.parametrize("name", BROKEN)
@slow_fault("64", "a target model that claims too much", "10^9 layers, GGUF of 2^40, ../", "exit 2, at once")
async def test_a_worker_refuses_a_model_that_cannot_be(kit: Kit, tmp_path: Path, name: str) -> None:
    break_it, sentence = BROKEN[name]
    target = break_it(save_tiny_folder(tmp_path / "target"))
    spec: SearchSpec = tiny_spec(tmp_path).model_copy(update={"model": str(target)})
    await kit.redis.set(kit.keys.spec, spec.model_dump_json())
    worker = await kit.worker(evaluation_process=EVALUATION_PROCESS)
    assert await worker.ended(200) == 2
    (last,) = worker.events("ended")
    assert sentence in last["error"] and "\n" not in last["error"]
    assert not worker.events("evaluation_process_died") and not worker.events("evaluation_process_failed")
