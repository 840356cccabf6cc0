"""`selfpruner zero-shot`: what a model answers without examples, as it is, pruned in memory, or exported."""

from pathlib import Path
from typing import Annotated

import typer

from daemon.commands import flags
from daemon.commands import tables as answers
from daemon.commands.output import answer, at_work
from daemon.commands.request import pruning_request, refuse_given
from daemon.settings.packages import need
from protocol.errors import SettingsError
from protocol.results.zero_shot import PAPER_TASKS, chosen_tasks, names_in
from protocol.runtime.paths import expanded


@flags.grouped
def zero_shot(
    model: Annotated[str, typer.Argument(help="A hub name, a folder (an exported one too), or `smollm2`.")],
    *,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help=f"Some of {', '.join(task.name for task in PAPER_TASKS)}; all if left out. Repeatable."),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="A folder of lm-eval task files: its tasks, all unless --tasks names some.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task; all if left out.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that run through the model together.")] = 8,
    choice: flags.ChoiceFlags,
    texts: flags.CalibrationFlags,
    how: flags.PruningFlags,
    options: flags.MethodFlags,
    dtype: flags.DtypeFlag = "bfloat16",
    seed: flags.Seed = 0,
    json_: flags.Json = False,
) -> None:
    """Measure the accuracy in the paper's seven zero-shot tasks, by lm-eval.

    The model is asked as it is, or pruned by --allocate or --rates.
    """
    names = names_in(tasks or [])
    if tasks is not None and not names:
        raise SettingsError("--tasks names no task")
    if tasks_dir is None:
        chosen_tasks(names)
    pruned = choice != flags.ChoiceFlags()
    if pruned:
        request = pruning_request(model, texts, choice, how, options, dtype=dtype, seed=seed)
    else:
        refuse_given("the model is asked as it is", texts, how, options)
        if seed:
            raise SettingsError("--seed is not read here: the model is asked as it is, and no item is drawn")
    need("torch", "worker")
    need("lm_eval", "eval")
    with at_work(model) as progress:
        from gpu_worker.evaluation.zero_shot import Questions, zero_shot_model, zero_shot_pruned

        questions = Questions(names, None if tasks_dir is None else expanded(tasks_dir), limit, batch_size)
        if pruned:
            result = zero_shot_pruned(
                request.spec,
                request.choice,
                questions,
                shape=request.shape,
                method=request.method,
                progress=progress,
            )
        else:
            result = zero_shot_model(model, questions, dtype=dtype, progress=progress)
    answer(result.model_dump(mode="json"), json_, lambda: answers.zero_shot(result))
