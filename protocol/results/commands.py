"""What the commands that prune and measure find: as JSON what a program reads of them."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from protocol.plans.any_heads import Heads
from protocol.plans.plan import LayerPlan, Parameters
from protocol.plans.shape import ModelShape
from protocol.plans.spec import Reconstruction, SearchSpec
from protocol.results.finetuning import Finetuning
from protocol.results.formats import Formats, GgufType
from protocol.results.zero_shot import Metric


class EvaluationResult(BaseModel):
    """What one model measures, and where it was pruned, what the dense model does on the same tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    method: str | None = None
    """The allocation, or where the rates come from; None for a model as it is."""
    heads: Heads | None = None
    """Which query heads could be removed; None for a model as it is."""
    reconstruction: Reconstruction | None = None
    """Whether what stays was fitted; None for a model as it is."""
    rate: float | None = None
    """Share of the decoder's parameters that was removed; None for a model as it is."""
    perplexity: float
    """On the fitness text."""
    dense_perplexity: float | None = None
    kl: float | None = None
    """Divergence from the dense model in nats, where it was asked for."""
    report_perplexity: float | None = None
    dense_report_perplexity: float | None = None
    parameters: Parameters
    seqlen: int
    tokens: int
    seconds: float
    """Wall time of pruning to the plan and measuring on the fitness text, and of nothing else."""
    calibration: str | None = None
    data: str
    """The fitness text."""
    fitness_digest: str
    """Of the tokens measured on: equal where two results are of the same ones."""
    card_perplexity: float | None = None
    """What an exported folder's own card says of the same tokens."""
    rates: tuple[float, ...] = ()


class AllocationResult(BaseModel):
    """Rates without a search, with all that is needed to prune by them: a file of rates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    method: str
    rates: tuple[float, ...]
    parameters: Parameters
    plan: tuple[LayerPlan, ...]
    shape: ModelShape
    spec: SearchSpec


class GgufPerplexity(BaseModel):
    """What an exported GGUF file computes in llama.cpp, beside the model in memory that it was written from."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    file_type: GgufType
    perplexity: PositiveFloat
    """In llama.cpp, of the first windows of the text that the export was measured on."""
    in_memory: PositiveFloat
    """Of the same windows."""
    tokens: PositiveInt
    """Predicted ones."""


class Searched(BaseModel):
    """What a search took, and what it is compared with, on the texts of what it found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    evaluations: int
    seconds: float
    uniform_perplexity: float | None
    uniform_report_perplexity: float | None


class ExportResult(BaseModel):
    """What was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    formats: Formats
    files: dict[str, int]
    """Names and sizes in bytes."""
    model: str
    method: str
    rate: float
    """Share of the decoder's parameters that is removed."""
    perplexity: float
    """On the fitness text, of the model in memory."""
    dense_perplexity: float
    kl: float | None
    report_perplexity: float | None
    parameters: Parameters
    seqlen: int
    tokens: int
    seconds: float
    """Wall time of writing the folder."""
    gguf: GgufPerplexity | None = None
    """None without a GGUF file, and where llama.cpp is not installed or has no room."""


class TaskAccuracy(BaseModel):
    """What a model answers in one zero-shot task; accuracies are shares of its items."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    """As on the command line; of a local task the name in its file."""
    title: str
    items: PositiveInt
    acc: float
    acc_norm: float | None
    """None where the task has no such accuracy."""
    metric: Metric
    """Which of the two counts (protocol/results/zero_shot.py)."""
    accuracy: float
    """That one."""
    standard_error: float | None
    """Of `accuracy`, from the number of items; None for a single item."""


class ZeroShotResult(BaseModel):
    """What a model answers without examples, and where it was pruned, how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    method: str | None = None
    """The allocation, or where the rates come from; None for a model as it is."""
    rate: float | None = None
    """Share of the decoder's parameters that was removed; None for a model as it is."""
    tasks: tuple[TaskAccuracy, ...]
    mean: float
    """Of the tasks' `accuracy`, each task counting the same, as in the paper."""
    limit: int | None
    """At most so many items of each task, the first ones; None for all."""
    tasks_dir: Path | None
    parameters: Parameters
    dtype: str
    batch_size: int
    harness: str
    """lm-eval's version."""
    seconds: float
    """Wall time of answering, and of nothing else."""
    calibration: str | None = None
    rates: tuple[float, ...] = ()


class FinetuneResult(BaseModel):
    """What was trained, what it measures, and what was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    formats: Formats
    files: dict[str, int]
    """Names below the folder, and sizes in bytes."""
    model: str
    """The model that was pruned."""
    parameters: Parameters
    finetuning: Finetuning
    resumed_from: int
    """Steps that an earlier process had made."""
    ended_by: Literal["steps", "time"]
    seconds: float
    """Wall time of the steps, over all restarts."""
    gguf: GgufPerplexity | None = None
    """As of an export; None where no text was measured, too."""


class PruneResult(BaseModel):
    """From model to smaller model: what search, export and check came to. Perplexities are of the fitness text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    search: str
    evaluations: int
    proposed_by_llm: int
    """Of them."""
    search_seconds: float
    uniform_perplexity: float | None
    uniform_report_perplexity: float | None
    uniform_kl: float | None
    """Where the search minimised the divergence from the dense model."""
    uniform_parameters: Parameters
    reconstruction: Reconstruction
    """Applies to uniform pruning and to the best allocation."""
    dense_report_perplexity: float | None
    exported: ExportResult
    """Before fine-tuning, in the search's folder, where there was any."""
    finetuned: FinetuneResult | None
    reloaded: float | None
    """Of the folder when it was loaded again; None where it holds no more than a GGUF file."""
    runs_in_llama_cpp: bool | None
    """The GGUF file was loaded and wrote tokens; None where there is none, or no llama.cpp here."""
