"""CrossViT's attention: folded projections, the query as its own key, the exchange between branches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attention
from attention.crossvit import CrossViTAttention, CrossViTBlock, ItemDropout, MultiScaleBlock
from attention.folding import folds
from kernels.errors import InputError
from tests.attention.released.crossvit import released


def make(dim: int = 24, heads: int = 4, **params: bool) -> CrossViTAttention:
    torch.manual_seed(0)
    module = attention.create("crossvit", dim=dim, num_heads=heads, **params)
    assert isinstance(module, CrossViTAttention)
    return module.eval()


@pytest.mark.parametrize("own_key", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("queries", [1, 3, 20])
def test_folded_and_projected_keys_give_one_result(queries: int, bias: bool, own_key: bool) -> None:
    module = make(own_key=own_key, qkv_bias=bias)
    q, kv = torch.randn(2, queries, 24), torch.randn(2, 9, 24)
    mask = torch.rand(2, 9) > 0.3
    read = kv * mask[..., None]
    one, other = module._read_folded(q, read, mask), module._read_projected(q, read, mask, True)
    for folded, projected in zip(one, other, strict=True):
        torch.testing.assert_close(folded, projected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module(q, kv), released(module)(q, kv), rtol=1e-5, atol=1e-6)


def test_many_queries_are_read_with_projected_keys_and_few_without() -> None:
    module = make()
    assert folds(8, 4, 24, 24) and not folds(9, 4, 24, 24)
    tokens = 1000
    assert module.flops((1, 8, tokens)) == pytest.approx(module.flops((1, 9, tokens)), rel=0.1)
    assert "keys and values" in [part.name for part in module.cost((1, 9, tokens))]
    assert "keys and values" not in [part.name for part in module.cost((1, 1, tokens))]


@pytest.mark.parametrize("own_key", [True, False])
@pytest.mark.parametrize("queries", [2, 20])
def test_weights_sum_to_one_over_the_tokens_and_the_query_itself(queries: int, own_key: bool) -> None:
    module = make(own_key=own_key)
    mask = torch.arange(7).expand(2, 7) < 5
    _, weights = module(torch.randn(2, queries, 24), torch.randn(2, 7, 24), mask, return_attention=True)
    assert weights.shape == (2, 4, queries, 7 + own_key)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, queries))
    assert (weights[..., -2:] == 0).all()


@pytest.mark.parametrize("queries", [2, 20])
def test_a_query_does_not_see_the_other_queries(queries: int) -> None:
    module = make()
    q, kv = torch.randn(2, queries, 24), torch.randn(2, 7, 24)
    torch.testing.assert_close(module(q, kv)[:, 1:2], module(q[:, 1:2], kv), rtol=1e-5, atol=1e-6)


def test_equal_tokens_are_read_as_their_value_whatever_the_query() -> None:
    module = make(own_key=False)
    kv = torch.randn(2, 1, 24).expand(2, 6, 24)
    expected = module.proj(module.wv(kv[:, :1])).expand(2, 3, 24)
    torch.testing.assert_close(module(torch.randn(2, 3, 24), kv), expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_the_tokens_does_not_matter() -> None:
    module = make()
    q, kv = torch.randn(2, 3, 24), torch.randn(2, 10, 24)
    torch.testing.assert_close(module(q, kv[:, torch.randperm(10)]), module(q, kv), rtol=1e-5, atol=1e-6)


def test_every_parameter_has_a_gradient_though_keys_are_folded() -> None:
    module = make()
    module(torch.randn(2, 1, 24), torch.randn(2, 7, 24)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_branches_of_three_scales_exchange_class_tokens_and_keep_their_patches() -> None:
    torch.manual_seed(0)
    block = MultiScaleBlock([8, 12, 16], [2, 3, 4], [0, 0, 0, 2], [1, 1, 1]).eval()
    branches = [torch.randn(2, 1 + n, dim) for n, dim in ((4, 8), (9, 12), (1, 16))]
    out = block(branches)
    for before, after in zip(branches, out, strict=True):
        assert after.shape == before.shape
        assert torch.equal(before[:, 1:], after[:, 1:]) and not torch.equal(before[:, 0], after[:, 0])
    changed = [branches[0], torch.randn(2, 10, 12), branches[2]]
    other = block(changed)
    assert not torch.equal(other[0], out[0]), "the first branch reads the second"
    assert torch.equal(other[2], out[2]), "the last branch reads the first alone"


def test_a_branch_may_be_mixed_by_another_attention() -> None:
    block = MultiScaleBlock([8, 8], [2, 2], [1, 1, 0], [2, 2], make_mixer=lambda dim, heads: nn.Identity())
    out = block([torch.randn(2, 5, 8), torch.randn(2, 3, 8)])
    assert [tuple(tokens.shape) for tokens in out] == [(2, 5, 8), (2, 3, 8)]
    assert not any("qkv" in name for name in block.state_dict())


def test_a_dropped_item_keeps_its_class_token_and_the_mean_is_kept() -> None:
    torch.manual_seed(0)
    block = CrossViTBlock(8, 2, drop_path=0.5).train()
    token, patches = torch.randn(1, 1, 8).expand(400, 1, 8), torch.randn(1, 3, 8).expand(400, 3, 8)
    out = block(token, patches)
    skipped = (out == token).all(-1)[:, 0]
    assert 120 < skipped.sum() < 280
    full = block.eval()(token[:1], patches[:1])[0] - token[0]
    torch.testing.assert_close((out - token)[~skipped], (2 * full).expand(int((~skipped).sum()), 1, 8))


def test_bad_values_are_refused() -> None:
    with pytest.raises(InputError, match=r"one depth more; got dims=\[8, 12\].*depths=\[1, 1\]"):
        MultiScaleBlock([8, 12], [2, 2], [1, 1], [1, 1])
    with pytest.raises(InputError, match="drop_path=1 must be"):
        ItemDropout(1)
    with pytest.raises(InputError, match="dim=24 is not divisible into num_heads=5"):
        make(heads=5)
