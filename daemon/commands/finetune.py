"""`selfpruner finetune`: recover a pruned model's quality by training."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from daemon.commands import flags, tables
from daemon.commands.output import print_result, show_progress
from daemon.settings.errors import validation_sentence
from daemon.settings.packages import need
from protocol.errors import DataError, SettingsError
from protocol.plans.spec import NAMED_TEXTS, Dtype
from protocol.results.finetuning import ALPACA_GPT4, Form, Recipe, Schedule, form_of
from protocol.results.formats import formats_of
from protocol.runtime.paths import check_model, expanded, is_same_file
from protocol.runtime.signals import Interrupted

SIZES: dict[Form, dict[str, int]] = {"alpaca": {"batch": 64, "seqlen": 256}, "text": {"batch": 8, "seqlen": 512}}
"""Default batch size, and tokens per example or window. Those for `alpaca` are LLM-Pruner's."""
HUB_TEXTS = tuple(name for name in NAMED_TEXTS if name != "self")
"""Named texts except `self`, which a model would have to generate."""
RESUME_HINT = "run the same command again to resume"
DISTILLED = 0.5
"""Share of the divergence in the loss of distillation. With 1, the model learns the text's own style less; with 0, it
loses more on other texts (docs/lab-notes/fine-tuning.md)."""
LEARNING_RATES = {False: 3e-4, True: 1e-4}
"""Default learning rates of LoRA (False) and of full fine-tuning (True)."""


@dataclass(frozen=True)
class RecipeFlags:
    """Training hyperparameters. None means the default for the kind of data."""

    rank: Annotated[int | None, typer.Option(help="LoRA rank r; 8 by default.")] = None
    alpha: Annotated[float | None, typer.Option(help="LoRA scale alpha; 16 by default.")] = None
    dropout: Annotated[float | None, typer.Option(help="LoRA dropout; 0.05 by default.")] = None
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate; 3e-4 by default, 1e-4 with --full.")
    ] = None
    schedule: Annotated[Schedule, typer.Option(help="Learning rate schedule after the warm-up.")] = "cosine"
    warmup: Annotated[float, typer.Option(help="Warm-up, as a share of the steps.")] = 0.05
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 2
    max_steps: Annotated[int | None, typer.Option(help="Maximum number of steps.")] = None
    batch: Annotated[
        int | None,
        typer.Option("--batch", "--batch-size", help="Examples (default 64) or windows of text (default 8) per step."),
    ] = None
    micro_batch: Annotated[int, typer.Option(help="Examples per forward pass; lower it to save memory.")] = 4
    seqlen: Annotated[
        int | None,
        typer.Option(help="Maximum tokens of an example (default 256), or tokens of a window (default 512)."),
    ] = None
    examples: Annotated[
        int | None, typer.Option(help="Number of examples, chosen at random; by default all, or 10,000 from the hub.")
    ] = None
    weight_decay: Annotated[float, typer.Option(help="AdamW weight decay.")] = 0.0
    clip: Annotated[float, typer.Option(help="Maximum gradient norm.")] = 1.0


