"""Dynamic mask attention: what is kept, grouped heads, causal order, blocks, masks."""

from typing import Any

import pytest
import torch

import attention
from attention import dynamic_mask
from attention.dynamic_mask import DynamicMaskAttention
from kernels.errors import InputError
from tests.attention.contract import compiled_agrees, gradients_are_right, make_mixer
from tests.attention.released.dynamic_mask import released


def mixer(**changes: Any) -> DynamicMaskAttention:
    made = make_mixer("dynamic_mask", **changes)
    assert isinstance(made, DynamicMaskAttention)
    with torch.no_grad():
        made.A.copy_(torch.linspace(1, 2, len(made.A)))  # biases far enough apart for a stable choice
    return made


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [None, 2, 1])
@pytest.mark.parametrize("window", [1, 5, 2048])
def test_choices_are_those_of_the_dense_form(causal: bool, groups: int | None, window: int) -> None:
    module = mixer(causal=causal, num_kv_heads=groups, window=window)
    x = torch.randn(2, 23, 32)
    torch.testing.assert_close(module(x), released(module)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_right_where_keys_are_dropped(causal: bool) -> None:
    module = mixer(causal=causal, num_kv_heads=2, window=4, dim=16)
    assert gradients_are_right(module, torch.randn(2, 11, 16))


@pytest.mark.parametrize("changes", [{"window": 4}, {"window": 4, "causal": True}, {"window": 4, "block_size": 3}])
def test_it_compiles_where_keys_are_dropped(changes: dict[str, Any]) -> None:
    compiled_agrees(mixer(**changes), torch.randn(2, 11, 32))


def test_queries_in_blocks_give_the_same_output_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = mixer(causal=True, window=3), torch.randn(2, 17, 32)
    found = []
    for rows in (256, 4):
        monkeypatch.setattr(dynamic_mask, "QUERY_ROWS", rows)
        given = x.clone().requires_grad_()
        out = module(given)
        found.append((out, *torch.autograd.grad(out.square().sum(), [given, *module.parameters()])))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    compiled_agrees(module, x)


@pytest.mark.parametrize("causal", [False, True])
def test_kept_keys_are_those_with_weight(causal: bool) -> None:
    module, x = mixer(causal=causal, window=4), torch.randn(2, 3, 5, 32)
    mask = torch.rand(2, 3, 5) < 0.8
    keep = module.kept(x, mask)
    weights = module(x, mask, return_attention=True)[1]
    rows = mask.flatten(1)[:, None, :, None]
    assert torch.equal((weights > 0) & rows, keep.expand_as(weights) & rows)
    if causal:
        assert not weights.triu(1).any()
        counts = torch.cumsum(mask.flatten(1), 1).clamp_max(4)
        assert torch.equal(keep.sum(-1), counts[:, None].expand(-1, 4, -1))
    else:
        assert (keep.sum(-1) == 4).all()


def test_masked_tokens_are_never_among_the_kept_even_when_they_are_fewer_than_the_window() -> None:
    module, x = mixer(window=6), torch.randn(1, 9, 32)
    mask = torch.arange(9)[None] < 4
    assert torch.equal(module.kept(x, mask)[0, 0, 0], mask[0])
    torch.testing.assert_close(module(x, mask)[:, :4], module(x[:, :4]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_follow_the_majority_of_their_tokens(causal: bool) -> None:
    plain, blocks = mixer(window=6, causal=causal), mixer(window=6, causal=causal, block_size=4)
    x = torch.randn(2, 18, 32)
    mask = torch.rand(2, 18) < 0.8
    single, together = plain.kept(x, mask), blocks.kept(x, mask)
    order = torch.arange(18)
    for item in range(2):
        for row in range(single.shape[2]):
            seen = mask[item] & (order <= row) if causal else mask[item]
            for start in range(0, 18, 4):
                part = slice(start, start + 4)
                wins = 2 * single[item, :, row, part].sum(-1) > seen[part].sum()
                assert torch.equal(together[item, :, row, part], wins[:, None] & seen[part])
    weights = blocks(x, mask, return_attention=True)[1]
    rows = mask[:, None, :, None]
    assert torch.equal((weights > 0) & rows, together.expand_as(weights) & rows)


def test_a_query_without_any_kept_key_gives_zero() -> None:
    module, x = mixer(causal=True, window=1, block_size=8), torch.randn(1, 8, 32, requires_grad=True)
    out = module(x)
    nothing = ~module.kept(x).any(-1)[0].any(0)
    assert nothing.any() and (out[0, nothing] == 0).all()
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"causal": True}, {"block_size": 2}, {"num_kv_heads": 2}])
def test_packed_maps_choose_their_own_keys(changes: dict[str, Any]) -> None:
    module = mixer(window=4, **changes)
    sizes = [9, 0, 3, 12]
    x = torch.randn(sum(sizes), 32)
    out = module.packed(x, torch.tensor([0, *sizes]).cumsum(0))
    alone = torch.cat([module(part[None])[0] for part in x.split(sizes) if len(part)])
    torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)


def test_half_precision_adds_the_bias_in_full() -> None:
    for causal in (False, True):
        module, x = mixer(causal=causal, window=64), torch.randn(2, 40, 32)
        full, low = module(x), module.bfloat16()(x.bfloat16())
        assert (low.float() - full).abs().max() < 0.03 * full.abs().max()


def test_bad_values_are_refused() -> None:
    with pytest.raises(InputError, match=r"num_kv_heads=3 does not divide num_heads=4; take it from 1, 2, 4"):
        attention.create("dynamic_mask", dim=32, num_heads=4, num_kv_heads=3)
    with pytest.raises(InputError, match="window=0 and block_size=1 must be at least 1"):
        attention.create("dynamic_mask", dim=32, num_heads=4, window=0)
