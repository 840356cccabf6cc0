"""What commands answer to a person: tables that stay whole wherever they are printed, and what to type next."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from agents.population.population import Evaluation
from daemon.commands import tables
from daemon.commands.output import print_result
from daemon.monitor.watch_screen import status_tables
from daemon.state.journal import best_record
from protocol.errors import DataError
from protocol.plans.plan import count_parameters, dense_plan
from protocol.plans.spec import TextSpec
from protocol.results.commands import (
    AllocationResult,
    EvaluationResult,
    ExportResult,
    FinetuneResult,
    GgufPerplexity,
    PruneResult,
)
from protocol.results.finetuning import Finetuning, Perplexities, Recipe
from tests.support.samples import SHAPE, SPEC, STATUS, candidates, measured

TEXT = TextSpec(source="self", windows=2, seqlen=256)
PARAMETERS = count_parameters(SPEC.uniform_plan(SHAPE), SHAPE)
EVALUATED = EvaluationResult(
    model="tiny",
    method="owl",
    rate=0.3,
    perplexity=1234.5678,
    dense_perplexity=12.3456,
    parameters=PARAMETERS,
    seqlen=256,
    tokens=2 * 255,
    seconds=1.23,
    calibration="/texts/other.txt",
    data="/texts/some.txt",
    fitness_digest="abc",
)
EXPORTED = ExportResult(
    folder=Path("my models/pruned"),
    formats=("hf",),
    files={"README.md": 4321, "model.safetensors": 269_000_000},
    model="tiny",
    method="search quickstart",
    rate=0.3,
    perplexity=23.4567,
    dense_perplexity=12.3456,
    kl=None,
    report_perplexity=None,
    parameters=PARAMETERS,
    seqlen=256,
    tokens=510,
    seconds=3.21,
)

PRUNED = PruneResult(
    search="night",
    evaluations=8,
    proposed_by_llm=5,
    search_seconds=90.0,
    uniform_perplexity=34.5678,
    uniform_report_perplexity=None,
    uniform_kl=None,
    uniform_parameters=PARAMETERS.model_copy(update={"total_after": 9_900_000}),
    reconstruction="none",
    improved=True,
    dense_report_perplexity=None,
    exported=EXPORTED,
    finetuned=None,
    reloaded=23.4567,
    runs_in_llama_cpp=None,
)


def printed(parts: Iterable[RenderableType]) -> list[str]:
    """The lines on a screen of 80 columns."""
    console = Console(width=80, file=io.StringIO())
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def cells(line: str) -> list[str]:
    return line.split()


def test_an_evaluation_is_a_table_and_says_what_was_measured() -> None:
    heading, titles, dense, pruned, *lines = printed(tables.evaluation(EVALUATED))
    assert heading == "tiny, 30.0% of the decoder's parameters removed by owl"
    assert cells(titles) == ["perplexity", "parameters"]
    assert cells(dense)[:2] == ["dense", "12.35"] and cells(pruned)[:2] == ["pruned", "1,234.57"]
    assert lines == [
        "measured on some.txt: 2 windows of 256 tokens, 510 of them predicted",
        "scored on other.txt",
        "pruning and measuring took 1.2 s",
    ]


def test_an_evaluation_has_a_column_for_all_that_was_measured_and_no_other() -> None:
    more = {"kl": 0.5, "report_perplexity": 2000.0, "dense_report_perplexity": 20.0}
    _, titles, dense, pruned, *lines = printed(tables.evaluation(EVALUATED.model_copy(update=more)))
    assert titles.split("  ")[-1] == "parameters" and "on the report text" in titles
    assert cells(dense)[1:4] == ["12.35", "20.00", "0.0000"]
    assert cells(pruned)[1:4] == ["1,234.57", "2,000.00", "0.5000"]
    assert "kl is the divergence from the dense model, in nats per token" in lines


def test_a_model_as_it_is_has_one_row_and_the_claim_of_its_card() -> None:
    as_it_is = EvaluationResult(
        model="pruned",
        perplexity=23.45,
        parameters=count_parameters(dense_plan(SHAPE), SHAPE),
        seqlen=256,
        tokens=255,
        seconds=1.0,
        data="self",
        fitness_digest="abc",
        card_perplexity=23.46,
    )
    heading, _, row, *lines = printed(tables.evaluation(as_it_is))
    assert heading == "pruned, unchanged" and row.startswith("unchanged")
    assert lines == [
        "measured on text that the dense model generated: 1 window of 256 tokens, 255 of them predicted",
        "the model card states 23.46 on the same tokens",
        "measuring took 1.0 s",
    ]


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("wikitext2", "next: selfpruner evaluate 'my models/pruned'"),
        ("/texts/some.txt", "next: selfpruner evaluate 'my models/pruned' --data /texts/some.txt"),
    ],
)
def test_an_export_says_what_was_written_and_what_to_type_next(source: str, command: str) -> None:
    reported = EXPORTED.model_copy(update={"report_perplexity": 34.5678})
    lines = printed(tables.exported(reported, TextSpec(source=source, windows=2, seqlen=256)))
    assert lines[0] == "my models/pruned: tiny, 30.0% of the decoder's parameters removed by search quickstart, as hf"
    assert "pruned, on the report text: 34.57; see README.md for the dense model's" in lines
    assert ["model.safetensors", "269.00"] in [cells(line) for line in lines]
    assert lines[-2:] == ["writing took 3.2 s", command]


def test_a_pruned_model_stands_beside_the_dense_one_and_uniform_pruning() -> None:
    _, titles, dense, uniform, pruned, *lines = printed(tables.pruned(PRUNED, TEXT))
    assert cells(titles) == ["perplexity", "parameters"]
    named = [["dense", "12.35"], ["uniform,", "rectangular"], ["pruned", "23.46"]]
    assert [cells(row)[:2] for row in (dense, uniform, pruned)] == named
    assert cells(uniform)[2:] == ["34.57", "9.9", "M"] and cells(pruned)[2:] != ["9.9", "M"]
    assert "perplexity is 0.679 times that of uniform, rectangular (one search, one seed)" in lines
    assert not any("gained nothing" in line for line in lines)
    worse = PRUNED.model_copy(update={"improved": False})
    assert any("has gained nothing over uniform, rectangular" in line for line in printed(tables.pruned(worse, TEXT)))
    assert "searched with 8 evaluations in 90 s (search night), 5 of them proposed by the LLM" in lines


def test_after_fine_tuning_both_texts_have_a_figure() -> None:
    reported = EXPORTED.model_copy(update={"report_perplexity": 30.0})
    tuned = FinetuneResult(
        folder=Path("tuned"),
        formats=("hf",),
        files={},
        model="tiny",
        parameters=PARAMETERS,
        finetuning=Finetuning(
            recipe=Recipe(),
            data="a.txt",
            form="text",
            examples=1,
            steps=1,
            tokens=1,
            trained_parameters=1,
            first_loss=2.0,
            last_loss=1.0,
            perplexity=Perplexities(text=TEXT, before=23.4, after=20.5, tokens=510),
            report_perplexity=Perplexities(text=TEXT, before=30.0, after=27.5, tokens=510),
        ),
        resumed_from=0,
        ended_by="steps",
        seconds=1.0,
    )
    result = PRUNED.model_copy(update={"exported": reported, "finetuned": tuned})
    assert ["fine-tuned", "20.50", "27.50"] in [cells(line)[:3] for line in printed(tables.pruned(result, TEXT))]
    after = [cells(line) for line in printed(tables.finetuned(tuned))]
    assert ["perplexity", "23.40", "20.50"] in after and ["on", "the", "report", "text", "30.00", "27.50"] in after


def test_what_a_search_minimised_is_shown() -> None:
    divergent = EXPORTED.model_copy(update={"kl": 0.25})
    result = PRUNED.model_copy(update={"uniform_kl": 0.5, "exported": divergent})
    lines = printed(tables.pruned(result, TEXT))
    assert cells(lines[1]) == ["perplexity", "kl", "parameters"]
    assert [cells(row)[-3] for row in lines[2:5]] == ["0.0000", "0.5000", "0.2500"]
    assert "kl is the divergence from the dense model, in nats per token" in lines


def test_where_what_stays_was_fitted_the_baseline_is_fitted_uniform() -> None:
    result = PRUNED.model_copy(update={"reconstruction": "least-squares", "uniform_report_perplexity": 40.0})
    best = EXPORTED.model_copy(update={"report_perplexity": 30.0})
    lines = printed(tables.pruned(result.model_copy(update={"exported": best}), TEXT))
    assert lines[3].startswith("uniform, fitted")
    assert (
        "perplexity is 0.679 (0.750 on the report text) times that of uniform, fitted (one search, one seed)" in lines
    )


def test_a_gguf_is_told_beside_the_model_in_memory() -> None:
    measured = GgufPerplexity(file_type="q4_k_m", perplexity=51.239, in_memory=44.1, tokens=2044)
    told = "in llama.cpp the GGUF file (q4_k_m) measures 51.24 on 2,044 tokens, where the model in memory has 44.10"
    assert told in printed(tables.exported(EXPORTED.model_copy(update={"gguf": measured}), TEXT))


def test_a_gguf_is_tried_with_llama_cpp() -> None:
    gguf = EXPORTED.model_copy(update={"formats": ("gguf",), "files": {"README.md": 1, "pruned-F16.gguf": 2}})
    *_, last = printed(tables.exported(gguf, TEXT))
    assert last == "next: llama-cli -m 'my models/pruned/pruned-F16.gguf' -p 'Once upon a time'"


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_an_allocation_says_each_layers_rates_and_what_it_keeps(granularity: Any) -> None:
    spec = SPEC.model_copy(update={"granularity": granularity})
    rates = tuple(0.3 for _ in SHAPE.units(granularity))
    plan = spec.plan(list(rates), SHAPE)
    result = AllocationResult(
        model="tiny",
        method="uniform",
        rates=rates,
        parameters=count_parameters(plan, SHAPE),
        plan=plan.layers,
        shape=SHAPE,
        spec=spec,
    )
    _, titles, *rows = printed(tables.allocation(result))
    assert ("attention rate" in titles) == (granularity == "block")
    first, whole = plan.layers[0], SHAPE.layers[0]
    figures = ["0", *["0.300"] * (len(rates) // len(plan.layers))]
    figures += f"{first.query_heads} of {whole.query_heads} {first.kv_heads} of {whole.kv_heads}".split()
    assert cells(rows[0])[: len(figures)] == figures
    assert len(rows) == len(SHAPE.layers) + 2


def test_the_best_says_who_made_it_and_how_to_export_it() -> None:
    candidate = candidates(1)[0]
    record = best_record("night", SPEC, SHAPE, Evaluation(candidate, measured(23.4567), 0))
    lines = printed(tables.best(record))
    assert "perplexity 23.46; measured on" in lines[1]
    assert f"candidate {candidate.id}, made by the {candidate.provenance.agent}" in lines[2]
    assert lines[-1] == "next: selfpruner export --search night --out DIR"


def test_a_best_of_another_version_is_one_sentence() -> None:
    with pytest.raises(DataError, match="by another version of Self-Pruner; --json shows them"):
        printed(tables.best({"search": "night", "rates": [0.3]}))


def test_a_status_is_one_look_of_the_screen() -> None:
    dead = {"id": "abc", "reason": "crashed", "worker": "host:9", "detail": "it died 3 times"}
    text = "\n".join(printed(status_tables(STATUS.model_copy(update={"dead": (dead,)}))))
    assert "5 measured, 1 failed" in text and "evaluating" in text
    assert "it died 3 times" in text and "host:9" in text


def test_what_is_printed_to_a_file_is_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    name = "[bold]" + "x" * 200
    print_result({}, json_=False, tables=lambda: tables.evaluation(EVALUATED.model_copy(update={"model": name})))
    assert capsys.readouterr().out.splitlines()[0].startswith(name)
