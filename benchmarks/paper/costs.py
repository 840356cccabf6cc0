"""Estimates how long a cell takes.

    seconds = start + parameters × tokens × seconds per parameter and token

`start` is `STARTING` seconds, plus loading two bytes per parameter at `LOADING` bytes per second. The command `speed`
loads several times. `tokens` is the cost of a cell as the number of tokens that the dense model reads in the same time.
The functions below count these tokens for each command:

- A model pruned by β needs 1 − β of the dense model's time per token (embeddings and head are small).
- Scoring reads the calibration text once. `taylor` reads ten short sequences, and a backward pass costs two forward
  passes. Least-squares reconstruction reads the text once more, `sequential` twice more for each pruned model.
- A search measures min(K + N·(M + S), max_evaluations) candidates on the fitness text, then dense, uniform, the best
  allocation if there is one, and the best on the report text, and each unit's sensitivity through half of the layers.
  The time of LLM calls is not estimated, but finished searches include it.
- The seven zero-shot tasks have 20,465 items, about 5.9 million tokens with all choices; a limit reduces them.
- Fine-tuning costs three passes per token. Generating a token costs `GENERATED` passes, because it is memory-bound.
- A text file has one token per 4 bytes, minus the windows that other roles take from it. Generating text and downloads
  are not counted, because their results are cached.

The last factor is the median over finished cells of the same command, of any model and rate, or else over all finished
cells. Before the first finished cell it is 2 FLOP divided by `UTILISATION` of the --tflops peak. Short cells of small
models mostly consist of the start, so they predict little about large models.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.answers import Figures
from benchmarks.paper.cells import Cell, Measured, Outcome, figures_of
from benchmarks.paper.commands import parsed
from benchmarks.paper.settings import Model, PaperSettings, Texts
from daemon.settings.settings import Settings
from daemon.settings.target import DataSettings
from gpu_worker.speed.engines import engines_named
from protocol.errors import SettingsError
from protocol.plans.spec import Role, TextSpec
from protocol.results.needs import SENSITIVITY_TOKENS
from protocol.runtime.paths import expanded

UTILISATION = 0.4
"""Share of the bf16 peak that a forward pass over long windows reaches."""
TFLOPS = 312.0
"""Peak of the paper's A100 in bf16."""
GENERATED = 64
STARTING = 10.0
LOADING = 1e9
NAMED_TOKENS: dict[str, dict[Role, int]] = {
    "wikitext2": {"calibration": 2_800_000, "fitness": 305_000, "report": 341_000},
    "c4": {"calibration": 1_800_000, "fitness": 500_000, "report": 500_000},
}
"""Tokens of each role's split of a hub text by LLaMA's tokenizer; for C4, estimated from its mean document length."""
UNKNOWN_FILE_TOKENS = 300_000
TASK_TOKENS = {
    "hellaswag": (10_042, 400),
    "winogrande": (1_267, 50),
    "boolq": (3_270, 290),
    "openbookqa": (500, 80),
    "piqa": (1_838, 80),
    "arc-e": (2_376, 130),
    "arc-c": (1_172, 150),
}
"""Number of items of each task, and tokens per item with all choices."""
TAYLOR_TOKENS = 640
UNITS = 64
"""Assumed number of units whose sensitivity is measured, while the model's shape is unknown."""
ALPACA_EXAMPLES = 10_000


def specs_of(texts: DataSettings, seqlen: int) -> dict[Role, TextSpec]:
    """Return the texts by role."""
    given: dict[Role, tuple[str | None, int | None]] = {
        "calibration": (texts.calibration, texts.calibration_windows),
        "fitness": (texts.fitness, texts.fitness_windows),
        "report": (texts.report, texts.report_windows),
    }
    return {role: TextSpec(source=name, windows=n, seqlen=seqlen) for role, (name, n) in given.items() if name}


def text_tokens(role: Role, texts: Mapping[Role, TextSpec]) -> int:
    """Return the number of tokens of a role's text, or 0 without a text. A whole file excludes other roles' windows."""
    text = texts.get(role)
    if text is None:
        return 0
    if text.windows is not None:
        return text.windows * text.seqlen
    if text.source in NAMED_TOKENS:
        return NAMED_TOKENS[text.source][role]
    file = expanded(text.source)
    whole = file.stat().st_size // 4 if file.is_file() else UNKNOWN_FILE_TOKENS
    same = (other for other in texts.values() if expanded(other.source).resolve() == file.resolve())
    return max(0, whole - sum((other.windows or 0) * other.seqlen for other in same))


def evaluation_tokens(
    texts: Texts, seqlen: int, rate: float, *, importance: str = "wanda-sp", sequential: bool = False, fitted: bool
) -> float:
    """Return the cost of `selfpruner evaluate` and `export`. At `rate` 0 the dense model is not scored."""
    roles = specs_of(texts, seqlen)
    measured = text_tokens("fitness", roles) + text_tokens("report", roles)
    if not rate:
        return measured
    calibration = texts.calibration_windows * seqlen
    scoring = 3 * TAYLOR_TOKENS if importance == "taylor" else calibration
    return measured + (1 - rate) * measured + scoring + (fitted + 2 * sequential) * calibration


def search_tokens(settings: Settings) -> float:
    """Return the cost of a whole search."""
    search, data, rate = settings.search, settings.data, settings.target.known_rate
    roles = specs_of(data, data.seqlen)
    fitness, report = text_tokens("fitness", roles), text_tokens("report", roles)
    fitted = search.reconstruction == "least-squares"
    calibration = (1 + fitted) * data.calibration_windows * data.seqlen
    measured = fitness * (1 + (1 - rate) * (search.planned + 1)) + report * (1 + (2 + bool(search.seeds)) * (1 - rate))
    return calibration + measured + UNITS * SENSITIVITY_TOKENS / 2


