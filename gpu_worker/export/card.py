"""Renders the model card: README.md of an exported folder."""

import html
import re
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from gpu_worker.export.facts import ExportFacts, TextPerplexity, version_of_selfpruner
from gpu_worker.models.limits import GRADIENT_SAMPLES, GRADIENT_TOKENS
from gpu_worker.models.modeling import module_name
from protocol.plans.allocation import uniform_label
from protocol.plans.spec import NAMED_TEXTS, SearchSpec, TextSpec, is_examples
from protocol.results.finetuning import Finetuning, Perplexities
from protocol.results.formats import Formats


@dataclass(frozen=True)
class _Measured:
    """A row of the table of perplexities."""

    text: str
    tokens: int
    seqlen: int
    dense: str
    uniform: str
    pruned: str


@dataclass(frozen=True)
class _Layer:
    """A row of the table of layers: rates as numbers, counts as `kept of dense`."""

    index: int
    rates: tuple[float, ...]
    query_heads: str
    kv_heads: str
    mlp_channels: str


def plain(name: str) -> str:
    """Return the name of a model or a text as Markdown and HTML show it: on one line, without meaning of its own."""
    text = html.escape("".join(c if c.isprintable() else "?" for c in name), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def render_card(facts: ExportFacts, formats: Formats, *, name: str, gguf: str | None = None) -> str:
    """Return the card of a folder called `name` in these formats; `gguf` is the name of the GGUF file, if any."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {"plain": plain, "quoted": shlex.quote}
    source = resources.files("gpu_worker.export").joinpath("card.md.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        facts=facts,
        formats=formats,
        only_gguf=formats == ("gguf",),
        name=name,
        gguf=gguf,
        module=f"{module_name(facts.shape.family)}.py",
        parameters=facts.parameters,
        measured=_measured(facts),
        uniform=_uniform(facts),
        against_uniform=_against_uniform(facts),
        finetunings=[_finetuned(each) for each in facts.finetunings],
        measured_again=_measured_again(facts.spec.fitness, name),
        layers=_layers(facts),
        scored_on=_scored_on(facts.spec),
        removed=1 - facts.parameters.decoder_after / facts.parameters.decoder_before,
        percent=lambda share: f"{100 * share:.3g} %",
        version=version_of_selfpruner(),
    )


def _measured(facts: ExportFacts) -> list[_Measured]:
    """Return the rows for the fitness text, which the search uses, and the report text, which it does not use."""
    of = facts.searched
    uniform, uniform_report = (None, None) if of is None else (of.uniform_perplexity, of.uniform_report_perplexity)
    rows = [
        (facts.spec.fitness, "fitness", facts.dense, uniform, facts.pruned),
        (facts.spec.report, "report", facts.dense_report, uniform_report, facts.pruned_report),
    ]
    return [
        _Measured(
            text=f"{_source(text)} ({role}{', answers only' if is_examples(text.source) else ''})",
            tokens=(dense or pruned).tokens,  # type: ignore[union-attr]
            seqlen=text.seqlen,
            dense=_figure(dense),
            uniform="not measured" if uniform is None else _number(uniform),
            pruned=_figure(pruned),
        )
        for text, role, dense, uniform, pruned in rows
        if text is not None and (dense or pruned)
    ]


def _uniform(facts: ExportFacts) -> str:
    """Return the heading of the column of uniform pruning."""
    return uniform_label(facts.spec.reconstruction) + (", not fine-tuned" if facts.finetunings else "")


def _against_uniform(facts: ExportFacts) -> str | None:
    """Compare the search's rates with uniform pruning; None if the model was also fine-tuned."""
    of = facts.searched
    text, pruned, uniform = "fitness text", facts.pruned, of and of.uniform_perplexity
    if of and of.uniform_report_perplexity and facts.pruned_report:
        text, pruned, uniform = "report text", facts.pruned_report, of.uniform_report_perplexity
    if pruned is None or not uniform or facts.finetunings:
        return None
    baseline = (
        "with the same reconstruction and number of parameters"
        if facts.spec.reconstruction == "least-squares"
        else "which is rectangular and without reconstruction: a weak baseline"
    )
    return (
        f"On the {text}, the perplexity is {pruned.perplexity / uniform:.3f} of that of uniform pruning, {baseline}.\n"
        "This is one search with one seed; other seeds find other rates."
    )


def _finetuned(tuned: Finetuning) -> str:
    """Describe one fine-tuning: method, data and results."""
    recipe = tuned.recipe
    how = "all weights of the decoder layers' projections"
    if recipe.method == "lora":
        how = f"LoRA (r {recipe.rank}, α {recipe.alpha:g}, dropout {recipe.dropout:g}), merged into the weights"
    if tuned.teacher is not None:
        how += f", partly from the predictions of {tuned.teacher}"
    pieces = "instructions (loss on the answers only)" if tuned.form == "alpaca" else "windows of text"
    done = (
        f"{how}; {tuned.examples:,} {pieces} from {tuned.data}; {tuned.steps:,} steps with batch size {recipe.batch}, "
        f"{tuned.tokens:,} predicted tokens; learning rate {recipe.learning_rate:g}, {recipe.schedule}; "
        f"mean loss {tuned.first_loss:.3f} in the first 10 % of steps, {tuned.last_loss:.3f} in the last"
    )
    perplexities = [_before_and_after(each) for each in (tuned.perplexity, tuned.report_perplexity) if each is not None]
    return "; ".join([done, *perplexities])


def _before_and_after(perplexity: Perplexities) -> str:
    return (
        f"perplexity {_number(perplexity.before)} before and {_number(perplexity.after)} after, "
        f"on {_text(perplexity.text)}"
    )


def _measured_again(text: TextSpec, name: str) -> str:
    """Return the command that measures the same tokens; a text file is given by its name without folders."""
    command = f"selfpruner evaluate {shlex.quote(name)}"
    return command if text.source in NAMED_TEXTS else f"{command} --data {shlex.quote(_source(text))}"


def _figure(measured: TextPerplexity | None) -> str:
    return "not measured" if measured is None else _number(measured.perplexity)


def _number(perplexity: float) -> str:
    return f"{perplexity:,.0f}" if perplexity >= 1000 else f"{perplexity:.4g}"


def _layers(facts: ExportFacts) -> list[_Layer]:
    each = len(facts.rates) // len(facts.plan.layers)
    return [
        _Layer(
            index=i,
            rates=facts.rates[i * each : (i + 1) * each],
            query_heads=f"{kept.query_heads} of {whole.query_heads}",
            kv_heads=f"{kept.kv_heads} of {whole.kv_heads}",
            mlp_channels=f"{kept.mlp_channels:,} of {whole.mlp_channels:,}",
        )
        for i, (kept, whole) in enumerate(zip(facts.plan.layers, facts.shape.layers, strict=True))
    ]


def _scored_on(spec: SearchSpec) -> str:
    """Describe the text that importance was scored on."""
    if spec.importance == "magnitude":
        return ""
    if spec.importance == "taylor":
        of_what = f"the first {GRADIENT_TOKENS} tokens of up to {GRADIENT_SAMPLES} windows"
        return f", gradients of {of_what} of {_source(spec.calibration)}"
    text = spec.calibration
    windows = "all windows" if text.windows is None else f"{text.windows} windows"
    return f", scored on {_source(text)}, {windows} of {text.seqlen} tokens (scoring: {spec.scoring})"


def _text(spec: TextSpec) -> str:
    if is_examples(spec.source):
        count = "all examples" if spec.windows is None else f"{spec.windows} examples"
        return f"{_source(spec)}, the answers of {count} of at most {spec.seqlen} tokens"
    windows = "all windows" if spec.windows is None else f"{spec.windows} windows"
    return f"{_source(spec)}, {windows} of {spec.seqlen} tokens"


def _source(spec: TextSpec) -> str:
    """Return the name of a text. A file is named without its folders, which are private."""
    return Path(spec.source).name
