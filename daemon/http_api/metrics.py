"""Prometheus metrics: figures of the last observation, and the LLM's latency."""

from collections.abc import Iterable, Mapping
from typing import get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from daemon.monitor.observer import Observer
from daemon.monitor.status import Status
from protocol.plans.candidate import Source

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics(Collector):
    """The metrics of one search. Candidate counters survive restarts; endpoint counters start at zero."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._registry = CollectorRegistry()
        self._latency = Histogram(
            "selfpruner_llm_answer_seconds",
            "Time that an endpoint took for an answer, including retries.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)
        self._registry.register(self)
        self.event_streams = 0

    def observe(self, record: Mapping[str, object]) -> None:
        """Record the latency in one line of the transcript, unless the question got no answer."""
        seconds, endpoint = record.get("seconds"), record.get("endpoint")
        if record.get("text") is not None and isinstance(seconds, int | float) and isinstance(endpoint, str):
            self._latency.labels(endpoint).observe(seconds)

    def page(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that the registry does not collect at registration."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics of the last observation."""
        yield _gauge("event_streams", "Clients that follow /api/events.", self.event_streams)
        heartbeat = self._observer.heartbeat
        yield _gauge(
            "event_loop_longest_block_seconds",
            "The longest time that the event loop was blocked.",
            heartbeat.longest_block,
        )
        yield _gauge(
            "event_loop_longest_busy_block_seconds",
            "The most processor time that the daemon used while its event loop was blocked.",
            heartbeat.longest_busy_block,
        )
        status = self._observer.status
        if status is None:
            yield _gauge("redis_up", "Whether Redis answers.", 0)
            return
        yield from self._candidates(status)
        yield from _workers(status)
        yield from _endpoints(status)
        yield from _figures(status)

    def _candidates(self, status: Status) -> Iterable[Metric]:
        outcomes = CounterMetricFamily(
            "selfpruner_candidates",
            "Candidates with an outcome, by source.",
            labels=["source", "outcome"],
        )
        for source in (*get_args(Source), "baseline"):
            for kind in ("measured", "failed", "stopped"):
                outcomes.add_metric([source, kind], self._observer.outcomes.get((source, kind), 0))
        yield outcomes
        yield CounterMetricFamily(
            "selfpruner_evaluation_seconds",
            "Time that workers spent on measured candidates; its rate per worker is their utilisation.",
            value=self._observer.evaluation_seconds,
        )
        queue = GaugeMetricFamily("selfpruner_queue_depth", "Candidates on the job stream.", labels=["state"])
        queue.add_metric(["queued"], status.queue.queued)
        queue.add_metric(["running"], status.queue.running)
        yield queue


def _workers(status: Status) -> Iterable[Metric]:
    stages = ("idle", "evaluating", "preparing", "unusable")
    counts = dict.fromkeys(stages, 0)
    for worker in status.workers:
        counts[worker.stage if worker.stage in counts else "preparing"] += 1
    workers = GaugeMetricFamily(
        "selfpruner_workers", "Workers alive, by stage at their last heartbeat.", labels=["stage"]
    )
    for stage, count in counts.items():
        workers.add_metric([stage], count)
    yield workers
    usable = len(status.workers) - counts["unusable"]
    share = min(1.0, status.queue.running / usable) if usable else 0.0
    yield _gauge("worker_utilisation", "The share of usable workers that hold a candidate now.", share)


def _endpoints(status: Status) -> Iterable[Metric]:
    requests = CounterMetricFamily("selfpruner_llm_requests", "HTTP requests, including retries.", labels=["endpoint"])
    errors = CounterMetricFamily("selfpruner_llm_errors", "Questions that failed for good.", labels=["endpoint"])
    tokens = CounterMetricFamily("selfpruner_llm_tokens", "Tokens in and out.", labels=["endpoint", "kind"])
    asked = GaugeMetricFamily(
        "selfpruner_llm_endpoint_up", "0 while an endpoint rests after failures.", labels=["endpoint"]
    )
    for name, endpoint in status.endpoints.items():
        requests.add_metric([name], endpoint.requests)
        errors.add_metric([name], endpoint.errors)
        tokens.add_metric([name, "prompt"], endpoint.prompt_tokens)
        tokens.add_metric([name, "completion"], endpoint.completion_tokens)
        asked.add_metric([name], endpoint.state == "asked")
    yield from (requests, errors, tokens, asked)
    yield _gauge("degraded", "1 while operators without an LLM propose in its place.", status.degraded)


def _figures(status: Status) -> Iterable[Metric]:
    fitness = status.best_perplexity if status.fitness == "perplexity" else status.best_kl
    yield _gauge("redis_up", "Whether Redis answers.", status.redis == "answers")
    yield _gauge("paused", "1 while the command is pause.", status.control == "pause")
    yield _gauge("finished", "1 when all rounds are done or the budget is used up.", status.finished)
    yield _gauge("llm_cost", "Cost of the LLM at the endpoints' prices, summed over restarts.", status.cost)
    yield _gauge("round", "The round of the newest candidate; 0 is the first population.", status.round)
    yield _gauge("best_fitness", "Fitness of the best candidate.", fitness)
    yield _gauge("best_perplexity", "Perplexity of the best candidate.", status.best_perplexity)
    yield _gauge("dense_perplexity", "Perplexity of the unpruned model.", status.dense_perplexity)


def _gauge(name: str, says: str, value: float | None) -> Metric:
    """Return a gauge without labels; without a value it has no sample."""
    family = GaugeMetricFamily(f"selfpruner_{name}", says)
    if value is not None:
        family.add_metric([], float(value))
    return family
