"""Blocks, grids and both in turn: who sees whom, the two dialects, maps that do not divide."""

from __future__ import annotations

import pytest
import torch

import attention
from attention.max_vit import BlockAttention, GridAttention, MultiAxisAttention
from kernels.errors import InputError


def seen(module: BlockAttention | GridAttention, height: int, width: int) -> torch.Tensor:
    """(H, W, H, W) bool: which token has weight for which."""
    torch.manual_seed(0)
    _, weights = module(torch.randn(1, height, width, module.dim), return_attention=True)
    return (weights[0, 0] > 0).unflatten(1, (height, width)).unflatten(0, (height, width))


def test_a_block_holds_the_tokens_with_the_same_quotient() -> None:
    found = seen(BlockAttention(8, 2, 3), 7, 6)
    rows, columns = torch.arange(7) // 3, torch.arange(6) // 3
    expected = (rows[:, None] == rows)[:, None, :, None] & (columns[:, None] == columns)[None, :, None, :]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [(6, 9), (7, 5)])
def test_a_grid_holds_the_tokens_with_the_same_remainder(size: tuple[int, int]) -> None:
    found = seen(GridAttention(8, 2, 3), *size)
    steps = [-(-n // 3) for n in size]  # the map is extended to a multiple of 3, which sets the distance
    rows, columns = (torch.arange(n) % step for n, step in zip(size, steps, strict=True))
    expected = (rows[:, None] == rows)[:, None, :, None] & (columns[:, None] == columns)[None, :, None, :]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["block", "grid"])
def test_both_dialects_are_the_same_attention_in_another_order_of_parameters(name: str) -> None:
    torch.manual_seed(0)
    ours = attention.create(name, dim=12, num_heads=3, window_size=(2, 4))
    other = attention.create(name, dim=12, num_heads=3, window_size=(2, 4), dialect="tf")
    state = ours.state_dict()
    for key in ("qkv.weight", "qkv.bias"):
        state[key] = state[key].unflatten(0, (3, 3, 4)).transpose(0, 1).flatten(0, 2)
    table = state["relative_position_bias_table"].t().reshape(3, 3, 7)
    state["relative_position_bias_table"] = table.flip(1, 2)
    other.load_state_dict(state)
    x = torch.randn(2, 6, 8, 12)
    torch.testing.assert_close(other(x), ours(x))


@pytest.mark.parametrize("name", ["block", "grid"])
def test_values_that_are_all_the_same_come_out_as_they_went_in(name: str) -> None:
    module = attention.create(name, dim=8, num_heads=2, window_size=4)
    with torch.no_grad():
        module.qkv.weight.unflatten(0, (2, 3, 4))[:, 2] = 0
        module.proj.weight.copy_(torch.eye(8))
        module.proj.bias.zero_()
    value = module.qkv.bias.unflatten(0, (2, 3, 4))[:, 2].flatten()
    out = module(torch.randn(2, 7, 5, 8))
    torch.testing.assert_close(out, value.expand_as(out))


def test_what_sticks_out_is_seen_on_request() -> None:
    x = torch.randn(1, 5, 6, 8)
    for name in ("block", "grid"):
        hidden = attention.create(name, dim=8, num_heads=2, window_size=4)
        zeros = attention.create(name, dim=8, num_heads=2, window_size=4, padding="released")
        zeros.load_state_dict(hidden.state_dict())
        padded = torch.nn.functional.pad(x, (0, 0, 0, 2, 0, 3))
        torch.testing.assert_close(zeros(x), hidden(padded)[:, :5, :6])
        assert (zeros(x) - hidden(x)).abs().max() > 1e-3


def test_a_token_reaches_the_whole_map_by_a_block_and_a_grid() -> None:
    torch.manual_seed(0)
    module = MultiAxisAttention(8, 2, 4)
    x = torch.randn(1, 8, 8, 8, requires_grad=True)
    module(x)[0, 2, 5].sum().backward()
    assert x.grad is not None and (x.grad[0].abs().sum(-1) > 0).all()


def test_both_steps_are_the_residual_steps_of_the_paper() -> None:
    module = MultiAxisAttention(8, 2, 3)
    x = torch.randn(2, 6, 7, 8)
    first = x + module.block(x)
    torch.testing.assert_close(x + module(x), first + module.grid(module.norm(first)))


def test_impossible_options_are_refused() -> None:
    with pytest.raises(InputError, match=r"'grid': window_size=0 must be at least 1"):
        GridAttention(8, 2, 0)
    with pytest.raises(InputError, match=r"'block': window_size=\[2, 3, 4\] must be"):
        BlockAttention(8, 2, [2, 3, 4])
    with pytest.raises(InputError, match=r"'block': dialect 'jax' is not known.*Known: tf, torch"):
        BlockAttention(8, 2, dialect="jax")
    with pytest.raises(InputError, match=r"padding 'hidden' is not known. Did you mean 'hide'"):
        MultiAxisAttention(8, 2, padding="hidden")
