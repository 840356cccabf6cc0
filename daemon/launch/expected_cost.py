"""How long a search takes and what it costs, by arithmetic: floating-point operations, tokens, prices.

Each figure is a range. A GPU reaches between a quarter and six tenths of its peak in matrix products of this size, and
a search asks again for some replies.
"""

from dataclasses import dataclass
from urllib.parse import urlsplit

from agents.llm.endpoint import LOOPBACK
from daemon.monitor.watch_screen import unit_of_time
from daemon.search.rehearsal import Questions
from daemon.settings.settings import Settings
from protocol.plans.shape import ModelShape
from protocol.plans.spec import Role, SearchSpec, TextSpec
from protocol.results.needs import PREWRITTEN_LENGTH, PREWRITTEN_WINDOWS, SENSITIVITY_TOKENS, DeviceSpeed, Needs
from protocol.runtime.paths import SMOLLM2

SHARES_OF_PEAK = (0.6, 0.4, 0.25)
"""Best, expected and worst share of a data sheet's peak that an evaluation reaches."""
SHARES_OF_MEASURED = (0.9, 0.75, 0.5)
"""The same of a matrix product measured on the same device: on CPUs, evaluations take 1.2 to 1.4 times the time of
their matrix products."""
ASKED_AGAIN = (1.0, 1.15, 1.6)
"""Questions for each planned question: least, expected and most."""
REPLY_LENGTH = (0.5, 0.8, 4.0)
"""Tokens of a reply divided by those that its form needs; models that reason first take the most."""
TOKENS_PER_SECOND = (120.0, 60.0, 15.0)
"""How fast an endpoint that was not asked writes its replies."""
TOKENS_OF_TEXTS: dict[tuple[str, Role], int] = {("wikitext2", "fitness"): 270_000, ("wikitext2", "report"): 335_000}
"""About as many tokens as whole splits have, for texts that cannot be read here."""
UNKNOWN_TOKENS = 300_000
SHARES_OF_MEMORY = (0.8, 0.5, 0.25)
"""The same of the speed of memory, while text is written."""
HOUR = 1 / 3600


@dataclass(frozen=True)
class Range:
    """Least, expected and most."""

    least: float
    expected: float
    most: float

    def __add__(self, other: "Range") -> "Range":
        return Range(self.least + other.least, self.expected + other.expected, self.most + other.most)

    def __mul__(self, factor: float) -> "Range":
        return Range(self.least * factor, self.expected * factor, self.most * factor)

    @property
    def values(self) -> dict[str, float]:
        """Return the range for JSON, with three digits."""
        return {name: float(f"{value:.3g}") for name, value in vars(self).items()}


