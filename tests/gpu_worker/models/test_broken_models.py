"""Model files that are broken or hostile: each loads, or is refused in one sentence, soon and without much memory."""

import json
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from gpu_worker.models import loading as models
from gpu_worker.models.checkpoint_files import is_inside
from gpu_worker.models.gguf_layout import MAX_ELEMENTS, check_layout, open_gguf
from gpu_worker.models.loading import load_model
from protocol.errors import ModelError
from tests.support import broken_models
from tests.support.broken_models import (
    SENSELESS,
    Break,
    with_header,
    with_holes,
    with_index,
    with_link,
    with_packed_records,
    with_pipe,
    with_tensors,
    with_text,
)
from tests.support.root import ROOT
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import change_config, save_tiny_folder, tiny_llama

pytestmark = pytest.mark.usefixtures("own_cache")
SECONDS = 20.0
"""Most that one file may take, on a busy machine; each takes well under one second alone."""
MEGABYTES = 500
"""Most that the process may grow by."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_folder(tmp_path / "model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A GGUF file that loads."""
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama(hidden_size=48)).read_bytes()


def refusal(path: Path) -> str:
    """Load a model; the sentence that refuses it, empty where it loads. Any other error fails the test."""
    began, before = time.monotonic(), _peak()
    try:
        load_model(str(path), "float32")
        sentence = ""
    except ModelError as error:
        sentence = str(error)
    assert time.monotonic() - began < SECONDS
    assert _peak() - before < MEGABYTES
    assert "\n" not in sentence and len(sentence) < 800
    return sentence


