"""`selfpruner zero-shot`: zero-shot accuracy of a model unchanged, pruned in memory, or exported."""

from pathlib import Path
from typing import Annotated

import typer

from daemon.commands import flags, tables
from daemon.commands.output import print_result, show_progress
from daemon.commands.request import pruning_request, refuse_given
from daemon.settings.packages import need
from protocol.errors import SettingsError
from protocol.results.zero_shot import PAPER_TASKS, select_tasks, split_task_names
from protocol.runtime.paths import expanded


@flags.grouped
def zero_shot(
    model: Annotated[str, typer.Argument(help="A Hugging Face name, a folder (also an exported one), or `smollm2`.")],
    *,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(task.name for task in PAPER_TASKS)}; all by default. Repeatable."),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="Folder of lm-eval task files; all its tasks unless --tasks selects some.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items per task; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass.")] = 8,
    choice: flags.ChoiceFlags,
    texts: flags.CalibrationFlags,
    how: flags.PruningFlags,
    options: flags.MethodFlags,
    dtype: flags.DtypeFlag = "bfloat16",
    seed: flags.Seed = 0,
    json_: flags.Json = False,
) -> None:
    """Measure accuracy on the paper's seven zero-shot tasks, with lm-eval.

    The model is evaluated unchanged, or pruned with --allocate or --rates.
    """
    names = split_task_names(tasks or [])
    if tasks is not None and not names:
        raise SettingsError("--tasks names no task")
    if tasks_dir is None:
        select_tasks(names)
    pruned = choice != flags.ChoiceFlags()
    if pruned:
        request = pruning_request(model, texts, choice, how, options, dtype=dtype, seed=seed)
    else:
        refuse_given("the model is evaluated unchanged", texts, how, options)
        if seed:
            raise SettingsError("--seed has no effect here: the model is evaluated unchanged, and no item is sampled")
    need("torch", "worker")
    need("lm_eval", "eval")
    with show_progress(model) as progress:
        from gpu_worker.evaluation.zero_shot import Questions, zero_shot_model, zero_shot_pruned

        questions = Questions(names, None if tasks_dir is None else expanded(tasks_dir), limit, batch_size)
        if pruned:
            result = zero_shot_pruned(request, questions, progress)
        else:
            result = zero_shot_model(model, questions, dtype=dtype, progress=progress)
    print_result(result.model_dump(mode="json"), json_, lambda: tables.zero_shot(result))
