"""Options that are no defaults keep what every mixer promises: masks, maps without tokens, precision, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attention
from attention import halo
from attention.mixer import Mixer
from tests.attention.contract import close_enough, compiled_agrees, gradients_are_right

ROUTED = {"regions": 2, "topk": 2}
OPTIONS: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("neighborhood", (9,), {"axes": 1, "kernel_size": 4, "stride": 2, "dilation": 2}),
    ("neighborhood", (3, 4, 2), {"axes": 3, "kernel_size": 3}),
    ("neighborhood", (3, 5), {"small_maps": "clamp"}),
    ("neighborhood", (3, 5), {"kernel_size": 3, "causal": (True, False), "relative_bias": False}),
    ("bi_level_routing", (5, 7), {**ROUTED, "form": "refactored", "padding": "released"}),
    ("bi_level_routing", (5, 7), {**ROUTED, "padding": "released", "kv_pooling": "adaptive_max", "kv_pooling_size": 2}),
    ("bi_level_routing", (5, 7), {**ROUTED, "kv_pooling": "max", "kv_pooling_size": 2, "qk_dim": 4}),
    ("bi_level_routing", (5, 7), {**ROUTED, "routing": "learned", "kv_pooling": "average", "kv_pooling_size": 2}),
    ("bi_level_routing", (5, 7), {"dense": True, "form": "refactored"}),
    ("halo", (5, 7), {"form": "released", "block_size": 3, "halo_size": 2}),
    ("halo", (5, 7), {"block_size": 2, "halo_size": 3}),
    ("outlook", (5, 7), {"kernel_size": 5, "stride": 3}),
    ("grid", (5, 7), {"window_size": 3, "padding": "released", "dialect": "tf"}),
    ("multi_axis", (5, 7), {"window_size": 3, "dialect": "tf"}),
]
every_option = pytest.mark.parametrize(("name", "grid", "options"), OPTIONS)


class Masked(nn.Module):
    """A mixer with a mask of its own."""

    def __init__(self, mixer: Mixer, mask: Tensor) -> None:
        super().__init__()
        self.mixer, self.mask = mixer, mask

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x, self.mask)


def build(name: str, grid: tuple[int, ...], options: dict[str, Any]) -> tuple[Mixer, Tensor, Tensor]:
    """A mixer, an input, and a mask that leaves nothing of the first item."""
    torch.manual_seed(0)
    mixer = attention.create(name, kind="mixer", dim=8, num_heads=2, **options).eval()
    assert isinstance(mixer, Mixer)
    mask = torch.rand(2, *grid) < 0.7
    mask[0] = False
    mask.view(2, -1)[1, 0] = True
    return mixer, torch.randn(2, *grid, 8), mask


@every_option
def test_masks_hold_with_these_options(name: str, grid: tuple[int, ...], options: dict[str, Any]) -> None:
    mixer, x, mask = build(name, grid, options)
    clean = mixer(x, mask)
    torch.testing.assert_close(mixer(x.masked_fill(~mask[..., None], torch.nan), mask), clean)
    assert (clean[~mask] == 0).all() and clean[mask].abs().min() > 0
    torch.testing.assert_close(mixer(x, torch.ones_like(mask)), mixer(x), rtol=1e-4, atol=1e-5)
    assert gradients_are_right(Masked(mixer, mask), x)


@every_option
def test_precision_and_graphs_hold_with_these_options(
    name: str, grid: tuple[int, ...], options: dict[str, Any]
) -> None:
    mixer, x, mask = build(name, grid, options)
    full = mixer(x, mask)
    compiled_agrees(Masked(mixer, mask), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer(x, mask).isfinite().all()
    low = mixer.to(torch.bfloat16)(x.bfloat16(), mask)
    assert low.dtype == torch.bfloat16
    if not mixer.takes_choices or options.get("dense"):
        close_enough(low, full)


def test_halo_windows_in_several_steps_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halo, "_COPIED", 1)
    mixer, x, mask = build("halo", (5, 7), {"block_size": 3, "halo_size": 2})
    compiled_agrees(Masked(mixer, mask), x)
