"""Kernels of deformable sampling: forward, gradients of locations and weights, and two of the gradient of the values.

A row is one head of one query, numbered (B, Q, H), or of one pixel, (B, S, H); a program handles ``BLOCK`` rows with
all their channels. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(locations, weights, sample, inside, height, width):
    """First pixel and distance past it along both axes, and the weight of a sample; far outside without one."""
    x = tl.load(locations + 2 * sample, mask=inside, other=-1.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * sample + 1, mask=inside, other=-1.0).to(tl.float32) * height - 0.5
    x = tl.minimum(tl.maximum(x, -2.0), width)  # keeps the conversion to an integer defined
    y = tl.minimum(tl.maximum(y, -2.0), height)
    first_x = tl.floor(x)
    first_y = tl.floor(y)
    weight = tl.load(weights + sample, mask=inside, other=0.0).to(tl.float32)
    return first_x.to(tl.int32), first_y.to(tl.int32), x - first_x, y - first_y, weight


@triton.jit
def _pixel(y, x, height, width, inside):
    """Number of a pixel within its level, and whether it is on the map."""
    seen = inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return y * width + x, seen


@triton.jit
def _values(base, y, x, height, width, stride, inside, d, D: tl.constexpr):
    """Channels of a pixel as a float32 tile, zeros off the map; ``base`` points at each row's level."""
    pixel, seen = _pixel(y, x, height, width, inside)
    at = base + pixel.to(tl.int64) * stride
    return tl.load(at[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def sample_values(
    value, locations, weights, levels, out, total, queries, level_count, points, v_batch, v_row, v_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = rows < total
    base = value + (rows // HEADS // queries).to(tl.int64) * v_batch + (rows % HEADS).to(tl.int64) * v_head
    rows = rows.to(tl.int64)
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for level in range(level_count):
        height = tl.load(levels + level * 4)
        width = tl.load(levels + level * 4 + 1)
        pixels = base + tl.load(levels + level * 4 + 2).to(tl.int64) * v_row
        for point in range(points):
            sample = (rows * level_count + level) * points + point
            x, y, right, below, weight = _place(locations, weights, sample, inside, height, width)
            lower = weight * below
            upper = weight - lower
            sums += (upper * (1.0 - right))[:, None] * _values(pixels, y, x, height, width, v_row, inside, d, D)
            sums += (upper * right)[:, None] * _values(pixels, y, x + 1, height, width, v_row, inside, d, D)
            sums += (lower * (1.0 - right))[:, None] * _values(pixels, y + 1, x, height, width, v_row, inside, d, D)
            sums += (lower * right)[:, None] * _values(pixels, y + 1, x + 1, height, width, v_row, inside, d, D)
    tl.store(
        out + rows[:, None] * D + d[None, :],
        sums.to(out.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )


@triton.jit
def sample_gradients(
    value, locations, weights, levels, grad_out, d_locations, d_weights,
    total, queries, level_count, points, v_batch, v_row, v_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = rows < total
    base = value + (rows // HEADS // queries).to(tl.int64) * v_batch + (rows % HEADS).to(tl.int64) * v_head
    rows = rows.to(tl.int64)
    grad = tl.load(grad_out + rows[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(
        tl.float32
    )
    for level in range(level_count):
        height = tl.load(levels + level * 4)
        width = tl.load(levels + level * 4 + 1)
        pixels = base + tl.load(levels + level * 4 + 2).to(tl.int64) * v_row
        for point in range(points):
            sample = (rows * level_count + level) * points + point
            x, y, right, below, weight = _place(locations, weights, sample, inside, height, width)
            first = tl.sum(_values(pixels, y, x, height, width, v_row, inside, d, D) * grad, 1)
            second = tl.sum(_values(pixels, y, x + 1, height, width, v_row, inside, d, D) * grad, 1)
            third = tl.sum(_values(pixels, y + 1, x, height, width, v_row, inside, d, D) * grad, 1)
            fourth = tl.sum(_values(pixels, y + 1, x + 1, height, width, v_row, inside, d, D) * grad, 1)
            top = first + (second - first) * right
            bottom = third + (fourth - third) * right
            across = (second - first) + ((fourth - third) - (second - first)) * below
            kind = d_locations.dtype.element_ty
            tl.store(d_locations + 2 * sample, (across * weight * width).to(kind), mask=inside)
            tl.store(d_locations + 2 * sample + 1, ((bottom - top) * weight * height).to(kind), mask=inside)
            d_weight = top + (bottom - top) * below
            tl.store(d_weights + sample, d_weight.to(d_weights.dtype.element_ty), mask=inside)


@triton.jit
def _scatter(base, y, x, height, width, stride, inside, d, values, D: tl.constexpr):
    pixel, seen = _pixel(y, x, height, width, inside)
    at = base + pixel.to(tl.int64) * stride
    tl.atomic_add(at[:, None] + d[None, :], values, mask=seen[:, None] & (d < D)[None, :], sem="relaxed")


@triton.jit
def scatter_gradient(
    locations, weights, levels, grad_out, d_value, total, queries, positions, level_count, points,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to ``d_value`` (B, S, H, D) float32, zeros before, in any order."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = rows < total
    base = d_value + ((rows // HEADS // queries).to(tl.int64) * positions * HEADS + rows % HEADS) * D
    rows = rows.to(tl.int64)
    grad = tl.load(grad_out + rows[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(
        tl.float32
    )
    step = HEADS * D
    for level in range(level_count):
        height = tl.load(levels + level * 4)
        width = tl.load(levels + level * 4 + 1)
        pixels = base + tl.load(levels + level * 4 + 2).to(tl.int64) * step
        for point in range(points):
            sample = (rows * level_count + level) * points + point
            x, y, right, below, weight = _place(locations, weights, sample, inside, height, width)
            lower = weight * below
            upper = weight - lower
            _scatter(pixels, y, x, height, width, step, inside, d, grad * (upper * (1.0 - right))[:, None], D)
            _scatter(pixels, y, x + 1, height, width, step, inside, d, grad * (upper * right)[:, None], D)
            _scatter(pixels, y + 1, x, height, width, step, inside, d, grad * (lower * (1.0 - right))[:, None], D)
            _scatter(pixels, y + 1, x + 1, height, width, step, inside, d, grad * (lower * right)[:, None], D)


@triton.jit
def gather_gradient(
    locations, weights, levels, order, begins, grad_out, d_value,
    total, positions, cells, level_count, points,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each pixel sums the samples of the four cells around it, in the order of :func:`sampling.sort_by_cell`."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    head = rows % HEADS
    batch = (rows // HEADS // positions).to(tl.int64)
    position = rows // HEADS % positions
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for level in range(level_count):
        height = tl.load(levels + level * 4)
        width = tl.load(levels + level * 4 + 1)
        pixel = position - tl.load(levels + level * 4 + 2)
        inside = (rows < total) & (pixel >= 0) & (pixel < height * width)
        y = pixel // width
        x = pixel % width
        first_cell = tl.load(levels + level * 4 + 3)
        for corner in range(4):
            cell_y = y - corner // 2  # the first pixel of the cell
            cell_x = x - corner % 2
            cell = batch * cells + (first_cell + (cell_y + 1) * (width + 1) + cell_x + 1)
            begin = tl.load(begins + cell * HEADS + head, mask=inside, other=0)
            end = tl.load(begins + cell * HEADS + head + 1, mask=inside, other=0)
            for i in range(tl.max(end - begin, 0)):
                here = begin + i < end
                sample = tl.load(order + begin + i, mask=here, other=0)
                wide = sample.to(tl.int64)
                _, _, right, below, weight = _place(locations, weights, wide, here, height, width)
                share_y = tl.where(corner // 2 == 1, below, 1.0 - below)
                share_x = tl.where(corner % 2 == 1, right, 1.0 - right)
                query = (sample // (level_count * points)).to(tl.int64)
                grad = tl.load(
                    grad_out + query[:, None] * D + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0
                ).to(tl.float32)
                sums += (weight * share_y * share_x)[:, None] * grad
    tl.store(
        d_value + rows.to(tl.int64)[:, None] * D + d[None, :],
        sums.to(d_value.dtype.element_ty),
        mask=(rows < total)[:, None] & (d < D)[None, :],
    )
