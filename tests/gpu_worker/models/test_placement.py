from collections import Counter
from dataclasses import replace

import pytest
import torch

from gpu_worker.models.families import extract_decoder
from gpu_worker.models.machine import Machine
from gpu_worker.models.memory import MemoryEstimate
from gpu_worker.models.placement import Placement, device_map, meta_model, place
from protocol.errors import ModelError
from tests.support.tiny_models import tiny_llama

GB = 10**9
SEVEN_BILLION = MemoryEstimate(weights=14 * GB, pruned_copies=2 * GB, activations=GB, main_memory=GB)


def machine(*gpus: int, main_memory: int = 64) -> Machine:
    return Machine(tuple(free * GB for free in gpus), main_memory * GB)


def test_a_model_that_fits_on_one_gpu_goes_to_the_one_with_most_room() -> None:
    assert place(SEVEN_BILLION, machine(24)) == Placement("cuda:0")
    assert place(SEVEN_BILLION, machine(20, 80, 24)) == Placement("cuda:1")
    assert place(SEVEN_BILLION, machine(18, 18)) == Placement("cuda:0")
    assert place(SEVEN_BILLION, machine(17)) == Placement("cuda:0"), "without room for all copies"
    with pytest.raises(ModelError):
        place(SEVEN_BILLION, machine(15))  # the last 4 % of a GPU are not used


def test_a_model_too_large_for_one_gpu_is_spread_and_each_keeps_room_to_run_and_for_copies() -> None:
    placement = place(SEVEN_BILLION, machine(12, 12))
    assert placement.device is None
    assert placement.budget == {0: 9_205_000_000, 1: 9_205_000_000}
    for weights in placement.budget.values():
        copies = weights * SEVEN_BILLION.pruned_copies // SEVEN_BILLION.weights
        assert weights + copies + SEVEN_BILLION.activations <= 12 * GB


def test_a_gpu_without_room_is_left_alone() -> None:
    assert set(place(SEVEN_BILLION, machine(12, 1, 12)).budget) == {0, 2}


def test_where_there_is_no_room_for_every_plans_copies_the_model_is_loaded_all_the_same() -> None:
    assert place(SEVEN_BILLION, machine(16)) == Placement("cuda:0")
    assert place(SEVEN_BILLION, machine(9, 9)).budget == {0: 7_640_000_000, 1: 7_640_000_000}


def test_a_model_that_fits_on_no_gpus_is_refused_with_what_it_needs_what_there_is_and_what_to_do() -> None:
    with pytest.raises(ModelError) as refusal:
        place(SEVEN_BILLION, machine(7, 7))
    assert str(refusal.value) == (
        "the model is too large for this machine: it needs about 14.0 GB for weights, 1.0 GB to run them, up to 2.0 GB "
        "for copies of pruned weights, 1.0 GB of main memory for texts; "
        "the 2 GPUs have 14.0 GB free (7.0 GB, 7.0 GB); use "
        "shorter windows (seqlen), a smaller dtype, more or larger GPUs, or a smaller model"
    )


def test_copies_that_every_plan_needs_must_fit_others_need_not() -> None:
    estimate = MemoryEstimate(14 * GB, pruned_copies=6 * GB, activations=GB, main_memory=0, fitted_copies=3 * GB)
    assert place(estimate, machine(19)) == Placement("cuda:0")
    with pytest.raises(ModelError, match="too large"):
        place(estimate, machine(18))


def test_the_matrices_of_the_fit_go_to_main_memory_where_the_gpu_has_no_room() -> None:
    fitted = MemoryEstimate(
        16 * GB,
        pruned_copies=6 * GB,
        activations=GB,
        main_memory=GB,
        reconstruction=40 * GB,
        fitted_copies=3 * GB,
        fit="all layers",
    )
    split = replace(fitted, reconstruction=2 * GB, main_memory=42 * GB)
    estimate = replace(fitted, with_fit_in_main_memory=split)
    assert place(estimate, machine(80)) == Placement("cuda:0")
    assert place(estimate, machine(24)) == Placement("cuda:0", fit_in_main_memory=True)
    spread = place(estimate, machine(16, 16))
    assert spread.fit_in_main_memory and set(spread.budget) == {0, 1}
    with pytest.raises(ModelError, match=r"need about 42\.0 GB where 32\.0 GB are available; use sequential scoring"):
        place(estimate, machine(24, main_memory=32))
    with pytest.raises(ModelError, match=r"2\.0 GB for the matrices of the fit.* or no reconstruction"):
        place(estimate, machine(16))