@flags.grouped
def finetune(
    folder: Annotated[Path, typer.Argument(help="A folder written by `selfpruner export`, as hf or padded.")],
    out: Annotated[Path, typer.Option(help="The folder to create.")],
    data: Annotated[
        str,
        typer.Option(
            help=f"`{ALPACA_GPT4}`, a .json or .jsonl file in Alpaca format, a text file, `wikitext2` or `c4`."
        ),
    ] = ALPACA_GPT4,
    format_: flags.FormatNames = None,
    gguf_type: flags.GgufTypeFlag = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
    distil: Annotated[
        str | None,
        typer.Option(
            help="Also learn the predictions of this model, the dense one: a Hugging Face name, a folder, a GGUF file, "
            "or `smollm2`. Half of the loss is then the divergence from them."
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights of the projections instead of LoRA.")] = False,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            help="Maximum training time, summed over restarts. The learning rate then follows time instead of steps."
        ),
    ] = None,
    checkpoint_minutes: Annotated[float, typer.Option(min=0, help="Time between checkpoints.")] = 2.0,
    eval_data: Annotated[
        str | None, typer.Option(help="Text to measure before and after training: `wikitext2`, `c4` or a file.")
    ] = None,
    eval_windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of --eval-data; by default as on the model card.")
    ] = None,
    eval_seqlen: Annotated[
        int | None, typer.Option(min=16, help="Tokens per window; by default as on the model card.")
    ] = None,
    *,
    how: RecipeFlags,
    dtype: Annotated[Dtype | None, flags.chosen(Dtype, "Data type (by default as on the model card)")] = None,
    seed: Annotated[
        int, typer.Option(min=0, callback=flags.seed_of_torch, help="Seed of the data's order and of dropout.")
    ] = 0,
    json_: flags.Json = False,
) -> None:
    """Fine-tune a pruned model: train LoRA, merge it into the weights and export the result.

    After an interruption, the same command resumes from its checkpoint, which is beside --out.
    """
    recipe = recipe_of(data, how, full=full, distils=distil is not None, seed=seed)
    formats = formats_of(format_ or [])
    check_minutes("--max-minutes", max_minutes)
    if eval_data is None and (eval_windows, eval_seqlen) != (None, None):
        raise SettingsError("--eval-windows and --eval-seqlen need --eval-data")
    if is_same_file(str(folder), str(out)):
        raise SettingsError(f"--out {out} is the folder to train from: give another folder, which will be created")
    if distil is not None:
        check_model(distil)
    data, eval_data = found_data(data), eval_data and found_data(eval_data, only_text=True)
    check_apart("--data", data, "--eval-data", eval_data)
    from gpu_worker.export.folder import formats_in

    formats_in(expanded(folder))  # now, because torch takes seconds to import
    need("torch", "worker")
    if not full:
        need("peft", "finetune")
    try:
        with show_progress(str(folder)) as progress:
            from gpu_worker.finetune.eval_texts import EvalText
            from gpu_worker.finetune.finetune import FinetuneRequest, finetune_once
            from gpu_worker.finetune.training import Limits

            request = FinetuneRequest(
                folder=expanded(folder),
                data=data,
                recipe=recipe,
                out=expanded(out),
                teacher=distil,
                formats=formats,
                gguf_type=gguf_type,
                force=force,
                eval_text=None if eval_data is None else EvalText(eval_data, eval_windows, eval_seqlen),
                dtype=dtype,
                limits=Limits(None if max_minutes is None else 60 * max_minutes, 60 * checkpoint_minutes),
            )
            result = finetune_once(request, progress)
    except Interrupted as end:
        end.left = RESUME_HINT
        raise
    print_result(result.model_dump(mode="json"), json_, lambda: tables.finetuned(result))


def recipe_of(data: str, how: RecipeFlags, *, full: bool, distils: bool, seed: int) -> Recipe:
    """Return the recipe from the flags. Raises SettingsError for flags that are invalid or have no effect."""
    given: dict[str, Any] = {name: value for name, value in asdict(how).items() if value is not None}
    if full:
        for name in ("rank", "alpha", "dropout"):
            if name in given:
                raise SettingsError(f"--{name} has no effect here: --full trains without LoRA")
    defaults = SIZES[form_of(data)] | {"learning_rate": LEARNING_RATES[full]}
    try:
        return Recipe(
            **defaults | given, method="full" if full else "lora", distilled=DISTILLED if distils else 0, seed=seed
        )
    except ValidationError as error:
        raise SettingsError(validation_sentence(error)) from error


def check_minutes(flag: str, minutes: float | None) -> None:
    """Raise SettingsError unless the minutes are a positive, finite number."""
    if minutes is not None and not 0 < minutes < math.inf:
        raise SettingsError(f"{flag} {minutes} is not a positive time")


def found_data(source: str, *, only_text: bool = False) -> str:
    """Return a named text, or a file's absolute path. Raises DataError for a missing file."""
    names = HUB_TEXTS if only_text else (ALPACA_GPT4, *HUB_TEXTS)
    if source in names:
        return source
    if not expanded(source).is_file():
        raise DataError(f"there is no file {source!r}; give a file, or {' or '.join(names)}")
    return str(expanded(source).absolute())


def check_apart(data_flag: str, data: str, measured_flag: str, measured: str | None) -> None:
    """Raise SettingsError if a file is used for both training and measuring. Named texts have a split for each."""
    if measured is None or {data, measured} & {ALPACA_GPT4, *NAMED_TEXTS}:
        return
    if is_same_file(data, measured):
        raise SettingsError(
            f"{data_flag} and {measured_flag} are the same file, {measured!r}: measure on text that was not trained on"
        )
