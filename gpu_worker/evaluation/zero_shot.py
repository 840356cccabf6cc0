"""`selfpruner zero-shot`: measures zero-shot accuracy on tasks with lm-eval."""

import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import structlog
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from gpu_worker.evaluation.allocation import choose_rates, prepare
from gpu_worker.evaluation.one_shot import removed_share
from gpu_worker.evaluation.outcomes import first_line
from gpu_worker.evaluation.zero_shot_tasks import LoadedTask, load_tasks, quiet
from gpu_worker.models.errors import NotFiniteError, is_out_of_memory
from gpu_worker.models.loading import LoadedModel, load_model
from gpu_worker.models.machine import gigabytes, main_memory
from gpu_worker.models.memory import FP32
from gpu_worker.progress import Progress, no_progress
from protocol.errors import UsageError
from protocol.plans.allocation import PruningRequest
from protocol.plans.plan import Parameters, count_parameters, dense_plan
from protocol.plans.spec import Dtype
from protocol.results.commands import TaskAccuracy, ZeroShotResult

log = structlog.get_logger()

LM_EVAL_LOG = logging.getLogger("lm_eval")
"""lm-eval's logger, silenced because it warns about each model that lm-eval did not load and about each long item. This
module logs one warning instead."""


@dataclass(frozen=True)
class Questions:
    """The tasks to measure: their names (empty: all tasks), their folder, if any, and how many items of each."""

    names: tuple[str, ...] = ()
    folder: Path | None = None
    limit: int | None = None
    batch_size: int = 8
    """Texts per batch."""


def zero_shot_model(
    name: str, questions: Questions, *, dtype: Dtype, progress: Progress = no_progress
) -> ZeroShotResult:
    """Measure a model, such as an exported model, without pruning it. Raises the same errors as `zero_shot_pruned`."""
    tasks = load_tasks(questions.names, questions.folder, questions.limit, progress)
    progress("loading model", 0, 1)
    model = load_model(name, dtype)
    progress("loading model", 1, 1)
    start = time.perf_counter()
    answers = answer_tasks(model, tasks, questions, progress)
    shape = model.decoder.shape
    parameters = count_parameters(dense_plan(shape), shape)
    return _result(name, questions, answers, parameters, dtype, time.perf_counter() - start)


def zero_shot_pruned(request: PruningRequest, questions: Questions, progress: Progress = no_progress) -> ZeroShotResult:
    """Prune by given rates or an allocation, and measure.

    Raises UsageError for tasks, a model or a text that is not available and for rates of the wrong number, range or
    model; NotFiniteError if the model's predictions are not finite.
    """
    tasks = load_tasks(questions.names, questions.folder, questions.limit, progress)
    spec = request.spec
    target = prepare(request, progress, measured=False)
    rates = choose_rates(target, request.choice)
    plan = spec.plan(list(rates), target.shape)
    try:
        target.prune(plan)
        start = time.perf_counter()
        answers = answer_tasks(target.model, tasks, questions, progress)
    except NotFiniteError as error:
        raise NotFiniteError(f"pruned so, {spec.model} does not compute: {error}") from error
    parameters = count_parameters(plan, target.shape)
    result = _result(spec.model, questions, answers, parameters, spec.dtype, time.perf_counter() - start)
    how = {
        "method": request.method,
        "rate": removed_share(parameters),
        "calibration": spec.calibration.source,
        "rates": rates,
    }
    return result.model_copy(update=how)


