"""The layouts of Tables 1 to 7: the cell of each entry, and the paper's figure beside it. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.paper import paper_figures
from benchmarks.paper.answers import Figures
from benchmarks.paper.cell_maker import ABLATIONS, CellMaker
from benchmarks.paper.cells import Cell
from benchmarks.paper.settings import Method, Model, PaperSettings
from benchmarks.paper.tables import EntryLayout, FigureGetter, RowLayout, TableLayout

LABELS: dict[Method, str] = {
    "dense": "Dense",
    "llm-pruner": "LLM-Pruner",
    "wanda-sp": "Wanda-sp",
    "wanda-sp-any-heads": "Wanda-sp (any heads)",
    "wanda-sp-sequential": "Wanda-sp (sequential)",
    "owl": "OWL",
    "mip": "MIP",
    "self-pruner": "Self-Pruner",
    "self-pruner-best": "Self-Pruner (best)",
}
IN_PAPER: dict[Method, str] = {
    "dense": "Dense",
    "llm-pruner": "LLM-Pruner",
    "wanda-sp": "Wanda-sp",
    "wanda-sp-any-heads": "Wanda-sp",
    "wanda-sp-sequential": "Wanda-sp",
    "self-pruner": "Self-Pruner",
}
"""Names in Tables 1 and 2 of the paper. Its Wanda-sp is FLAP's, which scores sequentially. All our variants of Wanda-sp
are compared with it."""
PaperFigures = tuple[float | None, float | None]
"""Perplexity and accuracy."""
NO_FIGURES: PaperFigures = (None, None)


def table_layouts(settings: PaperSettings) -> list[TableLayout]:
    """Return the requested tables, in order. Raises SettingsError for a search with invalid settings."""
    maker = CellMaker(settings)
    makers = {1: _perplexities, 2: _accuracies, 3: _ablations, 4: _llms, 5: _owl, 6: _lora, 7: _speed}
    return [_without_incomparable(makers[number](maker), settings) for number in sorted(set(settings.tables))]


def _without_incomparable(table: TableLayout, settings: PaperSettings) -> TableLayout:
    """Remove the paper's perplexities if our text differs from the paper's, and its accuracies if our tasks differ."""
    is_incomparable: dict[FigureGetter, bool] = {
        perplexity: not settings.is_papers_text,
        accuracy: not settings.are_papers_tasks,
    }

    def shown(entry: EntryLayout) -> EntryLayout:
        return replace(entry, paper=None) if is_incomparable.get(entry.get_figure, False) else entry

    return replace(table, rows=tuple((labels, tuple(map(shown, row))) for labels, row in table.rows))


def perplexity(figures: Figures) -> float | None:
    """Return the perplexity of a cell."""
    return figures.perplexity


def accuracy(figures: Figures) -> float | None:
    """Return the mean accuracy of a cell, in percent."""
    return figures.accuracy


def _perplexities(maker: CellMaker) -> TableLayout:
    return _by_rate(maker, 1, "Perplexity", perplexity, paper_figures.PERPLEXITY)


def _accuracies(maker: CellMaker) -> TableLayout:
    return _by_rate(maker, 2, "Mean zero-shot accuracy, percent", accuracy, paper_figures.ACCURACY)


def _by_rate(
    maker: CellMaker, number: int, title: str, get_figure: FigureGetter, grid: paper_figures.Grid
) -> TableLayout:
    settings = maker.settings
    columns = [(model, how) for model in settings.models for how in settings.reconstruction]
    make = maker.perplexity if number == 1 else maker.accuracy

    def row(method: Method, rate: float) -> tuple[tuple[str, ...], tuple[EntryLayout, ...]]:
        entries = []
        for model, how in columns:
            in_paper = how == "none" or method == "dense"
            paper = paper_figures.figure_in(grid, model.in_paper, IN_PAPER.get(method), rate) if in_paper else None
            entries.append(EntryLayout(make(model, method, rate, how), get_figure, paper))
        return (percent(rate), LABELS[method]), tuple(entries)

    rows = [row("dense", 0.0)] if "dense" in settings.methods else []
    rows += [row(method, rate) for rate in settings.rates for method in settings.methods if method != "dense"]
    return TableLayout(
        number,
        title,
        ("Rate", "Method"),
        tuple(model.title if how == "none" else f"{model.title}, {how}" for model, how in columns),
        (2,) * len(columns),
        tuple(rows),
    )


def percent(rate: float) -> str:
    """Return a rate as text in percent."""
    return f"{100 * rate:g}%"


def _ablations(maker: CellMaker) -> TableLayout:
    rate, rows = maker.settings.ablation_rate, []
    for model in maker.settings.models:
        for label, changes in ABLATIONS.items():
            search = maker.search(
                model, "self-pruner", rate, maker.settings.reconstruction[0], changes, label if changes else ""
            )
            paper = paper_figures.ABLATION[label] if rate == paper_figures.ABLATION_RATE else NO_FIGURES
            rows.append(_row(maker, model, (label,), search, paper))
    return _of_models(maker, 3, f"Ablations at {percent(rate)}", ("Method",), rows)


def _llms(maker: CellMaker) -> TableLayout:
    rate, rows = maker.settings.ablation_rate, []
    for model in maker.settings.models:
        rows.append(_dense(maker, model, ("Dense", "0%")))
        for llm in maker.settings.llms:
            search = maker.search(model, "self-pruner", rate, maker.settings.reconstruction[0], llm.set, llm.name)
            paper = paper_figures.LLMS.get(llm.name, NO_FIGURES) if rate == paper_figures.ABLATION_RATE else NO_FIGURES
            rows.append(_row(maker, model, (llm.name, percent(rate)), search, paper))
    return _of_models(maker, 4, "Different LLMs", ("LLM", "Rate"), rows)


def _owl(maker: CellMaker) -> TableLayout:
    how, rows = maker.settings.reconstruction[0], []
    methods: tuple[Method, ...] = ("owl", "self-pruner")
    if "self-pruner-best" in maker.settings.methods:
        methods += ("self-pruner-best",)
    for model in maker.settings.models:
        rows.append(_dense(maker, model, ("Dense", "0%")))
        for rate in maker.settings.compared_rates:
            for method in methods:
                cells = maker.perplexity(model, method, rate, how), maker.accuracy(model, method, rate, how)
                paper = (
                    paper_figures.OWL.get(rate, NO_FIGURES) if method == "owl" else _grid_figures(model, method, rate)
                )
                rows.append(_row_of(maker, model, (LABELS[method], percent(rate)), cells, paper))
    return _of_models(maker, 5, "Self-Pruner against OWL", ("Method", "Rate"), rows)


def _lora(maker: CellMaker) -> TableLayout:
    how, rows = maker.settings.reconstruction[0], []
    for model in maker.settings.models:
        for rate in maker.settings.compared_rates:
            search = maker.search(model, "self-pruner", rate, how)
            rows.append(
                _row(maker, model, ("Self-Pruner", percent(rate)), search, _grid_figures(model, "self-pruner", rate))
            )
            kinds = {"w. LoRA": False} | ({"w. LoRA, distilled": True} if maker.settings.finetune.distil else {})
            for label, distils in kinds.items():
                tuned = maker.finetuned(model, rate, distils=distils)
                cells = maker.measured_folder(model, tuned), maker.accuracy_of(model, tuned)
                paper = NO_FIGURES if distils else paper_figures.LORA.get(rate, NO_FIGURES)
                rows.append(_row_of(maker, model, (label, percent(rate)), cells, paper))
    return _of_models(maker, 6, "Recovery by LoRA", ("Method", "Rate"), rows)


SPEED_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("Params (B)", "parameters", 2),
    ("Memory (GiB)", "memory", 2),
    ("Tokens/s", "tokens_per_second", 2),
    ("Speed-up", "speed_up", 2),
)
"""Columns of Table 7: title, field of answers.Speed, decimals."""


def _speed(maker: CellMaker) -> TableLayout:
    rows: list[RowLayout] = []
    for model in maker.settings.models:
        papers = paper_figures.SPEED.get(model.in_paper or "", {})
        cells = {rate: maker.speed(model, rate) for rate in maker.settings.rates}
        # The cell of each rate measures the dense model too.
        dense = tuple(cells.values())
        sources = {0.0: dense, **{rate: (cell,) for rate, cell in cells.items()}} if dense else {}
        for rate, (cell, *others) in sources.items():
            paper = papers.get(rate, (None,) * len(SPEED_COLUMNS))
            entries = (
                EntryLayout(cell, _speed_getter(name, dense=not rate), shown, tuple(others))
                for (_, name, _), shown in zip(SPEED_COLUMNS, paper, strict=True)
            )
            rows.append(((model.title, percent(rate)), tuple(entries)))
    titles, _, digits = zip(*SPEED_COLUMNS, strict=True)
    return TableLayout(7, "Inference speed and memory", ("Model", "Rate"), titles, digits, tuple(rows))


def _speed_getter(name: str, *, dense: bool) -> FigureGetter:
    def get_figure(figures: Figures) -> float | None:
        speed = figures.dense_speed if dense else figures.speed
        return None if speed is None else float(getattr(speed, name))

    return get_figure


def _dense(maker: CellMaker, model: Model, labels: tuple[str, ...]) -> RowLayout:
    how = maker.settings.reconstruction[0]
    cells = maker.perplexity(model, "dense", 0.0, how), maker.accuracy(model, "dense", 0.0, how)
    return _row_of(maker, model, labels, cells, _grid_figures(model, "dense", 0.0))


def _row(maker: CellMaker, model: Model, labels: tuple[str, ...], search: Cell, paper: PaperFigures) -> RowLayout:
    """Return the row of a search."""
    return _row_of(maker, model, labels, (search, maker.accuracy_of(model, search)), paper)


def _row_of(
    maker: CellMaker, model: Model, labels: tuple[str, ...], cells: tuple[Cell, Cell | None], paper: PaperFigures
) -> RowLayout:
    """Return a row with perplexity, and with accuracy if tasks are run.

    The paper's figures are shown only for the model that the paper used.
    """
    plain = maker.settings.reconstruction[0] == "none" or cells[0].method == "dense"
    shown = paper if plain and model.in_paper == paper_figures.OF_TABLES_3_TO_6 else NO_FIGURES
    entries = [EntryLayout(cells[0], perplexity, shown[0])]
    if cells[1] is not None:
        entries.append(EntryLayout(cells[1], accuracy, shown[1]))
    return (model.title, *labels), tuple(entries)


def _grid_figures(model: Model, method: Method, rate: float) -> PaperFigures:
    name = IN_PAPER.get(method)
    return (
        paper_figures.figure_in(paper_figures.PERPLEXITY, model.in_paper, name, rate),
        paper_figures.figure_in(paper_figures.ACCURACY, model.in_paper, name, rate),
    )


def _of_models(
    maker: CellMaker, number: int, title: str, heads: tuple[str, ...], rows: Sequence[RowLayout]
) -> TableLayout:
    columns = ("Perplexity", "Accuracy") if maker.settings.zero_shot else ("Perplexity",)
    return TableLayout(number, title, ("Model", *heads), columns, (2,) * len(columns), tuple(rows))
