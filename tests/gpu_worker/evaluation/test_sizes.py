"""From a size to a rate: no plan is larger than asked for, and none smaller than needed."""

import random

import pytest

from gpu_worker.evaluation.sizes import rate_for, shape_of
from protocol.errors import SettingsError
from protocol.plans.plan import count_parameters, make_plan
from protocol.plans.size import Size
from tests.support.tiny_models import save_tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_folder(tmp_path_factory.mktemp("model"), channels=200, layers=4))


@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_no_plan_is_larger_than_the_size(model: str, share: float, multiple_of: int) -> None:
    shape = shape_of(model, "float32")
    most = int(share * shape.total_parameters)
    rate = rate_for(Size(parameters=most), model, "float32", multiple_of)
    draw = random.Random(0)
    step = multiple_of * shape.channel_parameters
    for _ in range(20):
        moved = draw.uniform(0, min(rate, 0.9 - rate)) * 0.8
        rates = [rate + moved, rate - moved] * 2
        plan = make_plan(rates, shape, multiple_of=multiple_of)
        assert most - 3 * step <= count_parameters(plan, shape).total_after <= most


def test_memory_is_that_of_the_weights_and_the_cache(model: str) -> None:
    shape = shape_of(model, "bfloat16")
    weights = 2 * shape.total_parameters
    cache = 2 * sum(2 * layer.kv_heads * shape.head_dim for layer in shape.layers) * 100 * 3
    without = rate_for(Size(memory=int(0.7 * weights)), model, "bfloat16", 1)
    with_cache = Size(memory=int(0.7 * weights) + cache, context=100, batch=3)
    assert rate_for(with_cache, model, "bfloat16", 1) == without
    assert rate_for(Size(parameters=int(0.7 * weights) // 2), model, "bfloat16", 1) == without


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (Size(memory=10**9), "1,000 MB is not smaller than the model, which has 0 MB of weights"),
        (Size(parameters=10**9), "1,000,000,000 parameters is not smaller than the model, which has"),
        (Size(parameters=10), "10 parameters cannot be reached: with 90% of the decoder removed, the model still has"),
        (Size(memory=10**6, context=10**9), "and up to 768,000 MB of KV cache"),
    ],
)
def test_a_size_that_cannot_be_is_one_sentence(model: str, size: Size, sentence: str) -> None:
    with pytest.raises(SettingsError) as error:
        rate_for(size, model, "float32", 1)
    assert sentence in str(error.value)


def test_a_model_that_is_known_but_not_here_has_sizes() -> None:
    rate = rate_for(Size(memory=10 * 10**9), "meta-llama/Llama-2-7b-hf", "bfloat16", 32)
    assert rate == pytest.approx((6.738e9 - 5e9) / 6.476e9, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "number"), [("170MB", 170_000_000), ("1.5 GiB", 3 * 2**29), ("8b", 8), (12, 12), ("2TB", 2 * 10**12)]
)
def test_memory_has_a_unit(text: object, number: int) -> None:
    assert Size.model_validate({"memory": text}).memory == number


@pytest.mark.parametrize(("text", "number"), [("5B", 5 * 10**9), ("100M", 10**8), ("85k", 85_000), ("7", 7)])
def test_parameters_have_a_unit(text: str, number: int) -> None:
    assert Size.model_validate({"parameters": text}).parameters == number


@pytest.mark.parametrize("wrong", [{"memory": "10XB"}, {"memory": "ten"}, {"memory": 0}, {"parameters": "-5B"}, {}])
def test_other_sizes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"such as|greater than|give parameters or memory"):
        Size.model_validate(wrong)
