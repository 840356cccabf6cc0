"""`selfpruner finetune`: recovers a pruned, exported folder by training, and writes it again."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from daemon.commands import flags
from daemon.commands import tables as answers
from daemon.commands.output import answer, at_work
from daemon.settings.errors import validation_sentence
from daemon.settings.packages import need
from protocol.errors import DataError, SettingsError
from protocol.plans.spec import NAMED_TEXTS, Dtype
from protocol.results.commands import FinetuneResult
from protocol.results.finetuning import ALPACA_GPT4, Form, Recipe, Schedule, form_of
from protocol.results.formats import formats_of
from protocol.runtime.paths import expanded, is_same_file
from protocol.runtime.signals import Interrupted

if TYPE_CHECKING:
    from gpu_worker.finetune.finetune import FinetuneRequest

SIZES: dict[Form, dict[str, int]] = {"alpaca": {"batch": 64, "seqlen": 256}, "text": {"batch": 8, "seqlen": 512}}
"""What a step takes where no flag says it: LLM-Pruner's for instructions."""
HUB_TEXTS = tuple(name for name in NAMED_TEXTS if name != "self")
"""Texts that need no model to write them."""
GOES_ON = "the same command goes on where it was"
LEARNING_RATES = {False: 3e-4, True: 1e-4}
"""Of LoRA, and of all weights."""


@dataclass(frozen=True)
class RecipeFlags:
    """How it is trained; None: what fits the data."""

    rank: Annotated[int | None, typer.Option(help="LoRA's r; 8 if left out.")] = None
    alpha: Annotated[float | None, typer.Option(help="What LoRA adds is scaled by alpha / r; 16 if left out.")] = None
    dropout: Annotated[float | None, typer.Option(help="Of LoRA's inputs; 0.05 if left out.")] = None
    learning_rate: Annotated[float | None, typer.Option(help="The highest; 3e-4, with --full 1e-4, if left out.")] = (
        None
    )
    schedule: Annotated[Schedule, typer.Option(help="How the learning rate falls after the warm-up.")] = "cosine"
    warmup: Annotated[float, typer.Option(help="The share of the steps in which it rises.")] = 0.05
    epochs: Annotated[int, typer.Option(help="How often the data is gone through.")] = 2
    max_steps: Annotated[int | None, typer.Option(help="At most so many steps.")] = None
    batch: Annotated[
        int | None,
        typer.Option("--batch", "--batch-size", help="Examples or windows of a step; 64 and 8 if left out."),
    ] = None
    micro_batch: Annotated[int, typer.Option(help="How many of them at once; less takes less memory.")] = 4
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens of an example at most, of a window exactly; 256 and 512 if left out.")
    ] = None
    examples: Annotated[
        int | None, typer.Option(help="So many, by a seeded shuffle; all, or 10,000 of the hub's, if left out.")
    ] = None
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0
    clip: Annotated[float, typer.Option(help="The largest norm of a step's gradient.")] = 1.0


