"""Magnitude-aware linear attention: its weights, rotary tables, forms, and its block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention.mala import ConvolvingMlp, MagnitudeAwareAttention, MagnitudeAwareBlock, rotary_tables, rotate
from kernels.errors import InputError


def make(**changes: object) -> MagnitudeAwareAttention:
    torch.manual_seed(0)
    return MagnitudeAwareAttention(16, 2, **changes).eval()  # type: ignore[arg-type]


def test_without_rotation_the_weights_sum_to_one() -> None:
    for module, x in [(make(rotary=False), torch.randn(1, 3, 4, 16)), (make(), torch.randn(1, 12, 16))]:
        _, weights = module(x, return_attention=True)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 12), rtol=1e-4, atol=1e-4)
        assert weights.std() > 0


def test_rotation_moves_the_sums_away_from_one_except_for_softmax() -> None:
    x = torch.randn(1, 3, 4, 16)
    _, weights = make()(x, return_attention=True)
    assert (weights.sum(-1) - 1).abs().max() > 1e-3
    _, weights = make(form="softmax")(x, return_attention=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 12))


@pytest.mark.parametrize("form", ["linear", "softmax"])
def test_the_order_of_a_sequence_does_not_matter(form: str) -> None:
    module, x = make(form=form), torch.randn(2, 12, 16)
    order = torch.randperm(12)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order], rtol=1e-4, atol=1e-5)


def test_a_larger_query_gives_a_more_peaked_row() -> None:
    module, x = make(rotary=False, local_axes=0), torch.randn(1, 20, 16)
    spread = []
    for factor in (1.0, 3.0):
        with torch.no_grad():
            module.qkv_gate.weight[:16] *= factor
            module.qkv_gate.bias[:16].zero_()
        spread.append(module(x, return_attention=True)[1].std(-1).mean())
    assert spread[1] > 1.05 * spread[0]


def test_products_of_rotated_features_depend_on_the_offset_alone() -> None:
    q, k = torch.randn(2, 1, 1, 2, 24, dtype=torch.float64)
    for grid in [(5, 6), (3, 4, 5)]:
        tables = rotary_tables(grid, 24, dtype=torch.float64)
        tokens = tables[0].shape[0]
        scores = torch.einsum(
            "bnhd,bmhd->nm",
            rotate(q.expand(1, tokens, 2, 24), *tables),
            rotate(k.expand(1, tokens, 2, 24), *tables),
        ).view(*grid, *grid)
        if len(grid) == 2:
            torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1])
            assert (scores[0, 0] - scores[0, 0, 0, 0]).abs()[1:, 1:].min() > 1e-6
        else:
            torch.testing.assert_close(scores[1:, 1:, 1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1, :-1, :-1])


def test_the_pairs_of_a_head_are_shared_out_among_the_axes() -> None:
    _, sin = rotary_tables((2, 3, 4), 16)  # 8 pairs: 2, 3, 3
    moved = [(sin.view(2, 3, 4, 8).std(axis).amax((0, 1)) > 0).tolist() for axis in range(3)]
    assert [sum(axis) for axis in moved] == [2, 3, 3]
    assert [sum(pair) for pair in zip(*moved, strict=True)] == [1] * 8


@pytest.mark.parametrize(("axes", "with_it"), [(0, ()), (1, (1, 2, 3)), (2, (2, 3)), (3, (3,))])
def test_the_local_term_reaches_over_the_last_axes(axes: int, with_it: tuple[int, ...]) -> None:
    module = make(local_axes=axes, local_kernel=3)
    plain = make(local_axes=0)
    plain.load_state_dict(module.state_dict(), strict=False)
    for grid in [(5,), (4, 5), (3, 4, 5)]:
        x = torch.randn(1, *grid, 16)
        assert ((module(x) - plain(x)).abs().max() > 1e-3) == (len(grid) in with_it), grid
        assert (module.flops((1, *grid)) > plain.flops((1, *grid))) == (len(grid) in with_it)


@pytest.mark.parametrize("form", ["linear", "softmax"])
def test_a_masked_surrounding_is_as_if_the_map_ended_there(form: str) -> None:
    module, x = make(form=form), torch.randn(1, 5, 6, 16)
    mask = torch.zeros(1, 5, 6, dtype=torch.bool)
    mask[:, :3, :4] = True
    torch.testing.assert_close(module(x, mask)[:, :3, :4], module(x[:, :3, :4]), rtol=1e-4, atol=1e-5)
    assert (module(x, torch.zeros_like(mask)) == 0).all()


def test_softmax_sequences_are_packed_as_if_alone() -> None:
    module, x = make(form="softmax"), torch.randn(9, 16)
    out = module.packed(x, torch.tensor([0, 4, 4, 9]))
    torch.testing.assert_close(out[:4], module(x[None, :4])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[4:], module(x[None, 4:])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_a_block_keeps_masked_tokens_out_and_scales_its_branches(layer_scale: float | None) -> None:
    torch.manual_seed(0)
    block = MagnitudeAwareBlock(16, 2, "softmax", layer_scale=layer_scale)
    x = torch.randn(1, 5, 6, 16)
    mask = torch.zeros(1, 5, 6, dtype=torch.bool)
    mask[:, :3, :4] = True
    out = block(x.masked_fill(~mask[..., None], torch.nan), mask)
    torch.testing.assert_close(out[:, :3, :4], block(x[:, :3, :4]), rtol=1e-4, atol=1e-5)

    def by_hand(x: Tensor, factor: float) -> Tensor:
        x = block.pos(x)
        x = x + factor * block.attn(block.norm1(x))
        return x + factor * block.ffn(block.norm2(x))

    torch.testing.assert_close(block(x), by_hand(x, layer_scale or 1.0))
    assert isinstance(block.ffn, ConvolvingMlp) and block.ffn.fc1.out_features == 56


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(InputError, match=r"Did you mean 'linear'"):
        make(form="linaer")
    with pytest.raises(InputError, match=r"heads of 6 channels .* cannot be rotated; take a multiple of 4"):
        MagnitudeAwareAttention(12, 2)
    with pytest.raises(InputError, match="local_axes=4 must be"):
        make(local_axes=4)
    with pytest.raises(InputError, match="local_kernel=2 must be odd"):
        make(local_kernel=2)
    assert MagnitudeAwareAttention(12, 2, rotary=False)(torch.randn(1, 2, 2, 12)).shape == (1, 2, 2, 12)
