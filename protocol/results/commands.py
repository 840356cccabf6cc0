"""Results of the commands that prune and measure, with the JSON of `--json`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from protocol.plans.any_heads import Heads
from protocol.plans.plan import LayerPlan, Parameters
from protocol.plans.shape import ModelShape
from protocol.plans.spec import Reconstruction, SearchSpec
from protocol.plans.value import FiniteValue, Value
from protocol.results.finetuning import Finetuning
from protocol.results.formats import Formats, GgufType
from protocol.results.zero_shot import Metric


class EvaluationResult(Value):
    """The perplexity of one model, and if it was pruned, of the dense model on the same tokens."""

    model: str
    method: str | None = None
    """The allocation, or the source of the rates; None for an unpruned model."""
    heads: Heads | None = None
    """Which query heads could be removed; None for an unpruned model."""
    reconstruction: Reconstruction | None = None
    """How the remaining weights were reconstructed; None for an unpruned model."""
    rate: float | None = None
    """Share of the decoder's parameters that was removed; None for an unpruned model."""
    perplexity: float
    """Perplexity on the fitness text."""
    dense_perplexity: float | None = None
    kl: float | None = None
    """KL divergence from the dense model in nats per token, if requested."""
    report_perplexity: float | None = None
    dense_report_perplexity: float | None = None
    parameters: Parameters
    seqlen: int
    tokens: int
    seconds: float
    """Wall time of two steps only: applying the plan, and measuring on the fitness text."""
    calibration: str | None = None
    data: str
    """The fitness text."""
    fitness_digest: str
    """Digest of the measured tokens: equal for results on the same tokens."""
    report_digest: str | None = None
    card_perplexity: float | None = None
    """The perplexity on the same tokens that the exported folder's model card states."""
    card_report_perplexity: float | None = None
    card_texts: str | None = None
    """Names of the texts on the model card, if its perplexity is of other tokens than those measured."""
    rates: tuple[float, ...] = ()


class AllocationResult(Value):
    """The rates of an allocation, with all that is needed to prune by them: the content of a rates file."""

    model: str
    method: str
    rates: tuple[float, ...]
    parameters: Parameters
    plan: tuple[LayerPlan, ...]
    shape: ModelShape
    spec: SearchSpec


class GgufPerplexity(FiniteValue):
    """Perplexity of an exported GGUF file in llama.cpp, and of the model in memory that it was written from."""

    file_type: GgufType
    perplexity: PositiveFloat
    """Perplexity in llama.cpp, on the first windows of the text that the export was measured on."""
    in_memory: PositiveFloat
    """Perplexity of the model in memory on the same windows."""
    tokens: PositiveInt
    """Number of predicted tokens."""


class SearchSummary(Value):
    """The cost of a search, and the uniform baseline on the same texts."""

    evaluations: int
    seconds: float
    uniform_perplexity: float | None
    uniform_report_perplexity: float | None
    dense_perplexity: float | None = None
    """Dense perplexity in the search. An export measures it again, which shows whether its tokens are the same."""
    dense_report_perplexity: float | None = None
    charts: dict[str, str] = Field(default_factory=dict, exclude=True, repr=False)
    """Drawings of the search as SVG, by the names of SEARCH_CHARTS. An export keeps them as files beside its card."""


class PushResult(Value):
    """What was uploaded to the Hugging Face Hub."""

    repository: str
    """`USER/NAME`."""
    url: str
    public: bool
    """Whether a new repository was made public; one that existed keeps its visibility."""
    files: int
    bytes: int


class ExportResult(Value):
    """The files that an export wrote, and the measurements of the exported model."""

    folder: Path
    formats: Formats
    files: dict[str, int]
    """File names, with sizes in bytes."""
    model: str
    method: str
    rate: float
    """Share of the decoder's parameters that was removed."""
    perplexity: float
    """Perplexity of the model in memory on the fitness text."""
    dense_perplexity: float
    kl: float | None
    report_perplexity: float | None
    parameters: Parameters
    seqlen: int
    tokens: int
    seconds: float
    """Wall time of writing the folder."""
    gguf: GgufPerplexity | None = None
    """Perplexity of the GGUF file; None without a file, and if llama.cpp is not installed or has too little memory."""


class TaskAccuracy(Value):
    """Accuracy of a model in one zero-shot task, as a share of its items."""

    task: str
    """The name on the command line; for a local task, the name in its file."""
    title: str
    items: PositiveInt
    acc: float
    acc_norm: float | None
    """Accuracy by log-likelihood per character; None if the task has no such accuracy."""
    metric: Metric
    """Which of `acc` and `acc_norm` is reported as `accuracy` (protocol/results/zero_shot.py)."""
    accuracy: float
    standard_error: float | None
    """Standard error of `accuracy`; None for a single item."""


class ZeroShotResult(Value):
    """Zero-shot accuracies of a model, and how it was pruned."""

    model: str
    method: str | None = None
    """The allocation, or the source of the rates; None for an unpruned model."""
    rate: float | None = None
    """Share of the decoder's parameters that was removed; None for an unpruned model."""
    tasks: tuple[TaskAccuracy, ...]
    mean: float
    """Unweighted mean of the tasks' `accuracy`, as in the paper."""
    limit: int | None
    """Only the first `limit` items of each task were used; None means all."""
    tasks_dir: Path | None
    parameters: Parameters
    dtype: str
    batch_size: int
    harness: str
    """The version of lm-eval."""
    seconds: float
    """Wall time of answering only."""
    calibration: str | None = None
    rates: tuple[float, ...] = ()


class FinetuneResult(Value):
    """The training, its perplexities, and the files that were written."""

    folder: Path
    formats: Formats
    files: dict[str, int]
    """Paths below the folder, with sizes in bytes."""
    model: str
    """The model that was pruned."""
    parameters: Parameters
    finetuning: Finetuning
    resumed_from: int
    """Number of steps that earlier processes made."""
    ended_by: Literal["steps", "time"]
    seconds: float
    """Wall time of the steps, over all restarts."""
    gguf: GgufPerplexity | None = None
    """As in ExportResult; also None if no text was measured."""


class PruneResult(Value):
    """Results of `selfpruner prune`: search, export and check. Perplexities are on the fitness text."""

    search: str
    evaluations: int
    proposed_by_llm: int
    """How many of the evaluated candidates the LLM proposed."""
    search_seconds: float
    uniform_perplexity: float | None
    uniform_report_perplexity: float | None
    uniform_kl: float | None
    """Set if the search minimised the divergence from the dense model."""
    uniform_parameters: Parameters
    reconstruction: Reconstruction
    """How both uniform pruning and the best candidate were reconstructed."""
    improved: bool | None
    """Whether the best candidate is better than uniform pruning, as in the search's summary."""
    dense_report_perplexity: float | None
    exported: ExportResult
    """The export before fine-tuning; with fine-tuning it is in the search's folder."""
    finetuned: FinetuneResult | None
    reloaded: float | None
    """Perplexity of the folder when loaded again; None if it holds only a GGUF file."""
    runs_in_llama_cpp: bool | None
    """Whether llama.cpp loaded the GGUF file and generated tokens; None without a GGUF file or llama.cpp."""
