"""ContMix: borders, small maps, masks, batch statistics, the reparameterised kernel, the block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attention.contmix import ContMix
from attention.contmix_block import ContMixBlock, GlobalResponseNorm
from attention.conv_norm import conv_norm, fold
from attention.dilated_reparam import BRANCHES, DilatedReparam, merge_reparam
from attention.dynamic_kernels import average, fitting_size, relative_bias, resize
from attention.masked_norm import masked_batch_norm
from kernels.errors import InputError
from tests.attention.contract import make_mixer


def contmix(**changes: object) -> ContMix:
    mixer = make_mixer("contmix", **changes)
    assert isinstance(mixer, ContMix)
    randomise_statistics(mixer)
    return mixer


def randomise_statistics(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)


@pytest.mark.parametrize("size", [(9, 8), (3, 5)])
def test_constant_values_stay_as_they_are(size: tuple[int, int]) -> None:
    mixer = contmix()
    mixer.weight_value.get_parameter("0.weight").data.zero_()  # values are their biases
    mixed = mixer.mixed(torch.randn(2, 32, *size))
    constant = mixer.value(torch.zeros(1, 32, 1, 1))
    torch.testing.assert_close(mixed, constant.expand_as(mixed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(9, 8), (3, 5)])
def test_weights_apply_to_values_as_the_mixer_does(size: tuple[int, int]) -> None:
    mixer = contmix()
    x = torch.randn(1, *size, 32)
    mask = torch.rand(1, *size) < 0.6
    mask[0, 0, 0] = True
    for seen in (None, mask):
        blank = x if seen is None else x.masked_fill(~seen[..., None], 0)
        _, weights = mixer(x, seen, return_attention=True)
        images = blank.movedim(-1, 1)
        # Values of a resized map are resized values: the projection is affine and weights sum to 1.
        values = mixer.value(images).flatten(2).unflatten(1, (2 * mixer.groups, -1))
        expected = torch.einsum("bhij,bhdj->bhdi", weights, values).flatten(1, 2).unflatten(2, size)
        real = torch.ones(1, *size, dtype=torch.bool) if seen is None else seen
        torch.testing.assert_close(
            mixer.mixed(images, seen).movedim(1, -1)[real], expected.movedim(1, -1)[real], rtol=1e-4, atol=1e-5
        )


def test_a_token_sees_only_its_window_but_its_kernel_follows_the_whole_map() -> None:
    mixer = contmix(kernel_size=5, smk_size=3)
    x = torch.randn(1, 11, 12, 32)
    _, weights = mixer(x, return_attention=True)
    seen = (weights[0, :, 5 * 12 + 6] > 0).unflatten(1, (11, 12))
    small, large = torch.zeros(11, 12, dtype=torch.bool), torch.zeros(11, 12, dtype=torch.bool)
    small[4:7, 5:8] = True
    large[3:8, 4:9] = True
    assert (seen[: mixer.groups] == small).all() and (seen[mixer.groups :] == large).all()
    corner = (weights[0, -1, 0] > 0).unflatten(0, (11, 12))
    assert corner[:5, :5].all() and corner.sum() == 25
    changed = x.clone()
    changed[0, 10, 11] += 5
    _, moved = mixer(changed, return_attention=True)
    assert not torch.allclose(moved[0, :, 0], weights[0, :, 0])


def test_relative_biases_are_those_of_key_minus_query() -> None:
    table = torch.arange(25.0).reshape(1, 5, 5)
    bias = relative_bias(table, (4, 6))[0]
    assert bias.shape == (4, 6, 9)
    torch.testing.assert_close(bias[1, 2], table[0, 1:4, 1:4].flatten())
    torch.testing.assert_close(bias[0, 0], table[0, 2:5, 2:5].flatten())
    torch.testing.assert_close(bias[3, 5], table[0, 0:3, 0:3].flatten())


def test_small_maps_grow_until_their_shorter_side_is_the_kernels() -> None:
    assert fitting_size((8, 9), 7) == (8, 9)
    assert fitting_size((5, 8), 7) == (7, 11)
    assert fitting_size((8, 5), 7) == (11, 7)
    assert fitting_size((3, 3), 13) == (13, 13)
    for short in range(1, 13):
        for long in range(short, 30):
            assert min(fitting_size((short, long), 13)) == 13


def test_resizing_and_averaging_leave_masked_tokens_out() -> None:
    mask = torch.rand(2, 5, 8) < 0.4
    x = torch.ones(2, 3, 5, 8).masked_fill(~mask[:, None], 0)
    for change, size in ((resize, (7, 11)), (average, (3, 2))):
        out, real = change(x, mask, size)
        assert real is not None and real.any()
        torch.testing.assert_close(out, real[:, None].expand_as(out).float())


def test_regions_without_real_tokens_have_no_say() -> None:
    mixer = contmix()
    mask = torch.zeros(1, 14, 14, dtype=torch.bool)
    mask[:, :8, :14] = True
    x = torch.randn(1, 32, 14, 14).masked_fill(~mask[:, None], 0)
    before = mixer.logits(x, mask)
    with torch.no_grad():
        mixer.weight_proj.weight.unflatten(1, (7, 7))[:, 4:] += 3  # the columns of the regions below
    torch.testing.assert_close(mixer.logits(x, mask), before)


def test_maps_smaller_than_the_kernel_are_refused_on_request() -> None:
    mixer = contmix(small_maps="refuse")
    mixer(torch.randn(1, 7, 8, 32))
    with pytest.raises(InputError, match=r"map of 6 x 8 is smaller than kernel_size=7"):
        mixer(torch.randn(1, 6, 8, 32))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dim": 36, "num_heads": 6}, "dim=36 must be a multiple of 4 num_heads = 24"),
        ({"smk_size": 9}, "smk_size=9 must be from 1 to kernel_size=7"),
        ({"smk_size": 0}, "smk_size=0 must be from 1"),
        ({"regions": 0}, "regions=0 must be at least 1"),
        ({"kernel_size": 6}, "has a side of 5, 7, .* got 6"),
        ({"small_maps": "resise"}, "Did you mean 'resize'"),
    ],
)
def test_impossible_parameters_are_refused(changes: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make_mixer("contmix", **changes)


def test_batch_statistics_are_those_of_real_tokens() -> None:
    mask = torch.rand(2, 6, 5) < 0.5
    x = torch.randn(2, 4, 6, 5)
    ours, expected = nn.BatchNorm2d(4), nn.BatchNorm1d(4)
    out = masked_batch_norm(ours, x.masked_fill(~mask[:, None], 7.0), mask)
    tokens = expected(x.movedim(1, -1)[mask])
    torch.testing.assert_close(out.movedim(1, -1)[mask], tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, expected.running_mean)
    torch.testing.assert_close(ours.running_var, expected.running_var)
    assert ours.num_batches_tracked == 1


def test_training_does_not_see_masked_tokens() -> None:
    mixer = contmix().train()
    x, mask = torch.randn(2, 8, 9, 32), torch.rand(2, 8, 9) < 0.7
    torch.testing.assert_close(
        mixer(x.masked_fill(~mask[..., None], torch.nan), mask), mixer(x, mask), rtol=1e-5, atol=1e-5
    )
    full = torch.ones_like(mask)
    torch.testing.assert_close(mixer(x, full), mixer(x), rtol=1e-4, atol=1e-4)


def test_a_folded_convolution_is_the_convolution_and_its_norm() -> None:
    conv, norm = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
    randomise_statistics(nn.Sequential(norm))
    norm.eval()
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(conv_norm(x, conv, norm), norm(conv(x)), rtol=1e-4, atol=1e-5)
    weight, _ = fold(conv.bfloat16(), norm.bfloat16())
    assert weight.dtype == torch.bfloat16


@pytest.mark.parametrize("side", BRANCHES)
def test_branches_are_one_kernel_and_merge_into_it(side: int) -> None:
    block = DilatedReparam(3, side)
    randomise_statistics(block)
    x = torch.randn(2, 3, 21, 20)
    block.eval()
    branches = block.origin_bn(block.lk_origin(x))
    for kernel, dilation in BRANCHES[side]:
        convolved = block.get_submodule(f"dil_conv_k{kernel}_{dilation}")(x)
        branches = branches + block.get_submodule(f"dil_bn_k{kernel}_{dilation}")(convolved)
    torch.testing.assert_close(block(x), branches, rtol=1e-4, atol=1e-4)
    assert merge_reparam(nn.Sequential(block))[0] is block
    torch.testing.assert_close(block(x), branches, rtol=1e-4, atol=1e-4)
    assert sorted(block.state_dict()) == ["lk_origin.bias", "lk_origin.weight"]
    loaded = DilatedReparam(3, side, merged=True)
    loaded.load_state_dict(block.state_dict())
    torch.testing.assert_close(loaded(x), block.merge()(x))


def test_training_normalises_each_branch_by_its_batch() -> None:
    block = DilatedReparam(3, 7).train()
    assert block(torch.randn(2, 3, 9, 9) * 5).std() > 1
    assert all(norm.num_batches_tracked == 1 for norm in block.modules() if isinstance(norm, nn.BatchNorm2d))
    assert (block.get_submodule("dil_bn_k5_1").running_var != 1).all()


def test_the_block_adds_its_branches_to_the_input() -> None:
    block = ContMixBlock(16, 2, mlp_ratio=2, ls_init_value=0, drop_path=0.5).eval()
    x = torch.randn(2, 16, 8, 9)
    torch.testing.assert_close(block(x), block.dwconv2(block.dwconv1(x)))
    block.train()
    torch.manual_seed(0)
    assert block(x).isfinite().all()
    with pytest.raises(InputError, match=r"drop_path=1 must be"):
        ContMixBlock(16, 2, drop_path=1)
    with pytest.raises(InputError, match=r"mlp_ratio=0 leaves no hidden channel"):
        ContMixBlock(16, 2, mlp_ratio=0)


def test_a_dropped_branch_is_left_out_and_a_kept_one_scaled_up() -> None:
    block = ContMixBlock(16, 2, drop_path=0.75).train()
    torch.manual_seed(0)
    dropped = block._dropped(torch.ones(400, 1, 1, 1))
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert 0.6 < (dropped == 0).float().mean() < 0.9


def test_response_normalisation_weighs_channels_by_their_norm_relative_to_the_mean() -> None:
    norm = GlobalResponseNorm(2)
    nn.init.ones_(norm.gamma)
    x = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    torch.testing.assert_close(norm(x)[0, :, 0, 0], torch.tensor([3 * 2.5, 1 * 1.5]))


def test_synchronised_batch_normalisation_is_taken() -> None:
    module = contmix()
    x = torch.randn(2, 9, 8, 32)
    before = module(x)
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in synchronised.modules())
    torch.testing.assert_close(synchronised(x), before)
