"""Tables 1 to 7 before anything is run: which cell stands where, and the paper's figure beside it. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.paper import numbers
from benchmarks.paper.answers import Figures
from benchmarks.paper.cells import Cell
from benchmarks.paper.making import ABLATIONS, CellMaker
from benchmarks.paper.settings import Method, Model, PaperSettings
from benchmarks.paper.tables import Pick, Wanted, WantedRow, WantedTable

LABELS: dict[Method, str] = {
    "dense": "Dense",
    "llm-pruner": "LLM-Pruner",
    "wanda-sp": "Wanda-sp",
    "wanda-sp-any-heads": "Wanda-sp (any heads)",
    "wanda-sp-sequential": "Wanda-sp (sequential)",
    "owl": "OWL",
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
"""What Tables 1 and 2 of the paper call it. Its Wanda-sp is FLAP's, which scores sequentially; both stand beside it,
and where query heads share KV heads so does the one that may remove any of them."""
Both = tuple[float | None, float | None]
"""Perplexity and accuracy."""
NEITHER: Both = (None, None)


def wanted_tables(settings: PaperSettings) -> list[WantedTable]:
    """The tables that the settings ask for, in order. Raises SettingsError for a search whose settings cannot be."""
    maker = CellMaker(settings)
    makers = {1: _perplexities, 2: _accuracies, 3: _ablations, 4: _llms, 5: _owl, 6: _lora, 7: _speed}
    return [_comparable(makers[number](maker), settings) for number in sorted(set(settings.tables))]


def _comparable(table: WantedTable, settings: PaperSettings) -> WantedTable:
    """Without the paper's figures where they are of another text or of other tasks than ours."""
    others: dict[Pick, bool] = {perplexity: not settings.is_papers_text, accuracy: not settings.are_papers_tasks}

    def shown(wanted: Wanted) -> Wanted:
        return replace(wanted, paper=None) if others.get(wanted.pick, False) else wanted

    return replace(table, rows=tuple((labels, tuple(map(shown, row))) for labels, row in table.rows))


def perplexity(figures: Figures) -> float | None:
    """Of a cell."""
    return figures.perplexity


def accuracy(figures: Figures) -> float | None:
    """Of a cell, in percent."""
    return figures.accuracy


def _perplexities(maker: CellMaker) -> WantedTable:
    return _by_rate(maker, 1, "Perplexity", perplexity, numbers.PERPLEXITY)


def _accuracies(maker: CellMaker) -> WantedTable:
    return _by_rate(maker, 2, "Mean zero-shot accuracy, percent", accuracy, numbers.ACCURACY)


def _by_rate(maker: CellMaker, number: int, title: str, pick: Pick, grid: numbers.Grid) -> WantedTable:
    settings = maker.settings
    columns = [(model, how) for model in settings.models for how in settings.reconstruction]
    make = maker.perplexity if number == 1 else maker.accuracy

    def row(method: Method, rate: float) -> tuple[tuple[str, ...], tuple[Wanted, ...]]:
        wanted = []
        for model, how in columns:
            in_paper = how == "none" or method == "dense"
            paper = numbers.of_grid(grid, model.in_paper, IN_PAPER.get(method), rate) if in_paper else None
            wanted.append(Wanted(make(model, method, rate, how), pick, paper))
        return (percent(rate), LABELS[method]), tuple(wanted)

    rows = [row("dense", 0.0)] if "dense" in settings.methods else []
    rows += [row(method, rate) for rate in settings.rates for method in settings.methods if method != "dense"]
    return WantedTable(
        number,
        title,
        ("Rate", "Method"),
        tuple(model.title if how == "none" else f"{model.title}, {how}" for model, how in columns),
        (2,) * len(columns),
        tuple(rows),
    )


def percent(rate: float) -> str:
    """A rate for people."""
    return f"{100 * rate:g}%"


def _ablations(maker: CellMaker) -> WantedTable:
    rate, rows = maker.settings.ablation_rate, []
    for model in maker.settings.models:
        for label, changes in ABLATIONS.items():
            search = maker.search(
                model, "self-pruner", rate, maker.settings.reconstruction[0], changes, label if changes else ""
            )
            paper = numbers.ABLATION[label] if rate == numbers.ABLATION_RATE else NEITHER
            rows.append(_row(maker, model, (label,), search, paper))
    return _of_models(maker, 3, f"Ablations at {percent(rate)}", ("Method",), rows)


def _llms(maker: CellMaker) -> WantedTable:
    rate, rows = maker.settings.ablation_rate, []
    for model in maker.settings.models:
        rows.append(_dense(maker, model, ("Dense", "0%")))
        for llm in maker.settings.llms:
            search = maker.search(model, "self-pruner", rate, maker.settings.reconstruction[0], llm.set, llm.name)
            paper = numbers.LLMS.get(llm.name, NEITHER) if rate == numbers.ABLATION_RATE else NEITHER
            rows.append(_row(maker, model, (llm.name, percent(rate)), search, paper))
    return _of_models(maker, 4, "Different LLMs", ("LLM", "Rate"), rows)


