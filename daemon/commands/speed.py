"""`selfpruner speed`: the speed of an exported model compared with its dense model."""

from pathlib import Path
from typing import Annotated

import typer

from daemon.commands import flags, tables
from daemon.commands.output import print_result, show_progress
from daemon.settings.packages import need
from protocol.errors import ModelError
from protocol.results.formats import GgufType
from protocol.runtime.paths import expanded


def speed(
    folder: Annotated[Path, typer.Argument(help="An exported model.")],
    baseline: Annotated[
        str, typer.Option(help="The dense model: a Hugging Face name, a folder, or a GGUF file for llama.cpp.")
    ],
    engine: Annotated[
        list[str] | None,  # Typer has no lists of a Literal
        typer.Option(
            help="transformers, llama.cpp or vllm; repeatable. Default: all installed ones that can load the folder."
        ),
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Batch size; repeatable; 1 by default.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 512,
    generate: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each model, alternating.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Measurements to discard first.")] = 1,
    gguf_type: Annotated[
        GgufType | None,
        typer.Option(help="Weight type for llama.cpp. Default: that of the folder's GGUF file, else f16."),
    ] = None,
    dtype: flags.DtypeFlag = "bfloat16",
    json_: flags.Json = False,
) -> None:
    """Compare the tokens per second, memory and size of a pruned model with those of its dense model.

    After Ctrl-C, the figures of the repeats so far are printed.
    """
    need("torch", "worker")
    from gpu_worker.speed.engines import SpeedRequest, check_request, engines_named
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
    check_request(request)
    with show_progress(baseline, stock_torch=True) as progress:
        from gpu_worker.speed.speed import measure_speed

        result, interruption = measure_speed(request, progress)
    print_result(result.model_dump(mode="json"), json_, lambda: tables.speed(result))
    if interruption:
        interruption.left = "the figures are partial"
        raise interruption
    if engine and result.skipped:
        # The results of the other engines are printed first.
        raise ModelError("; ".join(result.skipped.values()))
