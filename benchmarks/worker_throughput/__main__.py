"""How fast does a worker measure candidates, and how far is that from what the hardware allows?

    python -m benchmarks.worker_throughput [--model smollm2] [--json FILE] [--plot FILE.png]
    python -m benchmarks.worker_throughput --shape llama-2-7b                 (random weights, on a GPU)
    python -m benchmarks.worker_throughput --shape llama-3-70b --layers 4

Each line is a median over some plans. `ratio` compares with the matrix products of the same plans, computed alone right
after each candidate; `of peak` is the share of a large product's speed, measured in the same run. `naive` is the way of
the papers' scripts on the same plan, which must give the same perplexity. Texts are random tokens. Preparation is
timed with an empty cache, and again as a second search on the same model finds it.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.worker_throughput.naive import naive_perplexity
from benchmarks.worker_throughput.plot import plot
from benchmarks.worker_throughput.products import Products
from benchmarks.worker_throughput.random_models import SHAPES, random_model
from benchmarks.worker_throughput.stages import stages
from gpu_worker.evaluation.process import keep_libraries_quiet, let_segments_grow
from gpu_worker.evaluation.session import Session
from gpu_worker.evaluation.target import Target
from gpu_worker.measuring.devices import speed_of_this_machine
from gpu_worker.measuring.half_precision import products_in_float32
from gpu_worker.models.loading import LoadedModel, load_model
from protocol.plans.allocation import OUTLIER_THRESHOLD
from protocol.plans.plan import Plan
from protocol.plans.spec import Measure, Reconstruction, SearchSpec, TextSpec
from protocol.runtime import logs

WAYS: tuple[tuple[Measure, Reconstruction], ...] = (
    ("perplexity", "none"),
    ("kl", "none"),
    ("kl", "least-squares"),
)


@dataclass(frozen=True)
class Row:
    """Figures of one way to measure at one rate; seconds are per candidate."""

    fitness: str
    reconstruction: str
    rate: float
    seconds: float
    products: float
    ratio: float
    tokens_per_second: float
    candidates_per_hour: float
    of_peak: float
    stages: dict[str, float]


@dataclass(frozen=True)
class Naive:
    """The naive way beside ours on the same plan; seconds per candidate."""

    rate: float
    seconds: float
    ours: float
    perplexity: float
    ours_perplexity: float

    @property
    def ratio(self) -> float:
        """Return how many times as long the naive way takes."""
        return self.seconds / self.ours


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", default="smollm2")
    model.add_argument("--shape", choices=SHAPES, help="random weights in this shape instead of a model")
    parser.add_argument("--layers", type=int, help="with --shape: this many decoder layers")
    parser.add_argument("--device", help="with --shape: cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.3, 0.5])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=3, help="plans per line")
    parser.add_argument("--naive-rates", type=float, nargs="*", default=[0.3])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a picture of where the time goes")
    return parser


def main() -> int:
    """Measure, and print the tables."""
    given = _parser().parse_args()
    logs.configure(level="WARNING")
    keep_libraries_quiet()
    console = Console(width=120)
    let_segments_grow()
    with _empty_cache(), products_in_float32():
        peak = speed_of_this_machine(given.dtype)
        name, device = _described(given)
        console.print(f"{name}, {given.dtype}, {device}, torch {torch.__version__}")
        console.print(f"a large product: {peak.multiply / 1e12:.2f} TFLOPS; {given.windows} windows of {given.seqlen}")
        rows: list[Row] = []
        preparations: dict[str, tuple[float, float]] = {}
        naive: list[Naive] = []
        memory: dict[str, int] = {}
        for measure, reconstruction in WAYS:
            way = f"{measure}, {reconstruction}"
            first = _prepared(given, measure, reconstruction)[1]  # its session is freed before the next is made
            session, again = _prepared(given, measure, reconstruction)
            preparations[way] = first, again
            console.print(f"{way}: prepared in {first:.1f} s, a second search in {again:.1f} s")
            for rate in given.rates:
                rows.append(_measured(session, rate, given.candidates, peak.multiply))
                console.print(_line(rows[-1]))
            if (measure, reconstruction) == WAYS[0]:
                naive = [_compared(session, rate) for rate in given.naive_rates]
            del session
            memory[way] = _peak_memory()
        _print(console, rows, naive)
    found = {
        "model": name,
        "device": device,
        "dtype": given.dtype,
        "torch": torch.__version__,
        "windows": given.windows,
        "seqlen": given.seqlen,
        "peak_flops": peak.multiply,
        "peak_memory_bytes": memory,
        "preparations": preparations,
        "rows": [asdict(row) for row in rows],
        "naive": [asdict(each) | {"ratio": each.ratio} for each in naive],
    }
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    if given.plot:
        plot(found, given.plot)
    return 0


@contextmanager
def _empty_cache() -> Iterator[None]:
    """Let preparation find nothing in the cache."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"XDG_CACHE_HOME": folder}):
        yield


def _described(given: argparse.Namespace) -> tuple[str, str]:
    """Return the name of the model and of its device."""
    model = _model(given)
    if model.device.type == "cuda":
        return model.name, torch.cuda.get_device_name(model.device)
    threads = torch.get_num_threads()
    return model.name, f"CPU with {torch.backends.cpu.get_cpu_capability()}, {threads} threads"


