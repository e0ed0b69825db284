"""Efficient probing: pooling before projecting, normalised heads, given queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attention
from attention.efficient_probing import EfficientProbing, EfficientProbingCross
from kernels.errors import InputError
from tests.attention.common import bounds
from tests.attention.released.efficient_probing import released_cross, released_pooling


def make(**params: Any) -> EfficientProbing:
    torch.manual_seed(0)
    module = attention.create(
        "efficient_probing", kind="pooling", dim=24, num_classes=3, **{"num_queries": 4, **params}
    )
    assert isinstance(module, EfficientProbing)
    return module.eval()


def make_cross(**params: Any) -> EfficientProbingCross:
    torch.manual_seed(0)
    module = attention.create("efficient_probing", kind="cross", dim=24, **params)
    assert isinstance(module, EfficientProbingCross)
    return module.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("d_out", "queries"), [(1, 1), (1, 24), (2, 4), (3, 8)])
def test_projecting_the_means_is_taking_the_means_of_projections(d_out: int, queries: int, bias: bool) -> None:
    module = make(d_out=d_out, num_queries=queries, qkv_bias=bias, norm=None)
    x = torch.randn(3, 50, 24)
    bags = module(x.flatten(0, 1), bounds([50] * 3))
    torch.testing.assert_close(bags.embeddings, released_pooling(module)(x), rtol=1e-5, atol=1e-6)
    assert bags.embeddings.shape == (3, 24 // d_out) and bags.attention.shape == (queries, 150)


def test_each_query_fills_its_own_block_of_the_feature() -> None:
    module = make(norm=None)
    x, cu_seqlens = torch.randn(30, 24), bounds([20, 10])
    before = module(x, cu_seqlens).embeddings
    with torch.no_grad():
        module.cls_token[0, 2] += 5
    changed = (module(x, cu_seqlens).embeddings != before).any(0)
    assert changed.nonzero().flatten().tolist() == list(range(12, 18))


def test_equal_features_are_pooled_to_their_value() -> None:
    module = make(norm=None, qkv_bias=True)
    one = torch.randn(1, 24)
    torch.testing.assert_close(module(one.expand(9, 24), bounds([9])).embeddings, module.v(one))


def test_an_empty_bag_gives_zeros_though_values_have_a_bias() -> None:
    module = make(norm=None, qkv_bias=True)
    assert (module(torch.randn(4, 24), bounds([0, 4])).embeddings[0] == 0).all()


def test_bag_features_are_normalised_over_the_batch_while_training_and_by_running_values_after() -> None:
    module = make().train()
    x, cu_seqlens = torch.randn(400, 24), bounds([50] * 8)
    trained = module(x, cu_seqlens).embeddings
    torch.testing.assert_close(trained.mean(0), torch.zeros(24), atol=1e-5, rtol=0)
    torch.testing.assert_close(trained.var(0, unbiased=False), torch.ones(24), atol=1e-2, rtol=0)
    assert not list(module.norm.parameters()), "the norm has no parameters"
    assert module.norm.eps == 1e-6
    alone = module.eval()(x[:50], bounds([50])).embeddings
    torch.testing.assert_close(alone, module(x, cu_seqlens).embeddings[:1])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("queries", [2, 40])
def test_given_queries_read_as_learned_ones_do(queries: int, heads: int, bias: bool) -> None:
    module = make_cross(num_heads=heads, qkv_bias=bias)
    q, kv = torch.randn(2, queries, 24), torch.randn(2, 11, 24)
    torch.testing.assert_close(module(q, kv), released_cross(module)(q, kv), rtol=1e-5, atol=1e-6)


def test_one_given_query_does_what_one_learned_query_does() -> None:
    pooler, cross = make(num_queries=1, norm=None), make_cross()
    cross.load_state_dict({"v.weight": pooler.v.weight})
    x = torch.randn(1, 13, 24)
    torch.testing.assert_close(cross(pooler.cls_token, x)[:, 0], pooler(x[0], bounds([13])).embeddings)


def test_values_are_projected_for_many_queries_alone() -> None:
    names = [[part.name for part in make_cross(num_heads=4).cost((1, queries, 1000))] for queries in (8, 9)]
    assert "values" not in names[0] and "values" in names[1]


def test_bad_values_are_refused() -> None:
    with pytest.raises(InputError, match="d_out=5 does not divide the feature size 24"):
        make(d_out=5)
    with pytest.raises(InputError, match=r"num_queries=5 .*feature of size 24; take one of 1, 2, 3, 4, 6"):
        make(num_queries=5)
    with pytest.raises(InputError, match="Did you mean 'batch'"):
        make(norm="bacth")