def _owl(maker: CellMaker) -> WantedTable:
    how, rows = maker.settings.reconstruction[0], []
    methods: tuple[Method, ...] = ("owl", "self-pruner")
    if "self-pruner-best" in maker.settings.methods:
        methods += ("self-pruner-best",)
    for model in maker.settings.models:
        rows.append(_dense(maker, model, ("Dense", "0%")))
        for rate in maker.settings.compared_rates:
            for method in methods:
                cells = maker.perplexity(model, method, rate, how), maker.accuracy(model, method, rate, how)
                paper = numbers.OWL.get(rate, NEITHER) if method == "owl" else _in_grids(model, method, rate)
                rows.append(_row_of(maker, model, (LABELS[method], percent(rate)), cells, paper))
    return _of_models(maker, 5, "Self-Pruner against OWL", ("Method", "Rate"), rows)


def _lora(maker: CellMaker) -> WantedTable:
    how, rows = maker.settings.reconstruction[0], []
    for model in maker.settings.models:
        for rate in maker.settings.compared_rates:
            search = maker.search(model, "self-pruner", rate, how)
            rows.append(
                _row(maker, model, ("Self-Pruner", percent(rate)), search, _in_grids(model, "self-pruner", rate))
            )
            tuned = maker.finetuned(model, rate)
            cells = maker.measured_folder(model, tuned), maker.accuracy_of(model, tuned)
            rows.append(_row_of(maker, model, ("w. LoRA", percent(rate)), cells, numbers.LORA.get(rate, NEITHER)))
    return _of_models(maker, 6, "Recovery by LoRA", ("Method", "Rate"), rows)


SPEED_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("Params (B)", "parameters", 2),
    ("Memory (GiB)", "memory", 2),
    ("Tokens/s", "tokens_per_second", 2),
    ("Speed-up", "speed_up", 2),
)
"""Of Table 7: titles, and where answers.Speed has them."""


def _speed(maker: CellMaker) -> WantedTable:
    rows: list[WantedRow] = []
    for model in maker.settings.models:
        papers = numbers.SPEED.get(model.in_paper or "", {})
        cells = {rate: maker.speed(model, rate) for rate in maker.settings.rates}
        # Each rate is measured beside the dense model.
        dense = tuple(cells.values())
        sources = {0.0: dense, **{rate: (cell,) for rate, cell in cells.items()}} if dense else {}
        for rate, (cell, *others) in sources.items():
            paper = papers.get(rate, (None,) * len(SPEED_COLUMNS))
            wanted = (
                Wanted(cell, _picked(name, dense=not rate), shown, tuple(others))
                for (_, name, _), shown in zip(SPEED_COLUMNS, paper, strict=True)
            )
            rows.append(((model.title, percent(rate)), tuple(wanted)))
    titles, _, digits = zip(*SPEED_COLUMNS, strict=True)
    return WantedTable(7, "Inference speed and memory", ("Model", "Rate"), titles, digits, tuple(rows))


def _picked(name: str, *, dense: bool) -> Pick:
    def pick(figures: Figures) -> float | None:
        speed = figures.dense_speed if dense else figures.speed
        return None if speed is None else float(getattr(speed, name))

    return pick


def _dense(maker: CellMaker, model: Model, labels: tuple[str, ...]) -> WantedRow:
    how = maker.settings.reconstruction[0]
    cells = maker.perplexity(model, "dense", 0.0, how), maker.accuracy(model, "dense", 0.0, how)
    return _row_of(maker, model, labels, cells, _in_grids(model, "dense", 0.0))


def _row(maker: CellMaker, model: Model, labels: tuple[str, ...], search: Cell, paper: Both) -> WantedRow:
    """Of a search."""
    return _row_of(maker, model, labels, (search, maker.accuracy_of(model, search)), paper)


def _row_of(
    maker: CellMaker, model: Model, labels: tuple[str, ...], cells: tuple[Cell, Cell | None], paper: Both
) -> WantedRow:
    """Perplexity, and where tasks are asked accuracy; the paper's only for the model of its Tables 3 to 6."""
    plain = maker.settings.reconstruction[0] == "none" or cells[0].method == "dense"
    shown = paper if plain and model.in_paper == numbers.OF_TABLES_3_TO_6 else NEITHER
    wanted = [Wanted(cells[0], perplexity, shown[0])]
    if cells[1] is not None:
        wanted.append(Wanted(cells[1], accuracy, shown[1]))
    return (model.title, *labels), tuple(wanted)


def _in_grids(model: Model, method: Method, rate: float) -> Both:
    name = IN_PAPER.get(method)
    return (
        numbers.of_grid(numbers.PERPLEXITY, model.in_paper, name, rate),
        numbers.of_grid(numbers.ACCURACY, model.in_paper, name, rate),
    )


def _of_models(
    maker: CellMaker, number: int, title: str, heads: tuple[str, ...], rows: Sequence[WantedRow]
) -> WantedTable:
    columns = ("Perplexity", "Accuracy") if maker.settings.zero_shot else ("Perplexity",)
    return WantedTable(number, title, ("Model", *heads), columns, (2,) * len(columns), tuple(rows))
