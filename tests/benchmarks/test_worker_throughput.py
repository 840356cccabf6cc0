import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.worker_throughput import __main__ as benchmark
from benchmarks.worker_throughput.products import Products
from benchmarks.worker_throughput.random_models import SHAPES, random_model
from gpu_worker.pruning.ordered_model import OrderedModel
from tests.support.pruned_models import keep, scores_of
from tests.support.tiny_models import save_tiny_folder, tiny_model


def test_the_table_has_every_way_and_the_naive_way_measures_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_folder(tmp_path / "model", hidden_size=48, channels=200)
    sizes = "--dtype float32 --windows 2 --seqlen 32 --calibration-windows 2 --candidates 1 --rates 0 0.4"
    files = ["--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "found.png")]
    monkeypatch.setattr(sys, "argv", ["worker_throughput", "--model", str(model), *sizes.split(), *files])
    assert benchmark.main() == 0
    found = json.loads((tmp_path / "found.json").read_text())
    ways = {(row["fitness"], row["reconstruction"], row["rate"]) for row in found["rows"]}
    assert ways == {(*way, rate) for way in benchmark.WAYS for rate in (0.0, 0.4)}
    for row in found["rows"]:
        assert row["products"] > 0 and row["seconds"] > 0 and sum(row["stages"].values()) == pytest.approx(1)
        assert row["stages"]["products"] > 0
    (naive,) = found["naive"]
    assert naive["perplexity"] == pytest.approx(naive["ours_perplexity"], rel=1e-4)
    assert (tmp_path / "found.png").stat().st_size > 10_000
    assert "a second search" in capsys.readouterr().out


def test_operations_are_counted_at_the_sizes_of_the_plan() -> None:
    model = tiny_model("llama")
    ordered = OrderedModel(model.decoder, scores_of(model))
    kept = (2, 1, 20), (3, 2, 48), (1, 2, 7)
    ordered.apply(keep(*kept))
    hidden, dim, seqlen = model.decoder.shape.hidden_size, model.decoder.shape.head_dim, 10
    weights = sum(
        hidden * dim * (2 * kv * q + 2 * kv) + 3 * hidden * mlp for kv, q, mlp in ((2, 1, 20), (3, 2, 48), (1, 2, 7))
    )
    weights += model.decoder.head.weight.numel()
    attention = seqlen * seqlen * dim * (2 + 6 + 2)
    products = Products(model.decoder, seqlen)
    products.run()
    assert products.flops == 2 * seqlen * weights + 2 * attention


@pytest.mark.parametrize("name", SHAPES)
def test_random_models_have_the_published_number_of_parameters(name: str) -> None:
    published = {"smollm2": 134.5e6, "llama-2-7b": 6.738e9, "llama-3-8b": 8.03e9, "llama-3-70b": 70.55e9}
    model = random_model(name, None, torch.bfloat16, torch.device("meta"))
    assert model.decoder.shape.total_parameters == pytest.approx(published[name], rel=2e-3)
