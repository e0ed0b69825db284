"""Bi-level routing: who is routed where, both forms, pooled keys, soft and learned routing, maps that do not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attention.bi_level_routing import POOLINGS, BiLevelRoutingAttention
from kernels.errors import InputError
from tests.attention.contract import gradients_are_right


def build(regions: int = 2, topk: int = 2, **options: Any) -> BiLevelRoutingAttention:
    torch.manual_seed(0)
    return BiLevelRoutingAttention(8, 2, regions, topk, **options)


def as_full_attention(module: BiLevelRoutingAttention, x: Tensor) -> Tensor:
    """Softmax over all tokens with the module's projections, scale and convolution."""
    q, k, v = module.qkv(x).chunk(3, -1)
    heads = (t.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, scale=module.scale).transpose(1, 2).reshape(x.shape)
    assert module.lepe is not None
    return module.proj(out + module.lepe(v.movedim(-1, 1)).movedim(1, -1))


@pytest.mark.parametrize("form", ["legacy", "refactored"])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3), (9, 2)])
def test_routing_to_every_region_is_full_attention(form: str, size: tuple[int, int]) -> None:
    module = build(3, 9, form=form)
    if form == "refactored":
        module.topk = 1000  # ragged maps have more regions than were asked for
    x = torch.randn(2, *size, 8)
    torch.testing.assert_close(module(x), as_full_attention(module, x))


def test_a_region_is_routed_to_the_regions_whose_mean_key_is_most_like_its_mean_query() -> None:
    module = build(2, 1)
    x = torch.randn(1, 4, 6, 8)
    q, k, _ = module.qkv(x).chunk(3, -1)
    cells = [(slice(i, i + 2), slice(j, j + 3)) for i in (0, 2) for j in (0, 3)]
    similarity = (
        torch.stack([q[0][a].mean((0, 1)) for a in cells]) @ torch.stack([k[0][a].mean((0, 1)) for a in cells]).T
    )
    best = similarity.argmax(1)
    _, weights = module(x, return_attention=True)
    total = weights[0, 0].unflatten(1, (4, 6)).unflatten(0, (4, 6))
    for region, cell in enumerate(cells):
        inside = total[cell].flatten(0, 1)
        torch.testing.assert_close(inside[:, *cells[best[region]]].sum((1, 2)), torch.ones(6))


def test_region_means_and_routes_leave_masked_tokens_and_empty_regions_out() -> None:
    module = build(2, 2)
    x = torch.randn(1, 4, 4, 8)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, 0, 0] = mask[:, 3, 3] = True
    q, k, _ = module.qkv(x).chunk(3, -1)
    chosen, share = module.route(q, k, mask, module.region_grid(4, 4))
    assert (chosen[0].sort(-1).values == torch.tensor([0, 3])).all()
    expected = (q[0, 0, 0] @ torch.stack([k[0, 0, 0], k[0, 3, 3]]).T * module.scale).softmax(-1)
    torch.testing.assert_close(share[0, 0], expected.sort(descending=True).values)
    two = F.scaled_dot_product_attention(
        *(module.qkv(x[mask]).chunk(3, -1)[i].unflatten(-1, (2, 4)).transpose(0, 1) for i in range(3)),
        scale=module.scale,
    )
    module.lepe = None
    torch.testing.assert_close(module(x, mask)[mask], module.proj(two.transpose(0, 1).flatten(1)))


def test_with_the_released_padding_zeros_are_seen() -> None:
    x = torch.randn(1, 5, 7, 8)
    padded = F.pad(x, (0, 0, 0, 2, 0, 1))
    even, ragged = build(3, 2, padding="error"), build(3, 2, padding="released")
    torch.testing.assert_close(ragged(x), even(padded)[:, :5, :7])
    seen = build(2, 3, form="refactored", padding="released")  # 3 x 3 regions of 2 x 3 tokens
    hidden = build(2, 3, form="refactored")
    assert (seen(x) - hidden(x)).abs().max() > 1e-3
    _, weights = seen(x, return_attention=True)
    assert (weights.sum(-1) < 0.99).any()


@pytest.mark.parametrize("pooling", [p for p in POOLINGS if p != "identity"])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_pooled_keys_leave_out_what_is_masked_or_outside(pooling: str, size: tuple[int, int]) -> None:
    module = build(2, 2, kv_pooling=pooling, kv_pooling_size=2)
    x = torch.randn(1, *size, 8)
    mask = torch.rand(1, *size) < 0.6
    poisoned = x.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(module(poisoned, mask), module(x, mask))
    torch.testing.assert_close(module(x, torch.ones_like(mask)), module(x))
    assert module(x, torch.zeros_like(mask)).abs().max() == 0


def test_pooling_to_single_tokens_is_no_pooling() -> None:
    x = torch.randn(2, 6, 5, 8)
    for pooling in ("average", "max"):
        torch.testing.assert_close(build(kv_pooling=pooling)(x), build()(x))
    assert (build(kv_pooling="average", kv_pooling_size=2)(x) - build()(x)).abs().max() > 1e-3


