"""Outlook attention: who sees whom, what is lost at borders, masks, strides."""

from __future__ import annotations

import pytest
import torch

from attention.outlook import OutlookAttention
from kernels.errors import InputError
from tests.attention.released.outlook import released


def uniform(kernel_size: int, stride: int) -> OutlookAttention:
    """Every share of every patch is 1 / K^2, values and output are the input."""
    module = OutlookAttention(4, 2, kernel_size, stride)
    with torch.no_grad():
        for layer in (module.attn, module.proj):
            layer.weight.zero_()
            layer.bias.zero_()
        module.v.weight.copy_(torch.eye(4))
        module.proj.weight.copy_(torch.eye(4))
    return module


@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 1), (3, 2), (5, 3)])
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (6, 5)])
def test_any_kernel_and_stride_computes_what_unfold_and_fold_do(
    kernel_size: int, stride: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    module = OutlookAttention(8, 2, kernel_size, stride)
    x = torch.randn(2, *size, 8)
    torch.testing.assert_close(module(x), released(module)(x))


def test_overlaps_are_summed_and_places_outside_take_their_share() -> None:
    out = uniform(3, 1)(torch.ones(1, 4, 5, 4))[0, :, :, 0]
    # Patches that hold a token, times the share of each patch that is on the map.
    inside = torch.nn.functional.avg_pool2d(torch.ones(1, 1, 4, 5), 3, 1, 1)
    expected = 9 * torch.nn.functional.avg_pool2d(inside, 3, 1, 1)[0, 0]
    torch.testing.assert_close(out, expected)


def test_a_token_has_one_share_for_each_patch_that_holds_both() -> None:
    _, weights = uniform(5, 3)(torch.randn(1, 6, 5, 4), return_attention=True)
    held = []
    for length in (6, 5):
        centres = torch.arange(0, length, 3)
        within = (torch.arange(length)[:, None] - centres).abs() <= 2
        held.append(within.float() @ within.float().T)
    torch.testing.assert_close(weights[0, 0], torch.kron(*held) / 25)


def test_masked_tokens_behind_the_map_are_as_if_absent() -> None:
    torch.manual_seed(0)
    for stride in (1, 2, 3):
        module = OutlookAttention(8, 2, 5, stride)
        x = torch.randn(2, 9, 8, 8)
        mask = torch.zeros(2, 9, 8, dtype=torch.bool)
        mask[:, :5, :7] = True
        torch.testing.assert_close(module(x, mask)[:, :5, :7], module(x[:, :5, :7]))


def test_the_average_at_a_centre_is_of_real_tokens() -> None:
    torch.manual_seed(0)
    module = OutlookAttention(8, 2)
    x = torch.randn(1, 2, 2, 8)
    mask = torch.tensor([[[True, False], [False, True]]])
    centres, present = module._centres(x * mask[..., None], mask)
    torch.testing.assert_close(centres[0, 0, 0], (x[0, 0, 0] + x[0, 1, 1]) / 2)
    assert present is not None and present.all()


def test_impossible_kernels_and_strides_are_refused() -> None:
    for kernel_size in (2, 0, -1):
        with pytest.raises(InputError, match=rf"kernel_size={kernel_size} must be odd"):
            OutlookAttention(8, 2, kernel_size)
    for stride in (0, 3):
        with pytest.raises(InputError, match=rf"stride={stride} must be from 1 to 2 for kernel_size=3"):
            OutlookAttention(8, 2, 3, stride)
