import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from gpu_worker.export.card import render_card
from gpu_worker.export.export import _on_same_tokens
from gpu_worker.export.facts import ExportFacts, TextPerplexity, read_facts, version_of_selfpruner, without_folders
from gpu_worker.export.writer import ExportContent, export_model
from protocol.results.commands import GgufPerplexity, SearchSummary
from protocol.results.finetuning import Finetuning, Recipe
from protocol.results.formats import Destination, Format, Formats
from tests.support.exports import UNEVEN, export, facts_of, pruned
from tests.support.samples import PROFILE
from tests.support.tiny_models import tiny_model

MODEL = tiny_model("llama")

FINETUNED = Finetuning.model_validate(
    {"recipe": Recipe(), "data": "a.txt", "form": "text", "first_loss": 2.0, "last_loss": 1.0}
    | dict.fromkeys(("examples", "steps", "tokens", "trained_parameters"), 1)
)


def card(fmt: Format | Formats = "hf", **changes: Any) -> str:
    formats: Formats = (fmt,) if isinstance(fmt, str) else fmt
    return render_card(facts_of(MODEL, **changes), formats, name="out", gguf="out.gguf" if "gguf" in formats else None)


def front_matter(text: str) -> dict[str, Any]:
    _, header, _ = text.split("---\n", 2)
    parsed: dict[str, Any] = yaml.safe_load(header)
    return parsed


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n\n")[2].partition("\n## ")[0].strip()


def test_the_hub_reads_where_the_model_comes_from() -> None:
    assert front_matter(card()) == {
        "base_model": "someone/some-model",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["self-pruner", "structured-pruning", "pruned"],
    }
    assert front_matter(card("gguf"))["library_name"] == "gguf"
    assert "# someone/some-model, pruned by 49.5 %" in card()


@pytest.mark.parametrize(
    ("model", "named"), [("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("some/tiny.gguf", None)]
)
def test_a_model_is_called_what_the_hub_calls_it(model: str, named: str | None) -> None:
    assert front_matter(card(base_model=model)).get("base_model") == named


def test_a_folder_is_no_name_on_the_hub_and_its_place_is_not_told(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    text = card(base_model=str(folder))
    assert "base_model" not in front_matter(text)
    assert "# my-model, pruned by 49.5 %" in text and str(tmp_path) not in text


def test_names_have_no_meaning_in_markdown_html_or_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / "ev<script>\x1b[31m\n# H\n---\nlicense: x|[y](z)"
    folder.mkdir()
    text = render_card(facts_of(MODEL, base_model=str(folder)), ("gguf",), name="my model", gguf="a;b.gguf")
    assert (
        "<script>" not in text and "\x1b" not in text and "\n# H" not in text and "license: x" not in front_matter(text)
    )
    assert r"# ev&lt;script&gt;?\[31m?# H?---?license: x\|\[y\](z), pruned by" in text
    assert "llama-cli -m 'my model/a;b.gguf' -p" in text


def test_parameters_are_told_before_and_after() -> None:
    shape = MODEL.decoder.shape
    before, after = shape.decoder_parameters, UNEVEN.decoder_parameters(shape)
    assert f"| decoder parameters | {before:,} | {after:,} |" in card()
    total = shape.total_parameters
    assert f"| total parameters | {total:,} | {total - before + after:,} |" in card()


def test_every_layer_is_told() -> None:
    why, more, empty, *table = section(card(), "Layers").splitlines()
    assert "Heads are removed as a whole" in why and "can differ from its rate" in more and not empty
    assert table == [
        "| layer | rate | query heads | KV heads | MLP width |",
        "| ---: | ---: | ---: | ---: | ---: |",
        "| 0 | 0.3 | 2 of 6 | 2 of 3 | 20 of 48 |",
        "| 1 | 0.3 | 3 of 6 | 3 of 3 | 48 of 48 |",
        "| 2 | 0.3 | 2 of 6 | 1 of 3 | 7 of 48 |",
    ]


def test_rates_of_blocks_are_told_apart() -> None:
    spec = facts_of(MODEL).spec.model_copy(update={"granularity": "block"})
    lines = section(card(spec=spec, rates=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)), "Layers").splitlines()[3:]
    assert lines[0] == "| layer | attention rate | MLP rate | query heads | KV heads | MLP width |"
    assert lines[3] == "| 1 | 0.3 | 0.4 | 3 of 6 | 3 of 3 | 48 of 48 |"


def test_perplexities_are_told_with_text_tokens_and_window() -> None:
    report = TextPerplexity(perplexity=101.26, tokens=999)
    lines = section(card(pruned_report=report), "Evaluation").splitlines()
    assert lines[4:6] == [
        "| wikitext2 (fitness) | 4,088 | 512 | 12.35 | 23.46 |",
        "| self (report) | 999 | 1024 | not measured | 101.3 |",
    ]


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("self", "selfpruner evaluate out"),
        ("wikitext2", "selfpruner evaluate out"),
        ("/home/me/my notes.txt", "selfpruner evaluate out --data 'my notes.txt'"),
    ],
)
def test_the_command_that_measures_again_is_told(source: str, command: str) -> None:
    spec = facts_of(MODEL).spec
    spec = spec.model_copy(update={"fitness": spec.fitness.model_copy(update={"source": source})})
    assert f"`{command}` measures the same tokens again." in card(spec=spec)
    assert "selfpruner evaluate" not in card("gguf", spec=spec)


