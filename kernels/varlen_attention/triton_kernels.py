"""Kernels of packed attention: forward, gradient of the queries, gradients of keys and values.

A program handles one block of rows of one segment for one head. Scores are in base 2 (``scale`` times log2 e), softmax
statistics and all sums in float32. The head's width is padded to a power of two with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _find_block(block_ends, cu_rows, segments, pid, BLOCK: tl.constexpr):
    """Segment of block ``pid``, its first row, the segment's end; segment ``segments`` when there is no such block."""
    low = 0
    high = segments
    while low < high:
        middle = (low + high) // 2
        if tl.load(block_ends + middle) <= pid:
            low = middle + 1
        else:
            high = middle
    inside = low < segments
    before = tl.load(block_ends + low - 1, mask=inside & (low > 0), other=0)
    start = tl.load(cu_rows + low, mask=inside, other=0).to(tl.int64)
    end = tl.load(cu_rows + low + 1, mask=inside, other=0).to(tl.int64)
    return low, start + (pid - before).to(tl.int64) * BLOCK, end


@triton.jit
def _rows(base, rows, stride, end, columns, WIDTH: tl.constexpr):
    """Rows of a packed tensor as a tile; zeros past ``end`` and past the width."""
    return tl.load(
        base + rows[:, None] * stride + columns[None, :],
        mask=(rows < end)[:, None] & (columns < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def _scores(
    q_tile, k_tile, rows, keys, row_end, key_end, bias, offset, scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr
):
    """Base-2 scores of a tile, -inf where a query does not see a key."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
    seen = (rows < row_end)[:, None] & (keys < key_end)[None, :]
    if bias is not None:
        scores += tl.load(bias + keys, mask=keys < key_end, other=0.0)[None, :].to(tl.float32) * LOG2E
    if CAUSAL:
        seen = seen & (keys[None, :] <= rows[:, None] + offset)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def attention_forward(
    q, k, v, cu_q, cu_k, key_bias, block_ends, out, lse, scale, segments, key_total,
    q_row, k_row, v_row, q_head, k_head, v_head, bias_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    segment, first, row_end = _find_block(block_ends, cu_q, segments, tl.program_id(0), BLOCK)
    if segment == segments:
        return
    head = tl.program_id(1).to(tl.int64)
    rows = first + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    key_start = tl.load(cu_k + segment).to(tl.int64)
    key_end = tl.load(cu_k + segment + 1).to(tl.int64)
    offset = key_end - row_end  # the last query of a segment is aligned with its last key
    q_tile = _rows(q + head * q_head, rows, q_row, row_end, d, D)
    k_base = k + head // GROUP * k_head
    v_base = v + head // GROUP * v_head
    bias = key_bias
    if bias is not None:
        bias += head * bias_head
    stop = key_end
    if CAUSAL:
        stop = tl.minimum(key_end, first + BLOCK + offset)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for n in range(key_start, stop, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        k_tile = _rows(k_base, keys, k_row, key_end, d, D)
        scores = _scores(q_tile, k_tile, rows, keys, row_end, key_end, bias, offset, scale, CAUSAL, PRECISION)
        new = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(highest - finite)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = _rows(v_base, keys, v_row, key_end, e, E)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        highest = new
    some = total > 0
    sums = sums / tl.where(some, total, 1.0)[:, None]
    inside = rows < row_end
    tl.store(
        out + (rows[:, None] * HEADS + head) * E + e[None, :],
        sums.to(out.dtype.element_ty),
        mask=inside[:, None] & (e < E)[None, :],
    )
    sum_of_exponentials = tl.where(some, (highest + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    tl.store(lse + rows * HEADS + head, sum_of_exponentials, mask=inside)


@triton.jit
def query_gradient(
    q, k, v, cu_q, cu_k, key_bias, block_ends, grad_out, grad_lse, out, lse, delta, d_q, scale, segments, key_total,
    q_row, k_row, v_row, q_head, k_head, v_head, bias_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    segment, first, row_end = _find_block(block_ends, cu_q, segments, tl.program_id(0), BLOCK)
    if segment == segments:
        return
    head = tl.program_id(1).to(tl.int64)
    rows = first + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    key_start = tl.load(cu_k + segment).to(tl.int64)
    key_end = tl.load(cu_k + segment + 1).to(tl.int64)
    offset = key_end - row_end
    inside = rows < row_end
    q_tile = _rows(q + head * q_head, rows, q_row, row_end, d, D)
    d_out = _rows(grad_out + head * E, rows, HEADS * E, row_end, e, E)
    o_tile = _rows(out + head * E, rows, HEADS * E, row_end, e, E)
    # The gradient of the log-sum-exp enters here and nowhere else.
    mean = tl.sum(d_out.to(tl.float32) * o_tile.to(tl.float32), 1)
    if grad_lse is not None:
        mean -= tl.load(grad_lse + rows * HEADS + head, mask=inside, other=0.0)
    tl.store(delta + rows * HEADS + head, mean, mask=inside)
    total = tl.load(lse + rows * HEADS + head, mask=inside, other=0.0)
    total = tl.where(total == float("-inf"), 0.0, total) * LOG2E
    k_base = k + head // GROUP * k_head
    v_base = v + head // GROUP * v_head
    bias = key_bias
    if bias is not None:
        bias += head * bias_head
    stop = key_end
    if CAUSAL:
        stop = tl.minimum(key_end, first + BLOCK + offset)
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for n in range(key_start, stop, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        k_tile = _rows(k_base, keys, k_row, key_end, d, D)
        scores = _scores(q_tile, k_tile, rows, keys, row_end, key_end, bias, offset, scale, CAUSAL, PRECISION)
        weights = tl.exp2(scores - total[:, None])
        v_tile = _rows(v_base, keys, v_row, key_end, e, E)
        d_weights = tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION)
        d_scores = weights * (d_weights - mean[:, None])
        sums += tl.dot(d_scores.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    tl.store(
        d_q + (rows[:, None] * HEADS + head) * D + d[None, :],
        (sums * scale).to(d_q.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )


@triton.jit
def key_gradients(
    q, k, v, cu_q, cu_k, key_bias, block_ends, grad_out, lse, delta, d_k, d_v, d_bias, scale, segments, key_total,
    q_row, k_row, v_row, q_head, k_head, v_head, bias_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    segment, first, key_end = _find_block(block_ends, cu_k, segments, tl.program_id(0), BLOCK)
    if segment == segments:
        return
    key_head = tl.program_id(1).to(tl.int64)
    keys = first + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    row_start = tl.load(cu_q + segment).to(tl.int64)
    row_end = tl.load(cu_q + segment + 1).to(tl.int64)
    offset = key_end - row_end
    inside = keys < key_end
    k_tile = _rows(k + key_head * k_head, keys, k_row, key_end, d, D)
    v_tile = _rows(v + key_head * v_head, keys, v_row, key_end, e, E)
    begin = row_start
    if CAUSAL:
        begin = tl.maximum(row_start, first - offset)
    k_sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    v_sums = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        bias = key_bias
        if bias is not None:
            bias += head * bias_head
        bias_sums = tl.zeros([BLOCK], tl.float32)
        for n in range(begin, row_end, BLOCK_N):
            rows = n + tl.arange(0, BLOCK_N)
            q_tile = _rows(q + head * q_head, rows, q_row, row_end, d, D)
            d_out = _rows(grad_out + head * E, rows, HEADS * E, row_end, e, E)
            total = tl.load(lse + rows * HEADS + head, mask=rows < row_end, other=0.0)
            total = tl.where(total == float("-inf"), 0.0, total) * LOG2E
            mean = tl.load(delta + rows * HEADS + head, mask=rows < row_end, other=0.0)
            scores = _scores(q_tile, k_tile, rows, keys, row_end, key_end, bias, offset, scale, CAUSAL, PRECISION)
            weights = tl.exp2(scores - total[:, None])
            v_sums += tl.dot(tl.trans(weights).to(d_out.dtype), d_out, input_precision=PRECISION)
            d_weights = tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION)
            d_scores = weights * (d_weights - mean[:, None])
            k_sums += tl.dot(tl.trans(d_scores).to(q_tile.dtype), q_tile, input_precision=PRECISION)
            if d_bias is not None:
                bias_sums += tl.sum(d_scores, 0)
        if d_bias is not None:
            tl.store(d_bias + head * key_total + keys, bias_sums, mask=inside)
    heads = HEADS // GROUP
    tl.store(
        d_k + (keys[:, None] * heads + key_head) * D + d[None, :],
        (k_sums * scale).to(d_k.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    tl.store(
        d_v + (keys[:, None] * heads + key_head) * E + e[None, :],
        v_sums.to(d_v.dtype.element_ty),
        mask=inside[:, None] & (e < E)[None, :],
    )
