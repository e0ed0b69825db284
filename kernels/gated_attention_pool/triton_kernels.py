"""Kernels of attention pooling: scores, split pooling and its combination, gradients of the softmax and of the gate.

Rows are split evenly whatever the bags: scores and gate by blocks of rows, pooling by chunks that never cross a bag.
Scores, softmax statistics and all sums are float32; ``MASKED`` is the score of a hidden instance.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-1e9)


@triton.jit
def _find_chunk(chunk_ends, cu_seqlens, bags, pid, chunk):
    """Bag of chunk ``pid``, its first row and the one past its last; bag ``bags`` when there is no such chunk."""
    low = 0
    high = bags
    while low < high:
        middle = (low + high) // 2
        if tl.load(chunk_ends + middle) <= pid:
            low = middle + 1
        else:
            high = middle
    inside = low < bags
    before = tl.load(chunk_ends + low - 1, mask=inside & (low > 0), other=0)
    start = tl.load(cu_seqlens + low, mask=inside, other=0).to(tl.int64)
    end = tl.load(cu_seqlens + low + 1, mask=inside, other=0).to(tl.int64)
    first = start + (pid - before).to(tl.int64) * chunk
    return low, first, tl.minimum(first + chunk, end)


@triton.jit
def _tanh(z):
    return 2 * tl.sigmoid(2 * z) - 1


@triton.jit
def _before_activation(
    x, gate, gate_bias, rows, inside, columns, width, depth, x_row, gate_row, shift,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of x [tanh; sigmoid]^T + bias; ``shift`` is the first of the gate's rows that counts."""
    sums = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    real = columns < width
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x_tile = tl.load(x + rows[:, None] * x_row + d[None, :], mask=inside[:, None] & (d < depth)[None, :], other=0.0)
        tile = tl.load(
            gate + (shift + columns)[:, None] * gate_row + d[None, :],
            mask=real[:, None] & (d < depth)[None, :],
            other=0.0,
        )
        sums = tl.dot(x_tile, tl.trans(tile), sums, input_precision=PRECISION)
    return sums + tl.load(gate_bias + shift + columns, mask=real, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _both_before_activation(
    x, gate, gate_bias, rows, inside, columns, width, depth, x_row, gate_row,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same for tanh and sigmoid at once, so that each tile of x is read once."""
    first = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    real = columns < width
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x_tile = tl.load(x + rows[:, None] * x_row + d[None, :], mask=inside[:, None] & (d < depth)[None, :], other=0.0)
        where = gate + columns[:, None] * gate_row + d[None, :]
        seen = real[:, None] & (d < depth)[None, :]
        tanh_tile = tl.load(where, mask=seen, other=0.0)
        first = tl.dot(x_tile, tl.trans(tanh_tile), first, input_precision=PRECISION)
        sigmoid_tile = tl.load(where + width * gate_row, mask=seen, other=0.0)
        second = tl.dot(x_tile, tl.trans(sigmoid_tile), second, input_precision=PRECISION)
    first += tl.load(gate_bias + columns, mask=real, other=0.0).to(tl.float32)[None, :]
    second += tl.load(gate_bias + width + columns, mask=real, other=0.0).to(tl.float32)[None, :]
    return first, second


@triton.jit
def score_forward(
    x, gate, gate_bias, score, score_bias, scores, total, width, depth, branches, x_row, gate_row, score_row,
    GATED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < total
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        if GATED:
            first, second = _both_before_activation(
                x, gate, gate_bias, rows, inside, columns, width, depth, x_row, gate_row,
                PRECISION, BLOCK_M, BLOCK_H, BLOCK_D,
            )  # fmt: skip
            product = _tanh(first) * tl.sigmoid(second)
        else:
            first = _before_activation(
                x, gate, gate_bias, rows, inside, columns, width, depth, x_row, gate_row, 0,
                PRECISION, BLOCK_M, BLOCK_H, BLOCK_D,
            )  # fmt: skip
            product = _tanh(first)
        w_tile = tl.load(
            score + k[:, None] * score_row + columns[None, :],
            mask=(k < branches)[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        sums = tl.dot(product.to(w_tile.dtype), tl.trans(w_tile), sums, input_precision=PRECISION)
    sums += tl.load(score_bias + k, mask=k < branches, other=0.0).to(tl.float32)[None, :]
    tl.store(scores + rows[:, None] * branches + k[None, :], sums, mask=inside[:, None] & (k < branches)[None, :])


@triton.jit
def pool_forward(
    values, scores, drop_mask, cu_seqlens, chunk_ends, partial_sums, partial_highest, partial_total,
    bags, chunk, branches, width, values_row, mask_row,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bag, first, stop = _find_chunk(chunk_ends, cu_seqlens, bags, pid, chunk)
    if bag == bags:
        return
    k = tl.arange(0, BLOCK_K)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    real = k < branches
    highest = tl.full([BLOCK_K], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    sums = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    for n in range(first, stop, BLOCK_N):
        rows = n + tl.arange(0, BLOCK_N)
        inside = rows < stop
        seen = real[:, None] & inside[None, :]
        tile = tl.load(scores + rows[None, :] * branches + k[:, None], mask=seen, other=0.0)
        if drop_mask is not None:
            hidden = tl.load(drop_mask + rows[None, :] * mask_row + k[:, None], mask=seen, other=0)
            tile = tl.where(hidden != 0, MASKED, tile)
        tile = tl.where(seen, tile, float("-inf"))
        new = tl.maximum(highest, tl.max(tile, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        # The difference first: near MASKED a scaled score has lost the digits that the largest must cancel.
        weights = tl.exp2((tile - finite[:, None]) * LOG2E)
        shrink = tl.exp2((highest - finite) * LOG2E)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = tl.load(
            values + rows[:, None] * values_row + e[None, :], mask=inside[:, None] & (e < width)[None, :], other=0.0
        )
        sums = sums * shrink[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        highest = new
    place = pid.to(tl.int64) * branches + k
    tl.store(partial_sums + place[:, None] * width + e[None, :], sums, mask=real[:, None] & (e < width)[None, :])
    if tl.program_id(1) == 0:
        tl.store(partial_highest + place, highest, mask=real)
        tl.store(partial_total + place, total, mask=real)


@triton.jit
def pool_combine(
    partial_sums, partial_highest, partial_total, chunk_ends, pooled, lse, stats, bags, branches, width,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Each program: all chunks of one bag, one branch, one block of the values' columns."""
    which = tl.program_id(0).to(tl.int64)
    bag = which // branches
    k = which % branches
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    begin = tl.load(chunk_ends + bag - 1, mask=bag > 0, other=0).to(tl.int64)
    end = tl.load(chunk_ends + bag).to(tl.int64)
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([BLOCK_E], tl.float32)
    for c in range(begin, end, BLOCK_C):
        place = (c + tl.arange(0, BLOCK_C)) * branches + k
        inside = c + tl.arange(0, BLOCK_C) < end
        parts = tl.load(partial_highest + place, mask=inside, other=float("-inf"))
        new = tl.maximum(highest, tl.max(parts, 0))
        weights = tl.exp2((parts - new) * LOG2E)  # a chunk has at least one row, so that ``new`` is finite
        shrink = tl.exp2((highest - new) * LOG2E)
        total = total * shrink + tl.sum(weights * tl.load(partial_total + place, mask=inside, other=0.0), 0)
        tile = tl.load(
            partial_sums + place[:, None] * width + e[None, :], mask=inside[:, None] & (e < width)[None, :], other=0.0
        )
        sums = sums * shrink + tl.sum(weights[:, None] * tile, 0)
        highest = new
    some = total != 0  # a NaN among the features must show
    sums = sums / tl.where(some, total, 1.0)
    tl.store(pooled + which * width + e, sums.to(pooled.dtype.element_ty), mask=e < width)
    if tl.program_id(1) == 0:
        one = which + tl.arange(0, 1)
        value = highest + tl.log(tl.where(some, total, 1.0))
        tl.store(lse + one, value)
        tl.store(stats + one, highest)
        tl.store(stats + bags * branches + one, total)


@triton.jit
def softmax_gradient(
    values, scores, drop_mask, cu_seqlens, chunk_ends, stats, mean, d_pooled, d_scores, d_values, d_visible,
    bags, chunk, branches, width, values_row, mask_row,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores, and what the weighted sum sends back to the values."""
    bag, first, stop = _find_chunk(chunk_ends, cu_seqlens, bags, tl.program_id(0), chunk)
    if bag == bags:
        return
    bag = bag.to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    real = k < branches
    rows = first + tl.arange(0, BLOCK_N)
    inside = rows < stop
    seen = inside[:, None] & real[None, :]
    tile = tl.load(scores + rows[:, None] * branches + k[None, :], mask=seen, other=0.0)
    if drop_mask is not None:
        hidden = tl.load(drop_mask + rows[:, None] * mask_row + k[None, :], mask=seen, other=0) != 0
        tile = tl.where(hidden, MASKED, tile)
    highest = tl.load(stats + bag * branches + k, mask=real, other=0.0)
    total = tl.load(stats + (bags + bag) * branches + k, mask=real, other=1.0)
    weights = tl.where(seen, tl.exp2((tile - highest[None, :]) * LOG2E) / total[None, :], 0.0)
    arriving = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        v_tile = tl.load(
            values + rows[:, None] * values_row + e[None, :], mask=inside[:, None] & (e < width)[None, :], other=0.0
        )
        g_tile = tl.load(
            d_pooled + (bag * branches + k)[:, None] * width + e[None, :],
            mask=real[:, None] & (e < width)[None, :],
            other=0.0,
        )
        arriving = tl.dot(v_tile, tl.trans(g_tile), arriving, input_precision=PRECISION)
        if d_values is not None:
            sent = tl.dot(weights.to(g_tile.dtype), g_tile, input_precision=PRECISION)
            tl.store(
                d_values + rows[:, None] * width + e[None, :],
                sent.to(d_values.dtype.element_ty),
                mask=inside[:, None] & (e < width)[None, :],
            )
    grad = weights * (arriving - tl.load(mean + bag * branches + k, mask=real, other=0.0)[None, :])
    if drop_mask is not None:
        grad = tl.where(hidden, 0.0, grad)
    if d_scores is not None:
        grad += tl.load(d_scores + rows[:, None] * branches + k[None, :], mask=seen, other=0.0)
    tl.store(d_visible + rows[:, None] * branches + k[None, :], grad, mask=seen)


@triton.jit
def gate_gradient(
    x, gate, gate_bias, score, d_scores, d_gates, partial, total, width, depth, branches, x_row, gate_row, score_row,
    GATED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient before the activations, recomputed; of the score weights and the gate's bias, one part per row block.

    ``partial (row blocks, K + 1 or 2, h)``: score weights, then the bias of the tanh, then that of the sigmoid.
    """
    pid = tl.program_id(0).to(tl.int64)
    rows = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < total
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    real = columns < width
    k = tl.arange(0, BLOCK_K)
    if GATED:
        first, second = _both_before_activation(
            x, gate, gate_bias, rows, inside, columns, width, depth, x_row, gate_row,
            PRECISION, BLOCK_M, BLOCK_H, BLOCK_D,
        )  # fmt: skip
        sigmoid = tl.sigmoid(second)
    else:
        first = _before_activation(
            x, gate, gate_bias, rows, inside, columns, width, depth, x_row, gate_row, 0,
            PRECISION, BLOCK_M, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    tanh = _tanh(first)
    w_tile = tl.load(
        score + k[:, None] * score_row + columns[None, :], mask=(k < branches)[:, None] & real[None, :], other=0.0
    )
    grad = tl.load(
        d_scores + rows[:, None] * branches + k[None, :], mask=inside[:, None] & (k < branches)[None, :], other=0.0
    ).to(w_tile.dtype)
    d_product = tl.dot(grad, w_tile, input_precision=PRECISION)
    out = d_gates + rows[:, None] * (2 * width if GATED else width) + columns[None, :]
    seen = inside[:, None] & real[None, :]
    part = partial + pid * (branches + 2 if GATED else branches + 1) * width + columns
    product = tanh
    if GATED:
        product = tanh * sigmoid
        d_second = d_product * product * (1 - sigmoid)
        tl.store(out + width, d_second.to(d_gates.dtype.element_ty), mask=seen)
        tl.store(part + (branches + 1) * width, tl.sum(d_second, 0), mask=real)
        d_product *= sigmoid
    d_first = d_product * (1 - tanh * tanh)
    tl.store(out, d_first.to(d_gates.dtype.element_ty), mask=seen)
    tl.store(part + branches * width, tl.sum(d_first, 0), mask=real)
    d_score = tl.dot(tl.trans(grad), product.to(w_tile.dtype), input_precision=PRECISION)
    tl.store(part[None, :] + k[:, None] * width, d_score, mask=(k < branches)[:, None] & real[None, :])
