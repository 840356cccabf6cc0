"""How long a cell takes.

    seconds = start + parameters × tokens × seconds for one parameter and token

`start` is `STARTING` seconds, and loading two bytes a parameter at `LOADING` bytes a second; `speed` loads often.
`tokens` are those that the dense model would read in the same time; the functions below count them for each command:

- A model pruned by β reads a token in 1 − β of the dense model's time (its embeddings and head, which stay, are small).
- Scoring reads the calibration text once, `taylor` ten beginnings of it, and a backward pass is two forward ones;
  least-squares reconstruction reads it once more, `sequential` twice more for each pruned model.
- A search measures min(K + N·(M + S), max_evaluations) candidates on the fitness text, then dense, uniform and best on
  the report text, and each unit's sensitivity through half of the layers. Waiting for the LLM counts nothing of itself:
  in searches that have ended it is part of their seconds.
- The seven zero-shot tasks have 20,465 items, which with all their choices are about 5.9 million tokens; with a limit,
  a part of them.
- Fine-tuning costs three passes a token. A token that is generated costs `GENERATED` passes, for it waits for memory.
- Of a whole file every 4 bytes are a token; windows that other roles take of it are left out. Text that the model
  writes itself is kept after the first time, and counts nothing. Nor do downloads.

The last factor is measured: the median over finished cells of the same command, of any model and rate; else over all
finished cells; else it is 2 FLOP divided by `UTILISATION` of the peak that --tflops gives. Short cells of small models
are mostly start: they say little of large ones.
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
from protocol.runtime.paths import expanded

UTILISATION = 0.4
"""Of the peak in bf16 that a forward pass over long windows comes to."""
TFLOPS = 312.0
"""The peak of the paper's A100 in bf16."""
GENERATED = 64
STARTING = 10.0
LOADING = 1e9
NAMED_TOKENS: dict[str, dict[Role, int]] = {
    "wikitext2": {"calibration": 2_800_000, "fitness": 305_000, "report": 341_000},
    "c4": {"calibration": 1_800_000, "fitness": 500_000, "report": 500_000},
}
"""All that each role has of a text of the hub, by LLaMA's tokenizer; of C4 from the mean length of its documents."""
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
"""Items of each task, and tokens of an item with all its choices."""
TAYLOR_TOKENS = 640
SENSITIVITY_TOKENS = 1024
UNITS = 64
"""Of a model whose layers are not known yet: units whose sensitivity is measured."""
ALPACA_EXAMPLES = 10_000


def specs_of(texts: Texts | DataSettings, seqlen: int) -> dict[Role, TextSpec]:
    """The texts by role."""
    given: dict[Role, tuple[str | None, int | None]] = {
        "calibration": (texts.calibration, texts.calibration_windows),
        "fitness": (texts.fitness, texts.fitness_windows),
        "report": (texts.report, texts.report_windows),
    }
    return {role: TextSpec(source=name, windows=n, seqlen=seqlen) for role, (name, n) in given.items() if name}


def text_tokens(role: Role, texts: Mapping[Role, TextSpec]) -> int:
    """Tokens that a role has: of a whole file those that the other roles leave, without a text none."""
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
    """Of `selfpruner evaluate` and `export`; `rate` 0 is a model as it is, which is not scored."""
    roles = specs_of(texts, seqlen)
    measured = text_tokens("fitness", roles) + text_tokens("report", roles)
    if not rate:
        return measured
    calibration = texts.calibration_windows * seqlen
    scoring = 3 * TAYLOR_TOKENS if importance == "taylor" else calibration
    return measured + (1 - rate) * measured + scoring + (fitted + 2 * sequential) * calibration


def candidates_of(settings: Settings) -> int:
    """Most that a search measures."""
    search = settings.search
    candidates = search.population + search.rounds * (search.mutations + search.crossovers)
    return min(candidates, search.max_evaluations or candidates)


def search_tokens(settings: Settings) -> float:
    """Of a whole search."""
    search, data, rate = settings.search, settings.data, settings.target.rate
    candidates = candidates_of(settings)
    roles = specs_of(data, data.seqlen)
    fitness, report = text_tokens("fitness", roles), text_tokens("report", roles)
    fitted = search.reconstruction == "least-squares"
    calibration = (1 + fitted) * data.calibration_windows * data.seqlen
    measured = fitness * (1 + (1 - rate) * (candidates + 1)) + report * (1 + 2 * (1 - rate))
    return calibration + measured + UNITS * SENSITIVITY_TOKENS / 2


