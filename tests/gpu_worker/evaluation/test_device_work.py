"""What keeps a GPU busy and its fast kernels in use, checked without one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.nn import functional as F

from gpu_worker.evaluation import session as session_module
from gpu_worker.evaluation.outcomes import answer
from gpu_worker.evaluation.session import Session
from gpu_worker.evaluation.target import Target
from gpu_worker.measuring.divergence import DensePredictions, window_divergence
from gpu_worker.measuring.perplexity import read, window_loss
from gpu_worker.models.families import extract_decoder
from gpu_worker.models.loading import load_model
from gpu_worker.pruning.ordered_model import ALIGNMENT
from gpu_worker.pruning.reconstruction import FittedColumns
from protocol.plans.candidate import Measured, Race
from protocol.plans.spec import SearchSpec
from tests.support.tiny_models import tiny_causal_lm, tiny_windows
from tests.support.tiny_specs import tiny_spec


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SearchSpec:
    made = tiny_spec(tmp_path_factory.mktemp("device"), channels=200)
    return made.model_copy(update={"measure": "kl", "reconstruction": "least-squares", "granularity": "block"})


@pytest.fixture(scope="module")
def session(spec: SearchSpec) -> Session:
    return Session(spec, sensitivity=False)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of scalars in each read from the device."""
    found: list[int] = []

    def counted(values: Any) -> list[float]:
        found.append(len(values))
        return read(values)

    monkeypatch.setattr(session_module, "read", counted)
    yield found


def test_no_window_waits_for_the_device() -> None:
    """Nothing can be read from the meta device, so that a hidden wait would fail."""
    decoder = extract_decoder(tiny_causal_lm("llama").to("meta"))
    window = tiny_windows(1, 24).to("meta")
    dense = DensePredictions.empty(23, 16, torch.float32).to(torch.device("meta"))
    for scalar in (window_loss(decoder, window), *window_divergence(decoder, window, dense)):
        assert scalar.is_meta and scalar.shape == ()


def test_a_second_device_gets_all_windows_before_its_first_loss_is_read() -> None:
    """The first half of the model is on the CPU, the second on the meta device, from which nothing can be read."""
    causal_lm = tiny_causal_lm("llama")
    decoder = extract_decoder(causal_lm)
    later = [layer.module for layer in decoder.layers[len(decoder.layers) // 2 :]]
    for module in (*later, causal_lm.model.norm, causal_lm.lm_head):
        add_hook_to_module(module.to("meta"), AlignDevicesHook(execution_device="meta"))
    dense = DensePredictions.empty(23, 16, torch.float32).to(torch.device("meta"))
    losses = []
    for window in tiny_windows(3, 24)[:, None]:
        losses += [window_loss(decoder, window), *window_divergence(decoder, window, dense)]
    assert decoder.device.type == "cpu" and all(loss.is_meta for loss in losses)


def test_an_evaluation_reads_its_figures_at_its_end(session: Session, reads: list[int]) -> None:
    plan = session.spec.uniform_plan(session.shape)
    whole = session.race(plan, Race(against=(), first_windows=1))
    assert isinstance(whole, Measured)
    assert set(reads) == {len(session.target.texts.fitness)}
    reads.clear()
    session.evaluate(plan)
    assert len(reads) == 2
    reads.clear()
    session.race(plan, Race(against=tuple(loss - 1 for loss in whole.losses), first_windows=1))
    assert set(reads) == {1}, "a race waits once, when it is decided"


def test_widths_are_multiples_of_64_while_a_plan_is_measured(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = session.spec.uniform_plan(session.shape)
    odd = {layer.mlp_channels for layer in plan.layers}
    assert any(width % ALIGNMENT for width in odd), odd
    exact = session.evaluate(plan)
    with monkeypatch.context() as patched:
        seen: list[tuple[int, ...]] = []

        def spied(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            seen.append((*hidden.stride()[:-1], *weight.shape))
            return F.linear(hidden, weight, bias)

        for layer in session.target.model.decoder.layers:
            for linear in layer.linears:
                patched.setattr(
                    linear, "forward", lambda hidden, linear=linear: spied(hidden, linear.weight, linear.bias)
                )
        assert session.evaluate(plan).perplexity == exact.perplexity
    layers = session.target.model.decoder.layers
    gates = {layer.gate.weight.shape[0] for layer in layers}
    assert gates == odd, "what is exported has exact widths"
    wide = {-(-width // ALIGNMENT) * ALIGNMENT for width in odd}
    hidden = session.shape.hidden_size
    assert {rows for *_, rows, inputs in seen if inputs == hidden} >= wide
    assert {strides[-1] for *strides, rows, inputs in seen if inputs in odd} <= wide, "down reads aligned rows"


def test_only_what_a_plan_changes_is_fitted_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = list(session.spec.uniform_rates(session.shape))
    session.evaluate(session.spec.plan(rates, session.shape))
    fitted: list[tuple[int, ...]] = []
    first = FittedColumns.first

    def counted(columns: FittedColumns, *counts: int) -> torch.Tensor:
        fitted.append(counts)
        return first(columns, *counts)

    monkeypatch.setattr(FittedColumns, "first", counted)
    session.evaluate(session.spec.plan(rates, session.shape))
    assert not fitted
    rates[1], rates[3] = rates[1] + 0.1, rates[3] - 0.1
    changed = session.evaluate(session.spec.plan(rates, session.shape))
    assert len(fitted) == 2, fitted
    fresh = Session(session.spec, sensitivity=False, target=Target(session.spec))
    assert fresh.evaluate(session.spec.plan(rates, session.shape)).perplexity == changed.perplexity


def test_a_plan_that_runs_out_of_memory_is_measured_again_without_the_copies_of_the_last(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = session.spec.uniform_plan(session.shape)
    expected = session.evaluate(plan)
    tries: list[int] = []

    def full(*columns: Any) -> torch.Tensor:
        tries.append(len(columns))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return first(*columns)

    first = FittedColumns.first
    session.evaluate(session.spec.plan([0.5, 0.3] + [0.4] * 4, session.shape))
    monkeypatch.setattr(FittedColumns, "first", full)
    found = answer(session, {"plan": plan.model_dump(), "text": "fitness"})
    assert isinstance(found, Measured) and found.perplexity == expected.perplexity
    assert len(tries) > len(plan.layers), "all layers were applied again"


def test_a_fit_that_ran_out_of_memory_is_made_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = list(session.spec.uniform_rates(session.shape))
    plan = session.spec.plan(rates, session.shape)
    expected = session.evaluate(plan).perplexity
    session.target.ordered.restore()
    with monkeypatch.context() as patched:
        patched.setattr(FittedColumns, "first", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        with pytest.raises(torch.OutOfMemoryError):
            session.evaluate(plan)
    session.target.ordered.restore()
    assert session.evaluate(plan).perplexity == expected


@pytest.mark.usefixtures("own_cache")
def test_a_fit_in_main_memory_measures_the_same(spec: SearchSpec, session: Session) -> None:
    plans = [spec.plan(rates, session.shape) for rates in ([0.5, 0.3] + [0.4] * 4, [0.2, 0.3] + [0.45] * 4)]
    expected = [session.evaluate(plan) for plan in plans]
    model = replace(load_model(spec.model, spec.dtype), fit_in_main_memory=True)
    for _ in range(2):  # computed, and read from the cache
        target = Target(spec, model=model)
        found = [Session(spec, sensitivity=False, target=target).evaluate(plan) for plan in plans]
        assert [each.kl for each in found] == [each.kl for each in expected]
        model = replace(load_model(spec.model, spec.dtype), fit_in_main_memory=True)
