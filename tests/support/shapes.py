"""Hypothesis strategies for model shapes and pruning rates."""

from hypothesis import strategies as st

from protocol.plans.shape import LayerShape, ModelShape


@st.composite
def layer_shapes(draw: st.DrawFn) -> LayerShape:
    kv_heads = draw(st.integers(1, 6))
    return LayerShape(
        query_heads=kv_heads * draw(st.integers(1, 4)), kv_heads=kv_heads, mlp_channels=draw(st.integers(16, 300))
    )


@st.composite
def model_shapes(draw: st.DrawFn, *, most_sizes: int = 2) -> ModelShape:
    """Draw a shape whose layers have at most this many different sizes."""
    sizes = draw(st.lists(layer_shapes(), min_size=1, max_size=most_sizes))
    hidden, head_dim = draw(st.sampled_from([8, 24, 64])), draw(st.sampled_from([4, 8, 16]))
    return ModelShape(
        family="llama",
        hidden_size=hidden,
        head_dim=head_dim,
        layers=tuple(draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=12))),
        query_head_parameters=2 * head_dim * hidden,
        kv_head_parameters=2 * head_dim * hidden,
        channel_parameters=3 * hidden,
        attention_fixed=hidden,
        mlp_fixed=draw(st.sampled_from([0, hidden])),
        other_parameters=100 * hidden,
    )


def some_rates(count: int) -> st.SearchStrategy[list[float]]:
    """Draw proposed rates, inside and outside the bounds."""
    return st.lists(st.floats(-2, 3), min_size=count, max_size=count)
