"""Agent attention: agents, tables of other sizes, forms of the paper's hosts, sequences and volumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attention
from attention.agent import AgentAttention
from attention.agent_bias import AgentBias
from attention.agent_stripes import StripeAgentAttention
from kernels.errors import InputError


def make(size: tuple[int, ...] = (6, 6), **params: Any) -> AgentAttention:
    torch.manual_seed(0)
    module = attention.create("agent", dim=16, num_heads=4, input_size=size, **{"agents": 4, **params})
    assert isinstance(module, AgentAttention)
    return module.eval()


def test_constant_values_come_out_unchanged_where_the_convolution_is_off() -> None:
    module = make()
    with torch.no_grad():
        module.dwc.weight.zero_()
        module.dwc.bias.zero_()
        module.qkv.weight[32:].zero_()  # values are the bias alone
        module.qkv.bias[32:] = torch.randn(16)
    expected = module.proj(module.qkv.bias[32:])
    torch.testing.assert_close(module(torch.randn(2, 5, 7, 16)), expected.expand(2, 5, 7, 16))


def test_one_agent_per_token_and_sharp_scores_pick_each_tokens_own_value() -> None:
    module = make((3, 3), agents=9, qkv_bias=False)
    with torch.no_grad():
        for name, table in module.bias.named_parameters():
            table.zero_()
            assert name.endswith("_bias")
        module.dwc.weight.zero_()
        module.dwc.bias.zero_()
        module.qkv.weight.copy_(torch.cat([torch.eye(16) * 60, torch.eye(16) * 60, torch.eye(16)]))
        module.proj.weight.copy_(torch.eye(16))
        module.proj.bias.zero_()
    x = torch.nn.functional.normalize(torch.randn(1, 3, 3, 4, 4), dim=-1).flatten(3)
    torch.testing.assert_close(module(x), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prefix", [0, 2])
def test_tables_are_exact_at_their_size_and_interpolated_at_others(prefix: int) -> None:
    bias = AgentBias(2, (2, 2), (4, 6), (4, 6), prefix)
    exact = bias.to_agents((4, 6), (2, 2))
    lines = bias.ah_bias + bias.aw_bias
    coarse = torch.nn.functional.interpolate(bias.an_bias, (4, 6), mode="bilinear")
    torch.testing.assert_close(exact[..., prefix:].unflatten(-1, (4, 6)), coarse[None] + lines)
    with torch.no_grad():
        for table in bias.parameters():
            table.fill_(0.5)
    assert torch.allclose(bias.to_agents((3, 9), (2, 3))[..., prefix:], torch.tensor(1.5))
    other = bias.from_agents((1, 1), (5, 1))
    assert other.shape == (1, 2, prefix + 1, 5) and torch.allclose(other[:, :, prefix:], torch.tensor(1.5))
    assert torch.allclose(other[:, :, :prefix], torch.tensor(0.5))


def test_agents_are_means_of_the_real_queries_of_their_cells() -> None:
    module = make()
    q = torch.randn(1, 6, 6, 4, 4)
    mask = torch.ones(1, 6, 6, dtype=torch.bool)
    mask[:, :3, :3] = False  # the first agent's cell
    mask[:, 3:, 1] = False
    agents, there = module._pool(q.masked_fill(~mask[..., None, None], 0), (6, 6), mask)
    assert there is not None and there.tolist() == [[False, True, True, True]]
    torch.testing.assert_close(agents[0, :, 1], q[0, :3, 3:].mean((0, 1)))
    torch.testing.assert_close(agents[0, :, 2], q[0, 3:, [0, 2]].mean((0, 1)))
    assert (agents[0, :, 0] == 0).all()


def test_a_free_grid_of_agents_equal_to_the_trained_one_changes_nothing() -> None:
    free, trained, x = make(agent_grid=(2, 2)), make(), torch.randn(2, 5, 8, 16)
    torch.testing.assert_close(free(x), trained(x))
    assert not torch.allclose(make(agent_grid=(3, 4))(x), trained(x), atol=1e-4)


def test_class_tokens_are_no_part_of_the_map() -> None:
    module = make((4, 8), prefix=2)
    x = torch.randn(2, 2 + 32, 16)
    out = module(x)
    other = x.clone()
    other[:, 0] += 1.0
    q = module._qkv(x, None)[0]
    torch.testing.assert_close(
        module._pool(q, (4, 8), None)[0], module._pool(module._qkv(other, None)[0], (4, 8), None)[0]
    )
    assert not torch.allclose(module(other)[:, 5], out[:, 5])  # yet the others read it
    assert module._grid(torch.zeros(1, 2 + 8, 16)) == (2, 4)  # the trained proportions
    _, weights = module(x, return_attention=True)
    assert weights.shape == (2, 4, 34, 34)
    mask = torch.ones(2, 34, dtype=torch.bool)
    mask[:, 7::3] = False
    torch.testing.assert_close(module(x.masked_fill(~mask[..., None], torch.nan), mask), module(x, mask))
    with pytest.raises(InputError, match=r"13 tokens with a prefix of 2 are no map of the proportions"):
        module(torch.randn(1, 13, 16))
    with pytest.raises(InputError, match="2 tokens with a prefix of 2"):
        module(torch.randn(1, 2, 16))


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 6), (9, 5)])
def test_reduced_keys_serve_any_size_and_ignore_masked_tokens(grid: tuple[int, int]) -> None:
    module = make((8, 8), sr_ratio=4)
    x = torch.randn(2, *grid, 16)
    mask = torch.rand(2, *grid) < 0.6
    mask[0, 0, 0], mask[1] = True, False
    clean = module(x, mask)
    assert clean.isfinite().all() and (clean[1] == 0).all()
    torch.testing.assert_close(module(x.masked_fill(~mask[..., None], torch.nan), mask), clean)
    torch.testing.assert_close(module(x, torch.ones_like(mask)), module(x))
    with pytest.raises(InputError, match="no weights between tokens"):
        module(x, return_attention=True)


def test_sequences_have_learned_agents_whatever_the_order_and_padding() -> None:
    module = make((64,), agents=5)
    with torch.no_grad():
        module.agent_tokens.normal_()
    x = torch.randn(2, 9, 16)
    order = torch.randperm(9)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])
    longer = torch.cat([x, torch.full((2, 4, 16), torch.nan)], 1)
    torch.testing.assert_close(module(longer, torch.arange(13).expand(2, 13) < 9)[:, :9], module(x))
    lengths = [5, 0, 9, 1]
    bags = torch.randn(15, 16)
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    alone = torch.cat([module(bag[None])[0] for bag in bags.split(lengths) if len(bag)])
    torch.testing.assert_close(module.packed(bags, cuts), alone)
    module.packed(bags, cuts).square().sum().backward()
    assert module.agent_tokens.grad is not None and module.agent_tokens.grad.any()
    _, weights = module(x, return_attention=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))


def test_volumes_have_a_table_for_the_depth() -> None:
    module = make((4, 6, 8), agents=8, sr_ratio=2)
    assert module.bias.ad_bias.shape == (1, 4, 8, 2, 1, 1) and module.bias.da_bias.shape == (1, 4, 4, 1, 1, 8)
    for grid in [(4, 6, 8), (1, 1, 1), (3, 5, 2)]:
        x = torch.randn(2, *grid, 16)
        mask = torch.rand(2, *grid) < 0.7
        assert module(x, mask).isfinite().all() and module(x).shape == x.shape
    out = make((4, 6, 8), agents=8)(torch.randn(1, 3, 4, 5, 16), return_attention=True)
    assert out[1].shape == (1, 4, 60, 60)
    low = make((4, 6, 8), agents=8).bfloat16()(torch.randn(1, 3, 4, 5, 16).bfloat16())
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


def test_dropout_acts_on_the_softmaxes_while_training_alone() -> None:
    module, x = make(attn_drop=0.5), torch.randn(1, 6, 6, 16)
    torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)
    module.train()
    assert not torch.allclose(module(x), module(x))


def test_stripes_do_not_see_each_other() -> None:
    module = StripeAgentAttention(16, 4, (4, 2), (2, 2)).eval()
    x = torch.randn(1, 8, 6, 16)
    other = x.clone()
    other[:, :4, :2] += 1
    changed = (module(other, other, other) - module(x, x, x)).abs().amax((0, 3)) > 0
    assert changed[:4, :2].all() and changed.sum() == 8
    with pytest.raises(InputError, match=r"stripes of \(4, 2\) do not divide a map of \(7, 6\)"):
        module(*[x[:, :7]] * 3)
    with pytest.raises(InputError, match="dim=16 is not divisible into num_heads=3"):
        StripeAgentAttention(16, 3, (4, 2))
    with pytest.raises(InputError, match=r"stripe=\(0, 2\)"):
        StripeAgentAttention(16, 4, (0, 2))


@pytest.mark.parametrize(
    ("size", "params", "sentence"),
    [
        ((6, 6), {"agents": 5}, r"agents=5 do not form a grid of 2 equal sides; take 4 or 9"),
        ((6, 6, 6), {"agents": 9}, r"agents=9 do not form a grid of 3 equal sides; take 8 or 27"),
        ((6, 6), {"agents": (3, 0)}, r"agents=\(3, 0\) must have 2 sides"),
        ((6, 6), {"agent_grid": (3,)}, r"agent_grid=\(3,\) must have 2 sides"),
        ((6,), {"agent_grid": (3,)}, "not for sequences"),
        ((6, 0), {}, r"input_size=\(6, 0\) must be one to three sizes"),
        ((6, 6), {"prefix": 1, "sr_ratio": 2}, "prefix=1 with sr_ratio=2 on 2 axes is not possible"),
        ((6,), {"sr_ratio": 2}, "sequences take neither"),
        ((6, 6), {"sr_ratio": 0}, "sr_ratio=0"),
    ],
)
def test_forms_that_do_not_exist_are_refused(size: tuple[int, ...], params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make(size, **params)
