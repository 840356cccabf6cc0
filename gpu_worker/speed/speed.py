"""`selfpruner speed`: measures an exported folder and its dense model in each engine."""

from collections.abc import Iterator
from contextlib import contextmanager

from gpu_worker.evaluation.outcomes import out_of_memory_as_usage_error
from gpu_worker.export.folder import check_weights, formats_in
from gpu_worker.progress import Progress, no_progress
from gpu_worker.speed.engines import SpeedRequest, choose_engines
from gpu_worker.speed.timing import Pair, measured_batches, prefixed
from protocol.errors import ModelError, UsageError
from protocol.results.formats import Engine, Formats
from protocol.results.speeds import EngineSpeed, SpeedResult
from protocol.runtime.signals import Interrupted


def measure_speed(request: SpeedRequest, progress: Progress = no_progress) -> tuple[SpeedResult, Interrupted | None]:
    """Measure both models in each engine. Return what was measured, and the interruption, if a signal ended it.

    Results of earlier engines are kept if a later engine fails. Raises Interrupted if nothing was measured before.
    Raises UsageError for a folder that is not an export, a baseline that it was not pruned from, an engine that is
    missing or cannot run the folder, and too little memory.
    """
    formats = formats_in(request.folder)
    check_weights(request.folder, formats)
    engines, skipped = choose_engines(request.engines, formats)
    check_gguf_type(request, engines, formats)
    found: list[EngineSpeed] = []
    interruption: Interrupted | None = None
    for engine in engines:
        try:
            with out_of_memory_as_usage_error(request.baseline):
                speed, interruption = _measure_in(engine, formats, request, progress)
            if speed.batches:
                found.append(speed)
        except Interrupted as end:
            interruption = end
        except UsageError as error:
            # An engine that was not requested may not support this family, these lengths or this device.
            if request.engines and not found:
                raise
            skipped[engine] = str(error)
        if interruption:
            break
    if interruption and not found:
        raise interruption
    if not found:
        raise ModelError(f"no engine here could measure: {'; '.join(skipped.values())}")
    result = SpeedResult(
        folder=request.folder,
        baseline=request.baseline,
        prompt=request.length.prompt,
        generate=request.length.generate,
        repeats=request.repeats,
        interrupted=interruption is not None,
        warm_up=request.warm_up,
        engines=tuple(found),
        skipped=skipped,
    )
    return result, interruption


def check_gguf_type(request: SpeedRequest, engines: tuple[Engine, ...], formats: Formats) -> None:
    """Raise SettingsError if a GGUF file has another type than requested, and cannot be converted."""
    if request.gguf_type is not None and "llama.cpp" in engines:
        from gpu_worker.speed.gguf_pair import existing_gguf_files

        existing_gguf_files(request, formats)


def _measure_in(
    engine: Engine, formats: Formats, request: SpeedRequest, progress: Progress
) -> tuple[EngineSpeed, Interrupted | None]:
    """Measure in one engine, and free its models before the next engine starts."""
    with _opened(engine, formats, request, progress) as pair:
        engine_progress = prefixed(progress, engine)
        batches, interruption = measured_batches(
            pair, request.batch_sizes, request.repeats, request.warm_up, engine_progress
        )
        speed = EngineSpeed(
            engine=engine,
            device=pair.device,
            threads=pair.threads,
            dense=pair.dense.size(),
            pruned=pair.pruned.size(),
            batches=batches,
        )
        return speed, interruption


@contextmanager
def _opened(engine: Engine, formats: Formats, request: SpeedRequest, progress: Progress) -> Iterator[Pair]:
    """Load both models in `engine`, whose module is imported here because its package may be missing."""
    progress(f"{engine}: loading", 0, 1)
    if engine == "transformers":
        from gpu_worker.speed.transformers_engine import open_pair as in_transformers

        opened = in_transformers(request)
    elif engine == "llama.cpp":
        from gpu_worker.speed.llama_cpp_engine import open_pair as in_llama_cpp

        opened = in_llama_cpp(request, formats, progress)
    else:
        from gpu_worker.speed.vllm_engine import open_pair as in_vllm

        opened = in_vllm(request)
    with opened as pair:
        progress(f"{engine}: loading", 1, 1)
        yield pair
