"""Halo attention: which keys a block sees, both forms, stride, and windows read in several steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attention import halo
from attention.halo import HaloAttention, HaloLayer
from kernels.errors import InputError
from tests.attention.released.halo import released


def test_a_token_sees_its_block_and_the_halo_around_it() -> None:
    torch.manual_seed(0)
    module = HaloAttention(8, 2, block_size=3, halo_size=1)
    _, weights = module(torch.randn(1, 7, 8, 8), return_attention=True)
    seen = (weights[0, 0] > 0).unflatten(1, (7, 8)).unflatten(0, (7, 8))
    near = []
    for length in (7, 8):
        places, first = torch.arange(length), torch.arange(length) // 3 * 3
        near.append((places >= first[:, None] - 1) & (places < first[:, None] + 4))
    assert torch.equal(seen, near[0][:, None, :, None] & near[1][None, :, None, :])


@pytest.mark.parametrize("form", ["masked", "released"])
@pytest.mark.parametrize("scale_positions", [None, True, False])
def test_both_forms_are_those_with_unfolded_windows(form: str, scale_positions: bool | None) -> None:
    torch.manual_seed(0)
    module = HaloAttention(8, 2, 4, 3, form=form, head_dim=6, qkv_bias=True, scale_positions=scale_positions)
    x = torch.randn(2, 7, 9, 8)
    torch.testing.assert_close(module(x), released(module)(x))


def test_zeros_around_the_map_take_weight_in_the_released_form_alone() -> None:
    x = torch.randn(1, 8, 8, 8)
    sums = {form: HaloAttention(8, 2, 4, 1, form=form)(x, return_attention=True)[1].sum(-1) for form in halo.FORMS}
    torch.testing.assert_close(sums["masked"], torch.ones(1, 2, 64))
    at_edge = torch.ones(8, 8, dtype=torch.bool)
    assert (sums["released"].view(2, 8, 8)[:, at_edge] < 1).all()


def test_a_halo_around_the_whole_map_is_attention_to_all_with_positions() -> None:
    torch.manual_seed(0)
    module = HaloAttention(8, 2, block_size=2, halo_size=4)
    layer, x = module.layer, torch.randn(1, 4, 3, 8)
    q, kv = layer.q(x), layer.kv(x)
    q, k, v = (t.view(12, 2, 4).transpose(0, 1) for t in (q, *kv.chunk(2, -1)))
    rows, columns = torch.arange(12) // 3, torch.arange(12) % 3
    # A key counts from the corner of the window, a halo of 4 ahead of the block from which a query counts.
    bias = sum(
        torch.einsum("hqd,qkd->hqk", q, table[p - p[:, None] + 4 + layer.window - 1])
        for p, table in ((rows, layer.height_rel), (columns, layer.width_rel))
    )
    out = ((q @ k.mT + bias) * 0.5).softmax(-1) @ v
    torch.testing.assert_close(module(x), layer.proj(out.transpose(0, 1).reshape(1, 4, 3, 8)))


def test_constant_values_come_out_as_they_went_in() -> None:
    module = HaloAttention(8, 2, 4, 1, qkv_bias=True)
    layer = module.layer
    with torch.no_grad():
        layer.kv.weight[8:] = 0
        layer.proj.weight.copy_(torch.eye(8))
        layer.proj.bias.zero_()
    mask = torch.rand(2, 6, 7) < 0.6
    out = module(torch.randn(2, 6, 7, 8), mask)
    torch.testing.assert_close(out[mask], layer.kv.bias[8:].expand_as(out[mask]))


def test_windows_read_in_several_steps_give_the_same_numbers_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = HaloAttention(8, 2, 3, 2)
    x = torch.randn(2, 14, 7, 8, requires_grad=True)
    found = []
    for limit in (2**24, 2 * 3 * 2 * 49 * 24 * 2, 1):
        monkeypatch.setattr(halo, "_COPIED", limit)
        out = module(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
        with torch.no_grad():
            torch.testing.assert_close(module(x), out)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_with_a_stride_every_other_query_is_left_out_or_outputs_are_averaged() -> None:
    torch.manual_seed(0)
    whole = HaloLayer(8, 8, 2, 4, 1, form="released")
    for options in ({"avg_down": True}, {}):
        strided = HaloLayer(8, 8, 2, 4, 1, form="released", stride=2, **options)
        strided.load_state_dict(whole.state_dict())
        x = torch.randn(1, 8, 12, 8)
        assert strided(x).shape == (1, 4, 6, 8)
        if options:
            torch.testing.assert_close(strided(x), F.avg_pool2d(whole(x).movedim(-1, 1), 2).movedim(1, -1))
    odd = HaloLayer(8, 8, 2, 3, 1, form="released", stride=2)
    x = torch.randn(1, 6, 6, 8)
    same = HaloLayer(8, 8, 2, 3, 1, form="released")
    same.load_state_dict(odd.state_dict())
    torch.testing.assert_close(odd(x), F.avg_pool2d(same(x).movedim(-1, 1), 2).movedim(1, -1))
    with pytest.raises(InputError, match=r"stride=2 does not divide a map of \(5, 6\)"):
        odd(torch.randn(1, 5, 6, 8))


def test_impossible_options_are_refused() -> None:
    for options, message in (
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"halo_size": -1}, "halo_size=-1 must be at least 0"),
        ({"head_dim": 0}, "head_dim=0 must be at least 1"),
        ({"form": "mask"}, "form 'mask' is not known. Did you mean 'masked'"),
    ):
        with pytest.raises(InputError, match=message):
            HaloAttention(8, 2, **options)
    with pytest.raises(InputError, match="stride=3 must be 1 or 2"):
        HaloLayer(8, 8, 2, stride=3)
    with pytest.raises(InputError, match="dim_out=9 is not divisible into num_heads=2 heads"):
        HaloLayer(8, 9, 2)
