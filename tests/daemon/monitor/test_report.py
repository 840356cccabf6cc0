"""The report of searches and its charts."""

import dataclasses
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.population.population import Population
from daemon.monitor.charts import draw_population, draw_progress, draw_rates
from daemon.monitor.drawing import Canvas, Drawing, Scale, shade
from daemon.monitor.record import SearchRecord
from daemon.monitor.report import charts_of, overview, render_report
from daemon.monitor.status import EndpointStatus
from daemon.state.history import History
from protocol.plans.candidate import Candidate, Failed, Measured, Provenance, candidate_id
from tests.support.cli import Cli
from tests.support.samples import PROFILE, SHAPE, SPEC, STATUS, candidates, measured

SENSITIVITY = (0.4, 0.1, 0.1, 0.2)
HOSTILE = "<script>alert(1)</script>\"'&"


def record_of(*values: float, search: str = "s", uniform: float | None = 20.0, endpoint: str = "e") -> SearchRecord:
    """A search with candidates of these perplexities, a failed one, and uniform pruning."""
    population = Population()
    _, *proposed, failed = candidates(len(values) + 2)  # the first one is uniform pruning
    for made, value in zip(proposed, values, strict=True):
        who = made.provenance.model_copy(update={"endpoint": endpoint})
        population.insert(made.model_copy(update={"provenance": who}), measured(value, made))
    population.insert(failed, Failed(reason="timeout", detail=""))
    if uniform is not None:
        plan = SPEC.uniform_plan(SHAPE)
        who = Provenance(agent="baseline", source="allocation", round=0)
        baseline = Candidate(id=candidate_id(plan, SPEC.fingerprint), rates=(0.3,) * 4, plan=plan, provenance=who)
        population.insert(baseline, measured(uniform, baseline))
    ledger = {each.candidate.id: each.candidate for each in population}
    return SearchRecord(search, SPEC, PROFILE, STATUS, History(ledger, population))


