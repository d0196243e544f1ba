import pytest
import torch
from torch import nn

from conftest import small_detector_config
from sgtr_hf.modeling.transformer_layers import DecoderLayer, EncoderLayer, MultiHeadAttention


WIDTH, HEADS, HIDDEN = 32, 4, 48


def copy_attention(source: nn.MultiheadAttention, target: MultiHeadAttention):
    weights, biases = source.in_proj_weight.chunk(3), source.in_proj_bias.chunk(3)
    for role, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        projection = getattr(target, f"{role}_projection")
        projection.weight.data.copy_(weight)
        projection.bias.data.copy_(bias)
    target.output_projection.load_state_dict(source.out_proj.state_dict())


def copy_parts(source, target, norms):
    copy_attention(source.self_attn, target.self_attention)
    if hasattr(source, "multihead_attn"):
        copy_attention(source.multihead_attn, target.cross_attention)
    target.feed_forward.expansion.load_state_dict(source.linear1.state_dict())
    target.feed_forward.contraction.load_state_dict(source.linear2.state_dict())
    for number, norm in enumerate(norms, start=1):
        reference = getattr(source, f"norm{number}")
        nn.init.normal_(reference.weight)
        nn.init.normal_(reference.bias)
        getattr(target, norm).load_state_dict(reference.state_dict())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_equals_torch(norm_first, implementation):
    torch.manual_seed(0)
    config = small_detector_config(norm_first=norm_first, query_type="learned")
    config._attn_implementation = implementation
    layer = EncoderLayer(config).eval()
    reference = nn.TransformerEncoderLayer(
        WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=norm_first
    ).eval()
    copy_parts(reference, layer, ("self_attention_norm", "feed_forward_norm"))
    features = torch.randn(2, 7, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(
            layer(features, torch.zeros_like(features)), reference(features), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_layer_equals_torch(norm_first, implementation):
    torch.manual_seed(0)
    config = small_detector_config(norm_first=norm_first, query_type="learned")
    config._attn_implementation = implementation
    layer = DecoderLayer(config).eval()
    reference = nn.TransformerDecoderLayer(
        WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=norm_first
    ).eval()
    norms = ("self_attention_norm", "cross_attention_norm", "feed_forward_norm")
    copy_parts(reference, layer, norms)
    queries, memory = torch.randn(2, 5, WIDTH), torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(
            layer(queries, memory), reference(queries, memory), rtol=0, atol=2e-6
        )


def test_positions_reach_queries_and_keys_but_never_values():
    torch.manual_seed(0)
    attention = MultiHeadAttention(small_detector_config()).eval()
    features, position = torch.randn(1, 4, WIDTH), torch.randn(1, 4, WIDTH)
    # With one key the weights are 1: the result is the value, whatever the position.
    with torch.no_grad():
        with_position, _ = attention(
            features + position, (features + position)[:, :1], features[:, :1]
        )
        without, _ = attention(features, features[:, :1], features[:, :1])
    torch.testing.assert_close(with_position, without)


def test_only_the_eager_backend_returns_weights():
    config = small_detector_config()
    features = torch.randn(1, 4, WIDTH)
    config._attn_implementation = "eager"
    _, weights = MultiHeadAttention(config).eval()(features, features, features)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, HEADS, 4))
    config._attn_implementation = "sdpa"
    _, weights = MultiHeadAttention(config).eval()(features, features, features)
    assert weights is None