def _peak_memory() -> int:
    """Return the most bytes that were allocated on the GPU since the last call, or ever in main memory."""
    gc.collect()
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = int(torch.cuda.max_memory_allocated())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return found


def _model(given: argparse.Namespace) -> LoadedModel:
    if given.shape is None:
        return load_model(given.model, given.dtype)
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return random_model(given.shape, given.layers, getattr(torch, given.dtype), device)


def _prepared(given: argparse.Namespace, measure: Measure, reconstruction: Reconstruction) -> tuple[Session, float]:
    """Return a session on a new copy of the model, and the seconds of its preparation without loading."""
    _peak_memory()
    model = _model(given)
    text = TextSpec(source="self", windows=given.windows, seqlen=given.seqlen)
    spec = SearchSpec(
        model=model.name,
        rate=0.3,
        granularity="block",
        calibration=text.model_copy(update={"windows": given.calibration_windows}),
        fitness=text,
        measure=measure,
        reconstruction=reconstruction,
        dtype=given.dtype,
    )
    start = time.perf_counter()
    target = Target(spec, model=model, outlier_threshold=OUTLIER_THRESHOLD, share_text=_tokens(model))
    return Session(spec, target=target), time.perf_counter() - start


def _tokens(model: LoadedModel) -> Callable[[int, int, Callable[[], Tensor]], Tensor]:
    vocabulary = model.decoder.head.out_features

    def random_tokens(windows: int, length: int, _: Callable[[], Tensor]) -> Tensor:
        return torch.randint(vocabulary, (windows, length), generator=torch.Generator().manual_seed(0))

    return random_tokens


def _plans(session: Session, rate: float, count: int) -> list[Plan]:
    """Return different plans at `rate`, a third around it in each block; the first is not timed."""
    rng = Random(0)
    spec = session.spec.model_copy(update={"rate": max(rate, 0.001)})
    units = len(session.shape.units("block"))
    rates = [[rate * rng.uniform(0.67, 1.33) for _ in range(units)] for _ in range(count + 1)]
    return [spec.plan(spec.feasible(each, session.shape), session.shape) for each in rates]


def _measured(session: Session, rate: float, count: int, peak: float) -> Row:
    decoder = session.target.model.decoder
    windows, seqlen = session.target.texts.fitness.shape
    seconds, alone, flops = [], [], 0
    plans = _plans(session, rate, count)
    for plan in plans:
        seconds.append(_seconds(lambda plan=plan: session.evaluate(plan)))  # type: ignore[misc]
        with session.target.ordered.aligned():
            products = Products(decoder, seqlen)
            alone.append(_seconds(lambda products=products: [products.run() for _ in range(windows)]))  # type: ignore[misc]
        flops = products.flops * windows
    each, floor = statistics.median(seconds[1:]), statistics.median(alone[1:])
    return Row(
        fitness=session.spec.measure,
        reconstruction=session.spec.reconstruction,
        rate=rate,
        seconds=each,
        products=floor,
        ratio=statistics.median(a / b for a, b in zip(seconds[1:], alone[1:], strict=True)),
        tokens_per_second=windows * seqlen / each,
        candidates_per_hour=3600 / each,
        of_peak=flops / each / peak,
        stages=stages(lambda: session.evaluate(plans[0]), session.target.model.device),
    )


def _compared(session: Session, rate: float) -> Naive:
    target = session.target
    plan = _plans(session, rate, 1)[0]
    ours: list[float] = []
    ours_seconds = statistics.median(_seconds(lambda: ours.append(session.evaluate(plan).perplexity)) for _ in range(3))
    target.ordered.restore()
    theirs: list[float] = []
    windows = target.texts.fitness
    seconds = _seconds(lambda: theirs.append(naive_perplexity(target.model, plan, target.calibration, windows)))
    return Naive(rate, seconds, ours_seconds, theirs[0], ours[0])


def _seconds(work: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.synchronize(gpu)


def _line(row: Row) -> str:
    return f"  {row.rate:.0%}: {row.seconds:.2f} s, {row.ratio:.2f} times the products alone"


def _print(console: Console, rows: list[Row], naive: list[Naive]) -> None:
    table = Table(box=None, pad_edge=False)
    columns = ("fitness", "fit", "rate", "s", "products, s", "ratio", "tokens/s", "candidates/h", "of peak")
    for column in (*columns, *rows[0].stages):
        table.add_column(column, justify="right" if column not in ("fitness", "fit") else "left")
    for row in rows:
        table.add_row(
            row.fitness, row.reconstruction, f"{row.rate:.0%}", f"{row.seconds:.3f}", f"{row.products:.3f}",
            f"{row.ratio:.2f}", f"{row.tokens_per_second:,.0f}", f"{row.candidates_per_hour:,.0f}",
            f"{row.of_peak:.0%}", *(f"{share:.0%}" for share in row.stages.values()),
        )  # fmt: skip
    console.print(table)
    for each in naive:
        console.print(
            f"naive at {each.rate:.0%}: {each.seconds:.1f} s beside {each.ours:.2f} s, {each.ratio:.1f} times; "
            f"perplexity {each.perplexity:.4f} and {each.ours_perplexity:.4f}"
        )


if __name__ == "__main__":
    sys.exit(main())
