"""Searches and pruning, as functions."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from daemon.launch.run import run_quietly
from daemon.monitor.follower import Progress, Reporter
from daemon.settings.settings import Settings
from daemon.settings.sources import load as load_settings
from protocol.errors import SelfPrunerError
from protocol.results.commands import PruneResult
from protocol.results.formats import Destination, GgufType, formats_of, gguf_type_of
from protocol.runtime import logs
from protocol.runtime.paths import expanded
from protocol.runtime.signals import Interrupted
from selfpruner.runs import Run

Report = Callable[[Progress], None]
Overrides = Mapping[str, Any]
"""Values by the dotted names of settings, such as {"target.rate": 0.3}, or by sections, as in a YAML file."""


def _no_report(_: Progress) -> None:
    """Report nothing."""


def search(config: str | Path | Overrides, *, progress: Report = _no_report, **settings: Any) -> Run:
    """Run a search to its end on this machine, or resume it, and return what it found.

    `config` is a YAML file of settings, or the settings themselves. `settings` override them, with two underscores for
    the dot: `target__rate=0.3`. `progress` is called with each change. Ctrl-C saves the search and raises
    KeyboardInterrupt; the same call resumes it.

    Raises UsageError for invalid settings, before anything is started, and SelfPrunerError if the search fails.
    """
    file = Path(config) if isinstance(config, str | Path) else None
    given = {} if file is not None else dict(config)  # type: ignore[arg-type]
    overrides = _overrides(given) + _overrides({name.replace("__", "."): value for name, value in settings.items()})
    chosen = load_settings(file, overrides)
    summary, interrupted = run_quietly(chosen, Reporter(progress))
    if interrupted is not None:
        raise KeyboardInterrupt
    if summary is None or not summary.finished:
        raise SelfPrunerError(f"the search was stopped before its end; {chosen.folder}/log.jsonl says why")
    return Run(chosen.folder)


def prune(
    model: str,
    rate: float | None = None,
    *,
    out: str | Path,
    memory: str | int | None = None,
    parameters: str | int | None = None,
    endpoint: Mapping[str, Any] | None = None,
    budget: int | None = None,
    data: str | None = None,
    report_data: str | None = None,
    formats: Sequence[str] = ("hf",),
    gguf_type: GgufType | None = None,
    config: str | Path | None = None,
    settings: Overrides | None = None,
    force: bool = False,
    progress: Report = _no_report,
) -> PruneResult:
    """Make a model smaller: search for the best pruning rates, export the pruned model to `out`, and check it.

    `rate` is the share of the decoder's parameters to remove. In its place, `memory` is the most memory that the
    weights may take ("10GB"), or `parameters` the most parameters ("5B"). `endpoint` is the LLM, as in llm.endpoints: a
    mapping with `base_url`, `model` and `api_key_file`; without it, a small model on this machine proposes. `budget` is
    the number of evaluations, `data` the text to score and search on, `report_data` the text to report on. `settings`
    override those of `config` (configs/best.yaml by default).

    Raises UsageError for invalid arguments, before anything is loaded, and SelfPrunerError if something fails.
    """
    from daemon.commands.prune import SearchFlags, make_smaller, prune_settings

    chosen = dict(settings or {})
    if endpoint is not None:
        chosen["llm.endpoints"] = [dict(endpoint)]
    named = formats_of(list(formats))
    destination = Destination(expanded(out), named, gguf_type_of(named, gguf_type), force)
    flags = SearchFlags(
        budget=budget,
        data=data,
        report_data=report_data,
        config=None if config is None else Path(config),
        set_=_overrides(chosen),
    )
    size = {"rate": rate, "memory": memory, "parameters": parameters}
    full = prune_settings(model, size, destination.folder, flags)
    try:
        return make_smaller(
            full, destination, None, partial(_searched, report=progress), partial(_computing, full, progress)
        )
    except Interrupted:
        raise KeyboardInterrupt from None


def _searched(settings: Settings, *, report: Report) -> Any:
    return run_quietly(settings, Reporter(report))


@contextmanager
def _computing(settings: Settings, report: Report) -> Iterator[Callable[[str, int, int], None]]:
    """Compute as the commands do, and report the progress of stages."""
    from gpu_worker.evaluation.outcomes import out_of_memory_as_usage_error
    from gpu_worker.measuring.half_precision import products_in_float32

    with logs.silent(), out_of_memory_as_usage_error(settings.target.model), products_in_float32():
        yield lambda stage, done, total: report(Progress(stage, done, total))


def _overrides(values: Overrides, prefix: str = "") -> list[str]:
    """Return settings in the form of --set; nested mappings are sections."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _overrides(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}={json.dumps(value, default=str)}")
    return found