def test_a_search_is_told_with_what_it_is_compared_with() -> None:
    text = card(
        searched=SearchSummary(evaluations=1200, seconds=60.4, uniform_perplexity=30.5, uniform_report_perplexity=None)
    )
    assert "| dense | uniform, rectangular | pruned |" in text and "| 12.35 | 30.5 | 23.46 |" in text
    assert "1,200 evaluations in 60 s, one search with seed 0\n- Granularity" in text
    assert "uniform, " not in card()


def test_charts_lie_beside_the_card_and_are_read_with_the_facts(tmp_path: Path) -> None:
    charts = {"search.svg": "<svg>progress</svg>", "rates.svg": "<svg>rates</svg>"}
    searched = SearchSummary(
        evaluations=8, seconds=60.0, uniform_perplexity=54.0, uniform_report_perplexity=None, charts=charts
    )
    content = ExportContent(pruned(tiny_model("llama")), facts_of(MODEL, searched=searched))
    export_model(content, Destination(tmp_path / "out", ("padded",)))
    assert {name: (tmp_path / "out" / name).read_text() for name in charts} == charts
    assert "<svg>" not in (tmp_path / "out" / "selfpruner.json").read_text()
    facts = read_facts(tmp_path / "out")
    assert facts.searched == searched
    text = render_card(facts, ("padded",), name="out")
    assert "](search.svg)" in section(text, "Pruning") and "](rates.svg)" in section(text, "Pruning")
    assert "\n\n\n" not in text
    (tmp_path / "out" / "search.svg").write_bytes(b"\xff\xfe")  # no text
    (tmp_path / "out" / "rates.svg").unlink()
    (tmp_path / "out" / "rates.svg").symlink_to(tmp_path / "out" / "README.md")  # a link may lead to a private file
    unreadable = read_facts(tmp_path / "out").searched
    assert unreadable is not None and unreadable.charts == {}
    assert ".svg" not in card(searched=searched.model_copy(update={"charts": {}}))


@pytest.mark.parametrize(("dense", "kept"), [(10.0, 54.0), (10.005, 54.0), (10.1, None), (None, None)])
def test_uniform_pruning_is_told_only_if_it_was_measured_on_the_same_tokens(
    dense: float | None, kept: float | None
) -> None:
    searched = SearchSummary(
        evaluations=8, seconds=60.0, uniform_perplexity=54.0, uniform_report_perplexity=60.0, dense_perplexity=dense
    )
    found = _on_same_tokens(searched, PROFILE)
    assert (found.uniform_perplexity, found.uniform_report_perplexity) == (kept, None)


def test_the_card_says_whether_uniform_pruning_was_fitted_and_that_nobody_fine_tuned_it() -> None:
    searched = SearchSummary(evaluations=12, seconds=6, uniform_perplexity=30.5, uniform_report_perplexity=None)
    spec = facts_of(MODEL).spec.model_copy(update={"reconstruction": "least-squares"})
    text = card(spec=spec, searched=searched)
    assert "| dense | uniform, fitted | pruned |" in text
    assert "0.769 of that of uniform pruning, with the same reconstruction and number of parameters" in text.replace(
        "\n", " "
    )
    rectangular = card(searched=searched).replace("\n", " ")
    assert (
        "0.769 of that of uniform pruning, which is rectangular and without reconstruction: a weak baseline"
        in rectangular
    )
    tuned = card(spec=spec, searched=searched, finetunings=(FINETUNED,))
    assert "| uniform, fitted, not fine-tuned | pruned and fine-tuned |" in tuned and "0.769" not in tuned


