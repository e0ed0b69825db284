"""What holds for every cross attention: sizes, masks, isolation, precision, gradients, costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attention
from attention.cross import Cross
from kernels.errors import InputError
from tests.attention.contract import (
    DIM,
    close_enough,
    compiled_agrees,
    every,
    gradients_are_right,
    make_cross,
    released,
)

every_cross = every("cross")


def small(name: str, queries: int = 5, tokens: int = 11) -> tuple[Cross, Tensor, Tensor]:
    module = make_cross(name)
    assert isinstance(module, Cross)
    torch.manual_seed(0)
    return module, torch.randn(2, queries, DIM), torch.randn(2, tokens, DIM)


@every_cross
def test_any_numbers_of_queries_and_tokens_give_one_output_per_query(name: str) -> None:
    module = make_cross(name)
    for queries, tokens in [(1, 1), (7, 1), (1, 50), (13, 9)]:
        q, kv = torch.randn(2, queries, DIM, requires_grad=True), torch.randn(2, tokens, DIM, requires_grad=True)
        out = module(q, kv)
        assert out.shape == (2, queries, DIM)
        out.square().sum().backward()
        assert out.isfinite().all() and q.grad is not None and q.grad.isfinite().all()
        assert kv.grad is not None and kv.grad.isfinite().all()
    assert (module(torch.randn(2, 3, DIM), torch.randn(2, 0, DIM)) == 0).all()


@every_cross
def test_it_computes_what_the_released_formulation_computes(name: str) -> None:
    module, q, kv = small(name)
    run = released(module, "cross")
    assert run is not None, f"tests/attention/released/{name}.py is missing"
    torch.testing.assert_close(module(q, kv), run(q, kv), rtol=1e-4, atol=1e-4)


@every_cross
def test_masked_tokens_are_as_if_absent(name: str) -> None:
    module, q, kv = small(name)
    mask = torch.arange(11).expand(2, 11) < 7
    poisoned = kv.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(module(q, poisoned, mask), module(q, kv[:, :7]), rtol=1e-4, atol=1e-5)
    none = mask.clone()
    none[0] = False
    leaves = q.clone().requires_grad_()
    out, weights = module(leaves, kv, none, return_attention=True)
    assert (out[0] == 0).all() and out.isfinite().all()
    assert (weights[0] == 0).all() and (weights[1] > 0).any()
    out.sum().backward()
    assert leaves.grad is not None and leaves.grad.isfinite().all()


@every_cross
def test_an_item_does_not_see_the_rest_of_its_batch(name: str) -> None:
    module, q, kv = small(name)
    torch.testing.assert_close(module(q[:1], kv[:1])[0], module(q, kv)[0], rtol=1e-4, atol=1e-5)


@every_cross
def test_weights_are_returned_on_request(name: str) -> None:
    module, q, kv = small(name)
    out, weights = module(q, kv, return_attention=True)
    torch.testing.assert_close(out, module(q, kv))
    assert weights.dim() == 4 and weights.shape[0] == 2 and weights.shape[2] == 5 and weights.isfinite().all()


@every_cross
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    assert gradients_are_right(*small(name))


@every_cross
def test_half_precision_gives_the_numbers_of_float32(name: str) -> None:
    module, q, kv = small(name)
    full = module(q, kv)
    with torch.autocast("cpu", torch.bfloat16):
        cast = module(q, kv)
    low = module.to(torch.bfloat16)(q.bfloat16(), kv.bfloat16())
    assert low.dtype == torch.bfloat16 and low.isfinite().all() and cast.isfinite().all()
    if not module.takes_choices:
        close_enough(cast, full)
        close_enough(low, full)


@every_cross
def test_it_compiles_as_one_graph(name: str) -> None:
    compiled_agrees(*small(name))


@every_cross
def test_its_state_goes_into_another(name: str) -> None:
    module, q, kv = small(name)
    other = make_cross(name, seed=5)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(q, kv), module(q, kv), rtol=0, atol=0)
    attention.load_official(other, module.state_dict())


@every_cross
def test_costs_grow_with_the_batch(name: str) -> None:
    module = make_cross(name)
    assert module.flops((4, 8, 64)) == pytest.approx(4 * module.flops((1, 8, 64)), rel=1e-6)
    assert module.min_bytes((2, 8, 64), torch.bfloat16) == module.min_bytes((2, 8, 64)) / 2 > 2 * 64 * DIM * 2


@every_cross
def test_wrong_shapes_and_masks_are_refused(name: str) -> None:
    module, q, kv = small(name)
    with pytest.raises(InputError, match=rf"'{name}' takes queries .*got \(2, 5, 31\)"):
        module(q[..., :-1], kv)
    with pytest.raises(InputError, match="the mask must be bool"):
        module(q, kv, torch.ones(2, 11))