def answer_tasks(
    model: LoadedModel, tasks: Sequence[LoadedTask], questions: Questions, progress: Progress = no_progress
) -> tuple[TaskAccuracy, ...]:
    """Measure the model on each task in turn.

    Raises NotFiniteError if its predictions are not finite, UsageError if the batches do not fit into memory.
    """
    LM_EVAL_LOG.setLevel(logging.ERROR)
    try:
        lm = _LmEvalModel(model, questions.batch_size, progress)
        return tuple(lm.answer(task, questions.limit) for task in tasks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(
            f"batches of {questions.batch_size} texts do not fit into memory ({first_line(error)}); "
            "give a smaller --batch-size"
        ) from error


class _LmEvalModel(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """A loaded model behind the interface that lm-eval calls.

    Likelihoods are computed in fp32, because bfloat16 cannot separate most pairs of answers, and published figures come
    from models with fp32 logits.
    """

    def __init__(self, model: LoadedModel, batch_size: int, progress: Progress) -> None:
        super().__init__(
            pretrained=model.causal_lm,
            tokenizer=model.tokenizer,
            backend="causal",
            max_length=model.longest_positions,
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        self._head = model.decoder.head.weight
        self._progress = progress
        self._title = ""
        self._stderr = sys.stderr

    def answer(self, loaded: LoadedTask, limit: int | None) -> TaskAccuracy:
        """Return the accuracies on a task's first `limit` items."""
        self._title = loaded.title
        name = loaded.harness_name
        task = {"tasks": {name: loaded.task}}
        with quiet():
            found = lm_eval.evaluate(self, task, limit=limit, bootstrap_iters=0, log_samples=False)
        accuracies, items = found["results"][name], found["n-samples"][name]["effective"]
        acc, acc_norm = accuracies["acc,none"], accuracies.get("acc_norm,none")
        counted = acc if loaded.metric == "acc" else acc_norm
        return TaskAccuracy(
            task=loaded.name,
            title=loaded.title,
            items=items,
            acc=acc,
            acc_norm=acc_norm,
            metric=loaded.metric,
            accuracy=counted,
            standard_error=math.sqrt(counted * (1 - counted) / (items - 1)) if items > 1 else None,
        )

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) for each (texts, context tokens, continuation tokens)."""
        with redirect_stderr(self._stderr):  # which shows the log and the progress
            return self._checked(requests)

    def _checked(self, requests: list[Any]) -> list[tuple[float, bool]]:
        cut = sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        if cut:
            log.warning("texts_too_long", task=self._title, texts=cut, of=len(requests), positions=self.max_length)
        self._check_memory(requests)
        self.set_cache_hook(_ProgressHook(self._progress, f"answering {self._title}", len(requests)))
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm=True)
        for likelihood, _is_greedy in answers:
            if not math.isfinite(likelihood):
                raise NotFiniteError(f"the log-likelihood of an answer in {self._title} is {likelihood}")
        return answers

    def _check_memory(self, requests: list[Any]) -> None:
        """Raise UsageError for batches too large for main memory; otherwise the kernel would kill the process."""
        if self.device.type != "cpu":
            return
        # One-token answers to one context share a row, because the model does not run an answer's last token.
        rows = {(*context, *answer[:-1]) for _, context, answer in requests}
        texts = min(int(self.batch_size), len(rows))
        tokens = min(max(map(len, rows)), self.max_length)
        # Each logit is kept as computed, in an fp32 copy if it is not fp32, and as log-softmax. The log-softmax of the
        # previous batch is kept too.
        size = self._head.element_size()
        each = size + (FP32 if size != FP32 else 0) + FP32 * (2 if len(rows) > texts else 1)
        need = texts * tokens * self._head.shape[0] * each
        free = main_memory()
        if need > free:
            raise UsageError(
                f"batches of {texts} texts of up to {tokens} tokens take {gigabytes(need)} for what the model "
                f"predicts, and the main memory has {gigabytes(free)} available; give a smaller --batch-size"
            )

    def _model_call(self, inps: Tensor, attn_mask: None = None, labels: None = None) -> Tensor:  # noqa: ARG002
        """Return logits [texts, tokens, vocabulary] of tokens [texts, tokens], which are padded with zeros on the
        right."""
        with torch.inference_mode():
            logits: Tensor = self.model(input_ids=inps, use_cache=False).logits
        return logits


class _ProgressHook:
    """Takes the place of lm-eval's answer cache, to report progress."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self._progress = progress
        self._stage = stage
        self._done, self._total = 0, total
        progress(stage, 0, total)

    def add_partial(self, attr: str, req: object, res: object) -> None:  # noqa: ARG002  (lm-eval's signature)
        """Count one answer."""
        self._done += 1
        self._progress(self._stage, self._done, self._total)


def _result(
    name: str,
    questions: Questions,
    answers: tuple[TaskAccuracy, ...],
    parameters: Parameters,
    dtype: Dtype,
    seconds: float,
) -> ZeroShotResult:
    return ZeroShotResult(
        model=name,
        tasks=answers,
        mean=math.fsum(answer.accuracy for answer in answers) / len(answers),
        limit=questions.limit,
        tasks_dir=questions.folder,
        parameters=parameters,
        dtype=dtype,
        batch_size=questions.batch_size,
        harness=lm_eval.__version__,
        seconds=seconds,
    )
