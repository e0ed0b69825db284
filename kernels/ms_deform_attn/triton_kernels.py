"""Kernels of deformable sampling: forward, gradients of locations and weights, gradient of the values.

A program handles ``BLOCK`` queries of one head of one image. Tokens around a point are read, or added to, where they
lie; a corner beyond its map is masked, so that nothing outside is touched.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _point(locations, place, inside, height, width):
    """Pixel left and above of each point, and the shares of the right and the lower ones."""
    x = tl.load(locations + 2 * place, mask=inside, other=-1.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * place + 1, mask=inside, other=-1.0).to(tl.float32) * height - 0.5
    # Far points are drawn near, where nothing is on the map either: their pixels must fit an int32.
    x = tl.minimum(tl.maximum(x, -2.0), width + 1.0)
    y = tl.minimum(tl.maximum(y, -2.0), height + 1.0)
    left = tl.floor(x)
    top = tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def _place(start, row, column, height, width, inside):
    """Token of a corner, and whether it is on the map."""
    on_map = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return (start + row * width + column).to(tl.int64), on_map


@triton.jit
def _tokens(base, token, on_map, stride, d, D: tl.constexpr):
    return tl.load(base + token[:, None] * stride + d[None, :], mask=on_map[:, None] & (d < D)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def sample(
    value, sizes, locations, weights, out, queries, levels, points, value_image, value_token, value_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64) // HEADS
    head = tl.program_id(1).to(tl.int64) % HEADS
    query = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = query < queries
    d = tl.arange(0, BLOCK_D)
    base = value + image * value_image + head * value_head
    first = ((image * queries + query) * HEADS + head) * levels * points
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for level in range(levels):
        height = tl.load(sizes + 3 * level)
        width = tl.load(sizes + 3 * level + 1)
        start = tl.load(sizes + 3 * level + 2)
        for point in range(points):
            place = first + level * points + point
            left, top, right, low = _point(locations, place, inside, height, width)
            weight = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)
            for corner in tl.static_range(4):
                token, on_map = _place(start, top + corner // 2, left + corner % 2, height, width, inside)
                share = (right if corner % 2 else 1 - right) * (low if corner // 2 else 1 - low)
                sums += (weight * share)[:, None] * _tokens(base, token, on_map, value_token, d, D)
    tl.store(
        out + ((image * queries + query) * HEADS + head)[:, None] * D + d[None, :],
        sums.to(out.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )


@triton.jit
def point_gradients(
    value, sizes, locations, weights, grad, d_locations, d_weights, queries, levels, points,
    value_image, value_token, value_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64) // HEADS
    head = tl.program_id(1).to(tl.int64) % HEADS
    query = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = query < queries
    d = tl.arange(0, BLOCK_D)
    base = value + image * value_image + head * value_head
    row = (image * queries + query) * HEADS + head
    first = row * levels * points
    d_out = tl.load(grad + row[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    d_out = d_out.to(tl.float32)
    for level in range(levels):
        height = tl.load(sizes + 3 * level)
        width = tl.load(sizes + 3 * level + 1)
        start = tl.load(sizes + 3 * level + 2)
        for point in range(points):
            place = first + level * points + point
            left, top, right, low = _point(locations, place, inside, height, width)
            weight = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)
            d_weight = tl.zeros([BLOCK], tl.float32)
            d_x = tl.zeros([BLOCK], tl.float32)
            d_y = tl.zeros([BLOCK], tl.float32)
            for corner in tl.static_range(4):
                token, on_map = _place(start, top + corner // 2, left + corner % 2, height, width, inside)
                seen = tl.sum(_tokens(base, token, on_map, value_token, d, D) * d_out, 1)
                across = right if corner % 2 else 1 - right
                down = low if corner // 2 else 1 - low
                d_weight += seen * across * down
                d_x += seen * down * (1 if corner % 2 else -1)
                d_y += seen * across * (1 if corner // 2 else -1)
            tl.store(d_weights + place, d_weight.to(d_weights.dtype.element_ty), mask=inside)
            tl.store(d_locations + 2 * place, (d_x * weight * width).to(d_locations.dtype.element_ty), mask=inside)
            tl.store(d_locations + 2 * place + 1, (d_y * weight * height).to(d_locations.dtype.element_ty), mask=inside)


@triton.jit
def value_gradient(
    grad, sizes, locations, weights, d_value, queries, levels, points, tokens,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64) // HEADS
    head = tl.program_id(1).to(tl.int64) % HEADS
    query = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = query < queries
    d = tl.arange(0, BLOCK_D)
    row = (image * queries + query) * HEADS + head
    first = row * levels * points
    d_out = tl.load(grad + row[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    d_out = d_out.to(tl.float32)
    base = d_value + (image * tokens * HEADS + head) * D
    for level in range(levels):
        height = tl.load(sizes + 3 * level)
        width = tl.load(sizes + 3 * level + 1)
        start = tl.load(sizes + 3 * level + 2)
        for point in range(points):
            place = first + level * points + point
            left, top, right, low = _point(locations, place, inside, height, width)
            weight = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)
            for corner in tl.static_range(4):
                token, on_map = _place(start, top + corner // 2, left + corner % 2, height, width, inside)
                share = (right if corner % 2 else 1 - right) * (low if corner // 2 else 1 - low)
                tl.atomic_add(
                    base + token[:, None] * (HEADS * D) + d[None, :],
                    (weight * share)[:, None] * d_out,
                    mask=on_map[:, None] & (d < D)[None, :],
                )
