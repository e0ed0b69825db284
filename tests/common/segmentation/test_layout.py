"""The layout of kernels on a CPU: same numbers, same state dict, and maps that follow."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from tasks.common.checkpoints import write_model
from tasks.common.segmentation.layout import lay_out
from tasks.meningioma.networks.agunet import AGUNet


def test_maps_and_gradients_stay_and_the_channels_come_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = AGUNet(filters=(3, 4, 5), deep_supervision=False)
    laid = copy.deepcopy(plain)
    lay_out(laid)
    files = [tmp_path / name for name in ("plain.safetensors", "laid.safetensors")]
    for network, path in zip((plain, laid), files, strict=True):
        write_model(path, network.state_dict(), "meningioma", {})
    assert files[0].read_bytes() == files[1].read_bytes()
    x = torch.randn(2, 1, 9, 10, 13)
    seen: list[torch.Tensor] = []
    first = next(m for m in laid.modules() if isinstance(m, nn.Conv3d) and m.in_channels > 1)
    first.register_forward_hook(lambda *call: seen.append(call[2]))
    for network in (plain, laid):
        network(x).square().mean().backward()
    assert seen[0].is_contiguous(memory_format=torch.channels_last_3d) and not seen[0].is_contiguous()
    torch.testing.assert_close(laid(x), plain(x), rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(laid.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-4)


def test_networks_for_images_are_left_alone() -> None:
    network = nn.Conv2d(3, 5, 3)
    place = network.weight.data_ptr()
    lay_out(network)
    assert network.weight.data_ptr() == place and network.weight.is_contiguous()
