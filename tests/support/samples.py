"""Small values for many tests: a shape, a spec, a profile, candidates."""

import json
from pathlib import Path

from daemon.monitor.status import QueueDepth, Status
from protocol.plans.candidate import Candidate, Measured, Provenance, candidate_id
from protocol.plans.plan import count_parameters
from protocol.plans.profile import DensePerplexity, ModelProfile
from protocol.plans.shape import LayerShape, ModelShape
from protocol.plans.spec import SearchSpec, TextSpec
from protocol.queue.worker_status import WorkerStatus

HIDDEN, HEAD_DIM = 32, 8
SHAPE = ModelShape(
    family="llama",
    hidden_size=HIDDEN,
    head_dim=HEAD_DIM,
    layers=(LayerShape(query_heads=4, kv_heads=2, mlp_channels=64),) * 4,
    query_head_parameters=2 * HEAD_DIM * HIDDEN,
    kv_head_parameters=2 * HEAD_DIM * HIDDEN,
    channel_parameters=3 * HIDDEN,
    attention_fixed=HIDDEN,
    mlp_fixed=HIDDEN,
    other_parameters=100 * HIDDEN,
)
SPEC = SearchSpec(
    model="tiny",
    rate=0.3,
    calibration=TextSpec(source="self", windows=2, seqlen=32),
    fitness=TextSpec(source="self", windows=2, seqlen=32),
)
PROFILE = ModelProfile(
    fingerprint=SPEC.fingerprint,
    model="tiny",
    shape=SHAPE,
    dense=DensePerplexity(perplexity=10.0, tokens=62, windows=2, seconds=0.1),
    dense_report=None,
    sensitivity=(0.4, 0.1, 0.1, 0.2),
    texts="0" * 16,
    device="cpu",
)

STATUS = Status(
    search="s",
    model="tiny",
    rate=0.3,
    fitness="perplexity",
    control="run",
    daemon="host:1:a",
    workers=(WorkerStatus(consumer="host:2:b", stage="evaluating", measured=4),),
    queue=QueueDepth(queued=3, running=1),
    finished=False,
    degraded=False,
    endpoints={},
    parents_source="fallback",
    round=2,
    candidates=9,
    by_source={"llm": 7, "fallback": 2, "allocation": 3},
    stopped=4,
    measured=5,
    failed=1,
    waiting=3,
    dense_perplexity=10.0,
    best="abc",
    best_perplexity=12.345,
    best_kl=None,
    uniform_perplexity=20.0,
    tokens={"prompt": 1234, "completion": 56},
    seconds=78.0,
)


def profile_for(spec: SearchSpec) -> ModelProfile:
    """Return the profile that a worker of this spec would publish."""
    return PROFILE.model_copy(update={"fingerprint": spec.fingerprint})


def candidate(
    rates: tuple[float, ...],
    *,
    agent: str = "mutator",
    round_: int = 1,
    spec: SearchSpec = SPEC,
    rule: str | None = None,
) -> Candidate:
    """Return the candidate with these rates."""
    feasible = spec.feasible(rates, SHAPE)
    plan = spec.plan(feasible, SHAPE)
    provenance = Provenance.model_validate({"agent": agent, "source": "llm", "round": round_, "rule": rule})
    return Candidate(id=candidate_id(plan, spec.fingerprint), rates=feasible, plan=plan, provenance=provenance)


def candidates(count: int) -> list[Candidate]:
    """Return `count` different candidates."""
    found: dict[str, Candidate] = {}
    for i in range(1000):
        made = candidate((0.3 + 0.007 * (i % 41), 0.3 - 0.009 * (i % 31), 0.3 + 0.003 * (i % 13), 0.3))
        found.setdefault(made.id, made)
        if len(found) == count:
            return list(found.values())
    raise AssertionError(f"only {len(found)} different candidates")


def measured(perplexity: float, of: Candidate | None = None, *, kl: float | None = None) -> Measured:
    """Return a measurement with this perplexity and divergence."""
    plan = (of or candidate((0.3,) * 4)).plan
    return Measured(perplexity=perplexity, kl=kl, parameters=count_parameters(plan, SHAPE), tokens=62, seconds=0.1)


def write_daemon_settings(folder: Path, *, http: dict[str, object]) -> Path:
    """Write daemon settings of a search called `test`, whose endpoint does not exist."""
    settings = {
        "search": {"name": "test"},
        "target": {"model": "m", "rate": 0.3},
        "llm": {"endpoints": [{"base_url": "http://127.0.0.1:9/v1", "model": "m"}]},
        "http": http,
        "run": {"folder": str(folder / "runs")},
    }
    path = folder / "search.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def put_status(folder: Path, *, finished: bool = True, measured: int = 7) -> None:
    """Write the status that a search leaves in its folder."""
    counts = {"measured": measured, "candidates": measured, "failed": 0, "stopped": 0, "waiting": 0}
    status = STATUS.model_copy(update=counts | {"finished": finished})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(status.model_dump_json())
