"""Dual cross attention: rollout, selection, pairs, weighted losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attention
from attention.dcal import (
    GlobalLocalCrossAttention,
    PairwiseCrossAttention,
    UncertaintyWeights,
    most_seen,
    rollout,
)
from attention.softmax import SoftmaxAttention
from kernels.errors import InputError


def make_glca(**params: float | bool) -> GlobalLocalCrossAttention:
    torch.manual_seed(0)
    module = attention.create("glca", dim=16, num_heads=2, **params)
    assert isinstance(module, GlobalLocalCrossAttention)
    return module.eval()


def make_pwca() -> PairwiseCrossAttention:
    torch.manual_seed(0)
    module = attention.create("pwca", dim=16, num_heads=2)
    assert isinstance(module, PairwiseCrossAttention)
    return module.eval()


def maps(layers: int, tokens: int, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(layers, batch, 4, tokens, tokens).softmax(-1)


def test_the_rollout_is_the_class_row_of_the_product_of_all_layers() -> None:
    attentions = maps(3, 7)
    product = torch.eye(7)
    for layer in attentions:
        product = (0.5 * layer.mean(1) + 0.5 * torch.eye(7)) @ product
    torch.testing.assert_close(rollout(attentions), product[:, 0])
    torch.testing.assert_close(rollout(attentions.mean(2)), product[:, 0])
    torch.testing.assert_close(rollout(attentions).sum(-1), torch.ones(2))


@pytest.mark.parametrize(("ratio", "kept"), [(0.3, 3), (0.01, 1), (1.0, 10), (0.29, 2)])
def test_a_share_of_the_tokens_is_kept_the_most_seen_first_and_never_the_class_token(ratio: float, kept: int) -> None:
    seen = torch.cat([torch.full((2, 1), 9.0), torch.randn(2, 10)], 1)
    index, chosen = most_seen(seen, ratio)
    assert index.shape == (2, kept) and (index > 0).all() and chosen.all()
    scores = seen.gather(1, index)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert (scores[:, -1:] >= seen[:, 1:].sort(1, descending=True).values[:, kept - 1 : kept]).all()


def test_selected_queries_read_as_they_would_among_all() -> None:
    module = make_glca(ratio=0.4)
    x, attentions = torch.randn(2, 11, 16), maps(2, 11)
    index, _ = module.select(attentions)
    out, weights = module(x, x, attentions=attentions, return_attention=True)
    assert out.shape == (2, 4, 16) and weights.shape == (2, 2, 4, 11)
    torch.testing.assert_close(out, module(x, x).gather(1, index[..., None].expand(-1, -1, 16)))
    with_class = make_glca(ratio=0.4, keep_class=True)
    torch.testing.assert_close(with_class(x, x, attentions=attentions)[:, 1:], out)
    torch.testing.assert_close(with_class(x, x, attentions=attentions)[:, :1], module(x[:, :1], x))


def test_masked_tokens_are_neither_selected_nor_counted() -> None:
    module = make_glca(ratio=0.5)
    x, attentions = torch.randn(1, 9, 16), maps(2, 9, batch=1).mean(2)
    real = torch.arange(9)[None] < 5
    attentions = attentions.masked_fill(~real[:, None], 0)
    alone = module(x[:, :5], x[:, :5], attentions=attentions[..., :5, :5])
    poisoned = x.masked_fill(~real[..., None], torch.nan)
    holes = attentions.masked_fill(~real[..., None], torch.nan)
    out = module(poisoned, poisoned, real, attentions=holes)
    assert alone.shape == (1, 2, 16) and out.shape == (1, 4, 16)
    torch.testing.assert_close(out[:, :2], alone)
    assert (out[:, 2:] == 0).all()


def test_selection_does_not_pass_a_gradient_to_the_maps() -> None:
    module = make_glca()
    attentions = maps(2, 11).requires_grad_()
    x = torch.randn(2, 11, 16, requires_grad=True)
    module(x, x, attentions=attentions).sum().backward()
    assert attentions.grad is None and x.grad is not None and x.grad.abs().sum() > 0


def test_a_pair_is_read_under_one_softmax() -> None:
    module = make_pwca()
    one, other = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    _, weights = module(one, other, return_attention=True)
    assert weights.shape == (2, 2, 5, 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5))


def test_an_image_paired_with_itself_is_self_attention() -> None:
    mixer = SoftmaxAttention(16, 2).eval()
    pair = PairwiseCrossAttention.sharing(mixer).eval()
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(pair(x, x), mixer(x), rtol=1e-5, atol=1e-6)
    pair(x, torch.randn(2, 6, 16)).sum().backward()
    assert mixer.qkv.weight.grad is not None and pair.qkv.weight is mixer.qkv.weight


def test_tokens_masked_in_the_first_image_are_as_if_absent() -> None:
    module = make_pwca()
    one, other = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    q_mask = torch.arange(5).expand(2, 5) < 3
    out = module(one.masked_fill(~q_mask[..., None], torch.nan), other, q_mask=q_mask)
    torch.testing.assert_close(out[:, :3], module(one[:, :3], other))
    assert (out[:, 3:] == 0).all()


def test_uncertainties_weigh_losses_and_settle_at_their_logarithms() -> None:
    weighted = UncertaintyWeights(2)
    losses = [torch.tensor(0.5), torch.tensor(4.0)]
    torch.testing.assert_close(weighted(losses), torch.tensor(2.25))
    with torch.no_grad():
        weighted.w.copy_(torch.stack(losses).log())
    weighted(losses).backward()
    torch.testing.assert_close(weighted.w.grad, torch.zeros(2))


def test_bad_values_are_refused() -> None:
    for ratio in (0.0, 1.2):
        with pytest.raises(InputError, match=f"'glca': ratio={ratio} must be more than 0"):
            make_glca(ratio=ratio)
    module, x = make_glca(), torch.randn(2, 11, 16)
    with pytest.raises(InputError, match="the maps are of these"):
        module(x, x, attentions=maps(2, 12))
    with pytest.raises(InputError, match="the maps are of these"):
        module(x[:, 1:], x, attentions=maps(2, 11))
    with pytest.raises(InputError, match="at least one layer"):
        module(x, x, attentions=[])
    with pytest.raises(InputError, match="there are none"):
        module(x[:, :1], x[:, :1], attentions=maps(1, 1))
    with pytest.raises(InputError, match="3 losses are weighted here; got 2"):
        UncertaintyWeights()([torch.zeros(())] * 2)
    with pytest.raises(InputError, match="count=0"):
        UncertaintyWeights(0)
