"""Sparsifiner: how many keys are kept and which, what the predictor learns from, class tokens, other sizes, masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attention
from attention.sparsifiner import SparsifinerAttention
from kernels.errors import InputError


def make(**params: Any) -> SparsifinerAttention:
    torch.manual_seed(0)
    module = attention.create("sparsifiner", dim=16, num_heads=4, **{"input_size": (6, 6), **params})
    assert isinstance(module, SparsifinerAttention)
    return module.eval()


@pytest.mark.parametrize(("rate", "kept"), [(0.25, 9), (0.26, 10), (1.0, 36), (0.001, 1)])
def test_each_token_attends_its_share_of_the_keys_with_the_highest_estimates(rate: float, kept: int) -> None:
    module, x = make(keep_rate=rate), torch.randn(2, 6, 6, 16)
    found = module.connectivity(x)
    assert (found.mask.sum(-1) == kept).all()
    assert ((found.coefficients > 0).sum(-1) == 6).all()  # 36 // 6 bases, fewer than 8
    lowest = found.estimate.masked_fill(~found.mask, torch.inf).amin(-1)
    highest = found.estimate.masked_fill(found.mask, -torch.inf).amax(-1)
    assert (lowest >= highest).all()
    _, weights = module(x, return_attention=True)
    assert ((weights > 0) == found.mask).all()


def test_keeping_all_keys_is_softmax_attention() -> None:
    module, x = make(keep_rate=1.0), torch.randn(2, 6, 6, 16)
    dense = attention.create("softmax", dim=16, num_heads=4).eval()
    dense.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("mask_predictor")})
    torch.testing.assert_close(module(x), dense(x))


def test_coefficients_and_bases_below_the_cut_are_zero() -> None:
    found = make(token_reduction=2, coefficients=3).connectivity(torch.randn(1, 6, 6, 16))
    assert found.coefficients.shape[-1] == 18 and ((found.coefficients > 0).sum(-1) == 3).all()
    assert (make(threshold=100.0).connectivity(torch.randn(1, 6, 6, 16)).estimate == 0).all()


def test_the_predictor_learns_from_the_reconstruction_alone() -> None:
    module, x = make().train(), torch.randn(2, 6, 6, 16)
    extras: dict[str, torch.Tensor] = {}
    out = module(x, extras=extras)
    out.square().sum().backward(retain_graph=True)
    assert all(p.grad is None for p in module.mask_predictor.parameters())
    extras["reconstruction"].backward()
    assert all(p.grad is not None and p.grad.any() for p in module.mask_predictor.parameters())


def test_the_reconstruction_is_the_distance_to_attention_over_all_real_keys() -> None:
    module, x = make(), torch.randn(2, 6, 6, 16)
    _, dense = make(keep_rate=1.0)(x, return_attention=True)
    extras: dict[str, torch.Tensor] = {}
    module(x, extras=extras)
    estimate = module.connectivity(x).estimate
    torch.testing.assert_close(extras["reconstruction"], (estimate - dense).square().mean())
    mask = torch.rand(2, 6, 6) < 0.7
    _, dense = make(keep_rate=1.0)(x, mask, return_attention=True)
    module(x, mask, extras=extras)
    estimate, real = module.connectivity(x, mask).estimate, mask.flatten(1)
    pairs = (real[:, :, None] & real[:, None])[:, None].expand_as(dense)
    torch.testing.assert_close(extras["reconstruction"], (estimate - dense)[pairs].square().mean())
    module(x, torch.zeros_like(mask), extras=extras)
    assert extras["reconstruction"] == 0


def test_the_share_is_that_of_the_real_keys() -> None:
    module, x = make(), torch.randn(2, 6, 6, 16)
    mask = torch.ones(2, 6, 6, dtype=torch.bool)
    mask[0, 3:], mask[1, 0, 1:], mask[1, 1:] = False, False, False
    found = module.connectivity(x, mask)
    assert (found.mask[0].sum(-1) == 5).all() and (found.mask[1].sum(-1) == 1).all()  # a quarter of 18, and of 1
    assert not found.mask[:, :, :, 35].any()


def test_class_tokens_attend_all_and_may_be_attended() -> None:
    module = make(prefix=2)
    x = torch.randn(2, 38, 16)
    found = module.connectivity(x)
    assert found.mask[:, :, :2].all() and (found.mask[:, :, 2:].sum(-1) == 10).all()
    assert found.coefficients.shape == (2, 4, 36, 6) and found.estimate.shape == (2, 4, 36, 38)
    mask = torch.ones(2, 38, dtype=torch.bool)
    mask[:, 5::3] = False
    torch.testing.assert_close(module(x.masked_fill(~mask[..., None], torch.nan), mask), module(x, mask))
    assert module(torch.randn(1, 2 + 16, 16)).shape == (1, 18, 16)
    with pytest.raises(InputError, match="13 tokens with a prefix of 2 are no map of the proportions"):
        module(torch.randn(1, 13, 16))


def test_bases_of_constant_tables_do_not_depend_on_the_size() -> None:
    module = make(prefix=1)
    with torch.no_grad():
        module.mask_predictor.proj_n.copy_(torch.randn(6).expand(37, 6))
        module.mask_predictor.proj_back_n.copy_(torch.randn(6).expand(37, 6))
    x = torch.randn(1, 1, 16)
    small, large = module.connectivity(x.expand(1, 37, 16)), module.connectivity(x.expand(1, 145, 16))
    torch.testing.assert_close(large.coefficients[:, :, :1], small.coefficients[:, :, :1])
    torch.testing.assert_close(large.estimate[..., 0, 0], small.estimate[..., 0, 0])


@pytest.mark.parametrize("grid", [(7,), (3, 2, 4)])
def test_sequences_and_volumes_are_taken_too(grid: tuple[int, ...]) -> None:
    module = make(input_size=grid)
    for other in [grid, tuple(n + 2 for n in grid)]:
        x = torch.randn(2, *other, 16)
        assert module(x).shape == x.shape


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"keep_rate": 0.0}, "keep_rate=0.0 must be above 0"),
        ({"keep_rate": 1.5}, "keep_rate=1.5 must be above 0 and at most 1"),
        ({"input_size": (6,), "prefix": 1}, "two behind prefix=1"),
        ({"prefix": -1}, "prefix=-1"),
        ({"token_reduction": 0}, "token_reduction=0"),
        ({"threshold": -0.1}, "threshold=-0.1 at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make(**params)