@flags.grouped
def finetune(
    folder: Annotated[Path, typer.Argument(help="What `selfpruner export` wrote, as hf or padded.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    data: Annotated[
        str,
        typer.Option(
            help=f"`{ALPACA_GPT4}`, a .json or .jsonl file in Alpaca's form, a text file, `wikitext2` or `c4`."
        ),
    ] = ALPACA_GPT4,
    format_: flags.FormatNames = None,
    gguf_type: flags.GgufTypeFlag = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older export.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Train the projections' own weights, and not LoRA.")] = False,
    max_minutes: Annotated[
        float | None, typer.Option(help="Of training, over all restarts; the learning rate falls with the time.")
    ] = None,
    checkpoint_minutes: Annotated[float, typer.Option(min=0, help="Between two checkpoints.")] = 2.0,
    eval_data: Annotated[
        str | None, typer.Option(help="A text to measure before and after: `wikitext2`, `c4` or a file.")
    ] = None,
    eval_windows: Annotated[int | None, typer.Option(min=1, help="Windows of it; as on the folder's card.")] = None,
    eval_seqlen: Annotated[int | None, typer.Option(min=16, help="Tokens of each; as on the folder's card.")] = None,
    *,
    how: RecipeFlags,
    dtype: Annotated[
        Dtype | None, flags.chosen(Dtype, "Of weights and activations; as on the folder's card if left out")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, callback=flags.seed_of_torch, help="Of the data's order, and of dropout.")
    ] = 0,
    json_: flags.Json = False,
) -> None:
    """Recover a pruned folder: train LoRA on it, merge that into the weights and write it again.

    Killed or interrupted, the same command goes on from its checkpoint, which is beside --out.
    """
    recipe, formats = recipe_of(data, how, full=full, seed=seed), formats_of(format_ or [])
    check_minutes("--max-minutes", max_minutes)
    if eval_data is None and (eval_windows, eval_seqlen) != (None, None):
        raise SettingsError("--eval-windows and --eval-seqlen are of --eval-data, which is missing")
    if is_same_file(str(folder), str(out)):
        raise SettingsError(f"--out {out} is the folder that is trained from: give another one, which is made")
    data, eval_data = found_data(data), eval_data and found_data(eval_data, only_text=True)
    check_apart("--data", data, "--eval-data", eval_data)
    need("torch", "worker")
    if not full:
        need("peft", "finetune")
    from gpu_worker.finetune.eval_texts import EvalText
    from gpu_worker.finetune.finetune import FinetuneRequest
    from gpu_worker.finetune.training import Limits

    result = finetuned(
        FinetuneRequest(
            folder=expanded(folder),
            data=data,
            recipe=recipe,
            out=expanded(out),
            formats=formats,
            gguf_type=gguf_type,
            force=force,
            eval_text=None if eval_data is None else EvalText(eval_data, eval_windows, eval_seqlen),
            dtype=dtype,
            limits=Limits(None if max_minutes is None else 60 * max_minutes, 60 * checkpoint_minutes),
        )
    )
    answer(result.model_dump(mode="json"), json_, lambda: answers.finetuned(result))


def finetuned(request: "FinetuneRequest") -> FinetuneResult:
    """Fine-tune with progress; a signal keeps the steps."""
    try:
        with at_work(str(request.folder)) as progress:
            from gpu_worker.finetune.finetune import finetune_once

            return finetune_once(request, progress)
    except Interrupted as end:
        end.left = GOES_ON
        raise


def recipe_of(data: str, how: RecipeFlags, *, full: bool, seed: int) -> Recipe:
    """The recipe that the flags describe. Raises SettingsError for what cannot be, and for what nobody would read."""
    given: dict[str, Any] = {name: value for name, value in asdict(how).items() if value is not None}
    if full:
        for name in ("rank", "alpha", "dropout"):
            if name in given:
                raise SettingsError(f"--{name} is not read here: --full trains without LoRA")
    defaults = SIZES[form_of(data)] | {"learning_rate": LEARNING_RATES[full]}
    try:
        return Recipe(**defaults | given, method="full" if full else "lora", seed=seed)
    except ValidationError as error:
        raise SettingsError(validation_sentence(error)) from error


def check_minutes(flag: str, minutes: float | None) -> None:
    """Raise SettingsError for minutes that are no time to train in."""
    if minutes is not None and not 0 < minutes < math.inf:
        raise SettingsError(f"{flag} {minutes} is no time to train in")


def found_data(source: str, *, only_text: bool = False) -> str:
    """A named text, or where a file is. Raises DataError for one that is not there, before torch is imported."""
    names = HUB_TEXTS if only_text else (ALPACA_GPT4, *HUB_TEXTS)
    if source in names:
        return source
    if not expanded(source).is_file():
        raise DataError(f"there is no file {source!r}; give a file, or {' or '.join(names)}")
    return str(expanded(source).absolute())


def check_apart(data_flag: str, data: str, measured_flag: str, measured: str | None) -> None:
    """Raise SettingsError where one file is learned from and measured on; of a named text each has a split."""
    if measured is None or {data, measured} & {ALPACA_GPT4, *NAMED_TEXTS}:
        return
    if is_same_file(data, measured):
        raise SettingsError(
            f"{data_flag} and {measured_flag} are one file, {measured!r}: what has been learned says nothing when it "
            "is measured, so give another one"
        )
