"""Kolmogorov-Arnold attention: its series, sizes, masks, the simplex and shared functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attention
from attention.karat import KolmogorovArnoldAttention, project_to_simplex
from kernels.errors import InputError


def make(**params: Any) -> KolmogorovArnoldAttention:
    torch.manual_seed(0)
    module = attention.create("karat", dim=16, num_heads=4, **{"input_size": (4, 6), **params})
    assert isinstance(module, KolmogorovArnoldAttention)
    return module.eval()


def test_without_cosines_and_scores_nothing_comes_out() -> None:
    module = make()
    with torch.no_grad():
        module.operators.a.zero_()
        module.qkv.weight[:16].zero_()
        module.qkv.bias[:16].zero_()
    out = module(torch.randn(2, 4, 6, 16))
    torch.testing.assert_close(out, module.proj.bias.expand_as(out))


def test_one_harmonic_of_rank_one_is_a_cosine_of_the_scores() -> None:
    module = make(rank=1, harmonics=1)
    with torch.no_grad():
        module.operators.b.zero_()
    x = torch.randn(1, 4, 6, 16)
    _, weights = module(x, return_attention=True)
    q, k, _ = module.qkv(x).reshape(24, 3, 4, 4).unbind(1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / 2
    row = torch.einsum("hqk,hk->hq", scores.cos(), module.operators.a[:, 0, :, 0])
    torch.testing.assert_close(weights[0], row[..., None] * module.operators.W[:, None, :, 0])


@pytest.mark.parametrize("harmonics", [1, 5, 11])
def test_many_harmonics_keep_their_digits(harmonics: int) -> None:
    module = make(harmonics=harmonics)
    with torch.no_grad():
        module.qkv.weight.mul_(5)
    x = torch.randn(1, 4, 6, 16)
    exact = make(harmonics=harmonics).double()
    exact.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), exact(x.double()).float(), rtol=1e-3, atol=1e-4)


def test_functions_of_one_place_serve_a_map_twice_the_size() -> None:
    module = make()
    with torch.no_grad():  # functions that do not depend on the place
        for table in module.operators.parameters():
            table.copy_(table.mean(2 if table.dim() == 4 else 1, keepdim=True))
    x = torch.randn(2, 4, 6, 16)
    doubled = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(module(doubled)[:, ::2, ::2], module(x), rtol=1e-4, atol=1e-5)


def test_masked_keys_have_neither_cosine_nor_weight() -> None:
    module = make(rank=2)
    x = torch.randn(2, 4, 6, 16)
    mask = torch.rand(2, 4, 6) < 0.6
    _, weights = module(x, mask, return_attention=True)
    hidden = ~mask.flatten(1)
    assert (weights.transpose(1, 3)[hidden] == 0).all()
    # As if the coefficients of the masked keys were 0.
    alone = make(rank=2)
    with torch.no_grad():
        for table in (alone.operators.a, alone.operators.b):
            table.transpose(0, 2)[hidden[0]] = 0
        alone.operators.W.transpose(0, 1)[hidden[0]] = 0
    keep = mask[0]
    torch.testing.assert_close(module(x, mask)[0][keep], alone(x)[0][keep], rtol=1e-4, atol=1e-5)


def test_the_projection_is_onto_the_simplex() -> None:
    x = torch.randn(50, 7) * 3
    found = project_to_simplex(x)
    torch.testing.assert_close(found.sum(-1), torch.ones(50))
    assert (found >= 0).all()
    torch.testing.assert_close(project_to_simplex(found), found)
    torch.testing.assert_close(project_to_simplex(x + 5), found)
    # The nearest point: the way to it makes an obtuse angle with the way on to any other.
    others = torch.rand(50, 200, 7)
    others = others / others.sum(-1, keepdim=True)
    assert (torch.einsum("bd,bkd->bk", x - found, others - found[:, None]) < 1e-4).all()
    seen = torch.tensor([True] * 5 + [False] * 2)
    torch.testing.assert_close(project_to_simplex(x, seen)[:, :5], project_to_simplex(x[:, :5]))
    assert (project_to_simplex(x, seen)[:, 5:] == 0).all()


def test_projected_weights_sum_to_one_over_the_real_keys() -> None:
    module, x = make(simplex=True), torch.randn(2, 4, 6, 16)
    assert module.rows_sum_to_one and not make().rows_sum_to_one
    mask = torch.rand(2, 4, 6) < 0.6
    mask[1] = False
    mask[0, 0, 0] = True
    _, weights = module(x, mask, return_attention=True)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(4, 24))
    assert (weights[0, ..., ~mask[0].flatten()] == 0).all() and (module(x, mask)[1] == 0).all()
    torch.autograd.gradcheck(module.double(), x.double().requires_grad_(), fast_mode=True)


def test_blocks_may_share_their_functions() -> None:
    first, second = make(), make()
    second.share_operators(first)
    names = [name for name, _ in torch.nn.ModuleList([first, second]).named_parameters()]
    assert sum("operators" in name for name in names) == 3
    with pytest.raises(InputError, match="functions of 4 heads cannot be shared with 2"):
        attention.create("karat", dim=16, num_heads=2).share_operators(first)


@pytest.mark.parametrize("params", [{"rank": 0}, {"harmonics": 0}, {"input_size": (0, 3)}, {"input_size": ()}])
def test_sizes_below_one_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        make(**params)
