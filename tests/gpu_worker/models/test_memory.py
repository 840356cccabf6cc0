from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from gpu_worker.models import memory
from gpu_worker.models.families import FAMILIES, extract_decoder
from gpu_worker.models.limits import ROWS_PER_CHUNK
from gpu_worker.models.loading import load_model
from gpu_worker.models.machine import Machine, main_memory, this_machine
from gpu_worker.models.memory import FP32, MemoryEstimate, Workload, estimate_memory
from gpu_worker.models.placement import meta_model
from protocol.plans.spec import SearchSpec, TextSpec
from tests.support.real_model import need_smollm2
from tests.support.tiny_models import tiny_model

LLAMA_2_7B = transformers.LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
LLAMA_3_70B = transformers.LlamaConfig(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, tie_word_embeddings=False, max_position_embeddings=131072,
)  # fmt: skip

WIDE_AND_NARROW = transformers.LlamaConfig(
    vocab_size=64, hidden_size=8192, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=64
)
"""Its hidden states are wider than all that it computes from them."""

SPEC = SearchSpec(
    model="m",
    rate=0.3,
    calibration=TextSpec(source="wikitext2", windows=32, seqlen=1024),
    fitness=TextSpec(source="wikitext2", windows=None, seqlen=2048),
    report=TextSpec(source="self", windows=4, seqlen=512),
)


@pytest.mark.parametrize("scoring", ["dense", "sequential"])
def test_reconstruction_needs_squares_of_every_width(scoring: str) -> None:
    spec = SPEC.model_copy(update={"reconstruction": "least-squares", "scoring": scoring})
    plain, fitted = (estimate_of(LLAMA_2_7B, Workload.of(each)) for each in (SPEC, spec))
    squares = FP32 * (4096**2 + 11008**2)
    layers = 32 if scoring == "dense" else 1
    assert plain.reconstruction == 0
    assert squares * layers < fitted.reconstruction < 2 * squares * (layers + 1)
    assert fitted.pruned_copies - plain.pruned_copies == 32 * 4096 * (4096 + 11008) * 2
    assert plain.fitted_copies == 0 and fitted.fitted_copies == pytest.approx(0.7 * fitted.pruned_copies, rel=1e-4)
    assert "matrices of the fit" in fitted.description and "matrices" not in plain.description


def test_in_main_memory_the_fit_needs_one_layer_on_the_device_and_all_of_them_there() -> None:
    fitted = SPEC.model_copy(update={"reconstruction": "least-squares"})
    one_layer = fitted.model_copy(update={"scoring": "sequential"})
    whole, alone = (estimate_of(LLAMA_2_7B, Workload.of(spec)) for spec in (fitted, one_layer))
    split = whole.with_fit_in_main_memory
    assert split is not None and alone.with_fit_in_main_memory is None
    assert split.reconstruction == alone.reconstruction
    states = 32 * 1024 * 4096 * 2
    pinned = 32 * (2 * 2**26 + 2**29 + 2**28)  # of 4096², 11008² and 11008 x 4096 values; rounded up by torch
    assert split.main_memory == whole.main_memory + pinned + states
    assert "other matrices of the fit" in split.description
    scored = fitted.model_copy(update={"importance": "obs"})
    assert estimate_of(LLAMA_2_7B, Workload.of(scored)).with_fit_in_main_memory is None


def test_elimination_keeps_the_squares_of_all_layers_while_it_scores() -> None:
    spec = SPEC.model_copy(update={"importance": "obs"})
    squares = FP32 * (4096**2 + 11008**2)
    scored = estimate_of(LLAMA_2_7B, Workload.of(spec))
    assert squares * 32 < scored.reconstruction < squares * 32 + 6 * FP32 * 11008**2
    fitted = spec.model_copy(update={"reconstruction": "least-squares"})
    assert estimate_of(LLAMA_2_7B, Workload.of(fitted)).reconstruction > scored.reconstruction