def _peak() -> float:
    """Most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


IMPOSSIBLE: dict[str, list[object]] = {
    "num_hidden_layers": [10**9, 1001],
    "hidden_size": [10**12, float("nan")],
    "vocab_size": [2**40],
    "num_key_value_heads": [5],
    "num_labels": [10**9],  # a table of so many names
    "partial_rotary_factor": [1e12],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e12}],
    "rms_norm_eps": [float("nan")],
    "rope_theta": [float("inf"), 10**40],
    "max_position_embeddings": [10**18],
    "sliding_window": ["x"],
    "per_layer_config": [[1], {"0": 1}, {"0": {"intermediate_size": 10**12}}, {"0": {"num_attention_heads": 4}}],
}


@pytest.mark.parametrize(
    "changes",
    [
        *({key: value} for key, values in IMPOSSIBLE.items() for value in values),
        {"num_attention_heads": 2**30, "head_dim": 2**30},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_a_config_of_impossible_sizes_is_refused_by_what_it_says(folder: Path, changes: dict[str, object]) -> None:
    change_config(folder, **changes)
    assert "the config of" in refusal(folder)


def test_large_numbers_that_size_nothing_load(folder: Path) -> None:
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 45.2e9}, tokens_seen=15 * 10**12)
    change_config(folder, tokenizer_model_max_length=int(1e30))  # transformers writes this number for "no limit"
    assert not refusal(folder)


def test_a_config_that_asks_for_far_more_weights_than_there_are_is_refused_before_they_are_made(folder: Path) -> None:
    change_config(folder, vocab_size=2**22)  # 600 MB of fp32, which memory has room for
    assert "asks for 151" in (sentence := refusal(folder)) and "where its files hold" in sentence


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_each_senseless_value_of_each_key_of_a_config_loads_or_is_refused(tmp_path: Path, family: str) -> None:
    folder = save_tiny_folder(tmp_path / "model", family)
    written = (folder / "config.json").read_text()
    refused = 0
    for key in [*json.loads(written), "rope_scaling", "num_labels", "per_layer_config", "text_config", "auto_map"]:
        for value in SENSELESS[:: 1 if key.startswith(("num", "hid", "voc", "rope")) else 4]:
            change_config(folder, **{key: value})
            refused += bool(refusal(folder))
            (folder / "config.json").write_text(written)
    assert refused > 50
    assert not refusal(folder)


@pytest.mark.parametrize(
    "breaks",
    [
        *(with_header(b"{}", length=length) for length in (2**63, 2**64 - 1)),
        *(with_header(header) for header in (b"[" * 100_000, b'{"a":' * 100_000, b" " * 2**20)),
        *(with_tensors(("a", *sizes)) for sizes in (([2**63], [0, 16]), ([2**32, 2**32], [0, 16]), ([16], [0, 2**63]))),
        with_tensors(("a", [4], [16, 0])),
        *(with_tensors(("a", [4], [0, 16]), other) for other in (("b", [4], [8, 24]), ("a", [12], [16, 64]))),
        *(
            with_index({"a": to})
            for to in ("../outside", "/etc/passwd", "sub/../../outside", "..\\outside", "x\0y", "")
        ),
        *(with_index(weight_map) for weight_map in ({"a": 1}, ["a"], None)),
        *(with_text("model.safetensors.index.json", text) for text in ("{", "[" * 100_000)),
        *(with_holes(name, 2**30) for name in ("tokenizer.json", "config.json", "generation_config.json")),
        with_holes("chat_template.jinja", 2**30),
        with_text("tokenizer.json", "[" * 1_000_000),
        with_text("config.json", '{"a":' * 100_000),
        with_text("config.json", '{"model_type": "llama", "num_hidden_layers": ' + "9" * 10_000 + "}"),
        with_text("config.json", json.dumps({"model_type": "x" * 1_000_000})),
        with_text("config.json", json.dumps({"model_type": "llama", "intermediate_size": [8] * 10**6})),
        *(with_pipe(name) for name in ("model.safetensors", "model-00001-of-00002.safetensors")),
        *(with_pipe(name) for name in ("config.json", "tokenizer_config.json")),
        *(with_link(name, "/dev/zero") for name in ("model.safetensors", "tokenizer.json", "pytorch_model.bin")),
        with_link("generation_config.json", "generation_config.json"),
        with_link("model.safetensors", "nowhere"),
    ],
    ids=str,
)
def test_a_broken_folder_is_refused_in_a_sentence(folder: Path, breaks: Break) -> None:
    breaks.on(folder)
    assert refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "shard.bin"])
def test_weights_that_would_unpack_to_more_than_their_file_are_refused(folder: Path, name: str) -> None:
    with_packed_records(name).on(folder)
    assert f"the file {name!r}" in (sentence := refusal(folder)) and "would unpack to" in sentence


@pytest.mark.parametrize(
    "adds",
    [
        *(with_holes(name, 2**31) for name in ("train.log", "trainer_state.json", "all.zip", "rust_model.ot")),
        *(with_holes(name, 2**31) for name in ("model.onnx_data", "imatrix.dat", "steps.npz", "optimizer.pt")),
        *(with_link(name, "nowhere") for name in ("latest", "notes.json", "training_args.bin")),
        *(with_link(name, "/dev/zero") for name in ("zeros", "zeros.json", "zeros.bin")),
        *(with_pipe(name) for name in ("socket", "pipe.json", "pipe.bin")),
    ],
    ids=str,
)
def test_a_file_that_is_never_read_may_be_anything(folder: Path, adds: Break) -> None:
    adds.on(folder)
    assert not refusal(folder)


def test_beginnings_of_a_file_of_weights_and_changes_in_its_header_load_or_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for variant in [*broken_models.cuts(data, 4096), *broken_models.changes(data[:2000], 60, seed=1)]:
        file.write_bytes(variant + data[2000:] if len(variant) == 2000 else variant)
        refusal(folder)


def test_a_folder_of_the_hubs_cache_whose_files_are_links_loads(tmp_path: Path, folder: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs = snapshot.parent.parent / "blobs"
    for each in (snapshot, blobs):
        each.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert not refusal(snapshot)


def test_weights_in_shards_load_from_the_folder_and_below(folder: Path) -> None:
    weights = folder / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), "parts/one.safetensors")}
    (folder / "parts").mkdir()
    weights.rename(folder / "parts" / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not refusal(folder)


@pytest.mark.parametrize(("file", "inside"), [("a.bin", True), ("a/b", True), ("../a", False), ("/a", False)])
def test_a_name_leads_out_of_its_folder_or_does_not(file: str, inside: bool) -> None:
    assert is_inside(file) == inside


def test_code_beside_the_weights_is_not_run(folder: Path) -> None:
    (folder / "modeling.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    auto = {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M", "AutoTokenizer": ["modeling.T", None]}
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto}))
    assert not refusal(folder)
    assert not (folder / "ran").exists()


def _add_adapter(folder: Path, base: Path) -> None:
    """An adapter that peft can load, whose config names the model in `base`."""
    rank, layer = 2, "base_model.model.model.layers.0.self_attn.q_proj"
    config = peft.LoraConfig(
        r=rank, target_modules=["q_proj"], layers_to_transform=[0], base_model_name_or_path=str(base)
    )
    config.save_pretrained(folder)
    sizes = json.loads((folder / "config.json").read_text())
    queries = sizes["num_attention_heads"] * sizes["head_dim"]
    tensors = {"A": torch.ones(rank, sizes["hidden_size"]), "B": torch.ones(queries, rank)}
    save_file(
        {f"{layer}.lora_{name}.weight": tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )


def _weights_of(model: str) -> dict[str, list[Any]]:
    state = load_model(model, "float32").causal_lm.state_dict()
    return {name: tensor.tolist() for name, tensor in state.items()}


def test_an_adapter_without_a_model_of_its_own_does_not_lead_to_the_model_that_it_names(
    folder: Path, tmp_path: Path
) -> None:
    _add_adapter(folder, save_tiny_folder(tmp_path / "other", seed=1))
    (folder / "model.safetensors").unlink()
    assert "holds only an adapter (adapter_config.json) and no model" in refusal(folder)


def test_a_merged_model_loads_as_it_is_although_its_adapter_is_still_there(folder: Path, tmp_path: Path) -> None:
    weights = _weights_of(str(folder))
    _add_adapter(folder, save_tiny_folder(tmp_path / "other", seed=1))
    assert _weights_of(str(folder)) == weights


def _in_the_hubs_cache(cache: Path, commit: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a commit of the model `a/b` in the hub's cache, with the hub out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(models, "hub_reachable", lambda: False)
    repository = cache / "models--a--b"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def test_an_adapter_on_the_hub_is_treated_like_one_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_folder(_in_the_hubs_cache(tmp_path / "cache", "1" * 40, monkeypatch))
    weights = _weights_of("a/b")
    _add_adapter(folder, save_tiny_folder(tmp_path / "other", seed=1))
    assert _weights_of("a/b") == weights
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="and no model; merge"):
        load_model("a/b", "float32")


def test_each_commit_of_a_model_on_the_hub_has_an_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identities = []
    for seed, commit in enumerate(("1" * 40, "2" * 40)):
        save_tiny_folder(_in_the_hubs_cache(tmp_path, commit, monkeypatch), seed=seed)
        identities.append(load_model("a/b", "float32").identity)
    assert identities == ["1" * 40, "2" * 40]


def test_the_command_line_refuses_a_broken_model_in_one_sentence(folder: Path) -> None:
    change_config(folder, num_hidden_layers=10**9)
    command = [sys.executable, "-c", "import sys; from daemon.cli import main; sys.exit(main())"]
    command += ["allocate", "uniform", "--model", str(folder), "--rate", "0.3"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert "num_hidden_layers 1000000000" in ended.stderr.splitlines()[-1] and "Traceback" not in ended.stderr


def test_every_beginning_of_a_gguf_file_is_refused(tmp_path: Path, whole: bytes) -> None:
    file = tmp_path / "cut.gguf"
    header, data = broken_models.cuts(whole[:9000], 64), broken_models.cuts(whole, 4096)
    for beginning in (*header, *data):
        file.write_bytes(beginning)
        with pytest.raises(ValueError, match=r"."):
            check_layout(file)
    file.write_bytes(whole)
    check_layout(file)


def test_a_gguf_header_that_passes_the_checks_can_be_read(tmp_path: Path, whole: bytes) -> None:
    """The library reads whatever is let through, without an error of its own that says nothing."""
    file = tmp_path / "changed.gguf"
    passed = 0
    for variant in broken_models.changes(whole[:9000], 250, seed=2):
        file.write_bytes(variant + whole[9000:])
        try:
            open_gguf(file)
            passed += 1
        except ValueError:
            continue
    assert passed


def test_changed_gguf_files_load_or_are_refused(tmp_path: Path, whole: bytes) -> None:
    file = tmp_path / "changed.gguf"
    for variant in broken_models.changes(whole[:1500], 40, seed=3):
        file.write_bytes(variant + whole[1500:])
        refusal(file)


def _gguf(*, fields: bytes = b"", kv: int = 0, tensors: int = 0, described: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, kv) + fields + described + b"\0" * 64


def _text(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def _array(kind: int, count: int) -> bytes:
    return _text(b"a") + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, count)


def _tensor(shape: list[int], kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    size = len(shape) if dimensions is None else dimensions
    return _text(b"t") + struct.pack(f"<I{len(shape)}QIQ", size, *shape, kind, offset)


HEADERS = {
    "2**60 fields": _gguf(kv=2**60),
    "2**60 tensors": _gguf(tensors=2**60),
    "an array of 2**40": _gguf(kv=1, fields=_array(0, 2**40)),
    "an array of one too many": _gguf(kv=1, fields=_array(0, MAX_ELEMENTS + 1)),
    "an array of arrays": _gguf(kv=1, fields=_array(gguf.GGUFValueType.ARRAY, 1)),
    "an array of texts of 2**50": _gguf(kv=1, fields=_array(gguf.GGUFValueType.STRING, 4) + _text(b"", 2**50)),
    "a name of 2**50": _gguf(kv=1, fields=_text(b"a", 2**50)),
    "a text of 2**64 - 1": _gguf(kv=1, fields=_text(b"a") + struct.pack("<I", 8) + _text(b"", 2**64 - 1)),
    "an unknown type": _gguf(kv=1, fields=_text(b"a") + struct.pack("<I", 99)),
    "a name that is no text": _gguf(kv=1, fields=_text(b"\xff") + struct.pack("<IB", 0, 1)),
    "a field twice": _gguf(kv=2, fields=2 * (_text(b"a") + struct.pack("<IB", 0, 1))),
    "an alignment of 0": _gguf(kv=1, fields=_text(b"general.alignment") + struct.pack("<II", 4, 0)),
    "a product that overflows": _gguf(tensors=1, described=_tensor([2**32, 2**32])),
    "an offset past the end": _gguf(tensors=1, described=_tensor([1], offset=2**40)),
    "an offset that is not aligned": _gguf(tensors=1, described=_tensor([1], offset=1)),
    "no dimensions": _gguf(tensors=1, described=_tensor([])),
    "2**31 dimensions": _gguf(tensors=1, described=_tensor([], dimensions=2**31)),
    "a dimension of 0": _gguf(tensors=1, described=_tensor([0])),
    "part of a block": _gguf(tensors=1, described=_tensor([33], kind=8)),
    "an unknown weight type": _gguf(tensors=1, described=_tensor([1], kind=4000)),
    "a tensor twice": _gguf(tensors=2, described=2 * _tensor([1])),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + b"\0" * 64,
    "version 99": _gguf(version=99),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_gguf_header_that_cannot_be_is_refused(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(header)
    assert "cannot be unpacked (" in refusal(file)


def test_sizes_in_a_gguf_file_are_bounded_like_those_of_a_config(tmp_path: Path, whole: bytes) -> None:
    file = tmp_path / "large.gguf"
    for name in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count"):
        field = f"llama.{name}".encode()
        place = whole.index(field + struct.pack("<I", 4)) + len(field) + 4
        file.write_bytes(whole[:place] + struct.pack("<I", 2**32 - 1) + whole[place + 4 :])
        assert "4294967295, which must be an integer" in refusal(file)