def zero_shot_tokens(limit: int | None, rate: float) -> float:
    """Of the seven tasks by a model that is pruned by `rate`."""
    items = ((min(count, limit or count), each) for count, each in TASK_TOKENS.values())
    return (1 - rate) * sum(count * each for count, each in items)


def finetune_tokens(settings: PaperSettings, rate: float) -> float:
    """Of the training, whatever the length of examples: all are taken for the longest."""
    chosen = settings.finetune
    examples = (chosen.examples or ALPACA_EXAMPLES) * chosen.epochs
    if chosen.max_steps is not None:
        examples = min(examples, chosen.max_steps * (chosen.batch or 64))
    return 3 * (1 - rate) * examples * chosen.seqlen


def speed_tokens(rate: float, flags: Sequence[str]) -> float:
    """Of `selfpruner speed` with these flags: each repeat runs the dense and the pruned model on every batch.

    Raises SettingsError for flags that it would refuse.
    """
    given = _speed_options(flags)
    prompt, generated = given["prompt"], given["generate"] * GENERATED
    batches = dict.fromkeys(given["batch_size"] or [1])
    tokens = 0
    for engine in _engines(given):
        # vLLM reads each prompt twice; and transformers has run both models once before, to see how large they are.
        reads = 2 if engine == "vllm" else 1
        run = sum(reads * batch * prompt + generated for batch in batches)
        tokens += (given["repeats"] + given["warm_up"]) * run
        tokens += prompt + generated if engine == "vllm" else 0
    return float((2 - rate) * tokens)


def speed_loads(rate: float, flags: Sequence[str]) -> float:
    """How often as much as the dense model is loaded: two models in each engine, for vLLM in transformers before."""
    return (2 - rate) * sum(2 if engine == "vllm" else 1 for engine in _engines(_speed_options(flags)))


def _speed_options(flags: Sequence[str]) -> dict[str, Any]:
    """What `selfpruner speed` reads in these flags, with its defaults. Raises SettingsError."""
    try:
        given = parsed(["speed", "FOLDER", "--baseline", "MODEL", *flags])
        engines_named(given["engine"])
        if given["baseline"] != "MODEL":
            raise SettingsError("--baseline is each of the models itself")
    except SettingsError as error:
        raise SettingsError(f"speed.flags: {error}") from error
    return given


def _engines(given: Mapping[str, Any]) -> Sequence[str]:
    """Left out, it is those that are there, and one of them at least."""
    return engines_named(given["engine"]) or ("transformers",)


def parameters_of(model: Model, cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> float | None:
    """Of the dense model: as the file says, else as finished cells do, else from a name such as Llama-2-7b."""
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
    """Seconds of cells, from those that have ended."""

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
        """One more cell has ended."""
        figures = figures_of(cell, outcome)
        if isinstance(figures, Figures) and self._parameters.get(cell.model) is None:
            self._parameters[cell.model] = figures.total_parameters
        parameters = self._parameters.get(cell.model)
        if parameters and cell.tokens:
            # A cell that was quicker than its start should take: a tenth of it was work.
            work = max(outcome.seconds - _start(parameters, cell.loads), outcome.seconds / 10)
            self._measured.setdefault(cell.what, []).append(work / (parameters * cell.tokens))

    def seconds(self, cell: Cell) -> float | None:
        """How long a cell takes; None where nothing says how large its model is."""
        parameters = self._parameters.get(cell.model)
        if parameters is None:
            return None
        return _start(parameters, cell.loads) + parameters * cell.tokens * self._factor(cell)

    def basis(self, cell: Cell) -> str:
        """What the seconds of a cell rest on."""
        if cell.what in self._measured:
            return f"{len(self._measured[cell.what])} of its kind"
        count = sum(map(len, self._measured.values()))
        return f"{count} of other kinds" if count else "assumed"

    def _factor(self, cell: Cell) -> float:
        seen = self._measured.get(cell.what) or [each for kind in self._measured.values() for each in kind]
        return statistics.median(seen) if seen else self._assumed


def _start(parameters: float, loads: float) -> float:
    return STARTING + loads * 2 * parameters / LOADING
