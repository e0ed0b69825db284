"""Kernels of windowed products: weighted sums, logits, weighted sums transposed, gradient of the relative positions.

A program takes a tile of T0 x T1 x T2 tokens of one head, in the coordinates of one dilation group, and walks through
the box of tokens that their windows cover. The weights of a tile against a stretch of the box form a dense matrix, zero
outside the windows, so that tensor cores multiply it. The place of a weight is a sum of a term of its query and a term
of its key: the matrix costs one addition and one comparison per axis and entry. A 1-D or 2-D grid has leading axes of
length 1; with one axis to spare (DEEP false) its comparison is left out.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _group_length(length, dilation, group):
    """Tokens of a dilation group on an axis."""
    return (length - group + dilation - 1) // dilation


@triton.jit
def _start(x, kernel, length, ZERO: tl.constexpr):
    """First key of the window of token ``x`` of a group; before the group or past its end only with zero padding."""
    start = x - kernel // 2
    if not ZERO:
        start = tl.minimum(tl.maximum(start, 0), length - kernel)
    return start


@triton.jit
def _first_query(j, kernel, ZERO: tl.constexpr):
    """First token of a group whose window holds the key ``j``; never negative."""
    first = tl.maximum(j - kernel + 1 + kernel // 2, 0)
    if not ZERO:
        first = tl.where(j < kernel, 0, first)
    return first


@triton.jit
def _last_query(j, kernel, length, ZERO: tl.constexpr):
    """Last token of a group whose window holds the key ``j``."""
    last = tl.minimum(j + kernel // 2, length - 1)
    if not ZERO:
        last = tl.where(j >= length - kernel, length - 1, last)
    return last


@triton.jit
def _program(
    heads, length0, length1, length2, dilation0, dilation1, dilation2,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
):  # fmt: skip
    """Batch and head, dilation group, its lengths and the first token of the tile, from the number of the program."""
    tiles0 = tl.cdiv(tl.cdiv(length0, dilation0), T0)
    tiles1 = tl.cdiv(tl.cdiv(length1, dilation1), T1)
    tiles2 = tl.cdiv(tl.cdiv(length2, dilation2), T2)
    pid = tl.program_id(0)
    t2 = pid % tiles2
    pid = pid // tiles2
    t1 = pid % tiles1
    pid = pid // tiles1
    t0 = pid % tiles0
    pid = pid // tiles0
    g2 = pid % dilation2
    pid = pid // dilation2
    g1 = pid % dilation1
    pid = pid // dilation1
    g0 = pid % dilation0
    pid = pid // dilation0
    batch = (pid // heads).to(tl.int64)
    head = (pid % heads).to(tl.int64)
    n0 = _group_length(length0, dilation0, g0)
    n1 = _group_length(length1, dilation1, g1)
    n2 = _group_length(length2, dilation2, g2)
    return batch, head, g0, g1, g2, n0, n1, n2, t0 * T0, t1 * T1, t2 * T2


@triton.jit
def _tile(x0, x1, x2, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr):
    """Group coordinates of the tokens of a tile."""
    i = tl.arange(0, T0 * T1 * T2)
    return x0 + i // (T1 * T2), x1 + i // T2 % T1, x2 + i % T2


@triton.jit
def _offset(x0, x1, x2, g0, g1, g2, dilation0, dilation1, dilation2, stride0, stride1, stride2):
    """Offset of tokens given in group coordinates."""
    return (
        (x0 * dilation0 + g0).to(tl.int64) * stride0
        + (x1 * dilation1 + g1).to(tl.int64) * stride1
        + (x2 * dilation2 + g2).to(tl.int64) * stride2
    )


@triton.jit
def _seen(k0, k1, k2, s0, s1, s2, kernel0, kernel1, kernel2, DEEP: tl.constexpr):
    """Whether the keys of the columns are within the windows of the rows, which start at ``s``."""
    # A key before the window is a huge unsigned number.
    seen = (k2[None, :] - s2[:, None]).to(tl.uint32) < kernel2
    seen &= (k1[None, :] - s1[:, None]).to(tl.uint32) < kernel1
    if DEEP:
        seen &= (k0[None, :] - s0[:, None]).to(tl.uint32) < kernel0
    return seen


@triton.jit
def _within(k0, k1, k2, n0, n1, n2):
    """Whether keys are in their group: one before it is a huge unsigned number."""
    return (k0.to(tl.uint32) < n0) & (k1.to(tl.uint32) < n1) & (k2.to(tl.uint32) < n2)


@triton.jit
def weighted_sum_kernel(
    attn, value, out, scale, heads,
    length0, length1, length2, kernel0, kernel1, kernel2, dilation0, dilation1, dilation2,
    attn_batch, attn_head, attn0, attn1, attn2,
    value_batch, value_head, value0, value1, value2,
    out_batch, out_head, out0, out1, out2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DEEP: tl.constexpr, ZERO: tl.constexpr, PRECISION: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, head, g0, g1, g2, n0, n1, n2, f0, f1, f2 = _program(
        heads, length0, length1, length2, dilation0, dilation1, dilation2, T0, T1, T2
    )
    if (f0 >= n0) | (f1 >= n1) | (f2 >= n2):  # the other groups are longer
        return
    x0, x1, x2 = _tile(f0, f1, f2, T0, T1, T2)
    inside = (x0 < n0) & (x1 < n1) & (x2 < n2)
    s0 = _start(x0, kernel0, n0, ZERO)
    s1 = _start(x1, kernel1, n1, ZERO)
    s2 = _start(x2, kernel2, n2, ZERO)
    # The box of keys: from the first key of the first window to the last key of the last.
    b0 = _start(f0, kernel0, n0, ZERO)
    b1 = _start(f1, kernel1, n1, ZERO)
    b2 = _start(f2, kernel2, n2, ZERO)
    w0 = _start(tl.minimum(f0 + T0, n0) - 1, kernel0, n0, ZERO) + kernel0 - b0
    w1 = _start(tl.minimum(f1 + T1, n1) - 1, kernel1, n1, ZERO) + kernel1 - b1
    w2 = _start(tl.minimum(f2 + T2, n2) - 1, kernel2, n2, ZERO) + kernel2 - b2
    d = tl.arange(0, BLOCK_D)
    rows = _offset(x0, x1, x2, g0, g1, g2, dilation0, dilation1, dilation2, attn0, attn1, attn2) - (
        (s0 * kernel1 + s1) * kernel2 + s2
    )
    attn += batch * attn_batch + head * attn_head
    value += batch * value_batch + head * value_head
    sums = tl.zeros([T0 * T1 * T2, BLOCK_D], tl.float32)
    for n in range(0, w0 * w1 * w2, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        k2 = b2 + j % w2
        k1 = b1 + j // w2 % w1
        k0 = b0 + j // w2 // w1
        live = j < w0 * w1 * w2
        if ZERO:
            live &= _within(k0, k1, k2, n0, n1, n2)
        seen = _seen(k0, k1, k2, s0, s1, s2, kernel0, kernel1, kernel2, DEEP)
        columns = (k0 * kernel1 + k1) * kernel2 + k2
        weights = tl.load(
            attn + rows[:, None] + columns[None, :], mask=seen & inside[:, None] & live[None, :], other=0.0
        )
        v = tl.load(
            value
            + _offset(k0, k1, k2, g0, g1, g2, dilation0, dilation1, dilation2, value0, value1, value2)[:, None]
            + d[None, :],
            mask=live[:, None] & (d < D)[None, :],
            other=0.0,
        )
        sums += tl.dot(weights, v, input_precision=PRECISION)
    tl.store(
        out
        + batch * out_batch
        + head * out_head
        + _offset(x0, x1, x2, g0, g1, g2, dilation0, dilation1, dilation2, out0, out1, out2)[:, None]
        + d[None, :],
        (sums * scale).to(out.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )


@triton.jit
def transposed_sum_kernel(
    attn, value, out, scale, heads,
    length0, length1, length2, kernel0, kernel1, kernel2, dilation0, dilation1, dilation2,
    attn_batch, attn_head, attn0, attn1, attn2,
    value_batch, value_head, value0, value1, value2,
    out_batch, out_head, out0, out1, out2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DEEP: tl.constexpr, ZERO: tl.constexpr, PRECISION: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # A tile of keys against the box of the queries whose windows hold one of them.
    batch, head, g0, g1, g2, n0, n1, n2, f0, f1, f2 = _program(
        heads, length0, length1, length2, dilation0, dilation1, dilation2, T0, T1, T2
    )
    if (f0 >= n0) | (f1 >= n1) | (f2 >= n2):
        return
    k0, k1, k2 = _tile(f0, f1, f2, T0, T1, T2)
    inside = (k0 < n0) & (k1 < n1) & (k2 < n2)
    b0 = _first_query(f0, kernel0, ZERO)
    b1 = _first_query(f1, kernel1, ZERO)
    b2 = _first_query(f2, kernel2, ZERO)
    # With zero padding and an even window the last keys of a box may have no query: widths are at least 0.
    w0 = tl.maximum(_last_query(tl.minimum(f0 + T0, n0) - 1, kernel0, n0, ZERO) + 1 - b0, 0)
    w1 = tl.maximum(_last_query(tl.minimum(f1 + T1, n1) - 1, kernel1, n1, ZERO) + 1 - b1, 0)
    w2 = tl.maximum(_last_query(tl.minimum(f2 + T2, n2) - 1, kernel2, n2, ZERO) + 1 - b2, 0)
    d = tl.arange(0, BLOCK_D)
    columns = (k0 * kernel1 + k1) * kernel2 + k2
    attn += batch * attn_batch + head * attn_head
    value += batch * value_batch + head * value_head
    sums = tl.zeros([T0 * T1 * T2, BLOCK_D], tl.float32)
    for n in range(0, w0 * w1 * w2, BLOCK_N):
        i = n + tl.arange(0, BLOCK_N)
        x2 = b2 + i % w2
        x1 = b1 + i // w2 % w1
        x0 = b0 + i // w2 // w1
        live = i < w0 * w1 * w2
        s0 = _start(x0, kernel0, n0, ZERO)
        s1 = _start(x1, kernel1, n1, ZERO)
        s2 = _start(x2, kernel2, n2, ZERO)
        seen = _seen(k0, k1, k2, s0, s1, s2, kernel0, kernel1, kernel2, DEEP)
        rows = _offset(x0, x1, x2, g0, g1, g2, dilation0, dilation1, dilation2, attn0, attn1, attn2) - (
            (s0 * kernel1 + s1) * kernel2 + s2
        )
        # Neighbouring keys lie side by side in a query's weights: read so, and turn the tile.
        weights = tl.load(
            attn + rows[:, None] + columns[None, :], mask=seen & live[:, None] & inside[None, :], other=0.0
        )
        v = tl.load(
            value
            + _offset(x0, x1, x2, g0, g1, g2, dilation0, dilation1, dilation2, value0, value1, value2)[:, None]
            + d[None, :],
            mask=live[:, None] & (d < D)[None, :],
            other=0.0,
        )
        sums += tl.dot(tl.trans(weights), v, input_precision=PRECISION)
    tl.store(
        out
        + batch * out_batch
        + head * out_head
        + _offset(k0, k1, k2, g0, g1, g2, dilation0, dilation1, dilation2, out0, out1, out2)[:, None]
        + d[None, :],
        (sums * scale).to(out.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )


@triton.jit
def products_kernel(
    q, k, rpb, out, scale, heads, rpb_head,
    length0, length1, length2, kernel0, kernel1, kernel2, dilation0, dilation1, dilation2,
    q_batch, q_head, q0, q1, q2,
    k_batch, k_head, key0, key1, key2,
    out_batch, out_head, out0, out1, out2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DEEP: tl.constexpr, ZERO: tl.constexpr, PRECISION: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, head, g0, g1, g2, n0, n1, n2, f0, f1, f2 = _program(
        heads, length0, length1, length2, dilation0, dilation1, dilation2, T0, T1, T2
    )
    if (f0 >= n0) | (f1 >= n1) | (f2 >= n2):
        return
    x0, x1, x2 = _tile(f0, f1, f2, T0, T1, T2)
    inside = (x0 < n0) & (x1 < n1) & (x2 < n2)
    s0 = _start(x0, kernel0, n0, ZERO)
    s1 = _start(x1, kernel1, n1, ZERO)
    s2 = _start(x2, kernel2, n2, ZERO)
    b0 = _start(f0, kernel0, n0, ZERO)
    b1 = _start(f1, kernel1, n1, ZERO)
    b2 = _start(f2, kernel2, n2, ZERO)
    w0 = _start(tl.minimum(f0 + T0, n0) - 1, kernel0, n0, ZERO) + kernel0 - b0
    w1 = _start(tl.minimum(f1 + T1, n1) - 1, kernel1, n1, ZERO) + kernel1 - b1
    w2 = _start(tl.minimum(f2 + T2, n2) - 1, kernel2, n2, ZERO) + kernel2 - b2
    d = tl.arange(0, BLOCK_D)
    q_tile = tl.load(
        q
        + batch * q_batch
        + head * q_head
        + _offset(x0, x1, x2, g0, g1, g2, dilation0, dilation1, dilation2, q0, q1, q2)[:, None]
        + d[None, :],
        mask=inside[:, None] & (d < D)[None, :],
        other=0.0,
    )
    rows = _offset(x0, x1, x2, g0, g1, g2, dilation0, dilation1, dilation2, out0, out1, out2) - (
        (s0 * kernel1 + s1) * kernel2 + s2
    )
    k += batch * k_batch + head * k_head
    out += batch * out_batch + head * out_head
    # The relative position of a key, too, is a term of the key less a term of the query.
    across1 = 2 * kernel1 - 1
    across2 = 2 * kernel2 - 1
    middle = ((kernel0 - 1) * across1 + kernel1 - 1) * across2 + kernel2 - 1
    origin = middle - ((x0 * across1 + x1) * across2 + x2)
    for n in range(0, w0 * w1 * w2, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        k2 = b2 + j % w2
        k1 = b1 + j // w2 % w1
        k0 = b0 + j // w2 // w1
        box = j < w0 * w1 * w2
        live = box
        if ZERO:  # a key beyond the grid has a logit all the same
            live = box & _within(k0, k1, k2, n0, n1, n2)
        k_tile = tl.load(
            k
            + _offset(k0, k1, k2, g0, g1, g2, dilation0, dilation1, dilation2, key0, key1, key2)[:, None]
            + d[None, :],
            mask=live[:, None] & (d < D)[None, :],
            other=0.0,
        )
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        seen = _seen(k0, k1, k2, s0, s1, s2, kernel0, kernel1, kernel2, DEEP) & inside[:, None] & box[None, :]
        if rpb is not None:
            entry = (k0 * across1 + k1) * across2 + k2
            logits += tl.load(rpb + head * rpb_head + origin[:, None] + entry[None, :], mask=seen, other=0.0).to(
                tl.float32
            )
        columns = (k0 * kernel1 + k1) * kernel2 + k2
        tl.store(out + rows[:, None] + columns[None, :], logits.to(out.dtype.element_ty), mask=seen)


@triton.jit
def table_gradient_kernel(
    grad, partial, heads, rows, rows_per_split, table_size,
    length0, length1, length2, kernel0, kernel1, kernel2, dilation0, dilation1, dilation2,
    grad_batch, grad_head, grad0, grad1, grad2,
    DEEP: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sums, over one share of the tokens of all images, of what each entry of a head's table was added to."""
    blocks = tl.cdiv(table_size, BLOCK_E)
    pid = tl.program_id(0)
    block = pid % blocks
    pid = pid // blocks
    head = (pid % heads).to(tl.int64)
    split = pid // heads
    entry = block * BLOCK_E + tl.arange(0, BLOCK_E)
    across1 = 2 * kernel1 - 1
    across2 = 2 * kernel2 - 1
    # Steps from the query to the key.
    e2 = entry % across2 - kernel2 + 1
    e1 = entry // across2 % across1 - kernel1 + 1
    e0 = entry // across2 // across1 - kernel0 + 1
    columns = (e0 * kernel1 + e1) * kernel2 + e2
    tokens = length0 * length1 * length2
    sums = tl.zeros([BLOCK_E], tl.float32)
    first = split.to(tl.int64) * rows_per_split
    for n in range(0, rows_per_split, BLOCK):
        row = first + n + tl.arange(0, BLOCK)
        inside = (row < rows) & (n + tl.arange(0, BLOCK) < rows_per_split)
        token = (row % tokens).to(tl.int32)
        p2 = token % length2
        p1 = token // length2 % length1
        p0 = token // length2 // length1
        x0 = p0 // dilation0
        x1 = p1 // dilation1
        x2 = p2 // dilation2
        # First tap less the query: what a step must exceed to be within the window.
        a0 = _start(x0, kernel0, _group_length(length0, dilation0, p0 % dilation0), ZERO) - x0
        a1 = _start(x1, kernel1, _group_length(length1, dilation1, p1 % dilation1), ZERO) - x1
        a2 = _start(x2, kernel2, _group_length(length2, dilation2, p2 % dilation2), ZERO) - x2
        seen = _seen(e0, e1, e2, a0, a1, a2, kernel0, kernel1, kernel2, DEEP)
        place = (
            row // tokens * grad_batch
            + p0.to(tl.int64) * grad0
            + p1.to(tl.int64) * grad1
            + p2.to(tl.int64) * grad2
            - ((a0 * kernel1 + a1) * kernel2 + a2)
        )
        given = tl.load(
            grad + head * grad_head + place[:, None] + columns[None, :],
            mask=seen & inside[:, None] & (entry < table_size)[None, :],
            other=0.0,
        )
        sums += tl.sum(given.to(tl.float32), 0)
    tl.store(partial + (split.to(tl.int64) * heads + head) * table_size + entry, sums, mask=entry < table_size)