LONG_TEXTS = MemoryEstimate(weights=GB, pruned_copies=0, activations=GB, main_memory=65 * GB)


@pytest.mark.parametrize(
    ("needs", "has", "sentence"),
    [
        # The main memory never holds what a GPU has no room for.
        (SEVEN_BILLION, machine(8, main_memory=1000), r"too large for this machine.* the GPU has 8\.0 GB free"),
        (SEVEN_BILLION, machine(main_memory=15), r"the main memory has 15\.0 GB available and there is no GPU"),
        (LONG_TEXTS, machine(80), r"need about 65\.0 GB of main memory where 64\.0 GB are available"),
    ],
    ids=["small GPU", "small CPU", "long texts"],
)
def test_a_machine_with_too_little_memory_is_refused(needs: MemoryEstimate, has: Machine, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        place(needs, has)
    assert place(SEVEN_BILLION, machine(main_memory=16)) == Placement("cpu")


def test_one_device_needs_no_map_of_modules() -> None:
    bare = meta_model(tiny_llama().causal_lm.config, torch.float32)
    assert device_map(bare, torch.nn.Module, Placement("cpu")) is None
    assert device_map(bare, torch.nn.Module, Placement("cuda:1")) == {"": "cuda:1"}


def test_a_spread_model_keeps_its_decoder_layers_whole_and_its_tied_head_at_the_embedding() -> None:
    bare = meta_model(tiny_llama(layers=6).causal_lm.config, torch.float32)
    decoder = extract_decoder(bare)
    layer = decoder.shape.layer_parameters(0) * 4
    room = decoder.shape.other_parameters * 4 + 4 * layer
    found = device_map(bare, type(decoder.layers[0].module), Placement(budget={0: room, 1: room}))
    assert found is not None
    assert [name for name in found if "layers." in name] == [f"model.layers.{i}" for i in range(6)]
    assert set(found.values()) == {0, 1}
    assert found["lm_head"] == found["model.embed_tokens"] == 0
    assert found["model.norm"] == 1


@pytest.mark.parametrize(
    ("rooms", "used", "most"), [([9] * 8, 2, 5), ([4] * 8, 3, 3), ([3, 9, 3, 9], 2, 5), ([7] * 3, 2, 5)]
)
def test_a_spread_model_takes_the_fewest_gpus_and_fills_them_evenly(rooms: list[int], used: int, most: int) -> None:
    bare = meta_model(tiny_llama(layers=8, channels=480, tied=False).causal_lm.config, torch.float32)
    decoder = extract_decoder(bare)
    layer = decoder.shape.layer_parameters(0) * 4
    ends = decoder.shape.other_parameters * 4
    budget = {gpu: room * layer + ends for gpu, room in enumerate(rooms)}
    found = device_map(bare, type(decoder.layers[0].module), Placement(budget=budget))
    assert found is not None
    layers = Counter(gpu for name, gpu in found.items() if "layers." in name)
    assert len(set(found.values())) == len(layers) == used
    assert sum(layers.values()) == 8 and max(layers.values()) <= most
    assert all(count <= rooms[int(gpu)] for gpu, count in layers.items())
    assert {found["model.norm"], found["lm_head"]} == {max(layers)}


def test_budgets_that_add_up_but_hold_no_whole_layers_are_refused() -> None:
    bare = meta_model(tiny_llama(layers=6).causal_lm.config, torch.float32)
    decoder = extract_decoder(bare)
    half_a_layer = decoder.shape.layer_parameters(0) * 2
    budget = dict.fromkeys(range(24), half_a_layer)
    with pytest.raises(ModelError, match="layers cannot be distributed over the 24 GPUs"):
        device_map(bare, type(decoder.layers[0].module), Placement(budget=budget))