def test_how_it_was_pruned_is_told() -> None:
    text = section(card(method="search quickstart"), "Pruning")
    assert "- Pruning rate β: 0.3 " in text
    assert "- Rates from: search quickstart" in text
    assert "- Importance: wanda-sp" in text
    assert f"- Made with: Self-Pruner {version_of_selfpruner()}" in text


@pytest.mark.parametrize(
    ("fmt", "wanted"),
    [
        ("hf", ['from_pretrained("out", trust_remote_code=True)', "modeling_pruned_llama.py", "vllm serve out --"]),
        ("padded", ['AutoModelForCausalLM.from_pretrained("out")', "as large and as slow as the dense one"]),
        ("gguf", ["llama-cli -m out/out.gguf"]),
    ],
)
def test_each_format_says_how_to_load_it(fmt: Format, wanted: list[str]) -> None:
    text = card(fmt)
    assert all(words in text for words in wanted)
    assert ("trust_remote_code" in text) == (fmt == "hf")


WITH_KL = {"pruned": TextPerplexity(perplexity=23.4567, tokens=4088, kl=1.25)}
IN_LLAMA_CPP = {"gguf": GgufPerplexity(file_type="f16", perplexity=23.5, in_memory=23.4, tokens=2044)}


@pytest.mark.parametrize(
    "changes", [{}, WITH_KL, IN_LLAMA_CPP, WITH_KL | IN_LLAMA_CPP, {"dense": None, "pruned": None}]
)
@pytest.mark.parametrize("fmt", ["hf", "padded", "gguf"])
def test_tables_and_blocks_are_set_apart_by_single_empty_lines(fmt: Format, changes: Any) -> None:
    text = card(fmt, **changes)
    assert "\n\n\n" not in text and "|\n#" not in text and "```\n#" not in text
    assert all(len(line) < 160 and line == line.rstrip() for line in text.splitlines())


def test_facts_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValidationError, match="2 rates for 3 units"):
        facts_of(MODEL, rates=(0.3, 0.3))
    with pytest.raises(ValidationError, match="a plan for 1 layers of 3"):
        facts_of(MODEL, plan=UNEVEN.model_copy(update={"layers": UNEVEN.layers[:1]}))


def test_a_program_reads_the_same_facts_from_the_folder(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = export(pruned(model), "padded", tmp_path / "out")
    written = json.loads((folder / "selfpruner.json").read_text())
    assert written.pop("selfpruner") == version_of_selfpruner()
    assert written.pop("format") == "padded" and written.pop("formats") == ["padded"]
    assert written.pop("parameters")["decoder_after"] == UNEVEN.decoder_parameters(model.decoder.shape)
    facts = facts_of(model)
    assert ExportFacts.model_validate(written) == facts.model_copy(update={"spec": without_folders(facts.spec)})
    assert "/home/" not in (folder / "selfpruner.json").read_text()
    assert (folder / "README.md").read_text() == render_card(facts_of(model), ("padded",), name="out")


@pytest.mark.parametrize(
    ("changes", "of_spec", "told"),
    [
        ({}, {}, "scored on notes.txt, 16 windows of 512 tokens (scoring: dense)"),
        ({}, {"importance": "magnitude"}, "- Importance: magnitude\n"),
        ({}, {"importance": "taylor"}, "gradients of the first 64 tokens of up to 10 windows of notes.txt"),
        ({}, {"reconstruction": "least-squares"}, "fitted by least squares"),
        (WITH_KL, {}, "\nOn the fitness text, the KL divergence from the dense model is 1.25 nats per token"),
        ({"dense": None, "pruned": None}, {}, "## Evaluation\n\nThe perplexity was not measured.\n"),
    ],
    ids=["scored", "magnitude", "taylor", "fitted", "divergence", "not measured"],
)
def test_what_was_done_is_told_and_no_more(changes: dict[str, Any], of_spec: dict[str, str], told: str) -> None:
    text = card(spec=facts_of(MODEL).spec.model_copy(update=of_spec), **changes)
    assert told in text and "/home/" not in text
    assert ("fitted" in text) == ("reconstruction" in of_spec) and ("KL" in text) == (changes is WITH_KL)
