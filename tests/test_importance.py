import torch

from gpu_worker.calibration import LayerActivations
from gpu_worker.importance import LayerImportance, column_scores, head_scores, wanda_sp
from protocol.shape import LayerShape
from tests.tiny_models import tiny_llama


def test_a_column_scores_its_mean_weight_times_the_root_mean_square_of_its_input() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    assert column_scores(weight, torch.tensor([4.0, 9.0])).tolist() == [2 * 2, 1 * 3]


def test_a_column_without_input_is_worth_nothing() -> None:
    assert column_scores(torch.ones(2, 2), torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_a_query_head_is_worth_the_sum_of_its_columns() -> None:
    columns = torch.arange(8.0)
    scores = head_scores(columns, LayerShape(query_heads=4, kv_heads=2, mlp_channels=1))
    assert scores.tolist() == [[0 + 1, 2 + 3], [4 + 5, 6 + 7]]


def test_a_kv_head_is_worth_the_sum_of_its_query_heads() -> None:
    importance = LayerImportance(query_heads=torch.tensor([[1.0, 2.0], [3.0, 4.0]]), channels=torch.zeros(1))
    assert importance.kv_heads.tolist() == [3, 7]


def test_wanda_sp_scores_every_head_and_channel_of_a_layer() -> None:
    decoder = tiny_llama().decoder
    layer, shape = decoder.layers[0], decoder.shape.layers[0]
    seen = LayerActivations(torch.rand(6 * 8), torch.rand(48))
    scores = wanda_sp(layer, seen, shape)
    head = [layer.output.weight[:, 24 + j].abs().mean() * seen.attention_output[24 + j].sqrt() for j in range(8)]
    assert torch.isclose(scores.query_heads[1, 1].float(), torch.stack(head).sum())
    channel = layer.down.weight[:, 5].abs().mean() * seen.mlp_output[5].sqrt()
    assert torch.isclose(scores.channels[5].float(), channel)
