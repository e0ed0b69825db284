"""What holds for every mixer: sizes, masks, packing, isolation, precision, gradients, compilation, costs."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import attention
from attention.mixer import Mixer
from kernels.errors import InputError
from tests.attention.contract import (
    DIM,
    close_enough,
    compiled_agrees,
    every,
    exported_agrees,
    gradients_are_right,
    grids,
    make_mixer,
    ordinary_grid,
    released,
)

every_mixer = every("mixer")


def small(name: str, seed: int = 0) -> tuple[Mixer, torch.Tensor]:
    mixer = make_mixer(name)
    assert isinstance(mixer, Mixer)
    torch.manual_seed(seed)
    return mixer, torch.randn(2, *ordinary_grid(mixer), DIM)


@every_mixer
def test_any_size_gives_a_finite_map_of_the_same_shape_and_gradients(name: str) -> None:
    mixer = make_mixer(name)
    for grid in grids(mixer):
        x = torch.randn(2, *grid, DIM, requires_grad=True)
        out = mixer(x)
        assert out.shape == x.shape, grid
        out.square().sum().backward()
        assert out.isfinite().all() and x.grad is not None and x.grad.isfinite().all(), grid


@every_mixer
def test_a_batch_without_items_gives_one_without_items(name: str) -> None:
    mixer = make_mixer(name)
    grid = ordinary_grid(mixer)
    x = torch.randn(0, *grid, DIM, requires_grad=True)
    for mask in (None, torch.ones(0, *grid, dtype=torch.bool)):
        out = mixer(x, mask)
        assert out.shape == x.shape
        out.sum().backward()


@every_mixer
def test_it_computes_what_the_released_formulation_computes(name: str) -> None:
    mixer = make_mixer(name)
    run = released(mixer, "mixer")
    assert run is not None, f"tests/attention/released/{name}.py is missing"
    # The map of the tables' own size: released code takes no other where it has tables.
    for grid in {ordinary_grid(mixer), (8, 8) if 2 in mixer.grids else (64,)}:
        if "input_size" in attention.parameters_of(name, "mixer") and grid != (8, 8):
            continue
        x = torch.randn(2, *grid, DIM)
        torch.testing.assert_close(mixer(x), run(x), rtol=1e-4, atol=1e-4)


@every_mixer
def test_what_masked_tokens_hold_changes_nothing(name: str) -> None:
    mixer, x = small(name)
    mask = torch.rand(x.shape[:-1]) < 0.7
    mask.view(2, -1)[:, 0] = True
    clean = mixer(x, mask)
    poisoned = mixer(x.masked_fill(~mask[..., None], torch.nan), mask)
    torch.testing.assert_close(poisoned, clean, rtol=1e-5, atol=1e-5)
    assert (clean[~mask] == 0).all()
    assert clean[mask].abs().sum() > 0
    torch.testing.assert_close(mixer(x, torch.ones_like(mask)), mixer(x), rtol=1e-4, atol=1e-5)


@every_mixer
def test_a_map_without_real_tokens_gives_zeros_and_finite_gradients(name: str) -> None:
    mixer, x = small(name)
    mask = torch.ones(x.shape[:-1], dtype=torch.bool)
    mask[0] = False
    x.requires_grad_()
    out = mixer(x, mask)
    assert (out[0] == 0).all() and out.isfinite().all()
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad[0] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


@every_mixer
def test_masked_tokens_at_the_end_of_a_sequence_are_as_if_absent(name: str) -> None:
    mixer = make_mixer(name)
    if 1 not in mixer.grids:
        pytest.skip("takes no sequences")
    if "input_size" in attention.parameters_of(name, "mixer"):
        pytest.skip("its tables depend on the length, padding included")
    x = torch.randn(2, 9, DIM)
    longer = torch.cat([x, torch.randn(2, 4, DIM)], 1)
    mask = torch.arange(13).expand(2, 13) < 9
    torch.testing.assert_close(mixer(longer, mask)[:, :9], mixer(x), rtol=1e-4, atol=1e-5)


@every_mixer
def test_packed_maps_are_mixed_as_if_alone(name: str) -> None:
    mixer = make_mixer(name)
    if 1 in mixer.grids:
        shapes: list[tuple[int, ...]] = [(5,), (0,), (1,), (17,), (5,)]
    else:
        shapes = [(3, 4), (1, 1), (2, 5), (0, 3), (3, 4)]
    maps = [torch.randn(*shape, DIM) for shape in shapes]
    cu_seqlens = torch.tensor([0, *(math.prod(shape) for shape in shapes)]).cumsum(0).int()
    together = torch.cat([m.flatten(0, -2) for m in maps])
    out = mixer.packed(together, cu_seqlens, None if 1 in mixer.grids else shapes)
    alone = [mixer(m[None])[0].flatten(0, -2) for m in maps if m.numel()]
    torch.testing.assert_close(out, torch.cat(alone), rtol=1e-4, atol=1e-5)


@every_mixer
def test_an_item_does_not_see_the_rest_of_its_batch(name: str) -> None:
    mixer, x = small(name)
    other = x.clone()
    other[1] = torch.randn_like(x[1]) * 3
    torch.testing.assert_close(mixer(other)[0], mixer(x)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixer(x[:1])[0], mixer(x)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixer(x.flip(0)), mixer(x).flip(0), rtol=1e-4, atol=1e-5)


@every_mixer
def test_attention_maps_are_weights_between_tokens_or_are_refused(name: str) -> None:
    mixer, x = small(name)
    tokens = math.prod(x.shape[1:-1])
    if not mixer.has_weights:
        with pytest.raises(InputError, match="no weights between tokens"):
            mixer(x, return_attention=True)
        return
    out, weights = mixer(x, return_attention=True)
    torch.testing.assert_close(out, mixer(x))
    assert weights.dim() == 4 and weights.shape[0] == 2 and weights.shape[2:] == (tokens, tokens)
    assert weights.isfinite().all()
    if mixer.rows_sum_to_one:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=1e-4, atol=1e-4)
    mask = torch.ones(x.shape[:-1], dtype=torch.bool)
    mask.view(2, -1)[:, 1::3] = False
    _, weights = mixer(x, mask, return_attention=True)
    seen = weights.transpose(1, 2)[mask.flatten(1)]  # rows of real tokens
    columns = ~mask.flatten(1).repeat_interleave(mask.flatten(1).sum(1), 0)
    assert seen.transpose(1, 2)[columns].abs().max() < 1e-6


@every_mixer
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    mixer = make_mixer(name)
    if not mixer.exact_gradient:
        pytest.skip("a straight-through estimator's gradient is not the function's")
    assert gradients_are_right(mixer, torch.randn(2, *ordinary_grid(mixer), DIM))


@every_mixer
def test_every_parameter_learns(name: str) -> None:
    mixer = make_mixer(name).train()
    grid = (8, 8) if 2 in mixer.grids else (64,)
    extras: dict[str, torch.Tensor] = {}
    out = mixer(torch.randn(2, *grid, DIM), extras=extras)
    sum((value.sum() for value in extras.values()), out.square().sum()).backward()
    idle = [n for n, p in mixer.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle


@every_mixer
def test_half_precision_gives_the_numbers_of_float32_or_is_refused(name: str) -> None:
    mixer, x = small(name)
    if not mixer.takes_half:
        with pytest.raises(InputError, match="does not work in bfloat16"):
            mixer.to(torch.bfloat16)(x.bfloat16())
        return
    full = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = mixer(x)
    low = mixer.to(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16 and low.isfinite().all() and cast.isfinite().all()
    if not mixer.takes_choices:
        close_enough(cast, full)
        close_enough(low, full)


@every_mixer
def test_it_compiles_as_one_graph(name: str) -> None:
    mixer, x = small(name)
    compiled_agrees(mixer, x)


@every_mixer
def test_it_exports_for_any_batch(name: str) -> None:
    mixer, x = small(name)
    if mixer.about.operator == "varlen_attention":
        pytest.skip("packed attention reads the boundaries of its sequences where there is no GPU")
    exported_agrees(mixer, x, torch.randn(5, *x.shape[1:]))


@every_mixer
def test_its_state_goes_into_another_and_seeds_repeat_it(name: str) -> None:
    mixer, x = small(name)
    other = make_mixer(name, seed=5)
    other.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(other(x), mixer(x), rtol=0, atol=0)
    attention.load_official(other, mixer.state_dict())
    twin = make_mixer(name).train()
    outputs = []
    for module in (mixer.train(), twin):
        torch.manual_seed(3)
        outputs.append(module(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@every_mixer
def test_costs_grow_with_the_batch_and_hold_at_least_the_input_and_output(name: str) -> None:
    mixer = make_mixer(name)
    grid = (16, 16) if 2 in mixer.grids else (256,)
    assert mixer.flops((4, *grid)) == pytest.approx(4 * mixer.flops((1, *grid)), rel=1e-6)
    assert mixer.min_bytes((2, *grid)) >= 2 * 2 * 256 * DIM * 4
    assert mixer.min_bytes((2, *grid), torch.bfloat16) == mixer.min_bytes((2, *grid)) / 2
    growth = math.log2(mixer.flops((1, *(4 * n for n in grid))) / mixer.flops((1, *grid))) / (2 * len(grid))
    assert 0.5 < growth < 2.5
    assert all(part.flops >= 0 and part.elements > 0 for part in mixer.cost((2, *grid)))


@every_mixer
def test_wrong_shapes_masks_and_heads_are_refused(name: str) -> None:
    mixer, x = small(name)
    with pytest.raises(InputError, match=rf"'{name}' takes .*got \(2, "):
        mixer(x[..., :-1])
    with pytest.raises(InputError, match="the mask must be bool"):
        mixer(x, torch.ones(x.shape[:-1]))
    if "num_heads" in inspect.signature(type(mixer)).parameters:
        with pytest.raises(InputError, match=r"dim=32 is not divisible into num_heads=5 heads"):
            make_mixer(name, num_heads=5)