class Reader(HTMLParser):
    """What a browser would make of a page: its elements, and addresses that it would ask."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]


def texts_of(drawing: Drawing) -> list[str]:
    """All text of a drawing, which must be well-formed XML."""
    root = ElementTree.fromstring(drawing.svg)
    return [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_progress_is_the_best_so_far_divided_by_uniform() -> None:
    drawing = draw_progress(record_of(18.0, 24.0, 16.0))
    said = texts_of(drawing)
    assert "best 0.8" in said and "uniform 1" in said and "LLM" in said
    assert "perplexity ÷ uniform" in said[0] or any("÷ uniform" in text for text in said)
    without = texts_of(draw_progress(record_of(18.0, 16.0, uniform=None)))
    assert "best 16" in without and not any("÷" in text for text in without)


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        ((0.01, 0.04, 0.6, 0.55), "layer 0, layer 1. Of the 1 most sensitive units, these are among them: layer 0"),
        ((0.55, 0.04, 0.01, 0.6), "among them: none; these are not: layer 0 (55% removed)."),
        ((0.3, 0.3, 0.3, 0.3), "5% or more is removed of every unit"),
    ],
)
def test_it_is_said_which_units_are_kept_and_whether_the_model_is_sensitive_there(
    rates: tuple[float, ...], says: str
) -> None:
    record = record_of(18.0, 16.0)
    best = record.population.best()
    assert best is not None
    object.__setattr__(best.candidate, "rates", rates)
    profile = PROFILE.model_copy(update={"sensitivity": SENSITIVITY})
    assert says in overview(dataclasses.replace(record, profile=profile))["kept"]


def test_several_searches_are_drawn_with_their_names() -> None:
    said = texts_of(draw_progress(record_of(18.0, search="one"), record_of(15.0, 14.0, search="two")))
    assert "one 0.9" in said and "two 0.7" in said


@pytest.mark.parametrize("draw", [draw_progress, draw_rates, draw_population])
def test_a_search_without_candidates_says_so(draw: Callable[[SearchRecord], Drawing]) -> None:
    empty = dataclasses.replace(record_of(uniform=None), history=History())
    assert texts_of(draw(empty)) == ["no candidate has been measured yet"]


def test_each_unit_has_a_bar_of_its_rate_and_one_of_its_sensitivity() -> None:
    record = record_of(18.0, 16.0)
    svg = draw_rates(record).svg
    best = record.population.best()
    assert best is not None
    for layer, (rate, harm) in enumerate(zip(best.candidate.rates, PROFILE.sensitivity, strict=True)):
        assert f"layer {layer}: {rate:.1%} removed" in svg and f"layer {layer}: sensitivity {harm:.4g}" in svg


def test_the_best_candidate_is_the_top_row_of_the_population() -> None:
    record = record_of(18.0, 16.0, 17.0)
    ranked = record.population.top(None)
    rates = sorted(rate for member in ranked for rate in member.candidate.rates)
    highest = rates[int(0.98 * (len(rates) - 1))]
    svg = draw_population(record).svg
    corners = {
        (float(x), float(y)): colour
        for moves, colour in re.findall(r'd="(M[^"]*z)" fill="(#[0-9a-f]{6})"', svg)
        for x, y in re.findall(r"M([0-9.]+) ([0-9.]+)", moves)
    }
    heights = sorted({y for _, y in corners})
    assert len(heights) == 3
    for height, member in zip(heights, ranked, strict=True):
        drawn = [colour for (_, y), colour in sorted(corners.items()) if y == height]
        assert drawn == [shade(min(1.0, rate / highest)) for rate in member.candidate.rates]


def test_what_others_wrote_is_text_and_nothing_is_asked_of_a_network() -> None:
    record = record_of(18.0, search=HOSTILE, endpoint=HOSTILE)
    endpoints = {HOSTILE: EndpointStatus(state="asked", requests=1, errors=0, prompt_tokens=1, completion_tokens=1)}
    hostile = dataclasses.replace(
        record,
        spec=SPEC.model_copy(update={"model": HOSTILE}),
        status=STATUS.model_copy(update={"endpoints": endpoints}),
    )
    text = render_report([hostile, record_of(17.0)])
    assert ">in use<" in text
    page = Reader(text)
    assert "script" not in page.elements and page.addresses == []
    assert {"svg", "table", "details"} <= page.elements
    assert all(ElementTree.fromstring(drawing.svg) is not None for drawing in charts_of([hostile]).values())


def test_a_report_says_what_was_gained() -> None:
    page = render_report([record_of(18.0, 16.0)])
    assert "perplexity 16.00 (lower is better), 0.800 times that of uniform pruning" in page
    assert "selfpruner export --search s" in page
    assert "no candidate has been measured yet" in render_report([record_of()])


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 12))
def test_ticks_are_round_and_within_the_range(low: float, span: float, about: int) -> None:
    scale = Scale(low, low + span, 0, 100)
    ticks = scale.ticks(about)
    assert len(ticks) <= about + 1
    assert all(low - span * 1e-6 <= tick <= scale.high + span * 1e-6 for tick in ticks)
    assert 0 <= scale(low - 1) <= scale(low + span / 2) <= scale(low + 2 * span) <= 100


@given(st.floats(-1, 2))
def test_every_share_has_a_colour(share: float) -> None:
    assert re.fullmatch(r"#[0-9a-f]{6}", shade(share))


def test_a_drawing_is_written_as_svg_or_png(tmp_path: Path) -> None:
    canvas = Canvas(40, 20, "a title", "what it shows")
    canvas.text(2, 12, "a < b")
    drawing = canvas.drawing()
    assert ElementTree.fromstring(drawing.save(tmp_path / "d.svg").read_text()) is not None
    assert drawing.save(tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    assert drawing._repr_svg_() == (tmp_path / "d.svg").read_text() == drawing.on_white


def test_thousands_of_candidates_make_a_page_of_moderate_size() -> None:
    population = Population()
    for i in range(5000):
        made = candidates(1)[0].model_copy(update={"id": f"{i:016x}"})
        population.insert(made, Measured.model_validate(measured(20 + i % 97).model_dump()))
    record = dataclasses.replace(record_of(), history=History({}, population))
    assert len(render_report([record])) < 500_000


def test_mistakes_of_the_command_are_one_sentence(cli: Cli, tmp_path: Path) -> None:
    assert "--out FILE.html" in cli.error("report", "--folder", tmp_path)
    assert "there is no search 'none'" in cli.error(
        "report", "--folder", tmp_path, "--search", "none", "--out", tmp_path / "r.html"
    )
    (tmp_path / "begun").mkdir()
    assert "there is no search in the folder" in cli.error(
        "report", "--folder", tmp_path, "--search", "begun", "--out", tmp_path / "r.html"
    )
    assert not (tmp_path / "r.html").exists()
