"""InLine attention: its weights, feature maps, and the local term on grids of every kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attention.inline import FEATURES, InLineAttention, inline_core
from kernels.errors import InputError


def make(**changes: object) -> InLineAttention:
    torch.manual_seed(0)
    return InLineAttention(16, 2, **changes).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("phi", FEATURES)
def test_constant_values_come_out_unchanged_whatever_the_features(phi: str) -> None:
    q, k = torch.randn(2, 1, 13, 2, 8)
    constant = torch.randn(1, 1, 2, 8).expand(1, 13, 2, 8)
    torch.testing.assert_close(inline_core(q, k, constant, phi), constant, rtol=1e-4, atol=1e-5)


def test_weights_are_scores_less_their_mean_plus_one_over_n() -> None:
    module, x = make(), torch.randn(1, 3, 4, 16)
    _, weights = module(x, return_attention=True)
    q, k, _ = module.qkv(x.flatten(1, 2)).view(12, 3, 2, 8).permute(1, 2, 0, 3)
    scores = q @ k.mT * 8**-0.5 / 12
    torch.testing.assert_close(weights[0], scores - scores.mean(-1, keepdim=True) + 1 / 12)
    assert weights.min() < 0


def test_without_the_local_term_the_order_of_tokens_does_not_matter() -> None:
    module, x = make(local_axes=0, phi="exp"), torch.randn(2, 12, 16)
    order = torch.randperm(12)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])
    assert module.residual is None


def local_part(module: InLineAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the local term adds, before the projection: the rest is that of a module without."""
    plain = make(local_axes=0)
    plain.load_state_dict(module.state_dict(), strict=False)
    nn.init.eye_(module.proj.weight)
    nn.init.eye_(plain.proj.weight)
    return module(x, mask) - plain(x, mask)


def test_the_local_term_is_a_convolution_of_the_values_with_kernels_of_each_item() -> None:
    module, x = make(), torch.randn(2, 4, 5, 16)
    values = module.qkv(x)[..., 32:].permute(0, 3, 1, 2)
    assert module.residual is not None
    expected = []
    for item in range(2):
        kernels = module.residual(x[item : item + 1].mean((1, 2))[..., None]).view(16, 1, 3, 3)
        expected.append(nn.functional.conv2d(values[item : item + 1], kernels, padding=1, groups=16))
    torch.testing.assert_close(local_part(module, x), torch.cat(expected).permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("axes", "with_it"), [(1, (1, 2, 3)), (2, (2, 3)), (3, (3,))])
def test_the_local_term_reaches_over_the_last_axes(axes: int, with_it: tuple[int, ...]) -> None:
    module = make(local_axes=axes)
    for grid in [(5,), (4, 5), (3, 4, 5)]:
        x = torch.randn(1, *grid, 16)
        added = local_part(module, x)
        assert (added.abs().max() > 1e-3) == (len(grid) in with_it), grid
        if len(grid) == 3 == axes + 1:  # slices differ by their values alone
            torch.testing.assert_close(local_part(module, x.flip(1)), added.flip(1), rtol=1e-4, atol=1e-5)


def test_a_masked_surrounding_is_as_if_the_map_ended_there() -> None:
    module, x = make(), torch.randn(1, 5, 6, 16)
    mask = torch.zeros(1, 5, 6, dtype=torch.bool)
    mask[:, :3, :4] = True
    torch.testing.assert_close(module(x, mask)[:, :3, :4], module(x[:, :3, :4]), rtol=1e-4, atol=1e-5)


def test_a_class_token_is_attended_to_and_not_convolved() -> None:
    module, x = make(prefix_tokens=1), torch.randn(2, 10, 16)
    plain = make(local_axes=0)
    plain.load_state_dict(module.state_dict(), strict=False)
    added = module(x) - plain(x)
    assert added[:, 0].abs().max() == 0 and added[:, 1:].abs().max() > 1e-3
    cut = torch.tensor([0, 10, 20])
    torch.testing.assert_close(module.packed(x.flatten(0, 1), cut), module(x).flatten(0, 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="9 tokens less prefix_tokens=1 are no square image"):
        module(x[:, :9])
    with pytest.raises(InputError, match=r"'inline' takes \(B, N, 16\)"):
        module(x.view(2, 5, 2, 16))


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(InputError, match=r"Did you mean 'relu'"):
        make(phi="rellu")
    with pytest.raises(InputError, match="local_axes=4 must be"):
        make(local_axes=4)
    with pytest.raises(InputError, match="prefix_tokens=1 must not be negative, and goes with local_axes 2 or 0"):
        make(prefix_tokens=1, local_axes=1)
