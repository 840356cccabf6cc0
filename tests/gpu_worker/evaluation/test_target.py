"""The prepared target model."""

from pathlib import Path

import pytest
import torch

from gpu_worker.evaluation.target import Target
from tests.support.tiny_specs import tiny_spec


def test_the_ridge_follows_from_the_amount_of_calibration_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_spec(tmp_path).model_copy(update={"reconstruction": "least-squares"})
    seen: list[int] = []

    def ridge(tokens: int) -> float:
        seen.append(tokens)
        return 1e6 if len(seen) > 1 else 0.01

    monkeypatch.setattr("gpu_worker.evaluation.target.damping_for", ridge)
    weights = []
    for _ in range(2):
        target = Target(spec)
        target.prune(spec.uniform_plan(target.shape))
        weights.append(target.model.decoder.layers[0].down.weight.clone())
    assert seen == [4 * 32, 4 * 32]
    assert not torch.allclose(weights[0], weights[1]), "a strong ridge keeps the old weights"
