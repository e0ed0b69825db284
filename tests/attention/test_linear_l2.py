"""Linear global attention: what its floor does, order, the local concentration module and the block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attention.linear_l2 import GlobalBlock, LinearGlobalAttention, LocalConcentration
from attention.masked_norm import masked_batch_norm
from kernels.errors import InputError


def make(**changes: float | None) -> LinearGlobalAttention:
    torch.manual_seed(0)
    return LinearGlobalAttention(16, 2, **changes).eval()  # type: ignore[arg-type]


def test_below_the_floor_the_output_is_divided_by_the_floor() -> None:
    x = torch.randn(1, 5, 16)
    high, higher = make(floor=1e4), make(floor=2e4)
    for module in (high, higher):
        nn.init.zeros_(module.proj.bias)
    torch.testing.assert_close(high(x), 2 * higher(x))


def test_above_the_floor_constant_values_come_out_times_the_temperature() -> None:
    module = make(floor=1e-6)
    with torch.no_grad():
        module.qkv.weight[32:].zero_()  # values are their bias
        module.qkv.bias[:32] += 1  # so that every feature meets another
        module.temperature.copy_(torch.tensor([0.5, 2.0])[:, None, None])
    constant = module.qkv.bias[32:] * torch.tensor([0.5, 2.0]).repeat_interleave(8)
    out = module(torch.randn(2, 4, 3, 16))
    torch.testing.assert_close(out, module.proj(constant).expand_as(out))


def test_the_order_of_tokens_does_not_matter() -> None:
    module, x = make(floor=0.1), torch.randn(2, 12, 16)
    order = torch.randperm(12)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])
    torch.testing.assert_close(module(x.view(2, 3, 4, 16)).flatten(1, 2), module(x))


def test_the_floor_counts_the_keys_that_are_there() -> None:
    module, x = make(floor=1.0), torch.randn(1, 3, 4, 16)
    mask = torch.ones(1, 3, 4, dtype=torch.bool)
    mask[:, 2] = False
    torch.testing.assert_close(module(x, mask)[:, :2], module(x[:, :2]))


def test_the_local_option_adds_the_module_of_the_output() -> None:
    module, plain = make(local_kernel=3), make()
    plain.load_state_dict(module.state_dict(), strict=False)
    assert module.local_mp is not None and module.local_norm is not None
    x = torch.randn(2, 5, 6, 16)
    out = plain(x)
    torch.testing.assert_close(module(x), out + module.local_mp(module.local_norm(out)))
    torch.testing.assert_close(module(x[:, 0]), plain(x[:, 0]))  # sequences go without
    volume = x[:, None].expand(2, 3, 5, 6, 16)
    torch.testing.assert_close(module(volume)[:, 1], module(volume)[:, 0])  # slices do not see each other
    assert module.flops((1, 5, 6)) > plain.flops((1, 5, 6))
    cut = torch.tensor([0, 30, 60])
    packed = module.packed(x.flatten(0, 2), cut, [(5, 6), (5, 6)])
    torch.testing.assert_close(packed, module(x).flatten(0, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_masked_surrounding_is_as_if_the_map_ended_there(training: bool) -> None:
    torch.manual_seed(0)
    module, twin = (LocalConcentration(8, 5).train(training) for _ in range(2))
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, 6, 7, 8)
    mask = torch.zeros(2, 6, 7, dtype=torch.bool)
    mask[:, :4, :5] = True
    out = module(x.masked_fill(~mask[..., None], torch.nan), mask)
    assert (out[~mask] == 0).all()
    torch.testing.assert_close(out[:, :4, :5], twin(x[:, :4, :5]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.bn.running_var, twin.bn.running_var)
    torch.testing.assert_close(module.bn.running_mean, twin.bn.running_mean)


def test_nothing_real_leaves_running_statistics_alone() -> None:
    norm = nn.BatchNorm1d(4)
    out = masked_batch_norm(norm, torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool), channel=-1)
    assert out.isfinite().all() and (norm.running_mean == 0).all() and (norm.running_var == 1).all()


def test_a_block_keeps_masked_tokens_out_and_drops_whole_branches() -> None:
    torch.manual_seed(0)
    block = GlobalBlock(16, 2, mlp_ratio=2, drop_path=1.0).eval()
    x = torch.randn(2, 5, 7, 16)
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[:, :, :4] = True
    out = block(x.masked_fill(~mask[..., None], torch.nan), mask)
    torch.testing.assert_close(out[:, :, :4], block(x[:, :, :4]), rtol=1e-4, atol=1e-5)

    def branches(y: Tensor) -> Tensor:
        return y - block.cpe[0](x)

    assert branches(block(x)).abs().max() > 0.01
    assert branches(block.train()(x)).abs().max() == 0


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(InputError, match="floor=0 must be above 0"):
        make(floor=0)
    with pytest.raises(InputError, match="kernel size 4 must be odd"):
        make(local_kernel=4)


def test_a_branch_cannot_be_left_out_more_often_than_always() -> None:
    with pytest.raises(InputError, match=r"drop_path=1\.5 must be from 0 to 1"):
        GlobalBlock(16, 2, drop_path=1.5)
