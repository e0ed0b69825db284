"""Deformable sampling beside the PyTorch form of released code: ``grid_sample`` level by level, then a weighted sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.measure import Case, Contestant
from kernels.ms_deform_attn import ms_deform_attn

HEADS, WIDTH, POINTS = 8, 32, 4


def cases(device: torch.device) -> Iterator[Case]:
    """Encoder (every pixel asks, near itself) and decoder (300 queries, anywhere) of a detector."""
    on_gpu = device.type == "cuda"
    height, width = (100, 134) if on_gpu else (48, 64)
    shapes = [(-(-height // 2**i), -(-width // 2**i)) for i in range(4)]
    for dtype in (torch.bfloat16, torch.float32) if on_gpu else (torch.float32,):
        yield _case("encoder", shapes, None, 4 if on_gpu else 1, dtype, device)
        yield _case("decoder", shapes, 300, 4 if on_gpu else 2, dtype, device)


def _case(
    name: str, shapes: list[tuple[int, int]], queries: int | None, batch: int, dtype: torch.dtype, device: torch.device
) -> Case:
    positions = sum(rows * columns for rows, columns in shapes)
    value = torch.randn(batch, positions, HEADS, WIDTH, device=device).to(dtype)
    if queries is None:
        centres = torch.cat([_centres(*shape) for shape in shapes]).to(device)
        sizes = torch.tensor([[columns, rows] for rows, columns in shapes], device=device)
        offsets = 2 * torch.randn(batch, positions, HEADS, len(shapes), POINTS, 2, device=device)
        locations = centres[:, None, None, None] + offsets / sizes[:, None]
    else:
        locations = torch.rand(batch, queries, HEADS, len(shapes), POINTS, 2, device=device)
    weights = torch.rand(locations.shape[:-1], device=device).flatten(3).softmax(-1).view(locations.shape[:-1])
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    samples = weights.numel()
    of_output = locations.shape[1] * batch * HEADS * WIDTH
    return Case(
        f"{name} B{batch} {'x'.join(map(str, shapes[0]))} Q{locations.shape[1]} {str(dtype).removeprefix('torch.')}",
        [
            Contestant("grid_sample", lambda: _by_level(value, shapes, locations, weights), leaves),
            Contestant("fovea", lambda: ms_deform_attn(value, shapes, locations, weights), leaves),
        ],
        "grid_sample",
        flops=8 * samples * WIDTH,
        bytes=(value.numel() + of_output) * value.element_size() + 12 * samples,
        tolerance=1e-3 if dtype == torch.float32 else 3e-2,
    )


def _centres(rows: int, columns: int) -> Tensor:
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def _by_level(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).to(value.dtype)
    samples = []
    for level, pixels in enumerate(value.split([rows * columns for rows, columns in shapes], 1)):
        image = pixels.flatten(2).mT.reshape(batch * heads, width, *shapes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    factors = weights.to(value.dtype).transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (torch.stack(samples, -2).flatten(-2) * factors).sum(-1)
    return out.view(batch, heads * width, queries).mT.contiguous()
