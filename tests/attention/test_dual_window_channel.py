"""Window and channel attention: the two parts, the versions of the second, and their block."""

from __future__ import annotations

import pytest
import torch

import attention
from attention.dual_window_channel import ChannelGroupAttention, DualBlock, DualWindowChannelAttention
from kernels.errors import InputError

NAME = "dual_window_channel"


def make(**changes: object) -> DualWindowChannelAttention:
    torch.manual_seed(0)
    return DualWindowChannelAttention(16, 2, **{"window_size": 3, **changes}).eval()  # type: ignore[arg-type]


def test_both_is_the_channel_part_of_the_window_part() -> None:
    module, x = make(), torch.randn(2, 4, 5, 16)
    assert module.window is not None and module.channel is not None
    torch.testing.assert_close(module(x), module.channel(module.window(x)))
    for part in ("window", "channel"):
        alone = make(part=part)
        alone.load_state_dict({k: v for k, v in module.state_dict().items() if k.startswith(part)})
        torch.testing.assert_close(alone(x), getattr(module, part)(x))


def test_blocks_of_a_stage_alternate_between_the_parts() -> None:
    params = {"part": "alternate", "window_size": 3}
    parts = [DualWindowChannelAttention.for_block(params, index) for index in range(3)]
    assert [p["part"] for p in parts] == ["window", "channel", "window"] and params["part"] == "alternate"
    assert [attention.create(NAME, dim=8, num_heads=2, **p).channel is None for p in parts] == [True, False, True]
    assert DualWindowChannelAttention.for_block({"part": "both"}, 1) == {"part": "both"}


def test_windows_see_nothing_beyond_themselves_and_channels_all() -> None:
    x = torch.randn(1, 6, 6, 16)
    other = x.clone()
    other[:, :3, :3] += 1
    for part, unchanged in (("window", True), ("channel", False)):
        module = make(part=part)
        assert torch.allclose(module(other)[:, 3:, 3:], module(x)[:, 3:, 3:], atol=1e-6) == unchanged


@pytest.mark.parametrize("version", [1, 2])
def test_channels_are_mixed_by_weights_that_sum_to_one(version: int) -> None:
    torch.manual_seed(0)
    module, x = ChannelGroupAttention(16, 2, version).double(), torch.randn(1, 5, 16, dtype=torch.float64)
    q, k, v = module.qkv(x).view(5, 3, 2, 8).permute(1, 2, 0, 3)
    if version == 1:
        out = (k.mT @ v * 8**-0.5).softmax(-1) @ q.mT
    else:
        out = (q.mT @ k * 5**-0.5).softmax(-1) @ v.mT
    torch.testing.assert_close(module(x)[0], module.proj(out.permute(2, 0, 1).flatten(1)))


@pytest.mark.parametrize("version", [1, 2])
def test_the_channel_part_takes_any_grid_and_counts_real_tokens_alone(version: int) -> None:
    module, x = make(part="channel", version=version), torch.randn(2, 3, 2, 4, 16)
    sequence = x.flatten(1, 3)
    torch.testing.assert_close(module(x).flatten(1, 3), module(sequence))
    order = torch.randperm(24)
    torch.testing.assert_close(module(sequence[:, order]), module(sequence)[:, order], rtol=1e-4, atol=1e-5)
    mask = torch.rand(1, 24) < 0.5
    out = module(sequence[:1], mask)
    torch.testing.assert_close(out[mask], module(sequence[:1][mask][None])[0], rtol=1e-4, atol=1e-5)
    assert (module(x, torch.zeros(2, 3, 2, 4, dtype=torch.bool)) == 0).all()
    cut = torch.tensor([0, 7, 7, 24])
    packed = module.packed(sequence[0], cut)
    torch.testing.assert_close(packed[:7], module(sequence[:1, :7])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[7:], module(sequence[:1, 7:])[0], rtol=1e-4, atol=1e-5)


def test_the_window_part_takes_images_alone() -> None:
    with pytest.raises(InputError, match=rf"'{NAME}' takes \(B, H, W, 16\)"):
        make()(torch.randn(1, 5, 16))


@pytest.mark.parametrize("part", ["window", "channel"])
def test_a_block_is_as_if_masked_tokens_were_absent(part: str) -> None:
    torch.manual_seed(0)
    block = DualBlock(16, 2, part, window_size=3, version=2, padding="hide").eval()
    x = torch.randn(1, 6, 6, 16)
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[:, :4, :5] = True
    out = block(x.masked_fill(~mask[..., None], torch.nan), mask)
    torch.testing.assert_close(out[:, :4, :5], block(x[:, :4, :5]), rtol=1e-4, atol=1e-5)
    assert (out[~mask] == 0).all()


def test_a_block_of_the_authors_code_is_loaded_by_its_names() -> None:
    torch.manual_seed(0)
    block, other, x = DualBlock(8, 2, "channel"), DualBlock(8, 2, "channel"), torch.randn(1, 3, 4, 8)
    official = {k.replace("cpe1.", "cpe.0.").replace("cpe2.", "cpe.1."): v for k, v in block.state_dict().items()}
    attention.load_official(other, official)
    torch.testing.assert_close(other(x), block(x))


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(InputError, match=r"Did you mean 'window'"):
        make(part="windows")
    with pytest.raises(InputError, match="version=3 must be 1"):
        make(version=3)
    with pytest.raises(InputError, match="window_size=0 must be at least 1"):
        make(window_size=0)
    with pytest.raises(InputError, match="'both'"):
        DualBlock(16, 2, "both")
