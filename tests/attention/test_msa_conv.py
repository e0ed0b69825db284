"""MSA-Conv: borders, dilation, heads, masks, strides of the layer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import attention
from attention.msa_conv import MSAConv, MSAConv2d
from kernels.errors import InputError
from tests.attention.contract import gradients_are_right, make_mixer
from tests.attention.released.msa_conv import released


def mixer(**changes: Any) -> MSAConv:
    made = make_mixer("msa_conv", **changes)
    assert isinstance(made, MSAConv)
    return made


@pytest.mark.parametrize(
    "changes", [{"kernel_size": 1}, {"kernel_size": 5}, {"dilation": 3}, {"num_heads": 4, "bias": True}], ids=str
)
def test_options_are_those_of_the_unfolded_form(changes: dict[str, Any]) -> None:
    module, x = mixer(**changes), torch.randn(2, 4, 7, 32)
    torch.testing.assert_close(module(x), released(module)(x), rtol=1e-4, atol=1e-5)
    assert gradients_are_right(module, x)


def test_what_lies_beyond_the_map_takes_its_share_of_the_softmax() -> None:
    module, x = mixer(), torch.zeros(1, 3, 3, 32)
    with torch.no_grad():
        module.conv.qkv.bias.zero_()  # all scores are 0, those beyond the map as well
    rows = module(x, return_attention=True)[1].sum(-1)[0, 0]
    torch.testing.assert_close(rows, torch.tensor([4, 6, 4, 6, 9, 6, 4, 6, 4]) / 9)


def test_no_token_sees_beyond_its_dilated_window() -> None:
    weights = mixer(dilation=2)(torch.randn(1, 9, 9, 32), return_attention=True)[1][0, 0]
    seen = weights[4 * 9 + 4].view(9, 9).nonzero()
    assert set(map(tuple, seen.tolist())) == {(r, c) for r in (2, 4, 6) for c in (2, 4, 6)}


def test_a_masked_token_is_like_a_place_beyond_the_map() -> None:
    module, x = mixer(kernel_size=5), torch.randn(1, 6, 8, 32)
    mask = torch.ones(1, 6, 8, dtype=torch.bool)
    mask[:, 4:] = False
    mask[:, :, 5:] = False
    torch.testing.assert_close(module(x, mask)[:, :4, :5], module(x[:, :4, :5]), rtol=1e-4, atol=1e-5)


def test_the_layer_halves_maps_and_changes_channels() -> None:
    torch.manual_seed(0)
    layer = MSAConv2d(6, 10, stride=2).eval()
    x = torch.randn(2, 7, 5, 6)
    weights, v = layer.attention(x, None)
    inner = layer.gather(weights, v).flatten(-2) + x
    expected = F.conv2d(inner.movedim(-1, 1), layer.mlp.weight, stride=2, padding=1).relu().movedim(1, -1)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == (2, 4, 3, 10)


def test_weights_are_dropped_in_training_alone() -> None:
    module, x = mixer(attn_drop=0.5), torch.randn(1, 5, 5, 32)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))


def test_bad_values_are_refused() -> None:
    with pytest.raises(InputError, match="kernel_size=4 must be odd"):
        attention.create("msa_conv", dim=8, kernel_size=4)
    with pytest.raises(InputError, match="dilation=-1 at least 1"):
        attention.create("msa_conv", dim=8, dilation=-1)
    with pytest.raises(InputError, match="dim=8 is not divisible into num_heads=3"):
        MSAConv2d(8, 8, num_heads=3)