def zero_shot_tokens(limit: int | None, rate: float) -> float:
    """Return the cost of the seven tasks for a model pruned by `rate`."""
    items = ((min(count, limit or count), each) for count, each in TASK_TOKENS.values())
    return (1 - rate) * sum(count * each for count, each in items)


def finetune_tokens(settings: PaperSettings, rate: float, *, distils: bool) -> float:
    """Return the cost of training, assuming that all examples have the maximum length; a teacher predicts them once."""
    chosen = settings.finetune
    examples = (chosen.examples or ALPACA_EXAMPLES) * chosen.epochs
    if chosen.max_steps is not None:
        examples = min(examples, chosen.max_steps * (chosen.batch or 64))
    return (3 * (1 - rate) + distils) * examples * chosen.seqlen


def speed_tokens(rate: float, flags: Sequence[str]) -> float:
    """Return the cost of `selfpruner speed` with these flags: each repeat runs both models on every batch.

    Raises SettingsError for invalid flags.
    """
    given = _speed_options(flags)
    prompt, generated = given["prompt"], given["generate"] * GENERATED
    batches = dict.fromkeys(given["batch_size"] or [1])
    tokens = 0
    for engine in _engines(given):
        # vLLM reads each prompt twice, and transformers first runs both models once to measure their size.
        reads = 2 if engine == "vllm" else 1
        run = sum(reads * batch * prompt + generated for batch in batches)
        tokens += (given["repeats"] + given["warm_up"]) * run
        tokens += prompt + generated if engine == "vllm" else 0
    return float((2 - rate) * tokens)


def speed_loads(rate: float, flags: Sequence[str]) -> float:
    """Return the loaded weights as a multiple of the dense model's.

    Each engine loads both models. With vLLM, transformers loads both as well.
    """
    return (2 - rate) * sum(2 if engine == "vllm" else 1 for engine in _engines(_speed_options(flags)))


def _speed_options(flags: Sequence[str]) -> dict[str, Any]:
    """Parse these flags of `selfpruner speed`, with its defaults. Raises SettingsError."""
    try:
        given = parsed(["speed", "FOLDER", "--baseline", "MODEL", *flags])
        engines_named(given["engine"])
        if given["baseline"] != "MODEL":
            raise SettingsError("do not give --baseline: it is set to each of the models")
    except SettingsError as error:
        raise SettingsError(f"speed.flags: {error}") from error
    return given


def _engines(given: Mapping[str, Any]) -> Sequence[str]:
    """Return the named engines. Without names, assume one."""
    return engines_named(given["engine"]) or ("transformers",)


def parameters_of(model: Model, cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> float | None:
    """Return the dense model's parameters: from the settings, else from finished cells, else from its name."""
    if model.billions is not None:
        return model.billions * 1e9
    for cell in cells:
        figures = figures_of(cell, outcomes.get(cell.id)) if cell.model == model.name else None
        if isinstance(figures, Figures) and figures.total_parameters:
            return figures.total_parameters
    if model.name == "smollm2":
        return 134.5e6
    found = re.search(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", Path(model.hub_name or model.name).name.lower())
    return float(found[1]) * (1e9 if found[2] == "b" else 1e6) if found else None


class CostModel:
    """Predicts the seconds of cells from finished ones."""

    def __init__(
        self, models: Sequence[Model], cells: Sequence[Cell], outcomes: Mapping[str, Outcome], tflops: float = TFLOPS
    ) -> None:
        self._parameters = {model.name: parameters_of(model, cells, outcomes) for model in models}
        self._assumed = 2 / (UTILISATION * tflops * 1e12)
        self._measured: dict[str, list[float]] = {}
        for cell in cells:
            outcome = outcomes.get(cell.id)
            if isinstance(outcome, Measured):
                self.learn(cell, outcome)

    def learn(self, cell: Cell, outcome: Measured) -> None:
        """Learn from one more finished cell."""
        figures = figures_of(cell, outcome)
        if isinstance(figures, Figures) and self._parameters.get(cell.model) is None:
            self._parameters[cell.model] = figures.total_parameters
        parameters = self._parameters.get(cell.model)
        if parameters and cell.tokens:
            # If a cell was faster than its predicted start, assume that a tenth of its time was work.
            work = max(outcome.seconds - _start(parameters, cell.loads), outcome.seconds / 10)
            self._measured.setdefault(cell.what, []).append(work / (parameters * cell.tokens))

    def seconds(self, cell: Cell) -> float | None:
        """Return the predicted seconds of a cell; None if the size of its model is unknown."""
        parameters = self._parameters.get(cell.model)
        if parameters is None:
            return None
        return _start(parameters, cell.loads) + parameters * cell.tokens * self._factor(cell)

    def basis(self, cell: Cell) -> str:
        """Return, as text, the cells that the prediction for a cell is based on."""
        if cell.what in self._measured:
            return f"{len(self._measured[cell.what])} of its kind"
        count = sum(map(len, self._measured.values()))
        return f"{count} of other kinds" if count else "assumed"

    def _factor(self, cell: Cell) -> float:
        seen = self._measured.get(cell.what) or [each for kind in self._measured.values() for each in kind]
        return statistics.median(seen) if seen else self._assumed


def _start(parameters: float, loads: float) -> float:
    return STARTING + loads * 2 * parameters / LOADING