def estimate_of(config: transformers.PreTrainedConfig, workload: Workload) -> MemoryEstimate:
    decoder = extract_decoder(meta_model(config, torch.bfloat16))
    return estimate_memory(decoder, torch.bfloat16, workload, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_of_the_weights_is_exact(family: str, tied: bool, dtype: torch.dtype) -> None:
    real = tiny_model(family, tied=tied, dtype=dtype).causal_lm
    bare = meta_model(real.config, dtype)
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    estimate = estimate_memory(extract_decoder(bare), dtype, Workload(), "cpu")
    assert estimate.weights == sum(p.numel() * p.element_size() for p in real.parameters())


@pytest.mark.model
def test_the_estimate_of_smollm2s_weights_is_exact() -> None:
    need_smollm2()
    model = load_model("smollm2", "bfloat16").causal_lm
    estimate = estimate_of(model.config, Workload())
    assert estimate.weights == sum(p.numel() * p.element_size() for p in model.parameters()) == 269_030_016


def test_a_model_of_seven_billion_is_reckoned_without_memory_for_it() -> None:
    estimate = estimate_of(LLAMA_2_7B, Workload(seqlen=2048))
    assert estimate.weights == 2 * 6_738_415_616
    assert estimate.pruned_copies == 0, "without shared KV heads every plan is a slice"
    assert estimate.main_memory == 0
    assert 0.5e9 < estimate.activations < 1.5e9


def test_keys_and_values_that_are_kept_are_reckoned_beside_a_window() -> None:
    plain, keeping = (estimate_of(LLAMA_2_7B, Workload(seqlen=2048, keeps_kv_cache=kept)) for kept in (False, True))
    assert keeping.activations - plain.activations == 2 * 2 * 2048 * 4096 * 32


def test_what_waits_is_reckoned_by_the_length_of_the_windows_and_not_by_the_longest_position() -> None:
    estimate = estimate_of(LLAMA_3_70B, Workload(seqlen=2048, hidden_state_tokens=128 * 2048))
    assert estimate.main_memory == 128 * 2048 * 8192 * 2


def test_predictions_of_the_dense_model_take_three_kilobytes_a_token() -> None:
    assert estimate_of(LLAMA_2_7B, Workload(predicted_tokens=1000)).main_memory == 1000 * 512 * 6


def test_gradients_need_more_than_a_window() -> None:
    """And a longer window needs more."""
    short, long = (estimate_of(LLAMA_2_7B, Workload(seqlen=seqlen)) for seqlen in (2048, 8192))
    assert long.activations > 2 * short.activations
    plain, with_gradients = (estimate_of(LLAMA_2_7B, Workload(computes_gradients=taken)) for taken in (False, True))
    assert plain.activations < with_gradients.activations < 10e9


def test_the_inputs_that_sensitivity_is_measured_from_are_reckoned_for_all_layers() -> None:
    short, long = (Workload(seqlen=seqlen, measures_sensitivity=True) for seqlen in (16, 2048))
    kept = 80 * 1024 * 8192 * 2
    logits = 1024 * 128256 * 4
    assert kept + logits < estimate_of(LLAMA_3_70B, short).activations < kept + 3 * logits
    assert estimate_of(LLAMA_3_70B, short).activations > estimate_of(LLAMA_3_70B, Workload(seqlen=16)).activations
    assert estimate_of(LLAMA_3_70B, long).activations >= estimate_of(LLAMA_3_70B, short).activations


def test_a_thousand_rows_of_the_widest_projection_are_reckoned_while_scores_are_taken() -> None:
    shape = extract_decoder(meta_model(WIDE_AND_NARROW, torch.bfloat16)).shape
    assert shape.layers[0].mlp_channels < shape.layers[0].query_heads * shape.head_dim < shape.hidden_size
    owl = 3 * FP32 * ROWS_PER_CHUNK * shape.hidden_size
    assert estimate_of(WIDE_AND_NARROW, Workload(seqlen=2)).activations >= owl


def test_shared_kv_heads_need_room_for_the_query_heads_of_a_pruned_model() -> None:
    estimate = estimate_of(LLAMA_3_70B, Workload())
    assert estimate.pruned_copies == 80 * (2 * 8192 * 8192) * 2 * 7 // 8


def test_the_words_name_every_part_that_there_is() -> None:
    estimate = MemoryEstimate(13_476_831_232, 2_100_000_000, 800_000_000, 1_073_741_824)
    assert estimate.description == (
        "about 13.5 GB for weights, 0.8 GB to run them, up to 2.1 GB for copies of pruned weights, "
        "1.1 GB of main memory for texts"
    )
    assert MemoryEstimate(1_234_000, 0, 200_000, 0).description == "about 1.2 MB for weights, 0.2 MB to run them"


def test_the_workload_of_a_spec_is_its_longest_window() -> None:
    always = Workload(calibration_tokens=32 * 1024, measures_sensitivity=True, kept=0.7)
    assert Workload.of(SPEC) == replace(always, seqlen=2048, generates_text=True)
    plain = SPEC.model_copy(update={"fitness": SPEC.calibration, "report": None})
    assert Workload.of(plain) == replace(always, seqlen=1024)


def test_the_workload_of_a_spec_counts_what_its_settings_keep() -> None:
    sequential = SPEC.model_copy(update={"scoring": "sequential"})
    assert Workload.of(sequential).hidden_state_tokens == 32 * 1024
    whole_text = sequential.model_copy(update={"calibration": SPEC.fitness})
    assert Workload.of(whole_text).hidden_state_tokens == 0
    assert Workload.of(SPEC.model_copy(update={"measure": "kl"})).predicted_tokens == 4 * 512
    assert Workload.of(SPEC.model_copy(update={"importance": "taylor"})).computes_gradients


def test_as_many_texts_are_written_together_as_their_keys_and_values_allow() -> None:
    large, small = (extract_decoder(meta_model(config, torch.bfloat16)).shape for config in (LLAMA_2_7B, LLAMA_3_70B))
    assert memory.kv_cache_bytes(large, 2, 2048) == 2**30, "Llama-2-7B keeps half a megabyte for each token"
    assert memory.generation_batch_size(large, 2, 2048) == 4
    assert memory.generation_batch_size(large, 2, 2**20) == 1, "one may always be written"
    assert memory.generation_batch_size(small, 2, 16) == 64
    estimate = estimate_of(LLAMA_2_7B, Workload(generates_text=True))
    assert estimate.activations == memory.MAX_KV_CACHE_BYTES


@pytest.mark.parametrize("file", ["sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"])
def test_a_containers_limit_counts_where_it_is_lower(tmp_path: Path, file: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       24684096 kB\nMemAvailable:   20000000 kB\n")
    assert main_memory(tmp_path) == 20_000_000 * 1024, "what the kernel says"
    limit = tmp_path / file
    limit.parent.mkdir(parents=True)
    limit.write_text("2147483648\n")
    assert main_memory(tmp_path) == 2**31
    limit.write_text("max\n")
    assert main_memory(tmp_path) == 20_000_000 * 1024


def test_this_machine_is_described_in_words(tmp_path: Path) -> None:
    """Where there is no /proc, all memory counts."""
    assert main_memory(tmp_path) > 2**28
    assert this_machine().main_memory > 2**28
    assert Machine((), 24_000_000_000).description == "the main memory has 24.0 GB available and there is no GPU"
    assert Machine((24_000_000_000,), 1).description == "the GPU has 24.0 GB free"
    assert Machine((24_000_000_000, 12_000_000_000), 1).description == "the 2 GPUs have 36.0 GB free (24.0 GB, 12.0 GB)"