def test_adaptive_pooling_to_one_token_is_attention_to_region_means() -> None:
    module = build(2, 4, kv_pooling="adaptive_average", kv_pooling_size=1, lepe_kernel=0)
    x = torch.randn(1, 4, 4, 8)
    q, k, v = module.qkv(x).chunk(3, -1)
    means = [F.avg_pool2d(t.movedim(-1, 1), 2).flatten(2).mT for t in (k, v)]
    heads = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q.flatten(1, 2), *means))
    out = F.scaled_dot_product_attention(*heads, scale=module.scale).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(module(x), module.proj(out))
    _, weights = module(x, return_attention=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 16))


@pytest.mark.parametrize("routing", ["soft", "differentiable", "learned"])
@pytest.mark.parametrize("masked", [False, True])
def test_soft_routing_multiplies_keys_and_values_by_the_share_of_their_region(routing: str, masked: bool) -> None:
    module = build(2, 2, routing=routing, lepe_kernel=0)
    x = torch.randn(1, 3, 4, 8)
    mask = torch.rand(1, 3, 4) < 0.7 if masked else torch.ones(1, 3, 4, dtype=torch.bool)
    grid = module.region_grid(3, 4)
    q, k, v = (module.qkv(x) * mask[..., None]).chunk(3, -1)
    chosen, share = module.route(q, k, mask, grid)
    region = torch.arange(3)[:, None] // 2 * 2 + torch.arange(4) // 2
    expected = torch.zeros_like(x)
    for row in range(3):
        for column in range(4):
            keys, values = [], []
            for place, factor in zip(chosen[0, region[row, column]], share[0, region[row, column]], strict=True):
                inside = mask[0] & (region == place)
                keys.append(k[0][inside] * factor)
                values.append(v[0][inside] * factor)
            kk, vv = (torch.cat(t).unflatten(-1, (2, 4)).transpose(0, 1) for t in (keys, values))
            query = q[0, row, column].view(2, 1, 4)
            out = (query @ kk.mT * module.scale).softmax(-1) @ vv
            expected[0, row, column] = out.flatten()
    torch.testing.assert_close(module(x, mask), module.proj(expected).masked_fill(~mask[..., None], 0))
    if not masked:
        torch.testing.assert_close(module(x), module(x, mask))


def test_only_differentiable_routing_passes_its_gradient_to_the_similarities() -> None:
    assert gradients_are_right(build(2, 2, routing="learned"), torch.randn(1, 4, 5, 8))
    assert gradients_are_right(build(2, 2, routing="differentiable", kv_pooling="average"), torch.randn(1, 4, 5, 8))
    soft, through = build(routing="soft"), build(routing="differentiable")
    x = torch.randn(1, 4, 4, 8)
    torch.testing.assert_close(soft(x), through(x))
    gradients = []
    for module in (soft, through):
        module(x).square().sum().backward()
        assert module.qkv.weight.grad is not None
        gradients.append(module.qkv.weight.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-5


@pytest.mark.parametrize("form", ["legacy", "refactored"])
def test_the_dense_form_is_full_attention_with_the_convolution_of_its_form(form: str) -> None:
    module = build(dense=True, form=form)
    assert module.lepe is not None
    x = torch.randn(2, 3, 5, 8)
    full = as_full_attention(module, x)
    if form == "legacy":
        v = module.qkv(x)[..., 16:]
        change = module.lepe(x.movedim(-1, 1)) - module.lepe(v.movedim(-1, 1))
        full = full + F.linear(change.movedim(1, -1), module.proj.weight)
    assert module.scale == 0.5
    torch.testing.assert_close(module(x), full)
    _, weights = module(x, return_attention=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 15))


def test_impossible_options_and_maps_are_refused() -> None:
    with pytest.raises(InputError, match=r"topk=5 must be from 1 to the 4 regions"):
        build(2, 5)
    with pytest.raises(InputError, match=r"regions=0 must be at least 1"):
        build(0)
    with pytest.raises(InputError, match=r"qk_dim=5 must be a multiple of num_heads=2"):
        build(qk_dim=5)
    with pytest.raises(InputError, match=r"lepe_kernel=4 must be odd"):
        build(lepe_kernel=4)
    with pytest.raises(InputError, match=r"scale=0.0 must be positive"):
        build(scale=0.0)
    with pytest.raises(InputError, match=r"kv_pooling_size=0 must be at least 1"):
        build(kv_pooling_size=0)
    with pytest.raises(InputError, match=r"form 'legaci' is not known. Did you mean 'legacy'"):
        build(form="legaci")
    with pytest.raises(InputError, match=r"do not divide a map of 4 x 5 tokens"):
        build(padding="error")(torch.randn(1, 4, 5, 8))
    with pytest.raises(InputError, match=r"a map of 1 x 7 tokens has fewer than regions=\(2, 2\)"):
        build(small_maps="error")(torch.randn(1, 1, 7, 8))
    with pytest.raises(InputError, match=r"topk=16 is more than the 9 regions of this map"):
        build(4, 16, small_maps="error")(torch.randn(1, 5, 5, 8))
    with pytest.raises(InputError, match=r"kv_pooling_size=3 is more than a side of this map's regions of 2 x 2"):
        build(kv_pooling="max", kv_pooling_size=3, small_maps="error")(torch.randn(1, 4, 4, 8))
    with pytest.raises(InputError, match=r"maxima of values have no weights"):
        build(kv_pooling="max", kv_pooling_size=2)(torch.randn(1, 4, 4, 8), return_attention=True)