@dataclass(frozen=True)
class Cost:
    """What a search takes."""

    evaluations: int
    seconds_per_evaluation: Range
    preparation_hours: Range
    hours: Range
    questions: Range
    prompt_tokens: Range
    reply_tokens: Range
    money: Range | None
    """In the currency of the endpoint's prices; None if no price is known."""
    arithmetic: tuple[str, ...]
    """How the figures came about, line by line."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of an evaluation, and of the preparation."""

    per_token: float
    tokens: int
    evaluation: float
    solving: float
    preparation: float
    products: float
    """The part of the preparation that least squares needs: products of inputs, in fp32."""
    writing: float
    """The operations of writing the model's own text, which `preparation` does not count."""
    read: float
    """Bytes of weights that writing it reads."""

    @classmethod
    def of(cls, spec: SearchSpec, needs: Needs) -> "Work":
        """Return the work of a search with this spec; `needs.shape` is known."""
        shape = needs.shape
        assert shape is not None
        tokens = {role: tokens_of(role, text, needs) for role, text in spec.texts.items()}
        decoder = 2 * shape.decoder_parameters + _attention(shape, spec.fitness.seqlen)
        whole = decoder + 2 * needs.head_parameters
        kept = 1 - spec.rate
        widths = [n for layer in shape.layers for n in (layer.query_heads * shape.head_dim, layer.mlp_channels)]
        fitted = spec.reconstruction == "least-squares"
        units = len(shape.units(spec.granularity))
        report = 5 * tokens.get("report", 0) * whole  # dense, uniform, best allocation, best rule and best
        own = [text for text in spec.texts.values() if text.source == "self"]
        if spec.model == SMOLLM2 and _is_prewritten(own):
            own = []
        steps = -(-sum(text.windows or 0 for text in own) // needs.texts_together) * spec.fitness.seqlen
        return cls(
            per_token=kept * decoder + 2 * needs.head_parameters,
            tokens=tokens["fitness"],
            evaluation=tokens["fitness"] * (kept * decoder + 2 * needs.head_parameters),
            solving=sum((kept * n) ** 2 * shape.hidden_size for n in widths) if fitted else 0.0,
            preparation=tokens["calibration"] * decoder
            + tokens["fitness"] * whole
            + report
            + units * SENSITIVITY_TOKENS * (decoder / 2 + 2 * needs.head_parameters),
            products=sum(tokens["calibration"] * n * n for n in widths) if fitted else 0.0,
            writing=sum((text.windows or 0) * text.seqlen for text in own) * whole,
            read=steps * needs.weight_bytes,
        )


def _is_prewritten(texts: list[TextSpec]) -> bool:
    """Return whether texts of `smollm2` are in the package and need not be written."""
    windows, longest = sum(text.windows or 0 for text in texts), max((text.seqlen for text in texts), default=0)
    return windows <= PREWRITTEN_WINDOWS and longest <= PREWRITTEN_LENGTH


def tokens_of(role: Role, text: TextSpec, needs: Needs) -> int:
    """Return the tokens of a text: as read, as the settings say, or about as many as it has."""
    windows = needs.windows.get(role) or text.windows
    if windows is not None:
        return windows * text.seqlen
    return TOKENS_OF_TEXTS.get((text.source, role), UNKNOWN_TOKENS)


def _attention(shape: ModelShape, seqlen: int) -> float:
    """Return the operations per token of attention scores and their sums, over half of the window on average."""
    return sum(2 * seqlen * layer.query_heads * shape.head_dim for layer in shape.layers)


@dataclass(frozen=True)
class _Asking:
    """What asking the LLM takes in a whole search."""

    questions: Range
    prompt_tokens: Range
    reply_tokens: Range
    seconds: Range
    lines: tuple[str, ...]

    @classmethod
    def of(cls, questions: Questions, settings: Settings, rounds: float, seconds: float | None) -> "_Asking":
        """Return the sums over all rounds; `seconds` is what one question took, if one was asked."""
        total, at_once = questions.total(rounds), settings.llm.concurrency
        asked, prompt = (
            Range(*(amount * again for again in ASKED_AGAIN)) for amount in (total.questions, total.prompt_tokens)
        )
        lengths = zip(ASKED_AGAIN, REPLY_LENGTH, strict=True)
        reply = Range(*(total.reply_tokens * again * length for again, length in lengths))
        one = _question(seconds, reply * (1 / max(1.0, total.questions)))
        selects = float(settings.search.selector == "llm" and settings.search.proposer == "llm")
        breeding = max(0.0, questions.each_round - selects)
        each_round = selects + (max(1.0, breeding / at_once) if breeding else 0.0)
        turns = -(-questions.first // at_once) + rounds * each_round
        waiting = one * turns
        lines = (
            f"LLM: {total.questions:,.0f} questions, {asked.expected:,.0f} with those asked again; "
            f"{prompt.expected:,.0f} tokens of prompts and {reply.expected:,.0f} of replies",
            f"waiting for the LLM: {turns:,.0f} turns of up to {at_once} questions, {_time(one)} each"
            f"{'' if seconds else ' (assumed)'}: {_time(waiting)}",
        )
        return cls(asked, prompt, reply, waiting, lines)


NOT_ASKED = _Asking(*(Range(0, 0, 0),) * 4, ())


def expected_cost(
    settings: Settings, needs: Needs, speed: DeviceSpeed, questions: Questions | None, seconds: float | None = None
) -> Cost:
    """Return what the search of `settings` takes on a device of this `speed`.

    `questions` is None if no LLM is asked. `seconds` is what one question took, if an endpoint was asked.
    """
    search, workers = settings.search, max(1, settings.worker.count)
    work = Work.of(settings.spec(), needs)
    shares = SHARES_OF_MEASURED if speed.is_measured else SHARES_OF_PEAK
    multiplying, solving, preparing, products, computing = (
        Range(*(amount / (rate * share) for share in shares))
        for amount, rate in (
            (work.evaluation, speed.multiply),
            (work.solving, speed.solve),
            (work.preparation, speed.multiply),
            (work.products, speed.solve),
            (work.writing, speed.multiply),
        )
    )
    reading = Range(*(work.read / (speed.read * share) for share in SHARES_OF_MEMORY))
    writing = Range(*map(max, vars(computing).values(), vars(reading).values()))
    prepared, evaluation = preparing + products + writing, multiplying + solving
    measuring = evaluation * ((search.planned + 1) / workers)
    rounds = (search.planned - search.population) / max(1, search.mutations + search.crossovers)
    asking = NOT_ASKED if questions is None else _Asking.of(questions, settings, rounds, seconds)
    whole = prepared + measuring + asking.seconds
    money, price = _money(settings, asking)
    lines = [
        f"evaluation: {work.tokens:,} tokens × {_flop(work.per_token)} = {_flop(work.evaluation)}, at {shares[1]:.0%} "
        f"({shares[2]:.0%} to {shares[0]:.0%}) of {_flop(speed.multiply)}/s {_how(speed)}: {_time(multiplying)}",
        f"least squares: {_flop(work.solving)} in fp32 at {_flop(speed.solve)}/s: {_time(solving)} more",
        f"preparation: {_flop(work.preparation)}, once per model and text: {_time(preparing)}",
        f"products for least squares: {_flop(work.products)} in fp32, once: {_time(products)}",
        f"writing text: {_flop(work.writing)} ({_time(computing)}), or reading {work.read / 1e12:,.3g} TB of weights "
        f"at {speed.read / 1e12:,.3g} TB/s ({_time(reading)}), whichever takes longer",
        f"measuring: {search.planned} candidates and uniform pruning, "
        f"{workers} worker{'s' * (workers > 1)}: {_time(measuring)}",
        *([] if questions is None else [_proposers(settings)]),
        *asking.lines,
        f"together: {_time(whole)}",
        *price,
    ]
    left_out = [
        name
        for name, amount in (("least", work.solving), ("products", work.products), ("writing", work.read))
        if not amount
    ]
    return Cost(
        evaluations=search.planned + 1,
        seconds_per_evaluation=evaluation,
        preparation_hours=prepared * HOUR,
        hours=whole * HOUR,
        questions=asking.questions,
        prompt_tokens=asking.prompt_tokens,
        reply_tokens=asking.reply_tokens,
        money=money,
        arithmetic=tuple(line for line in lines if line.split()[0] not in left_out),
    )


def _proposers(settings: Settings) -> str:
    """Return how many candidates the LLM proposes, which the recommended settings keep few."""
    search, share = settings.search, settings.llm.share
    first = search.population - len(search.seeds) if search.initializer == "llm" else 0
    by_llm = search.mutations * (search.mutator == "llm") + search.crossovers * (search.crossover == "llm")
    later = share * by_llm / max(1, search.mutations + search.crossovers) * (search.planned - search.population)
    said = f"proposals by the LLM: about {first + later:,.0f} of {search.planned:,} candidates"
    if first + later > 0.9 * search.planned:
        return said
    return f"{said}; search.initializer, search.seeds and llm.share leave the others to allocations and an optimiser"


def _money(settings: Settings, asking: _Asking) -> tuple[Range | None, list[str]]:
    """Return what the first endpoint charges, and the arithmetic; None without a price."""
    endpoint = next(iter(settings.llm.endpoints), None)
    if asking is NOT_ASKED or endpoint is None:
        return None, []
    if not (endpoint.price_in or endpoint.price_out):
        is_free = urlsplit(endpoint.base_url).hostname in LOOPBACK or "price_in" in endpoint.model_fields_set
        return None, [] if is_free else ["money: unknown, because price_in and price_out are not set in llm.endpoints"]
    prompt, reply = asking.prompt_tokens, asking.reply_tokens
    money = prompt * (endpoint.price_in / 1e6) + reply * (endpoint.price_out / 1e6)
    line = (
        f"money: {prompt.expected:,.0f} tokens at {endpoint.price_in:g} and {reply.expected:,.0f} at "
        f"{endpoint.price_out:g} per million: {money.expected:.2f} ({money.least:.2f} to {money.most:.2f})"
    )
    return money, [line]


def _question(seconds: float | None, tokens: Range) -> Range:
    """Return the seconds of one question: as measured, or by the length of its reply."""
    if seconds is not None:
        return Range(0.7 * seconds, seconds, 2 * seconds)
    pairs = zip((tokens.least, tokens.expected, tokens.most), TOKENS_PER_SECOND, strict=True)
    return Range(*(1 + amount / speed for amount, speed in pairs))


def _flop(amount: float) -> str:
    """Return a number of floating-point operations with a unit."""
    for factor, unit in ((1e15, "PFLOP"), (1e12, "TFLOP")):
        if amount >= factor:
            return f"{amount / factor:,.3g} {unit}"
    return f"{amount / 1e9:,.3g} GFLOP"


def _how(speed: DeviceSpeed) -> str:
    return f"measured on {speed.name}" if speed.is_measured else f"that the data sheet of {speed.name} states"


def _time(seconds: Range) -> str:
    """Return the range in seconds, minutes or hours."""
    size, unit = unit_of_time(seconds.expected)
    least, expected, most = map(_two_digits, vars(seconds * (1 / size)).values())
    return f"{expected} {unit} ({least} to {most})"


def _two_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
