"""Query readout: positions, norms, learned queries, narrow inner width, folded projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attention
from attention.query_readout import QueryReadout
from kernels.errors import InputError
from tests.attention.released.query_readout import released


def make(**params: Any) -> QueryReadout:
    torch.manual_seed(0)
    module = attention.create("query_readout", dim=24, num_heads=3, **params)
    assert isinstance(module, QueryReadout)
    return module.eval()


def tensors(queries: int = 3, tokens: int = 10) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, queries, 24), torch.randn(2, tokens, 24)


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("norm", ["post", "pre", None])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("mlp_dim", [None, 20])
def test_each_form_is_that_of_the_matrix_formulation(
    queries: int, norm: str | None, residual: bool, mlp_dim: int | None
) -> None:
    module = make(norm=norm, residual=residual, mlp_dim=mlp_dim, act="gelu", downsample_rate=4)
    q, kv = tensors(queries)
    torch.testing.assert_close(module(q, kv), released(module)(q, kv), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [2, 40])
def test_positions_change_the_weights_and_not_what_is_read(queries: int) -> None:
    module = make(norm=None, residual=False)
    q, kv = tensors(queries)
    positions = torch.randn(1, queries, 24), torch.randn(1, 10, 24)
    out, weights = module(q, kv, q_pos=positions[0], kv_pos=positions[1], return_attention=True)
    _, moved = module(q + positions[0], kv + positions[1], return_attention=True)
    torch.testing.assert_close(weights, moved)
    values = module.v_proj(kv).unflatten(2, (3, -1)).transpose(1, 2)
    torch.testing.assert_close(
        out, module.out_proj((weights @ values).transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("queries", [2, 40])
def test_positions_of_masked_tokens_may_hold_anything(queries: int) -> None:
    module = make()
    q, kv = tensors(queries)
    mask = torch.arange(10).expand(2, 10) < 6
    kv_pos = torch.randn(2, 10, 24)
    poisoned = kv_pos.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(
        module(q, kv, mask, kv_pos=poisoned), module(q, kv[:, :6], kv_pos=kv_pos[:, :6]), rtol=1e-5, atol=1e-5
    )


def test_learned_queries_read_when_none_are_given() -> None:
    module = make(num_queries=5)
    _, kv = tensors()
    out = module(None, kv)
    assert out.shape == (2, 5, 24)
    assert module.queries is not None
    torch.testing.assert_close(out, module(module.queries.expand(2, -1, -1), kv))
    out.square().sum().backward()
    assert module.queries.grad is not None and module.queries.grad.abs().sum() > 0


def test_the_inner_width_is_a_fraction_of_the_channels() -> None:
    module = make(downsample_rate=4)
    assert module.q_proj.weight.shape == (6, 24) and module.out_proj.weight.shape == (24, 6)
    assert module.flops((1, 100, 1000)) < make(downsample_rate=1).flops((1, 100, 1000)) / 3


@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("norm", ["post", "pre", None])
def test_equal_tokens_give_the_same_answer_to_any_query(queries: int, norm: str | None) -> None:
    module = make(norm=norm, residual=False)
    q, _ = tensors(queries)
    out = module(q, torch.randn(2, 1, 24).expand(2, 7, 24))
    torch.testing.assert_close(out, out[:, :1].expand_as(out), rtol=1e-5, atol=1e-5)


def test_state_of_sam_is_read_under_its_names() -> None:
    module = make(mlp_dim=8)
    state = {}
    for key, value in module.state_dict().items():
        head = key.split(".")[0]
        official = {"norm": "norm2", "norm_mlp": "norm3", "mlp": "mlp"}.get(head, f"cross_attn_token_to_image.{head}")
        state[official + key.removeprefix(head)] = value
    other = make(mlp_dim=8)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    attention.load_official(other, state)
    q, kv = tensors()
    assert torch.equal(other(q, kv), module(q, kv))


def test_bad_values_are_refused() -> None:
    with pytest.raises(
        InputError, match="downsample_rate=3 does not divide the 8 channels of a head; take one of 1, 2"
    ):
        make(downsample_rate=3)
    with pytest.raises(InputError, match="Did you mean 'post'"):
        make(norm="past")
    with pytest.raises(InputError, match="Did you mean 'gelu'"):
        make(act="geluu")
    with pytest.raises(InputError, match="mlp_dim=0 must be at least 1"):
        make(mlp_dim=0)
    with pytest.raises(InputError, match="num_queries=-1 must be"):
        make(num_queries=-1)
    with pytest.raises(InputError, match="has none of its own; set num_queries"):
        make()(None, tensors()[1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 2])
def test_many_queries_read_few_tokens_as_the_matrix_formulation_does(tokens: int, masked: bool) -> None:
    module = make(norm=None, residual=False).double()
    q, kv = (t.double() for t in tensors(40, 3))
    kv = kv[:, : tokens + 1]
    mask = torch.tensor([True] * tokens + [False]).expand(2, -1) if masked else None
    seen = kv[:, :tokens] if masked else kv[:, :tokens].clone()
    read = kv if masked else seen
    for leaf in (q, read, seen):
        leaf.requires_grad_()
    out, weights = module(q, read, mask, return_attention=True)
    expected = released(module)(q, seen)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights[..., :tokens].sum(-1), torch.ones(2, 3, 40, dtype=torch.float64))
    ours = torch.autograd.grad(out.square().sum(), [q, *module.parameters()])
    theirs = torch.autograd.grad(expected.square().sum(), [q, *module.parameters()])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
