import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.evaluation.one_shot import evaluate_model, evaluate_once
from gpu_worker.evaluation.outcomes import DeviceLostError, answer
from gpu_worker.evaluation.session import Session
from gpu_worker.evaluation.target import Target
from gpu_worker.measuring.corpora import windows_digest
from gpu_worker.models.errors import NotFiniteError, is_out_of_memory
from gpu_worker.pruning.ordered_model import OrderedModel
from gpu_worker.pruning.sequential import prune_sequentially
from protocol.errors import BudgetError, DataError, ModelError
from protocol.plans.allocation import Allocation, PruningRequest
from protocol.plans.candidate import Failed, Measured, Outcome, Race, Text
from protocol.plans.plan import Plan, dense_plan
from protocol.plans.spec import SearchSpec, TextSpec
from tests.support.real_model import need_smollm2
from tests.support.tiny_models import save_tiny_folder
from tests.support.tiny_specs import tiny_spec

UNIFORM = Allocation(method="uniform")


@pytest.fixture(scope="module")
def session(spec: SearchSpec) -> Session:
    return Session(spec)


class Raising:
    """A session whose evaluation ends with an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.target = SimpleNamespace(ordered=SimpleNamespace(restore=lambda: None))

    def race(self, plan: Plan, race: Race | None, text: str) -> Measured:
        raise self._error


def answer_to(error: Exception, session: Session) -> Outcome:
    request = {"plan": dense_plan(session.shape).model_dump(), "text": "fitness"}
    return answer(Raising(error), request)  # type: ignore[arg-type]


def test_the_dense_plan_measures_what_the_profile_says_of_the_dense_model(session: Session) -> None:
    dense = dense_plan(session.shape)
    assert session.evaluate(dense).perplexity == pytest.approx(session.profile.dense.perplexity, rel=1e-5)
    assert session.profile.dense_report is not None
    report = session.evaluate(dense, "report")
    assert report.perplexity == pytest.approx(session.profile.dense_report.perplexity, rel=1e-5)


def test_an_evaluation_does_not_depend_on_the_one_before(session: Session, spec: SearchSpec) -> None:
    uniform = spec.uniform_plan(session.shape)
    first = session.evaluate(uniform).perplexity
    session.evaluate(spec.plan([0.8, 0.2, 0.2], session.shape))
    assert session.evaluate(uniform).perplexity == first


def test_a_measurement_counts_what_the_plan_leaves(session: Session, spec: SearchSpec) -> None:
    measured = session.evaluate(spec.uniform_plan(session.shape))
    left = measured.parameters.decoder_after / measured.parameters.decoder_before
    assert left == pytest.approx(1 - spec.rate, abs=0.01)
    assert measured.tokens == 2 * 63


def test_sensitivity_has_a_figure_for_each_unit_and_none_where_it_is_not_wanted(
    session: Session, spec: SearchSpec
) -> None:
    assert len(session.profile.sensitivity) == len(session.shape.units(spec.granularity))
    assert Session(spec, sensitivity=False).profile.sensitivity == ()


def test_two_sessions_of_one_spec_agree_and_other_windows_show(session: Session, spec: SearchSpec) -> None:
    again = Session(spec, sensitivity=False).profile
    other = Session(spec.model_copy(update={"seed": 1}), sensitivity=False).profile
    assert (again.texts, again.dense.perplexity) == (session.profile.texts, session.profile.dense.perplexity)
    assert other.texts != session.profile.texts


@pytest.mark.usefixtures("own_cache")
def test_every_stage_ends_with_all_of_its_steps(spec: SearchSpec) -> None:
    last: dict[str, tuple[int, int]] = {}
    Session(spec, lambda stage, done, total: last.update({stage: (done, total)}))
    dense = ["measuring dense", "measuring dense on the report text"]
    assert list(last) == ["loading model", "reading texts", "calibrating", "scoring", *dense, "measuring sensitivity"]
    assert all(done == total for done, total in last.values())


@pytest.fixture(scope="module")
def kl_session(spec: SearchSpec) -> Session:
    return Session(spec.model_copy(update={"measure": "kl"}), sensitivity=False)


def test_where_the_spec_asks_for_divergence_it_is_measured_beside_the_same_perplexity(
    session: Session, kl_session: Session, spec: SearchSpec
) -> None:
    uniform = spec.uniform_plan(session.shape)
    texts: tuple[Text, ...] = ("fitness", "report")
    for text in texts:
        plain, both = session.evaluate(uniform, text), kl_session.evaluate(uniform, text)
        assert plain.kl is None and plain.fitness == plain.perplexity
        assert both.kl is not None and both.kl > 0.01 and both.fitness == both.kl
        assert both.perplexity == pytest.approx(plain.perplexity, rel=1e-5)
        assert both.tokens == plain.tokens
    assert kl_session.profile.dense.perplexity == pytest.approx(session.profile.dense.perplexity, rel=1e-5)


def test_the_dense_plan_does_not_diverge_even_after_another_was_measured(kl_session: Session, spec: SearchSpec) -> None:
    kl_session.evaluate(spec.plan([0.8, 0.2, 0.2], kl_session.shape))
    assert kl_session.evaluate(dense_plan(kl_session.shape)).kl == 0.0
    assert kl_session.evaluate(dense_plan(kl_session.shape), "report").kl == 0.0


def test_a_text_that_the_spec_does_not_have_is_refused(spec: SearchSpec) -> None:
    session = Session(spec.model_copy(update={"report": None}), sensitivity=False)
    assert session.profile.dense_report is None
    with pytest.raises(DataError, match=r"data\.report"):
        session.evaluate(dense_plan(session.shape), "report")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the docs"), "out-of-memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate"), "out-of-memory"),
        (MemoryError(), "out-of-memory"),
        (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), "out-of-memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out-of-memory"),
        (NotFiniteError("the mean loss is nan"), "not-finite"),
        (DataError("there is no text to report on"), "invalid"),
    ],
)
def test_an_evaluation_that_cannot_be_has_failed_with_its_reason(
    session: Session, error: Exception, reason: str
) -> None:
    outcome = answer_to(error, session)
    assert isinstance(outcome, Failed) and outcome.reason == reason and "\n" not in outcome.detail
    outcome = answer(session, {"plan": {"layers": [{"kv_heads": 0}]}, "text": "fitness"})  # which is no plan
    assert isinstance(outcome, Failed) and outcome.reason == "invalid"


def test_what_an_evaluation_held_is_free_again_when_it_ran_out_of_memory(session: Session) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    class Greedy(Raising):
        def race(self, plan: Plan, race: Race | None, text: str) -> Measured:
            activations = torch.zeros(3)
            held.append(weakref.ref(activations))
            return super().race(plan, race, text)

    def all_given_back() -> bool:
        return all(each() is None for each in held)

    greedy = Greedy(torch.OutOfMemoryError("CUDA out of memory"))
    request = {"plan": dense_plan(session.shape).model_dump(), "text": "fitness"}
    with pytest.MonkeyPatch.context() as patch:
        freed = []
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "empty_cache", lambda: freed.append(all_given_back()))
        answer(greedy, request)  # type: ignore[arg-type]
    assert freed == [True, True] and len(held) == 2, "once before it is tried again"


def test_a_device_side_assert_ends_the_process(session: Session) -> None:
    with pytest.raises(DeviceLostError, match="device-side assert"):
        answer_to(RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA"), session)
    with pytest.raises(RuntimeError, match="shapes"):  # an unexpected error is raised
        answer_to(RuntimeError("shapes cannot be multiplied"), session)


def test_a_real_allocation_beyond_the_memory_is_known_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55)
    assert is_out_of_memory(raised.value)


def test_evaluating_without_rates_is_evaluating_uniform_ones(spec: SearchSpec) -> None:
    assert evaluate_once(PruningRequest(spec, (0.2, 0.4, 0.6))).rate == pytest.approx(spec.rate, abs=0.01)
    uniform = evaluate_once(PruningRequest(spec, UNIFORM))
    given = evaluate_once(PruningRequest(spec, (spec.rate,) * 3))
    assert uniform.perplexity == given.perplexity
    assert uniform.rate == pytest.approx(spec.rate, abs=0.01)
    assert uniform.report_perplexity is not None
    assert (uniform.seqlen, uniform.tokens, uniform.data) == (64, 2 * 63, spec.fitness.source)


def test_sequential_scores_are_taken_once_for_all_texts_of_a_plan(
    spec: SearchSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(spec.model_copy(update={"scoring": "sequential"}), sensitivity=False)
    scored: list[Plan] = []

    def watched(ordered: OrderedModel, plan: Plan, *rest: Any, **options: Any) -> None:
        scored.append(plan)
        prune_sequentially(ordered, plan, *rest, **options)

    monkeypatch.setattr("gpu_worker.evaluation.target.prune_sequentially", watched)
    plan, other = (spec.plan(rates, session.shape) for rates in ([0.2, 0.4, 0.6], [0.6, 0.4, 0.2]))
    first = session.evaluate(plan).perplexity
    session.evaluate(plan, "report")
    session.evaluate(other)
    session.target.ordered.restore()
    assert session.evaluate(plan).perplexity == first
    assert scored == [plan, other, plan]


@pytest.mark.model
def test_uniform_pruning_harms_the_real_model(tmp_path: Path) -> None:
    need_smollm2()
    text = tmp_path / "text.txt"
    text.write_text(ENGLISH * 40)
    spec = SearchSpec(
        model="smollm2",
        rate=0.3,
        calibration=TextSpec(source=str(text), windows=2, seqlen=256),
        fitness=TextSpec(source=str(text), windows=1, seqlen=256),
    )
    result = evaluate_once(PruningRequest(spec, UNIFORM))
    assert result.dense_perplexity is not None and 1 < result.dense_perplexity < result.perplexity
    assert result.rate == pytest.approx(0.3, abs=1e-4)


ENGLISH = (
    "The lobster lives on rocky ground along the coast, where it hides by day and hunts by night. It eats mussels, "
    "crabs and worms, and grows slowly. Fishermen catch it in pots that they lower on long ropes in the spring.\n\n"
)


def test_a_dense_model_that_does_not_compute_is_called_broken(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"the dense model .* is broken"):
        Session(spec)


def test_a_pruned_model_that_does_not_compute_is_not_called_dense(
    spec: SearchSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Measured:
        raise NotFiniteError("the mean loss is nan")

    monkeypatch.setattr(Session, "evaluate", broken)
    with pytest.raises(NotFiniteError, match=r"pruned so, .* does not compute: the mean loss is nan"):
        evaluate_once(PruningRequest(spec, UNIFORM))


def test_windows_beyond_the_models_positions_are_refused(spec: SearchSpec) -> None:
    too_long = spec.fitness.model_copy(update={"seqlen": 512, "windows": 1})
    with pytest.raises(DataError, match="windows of 512 tokens are longer than the 256 positions"):
        Session(spec.model_copy(update={"fitness": too_long}))


def test_given_rates_are_checked_before_anything_is_scored(spec: SearchSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr("gpu_worker.evaluation.target.calibrate", never)
    with pytest.raises(BudgetError, match="2 pruning rates were given for 3 units"):
        evaluate_once(PruningRequest(spec, (0.1, 0.1)))
    with pytest.raises(BudgetError, match=r"off the budget 0.4 by -0.30000"):
        evaluate_once(PruningRequest(spec, (0.1, 0.1, 0.1)))
    with pytest.raises(BudgetError):
        evaluate_once(PruningRequest(spec, Allocation(method="llm-pruner", first_layers=2, last_layers=1)))


@pytest.mark.parametrize(("family", "begins"), [("gemma3_text", True), ("llama", False)])
def test_every_window_of_a_family_that_needs_it_begins_with_bos(tmp_path: Path, family: str, begins: bool) -> None:
    """Also of calibration, and the same ones as where the model is measured as is."""
    spec = tiny_spec(tmp_path)
    spec = spec.model_copy(update={"model": str(save_tiny_folder(tmp_path / family, family, hidden_size=48))})
    target = Target(spec)
    bos = target.model.tokenizer.bos_token_id
    for windows in (target.texts.calibration, target.texts.fitness, target.texts.report):
        assert windows is not None
        assert bool((windows[:, 0] == bos).all()) == begins
    as_it_is = evaluate_model(spec.model, spec.texts, dtype=spec.dtype, seed=spec.seed)
    assert as_it_is.fitness_digest == windows_digest(target.texts.fitness)
