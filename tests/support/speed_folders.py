"""Two tiny models on disk, a dense and a pruned one, and requests to measure their speed."""

from pathlib import Path
from typing import Any

from gpu_worker.speed.engines import SpeedRequest
from gpu_worker.speed.timing import Length
from tests.support.exports import export, pruned, with_tokenizer
from tests.support.pruned_models import keep
from tests.support.tiny_models import save_tiny_folder, tiny_llama

PLAN = keep((2, 1, 20), (3, 1, 48), (1, 2, 7))
LENGTH = Length(prompt=9, generate=4)


def clock(*times: float) -> Any:
    """A clock that returns these times, one after the other."""
    return iter(times).__next__


def save_folders(folder: Path) -> Path:
    """A dense model, an hf export and a GGUF export of a pruned one, all below `folder`."""
    save_tiny_folder(folder / "dense")
    model = pruned(with_tokenizer(tiny_llama()), PLAN)
    export(model, "hf", folder / "hf", PLAN)
    export(model, "gguf", folder / "gguf", PLAN)
    return folder


def request(folders: Path, name: str = "hf", **options: Any) -> SpeedRequest:
    """The pruned model in the folder `name` beside the dense one."""
    given: dict[str, Any] = {
        "baseline": str(folders / "dense"),
        "length": LENGTH,
        "dtype": "float32",
        "repeats": 2,
        "batch_sizes": (1, 2),
    }
    return SpeedRequest(folder=folders / name, **(given | options))
