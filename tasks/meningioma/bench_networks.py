"""The networks for volumes beside their peers: DAUNet's attention beside the released one, AGUNet beside MONAI's UNet.

And AGUNet beside itself, trained on patches with its kernels as PyTorch makes them.

``python -m tasks.bench meningioma``; sizes and repeats shrink with ``FOVEA_BENCH_QUICK=1``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from attention.dual_position_channel import PositionAttention
from kernels.measure import peak_memory
from tasks.common.bench import BenchRow, median_times
from tasks.common.segmentation.layout import lay_out
from tasks.meningioma.networks.agunet import AGUNet
from tasks.meningioma.networks.peers import MonaiNetwork

BOTTLENECK_CHANNELS = 256
"""Of the published networks."""
PLACES = ((8, 8, 9), (16, 16, 9), (16, 16, 18), (16, 16, 32))
"""Bottlenecks of 576 (128 x 128 x 144 voxels) to 8192 places; a volume of 256 x 256 x 192 has 3072."""
VOLUMES = (((128, 128, 144), 3), ((256, 256, 192), 1))
"""Sizes of whole volumes, and how often each is timed."""
PATCHES = (((24, 24, 24), 4), ((64, 64, 64), 2))
"""Sizes of patches, and how many in a step."""
EQUAL_CHANNELS = (32, 64, 128, 256, 512)
"""MONAI's UNet with two residual units has 19.2 M parameters with these, AGUNet 18.7 M."""


def rows() -> Iterator[BenchRow]:
    """Rows of both comparisons."""
    quick = os.environ.get("FOVEA_BENCH_QUICK", "0") == "1"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield from position_attention(((3, 3, 4), (4, 4, 4)) if quick else PLACES, device, 1 if quick else 5)
    yield from patches((((17, 19, 21), 2),) if quick else PATCHES, device, 1 if quick else 9)
    yield from whole_volumes((((33, 33, 35), 1),) if quick else VOLUMES, device)


def position_attention(grids: Sequence[Sequence[int]], device: torch.device, repeats: int) -> Iterator[BenchRow]:
    """DAUNet's position attention beside the released formulation, which keeps N x N weights, for growing N."""
    torch.manual_seed(0)
    module = PositionAttention(BOTTLENECK_CHANNELS, form="daunet").to(device)
    nn.init.ones_(module.gamma)
    for grid in grids:
        x = torch.randn(1, BOTTLENECK_CHANNELS, *grid, device=device)
        places = x[0, 0].numel()
        for direction, run in (("forward", _forward), ("forward and backward", _both)):
            calls = {"ours": run(module, x), "peer": run(lambda x: released_position(module, x), x)}
            times = median_times({name: _waiting(call, device) for name, call in calls.items()}, repeats)
            peaks = {name: _megabytes(call, device) for name, call in calls.items()}
            theirs = "" if peaks["peer"] is None else f", {peaks['peer']:,.0f} MB"
            yield BenchRow(
                f"position attention, N = {places}, {direction}",
                times["ours"],
                times["peer"],
                f"released N x N formulation{theirs}",
                peak_mb=peaks["ours"],
            )


def released_position(module: PositionAttention, x: Tensor) -> Tensor:
    """What ``module`` computes, by the formulation of the released code: all weights are kept."""
    projected = x.flatten(2).transpose(1, 2) @ module.qkv.weight.T
    q, k, v = projected.split([module.width, module.width, module.dim], -1)
    out = torch.softmax(q @ k.mT, -1) @ v
    return module.gamma * out.transpose(1, 2).unflatten(2, x.shape[2:]) + x


def patches(sizes: Sequence[tuple[Sequence[int], int]], device: torch.device, repeats: int) -> Iterator[BenchRow]:
    """A training step and an inference of AGUNet on patches, as a task runs it beside kernels with channels first."""
    for size, count in sizes:
        torch.manual_seed(0)
        ours, peer = (AGUNet(filters=(8, 16, 32, 64)).to(device) for _ in range(2))
        lay_out(ours)
        x = torch.randn(count, 1, *size, device=device)
        for direction, step in (("training step", _step), ("inference", _forward)):
            for network in (ours, peer):
                network.train(direction == "training step")
            calls = {name: _waiting(step(net, x), device) for name, net in (("ours", ours), ("peer", peer))}
            times = median_times(calls, repeats)
            title = f"agunet of 8 to 64 filters, {count} patches of {' x '.join(map(str, size))} voxels, {direction}"
            yield BenchRow(title, times["ours"], times["peer"], "itself, kernels with channels first")


def whole_volumes(volumes: Sequence[tuple[Sequence[int], int]], device: torch.device) -> Iterator[BenchRow]:
    """AGUNet beside MONAI's UNet of about as many parameters: inference on one volume at once.

    The two are no equals in work: AGUNet convolves at the full resolution, MONAI's UNet halves it first. For one volume
    of 128 x 128 x 144 voxels that is 518 against 105 thousand million operations.
    """
    torch.manual_seed(0)
    ours = AGUNet().to(device).eval()
    peer = MonaiNetwork("unet", channels=EQUAL_CHANNELS, strides=(2, 2, 2, 2)).to(device).eval()
    lay_out(ours)
    lay_out(peer)
    for size, repeats in volumes:
        x = torch.randn(1, 1, *size, device=device)
        calls = {"ours": _forward(ours, x), "peer": _forward(peer, x)}
        times = median_times({name: _waiting(call, device) for name, call in calls.items()}, repeats)
        peaks = {name: _megabytes(call, device) for name, call in calls.items()}
        theirs = "" if peaks["peer"] is None else f", {peaks['peer']:,.0f} MB"
        yield BenchRow(
            f"agunet, {' x '.join(map(str, size))} voxels, inference",
            times["ours"],
            times["peer"],
            f"MONAI's UNet of {_millions(peer):.1f} M parameters (ours {_millions(ours):.1f} M){theirs}",
            peak_mb=peaks["ours"],
        )


def _forward(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def call() -> None:
        with torch.inference_mode():
            run(x)

    return call


def _step(network: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    assert isinstance(network, nn.Module)

    def call() -> None:
        network.zero_grad(set_to_none=True)
        network(x).square().mean().backward()

    return call


def _both(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()

    def call() -> object:
        return torch.autograd.grad(run(leaf).sum(), leaf)

    return call


def _waiting(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``call``, until the device has done it."""
    if device.type != "cuda":
        return call

    def finished() -> None:
        call()
        torch.cuda.synchronize(device)

    return finished


def _megabytes(call: Callable[[], object], device: torch.device) -> float | None:
    found = peak_memory(call, device)
    return None if found is None else found / 1e6


def _millions(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6
