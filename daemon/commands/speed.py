"""`selfpruner speed`: how fast an exported folder is beside its dense model."""

from pathlib import Path
from typing import Annotated

import typer

from daemon.commands import flags
from daemon.commands import tables as answers
from daemon.commands.output import answer, at_work
from daemon.settings.packages import need
from protocol.errors import ModelError, SettingsError
from protocol.results.formats import GgufType
from protocol.runtime.paths import expanded


def speed(
    folder: Annotated[Path, typer.Argument(help="An exported model.")],
    baseline: Annotated[str, typer.Option(help="The dense model: as --model, or a GGUF file for llama.cpp.")],
    engine: Annotated[
        list[str] | None,  # Typer has no lists of a Literal
        typer.Option(help="transformers, llama.cpp or vllm; repeatable. Left out: those here that can run the folder."),
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Texts at a time; repeatable; 1.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    generate: Annotated[int, typer.Option(min=2, help="Tokens generated after it.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Of the dense and the pruned model, in turn.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Repeats before those that count.")] = 1,
    gguf_type: Annotated[
        GgufType | None, typer.Option(help="Of the GGUF files for llama.cpp. Left out: of the one there, else f16.")
    ] = None,
    dtype: flags.DtypeFlag = "bfloat16",
    json_: flags.Json = False,
) -> None:
    """Say how many tokens per second a pruned folder and its dense model process and generate, side by side."""
    need("torch", "worker")
    from gpu_worker.export.folder import formats_in
    from gpu_worker.speed.engines import SpeedRequest, choose_engines, engines_named
    from gpu_worker.speed.timing import Length

    request = SpeedRequest(
        folder=expanded(folder),
        baseline=baseline,
        length=Length(prompt, generate),
        batch_sizes=tuple(dict.fromkeys(batch_size or [1])),
        repeats=repeats,
        warm_up=warm_up,
        engines=engines_named(engine or []),
        dtype=dtype,
        gguf_type=gguf_type,
    )
    if not baseline.strip():
        raise SettingsError("--baseline is empty: name the dense model")
    # Before torch is loaded, which takes seconds.
    chosen, _ = choose_engines(request.engines, formats_in(request.folder))
    if gguf_type is not None and "llama.cpp" not in chosen:
        raise SettingsError(f"--gguf-type {gguf_type} is not read here: it is for the engine llama.cpp")
    with at_work(baseline, as_elsewhere=True) as progress:
        from gpu_worker.speed.speed import measure_speed

        result = measure_speed(request, progress)
    answer(result.model_dump(mode="json"), json_, lambda: answers.speed(result))
    if engine and result.skipped:
        # What the others measured is said all the same.
        raise ModelError("; ".join(result.skipped.values()))
