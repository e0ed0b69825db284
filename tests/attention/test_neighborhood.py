"""Neighbourhood attention: which windows, on one to three axes, and what happens on maps smaller than a window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention.neighborhood import NeighborhoodAttention
from kernels.errors import InputError


def seen(module: NeighborhoodAttention, *grid: int) -> Tensor:
    """(N, N) bool: which token has weight for which."""
    torch.manual_seed(0)
    _, weights = module(torch.randn(1, *grid, module.dim), return_attention=True)
    return weights[0, 0] > 0


def test_a_window_is_shifted_inwards_at_the_ends() -> None:
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]])
    assert torch.equal(seen(NeighborhoodAttention(8, 2, 3, axes=1), 5), expected.bool())


def test_dilated_windows_stay_within_their_residue() -> None:
    found = seen(NeighborhoodAttention(8, 2, 2, dilation=3, axes=1), 8)
    places = torch.arange(8)
    assert (found.sum(1) == 2).all()
    assert not found[(places[:, None] - places) % 3 != 0].any()


def test_a_stride_of_the_kernel_makes_blocks() -> None:
    found = seen(NeighborhoodAttention(8, 2, 4, stride=4, axes=1), 12)
    blocks = torch.arange(12) // 4
    assert torch.equal(found, blocks[:, None] == blocks)


def test_a_causal_window_ends_at_its_token() -> None:
    found = seen(NeighborhoodAttention(8, 2, 3, causal=True, relative_bias=False, axes=1), 6)
    distance = torch.arange(6)[:, None] - torch.arange(6)
    assert torch.equal(found, (distance >= 0) & (distance < 3))


@pytest.mark.parametrize("grid", [(9,), (4, 5), (3, 4, 5)])
def test_constant_values_come_out_as_they_went_in_on_any_number_of_axes(grid: tuple[int, ...]) -> None:
    module = NeighborhoodAttention(8, 2, 3, axes=len(grid))
    with torch.no_grad():
        module.qkv.weight[16:] = 0
        module.proj.weight.copy_(torch.eye(8))
        module.proj.bias.zero_()
    out = module(torch.randn(2, *grid, 8))
    torch.testing.assert_close(out, module.qkv.bias[16:].expand_as(out))


def test_a_window_of_the_whole_map_is_attention_to_all_with_a_bias_by_offset() -> None:
    torch.manual_seed(0)
    module = NeighborhoodAttention(8, 2, (3, 5))
    assert module.rpb is not None
    x = torch.randn(2, 3, 5, 8)
    rows, columns = torch.arange(3), torch.arange(5)
    down, across = rows - rows[:, None] + 2, columns - columns[:, None] + 4
    bias = module.rpb[:, down[:, None, :, None], across[None, :, None, :]].reshape(2, 15, 15)
    q, k, v = module.qkv(x).reshape(2, 15, 3, 2, 4).permute(2, 0, 3, 1, 4)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(module(x), module.proj(out.transpose(1, 2).reshape(x.shape)))


def test_a_small_map_is_padded_with_zeros_that_are_seen() -> None:
    module = NeighborhoodAttention(8, 2, 3, dilation=2)
    x = torch.randn(2, 4, 9, 8)
    padded = torch.cat([x, torch.zeros(2, 2, 9, 8)], 1)
    torch.testing.assert_close(module(x), module(padded)[:, :4])
    mask = torch.rand(2, 4, 9) < 0.7
    longer = torch.cat([mask, torch.ones(2, 2, 9, dtype=torch.bool)], 1)
    torch.testing.assert_close(module(x, mask), module(padded, longer)[:, :4])


def test_a_clamped_window_is_a_smaller_one_with_the_middle_of_the_bias() -> None:
    torch.manual_seed(0)
    large = NeighborhoodAttention(8, 2, 5, dilation=2, stride=4, small_maps="clamp")
    small = NeighborhoodAttention(8, 2, (3, 5), stride=(3, 4), small_maps="error")
    state = large.state_dict()
    state["rpb"] = state["rpb"][:, 2:7]
    small.load_state_dict(state)
    x = torch.randn(2, 3, 6, 8)
    torch.testing.assert_close(large(x), small(x))


def test_a_clamped_window_on_a_strip_is_that_of_a_sequence() -> None:
    torch.manual_seed(0)
    image = NeighborhoodAttention(8, 2, 3, small_maps="clamp")
    line = NeighborhoodAttention(8, 2, 3, axes=1)
    state = image.state_dict()
    state["rpb"] = state["rpb"][:, 2]
    line.load_state_dict(state)
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(image(x[:, None]), line(x)[:, None])
    alone = x[:, :1, None]
    torch.testing.assert_close(image(alone), image.proj(image.qkv(alone)[..., 16:]))
    _, weights = image(alone, return_attention=True)
    torch.testing.assert_close(weights, torch.ones(2, 2, 1, 1))


def test_dilations_take_turns_in_a_stage() -> None:
    settings = {"kernel_size": 3, "dilation": [1, 8, [2, 4]]}
    chosen = [NeighborhoodAttention.for_block(settings, index)["dilation"] for index in range(4)]
    assert chosen == [1, 8, [2, 4], 1]
    assert NeighborhoodAttention.for_block({"kernel_size": 3}, 1) == {"kernel_size": 3}


def test_impossible_windows_are_refused() -> None:
    with pytest.raises(InputError, match=r"kernel_size=1 must be .* at least 2"):
        NeighborhoodAttention(8, 2, 1)
    with pytest.raises(InputError, match=r"dilation=-1 must be"):
        NeighborhoodAttention(8, 2, 3, dilation=-1)
    with pytest.raises(InputError, match=r"stride=\(4, 4\) must be at most kernel_size=\(3, 3\)"):
        NeighborhoodAttention(8, 2, 3, stride=4)
    with pytest.raises(InputError, match=r"kernel_size=\(3, 3, 3\) must be .* each of the 2 axes"):
        NeighborhoodAttention(8, 2, (3, 3, 3))
    with pytest.raises(InputError, match=r"axes=4 must be 1, 2 or 3"):
        NeighborhoodAttention(8, 2, axes=4)
    with pytest.raises(InputError, match=r"causal windows have no relative bias"):
        NeighborhoodAttention(8, 2, 3, causal=(True, False))
    with pytest.raises(InputError, match=r"small_maps 'clip' is not known"):
        NeighborhoodAttention(8, 2, small_maps="clip")
    with pytest.raises(InputError, match=r"does not fit a map of \(2, 9\) tokens"):
        NeighborhoodAttention(8, 2, 3, small_maps="error")(torch.randn(1, 2, 9, 8))
    with pytest.raises(InputError, match=r"'neighborhood' takes \(B, N, 8\)"):
        NeighborhoodAttention(8, 2, 3, axes=1)(torch.randn(1, 4, 4, 8))
