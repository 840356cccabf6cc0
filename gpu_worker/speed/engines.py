"""The inference engines, the export formats that each runs, and the request to measure them. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gpu_worker.export.folder import formats_in
from gpu_worker.speed.timing import WARM_UP, Length
from protocol.errors import SettingsError
from protocol.plans.spec import Dtype
from protocol.results.formats import Engine, Format, Formats, GgufType


@dataclass(frozen=True)
class EngineFacts:
    """One engine: its package, how to install it, and the formats that it runs."""

    package: str
    pip: str
    formats: tuple[Format, ...]

    @property
    def is_installed(self) -> bool:
        """Return whether its package is installed, without importing it."""
        return find_spec(self.package) is not None


ENGINES: Mapping[Engine, EngineFacts] = {
    "transformers": EngineFacts("transformers", "pip install '.[worker]'", ("hf", "padded")),
    # An hf folder is converted to GGUF.
    "llama.cpp": EngineFacts("xllamacpp", "pip install '.[local]'", ("hf", "gguf")),
    "vllm": EngineFacts("vllm", "pip install 'vllm>=0.28'", ("hf", "padded")),
}


@dataclass(frozen=True)
class SpeedRequest:
    """A request to measure speed."""

    folder: Path
    baseline: str
    length: Length
    batch_sizes: tuple[int, ...] = (1,)
    repeats: int = 5
    warm_up: int = WARM_UP
    engines: tuple[Engine, ...] = ()
    """Engines to measure in. Empty: all engines that are installed and can run the folder."""
    dtype: Dtype = "bfloat16"
    gguf_type: GgufType | None = None
    """Type of the GGUF files. None: the type of an existing file, or f16 if there is no such file."""


def engines_named(names: Sequence[str]) -> tuple[Engine, ...]:
    """Return the engines with these names. Raises SettingsError for an unknown name."""
    for name in names:
        if name not in ENGINES:
            raise SettingsError(f"there is no engine {name!r}; there are {', '.join(ENGINES)}")
    return tuple(dict.fromkeys(engine for name in names for engine in ENGINES if engine == name))


def choose_engines(
    asked: tuple[Engine, ...], formats: Formats, facts: Mapping[Engine, EngineFacts] = ENGINES
) -> tuple[tuple[Engine, ...], dict[Engine, str]]:
    """Return the engines that can measure the folder, and the reasons why others cannot.

    Raises SettingsError if a requested engine cannot measure it, or if no engine can.
    """
    chosen: list[Engine] = []
    skipped: dict[Engine, str] = {}
    for engine in asked or tuple(facts):
        reason = _why_not(engine, facts[engine], formats)
        if reason is None:
            chosen.append(engine)
        elif asked:
            raise SettingsError(reason)
        else:
            skipped[engine] = reason
    if not chosen:
        raise SettingsError(f"no engine here can run the folder: {'; '.join(skipped.values())}")
    return tuple(chosen), skipped


def check_request(request: SpeedRequest) -> None:
    """Raise UsageError for a request that cannot be measured, before torch is loaded, which takes seconds."""
    if not request.baseline.strip():
        raise SettingsError("--baseline is empty: name the dense model")
    chosen, _ = choose_engines(request.engines, formats_in(request.folder))
    if request.gguf_type is not None and "llama.cpp" not in chosen:
        raise SettingsError(f"--gguf-type {request.gguf_type} has no effect here: it is for the engine llama.cpp")


def _why_not(engine: Engine, facts: EngineFacts, formats: Formats) -> str | None:
    if not set(formats) & set(facts.formats):
        runs = " and ".join(facts.formats)
        return f"{engine} cannot run an export in the format {' and '.join(formats)}; it runs {runs}"
    if not facts.is_installed:
        return f"the engine {engine} is not installed: {facts.pip}"
    return None
