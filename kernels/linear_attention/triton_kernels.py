"""Kernels of linear attention: reduce, combine, apply, and the same two passes backwards.

Tokens are cut into chunks that never cross a sequence; a program handles one chunk of one head in tiles of ``BLOCK``
tokens. Programs that sum over tokens write one partial state ``[[S, g], [t, n]]``, (D + 1, E + 1) float32, which
``combine`` adds in the order of the chunks. What the second pass applies is ``[[M, m], [c, -]]`` in the same layout.
All sums are float32; half-precision tiles are multiplied as TF32, which holds their digits and has no small range.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _find_chunk(chunk_ends, cu, sequences, pid, per_sequence, tokens, chunk):
    """Sequence of chunk ``pid``, batch item, first token, number of tokens (0 where there is no such chunk)."""
    if chunk_ends is None:
        sequence = (pid // per_sequence).to(tl.int64)
        first = (pid % per_sequence).to(tl.int64) * chunk
        batch = sequence
        end = sequence * 0 + tokens
    else:
        low = 0
        high = sequences
        while low < high:
            middle = (low + high) // 2
            if tl.load(chunk_ends + middle) <= pid:
                low = middle + 1
            else:
                high = middle
        inside = low < sequences
        before = tl.load(chunk_ends + low - 1, mask=inside & (low > 0), other=0)
        first = tl.load(cu + low, mask=inside, other=0).to(tl.int64) + (pid - before).to(tl.int64) * chunk
        end = tl.load(cu + low + 1, mask=inside, other=0).to(tl.int64)
        sequence = tl.minimum(low, sequences - 1).to(tl.int64)
        batch = sequence * 0
        if low == sequences:
            first = end
    return sequence, batch, first, tl.minimum(end - first, chunk).to(tl.int32)


@triton.jit
def _rows(base, rows, stride, count, columns, WIDTH: tl.constexpr):
    """Tokens as a float32 tile; zeros past ``count`` and past the width."""
    inside = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(base, rows, stride, count, columns, values, WIDTH: tl.constexpr):
    inside = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _features(x, inside, slope, MAP: tl.constexpr):
    """Feature map of a tile, 0 where there is no token or channel."""
    if MAP == "relu":
        x = tl.maximum(x, 0.0)
    if MAP == "leaky_relu":
        x = tl.where(x > 0, x, x * slope)
    if MAP == "elu_plus_one":
        x = tl.where(x > 0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * LOG2E))
    if MAP == "sigmoid":
        x = tl.sigmoid(x)
    if MAP == "exp":
        x = tl.exp2(x * (slope * LOG2E))
    return tl.where(inside, x, 0.0)


@triton.jit
def _times_slope(gradient, features, slope, MAP: tl.constexpr):
    """Times the derivative of the feature map, by its value."""
    if MAP == "relu":
        gradient = tl.where(features > 0, gradient, 0.0)
    if MAP == "leaky_relu":
        gradient = tl.where(features > 0, gradient, gradient * slope)
    if MAP == "elu_plus_one":
        gradient = gradient * tl.minimum(features, 1.0)
    if MAP == "sigmoid":
        gradient = gradient * features * (1.0 - features)
    if MAP == "exp":
        gradient = gradient * features * slope
    return gradient


@triton.jit
def _rotate(x, cos, sin, rows, count, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BACK: tl.constexpr):
    """Channels 2m and 2m + 1 rotated by angle m, or back."""
    if cos is not None:
        m = tl.arange(0, BLOCK_D // 2)
        c = _rows(cos, rows, D // 2, count, m, D // 2)
        s = _rows(sin, rows, D // 2, count, m, D // 2)
        if BACK:
            s = -s
        even, odd = tl.split(tl.reshape(x, (BLOCK, BLOCK_D // 2, 2)))
        x = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (BLOCK, BLOCK_D))
    return x


@triton.jit
def _weight(weight, rows, stride, count):
    """Weights of a tile of tokens, 0 past ``count``; 1 without any."""
    if weight is None:
        values = tl.where(rows < count, 1.0, 0.0)
    else:
        values = tl.load(weight + rows * stride, mask=rows < count, other=0.0)
    return values


@triton.jit
def _matrix(state, d, e, D: tl.constexpr, E: tl.constexpr):
    """Matrix (D, E) of a state."""
    inside = (d < D)[:, None] & (e < E)[None, :]
    return tl.load(state + d[:, None] * (E + 1) + e[None, :], mask=inside, other=0.0)


@triton.jit
def _vectors(state, d, e, D: tl.constexpr, E: tl.constexpr):
    """Column (D) and row (E) of a state."""
    column = tl.load(state + d * (E + 1) + E, mask=d < D, other=0.0)
    row = tl.load(state + D * (E + 1) + e, mask=e < E, other=0.0)
    return column, row


@triton.jit
def _store_state(state, d, e, matrix, column, row, corner, D: tl.constexpr, E: tl.constexpr):
    tl.store(state + d[:, None] * (E + 1) + e[None, :], matrix, mask=(d < D)[:, None] & (e < E)[None, :])
    tl.store(state + d * (E + 1) + E, column, mask=d < D)
    tl.store(state + D * (E + 1) + e, row, mask=e < E)
    tl.store(state + D * (E + 1) + E, corner)


@triton.jit
def _row_weights(z, eps, KIND: tl.constexpr):
    """a and b of each token, and the derivative of a by z."""
    a = tl.full(z.shape, 1.0, tl.float32)
    b = tl.zeros(z.shape, tl.float32)
    slope = tl.zeros(z.shape, tl.float32)
    if KIND == "affine":
        b = a
    if KIND == "shift":
        b = 1.0 - z
    if KIND == "mala":
        a = 1.0 / (z + eps)
        slope = -a * a
        a += 1.0
        b = -z
    if KIND == "ratio":
        a = 1.0 / (z + eps)
        slope = -a * a
    if KIND == "floor":
        a = 1.0 / tl.maximum(z, eps)
        slope = tl.where(z >= eps, -a * a, 0.0)
    return a, b, slope


@triton.jit
def reduce_keys(
    k, v, key_weight, cos, sin, cu, chunk_ends, partials, slope,
    sequences, per_sequence, tokens, chunk,
    k_batch, v_batch, w_batch, k_row, v_row, w_row, k_head, v_head, w_head,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    _, batch, first, count = _find_chunk(chunk_ends, cu, sequences, pid, per_sequence, tokens, chunk)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    if cos is not None:
        cos += first * (D // 2)
        sin += first * (D // 2)
    k += batch * k_batch + first * k_row + head * k_head
    v += batch * v_batch + first * v_row + head * v_head
    if key_weight is not None:
        key_weight += batch * w_batch + first * w_row + head * w_head
    sums = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    keys = tl.zeros([BLOCK_D], tl.float32)
    values = tl.zeros([BLOCK_E], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    for n in range(0, count, BLOCK):
        rows = n + tl.arange(0, BLOCK)
        inside = (rows < count)[:, None] & (d < D)[None, :]
        weight = _weight(key_weight, rows, w_row, count)
        g = _features(_rows(k, rows, k_row, count, d, D), inside, slope, MAP) * weight[:, None]
        v_tile = _rows(v, rows, v_row, count, e, E)
        keys += tl.sum(g, 0)
        values += tl.sum(v_tile * weight[:, None], 0)
        weights += weight
        g = _rotate(g, cos, sin, rows, count, D, BLOCK, BLOCK_D, False)
        sums += tl.dot(tl.trans(g), v_tile, input_precision=PRECISION)
    partials += (pid.to(tl.int64) * HEADS + head) * ((D + 1) * (E + 1))
    _store_state(partials, d, e, sums, keys, values, tl.sum(weights, 0), D, E)


@triton.jit
def combine(partials, chunk_ends, state, per_sequence, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of each sequence's partial states."""
    pid = tl.program_id(0)
    sequence = pid // HEADS
    head = pid % HEADS
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if chunk_ends is None:
        begin = sequence * per_sequence
        end = begin + per_sequence
    else:
        begin = tl.load(chunk_ends + sequence - 1, mask=sequence > 0, other=0)
        end = tl.load(chunk_ends + sequence)
    partials += (begin.to(tl.int64) * HEADS + head) * SIZE
    sums = tl.zeros([BLOCK], tl.float32)
    for _ in range(begin, end):
        sums += tl.load(partials + columns, mask=columns < SIZE, other=0.0)
        partials += HEADS * SIZE
    tl.store(state + pid.to(tl.int64) * SIZE + columns, sums, mask=columns < SIZE)


@triton.jit
def apply_to_queries(
    q, query_weight, cos, sin, cu, chunk_ends, prepared, out, slope, eps,
    sequences, per_sequence, tokens, chunk,
    q_batch, w_batch, q_row, w_row, q_head, w_head,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    MAP: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    sequence, batch, first, count = _find_chunk(
        chunk_ends, cu, sequences, tl.program_id(0), per_sequence, tokens, chunk
    )
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    if cos is not None:
        cos += first * (D // 2)
        sin += first * (D // 2)
    q += batch * q_batch + first * q_row + head * q_head
    out += ((batch * tokens + first) * HEADS + head) * E
    if query_weight is not None:
        query_weight += batch * w_batch + first * w_row + head * w_head
    prepared += (sequence * HEADS + head) * ((D + 1) * (E + 1))
    vector, constant = _vectors(prepared, d, e, D, E)
    matrix = _matrix(prepared, d, e, D, E)
    for n in range(0, count, BLOCK):
        rows = n + tl.arange(0, BLOCK)
        inside = (rows < count)[:, None] & (d < D)[None, :]
        f = _features(_rows(q, rows, q_row, count, d, D), inside, slope, MAP)
        rotated = _rotate(f, cos, sin, rows, count, D, BLOCK, BLOCK_D, False)
        result = tl.dot(rotated, matrix, input_precision=PRECISION)
        if KIND != "linear":
            a, b, _ = _row_weights(tl.sum(f * vector[None, :], 1), eps, KIND)
            result = result * a[:, None] + b[:, None] * constant[None, :]
        if query_weight is not None:
            result *= _weight(query_weight, rows, w_row, count)[:, None]
        _store_rows(out, rows, HEADS * E, count, e, result, E)


@triton.jit
def query_gradients(
    q, query_weight, cos, sin, cu, chunk_ends, prepared, grad_out, d_q, d_weight, partials, slope, eps,
    sequences, per_sequence, tokens, chunk,
    q_batch, w_batch, q_row, w_row, q_head, w_head,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    MAP: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence, batch, first, count = _find_chunk(chunk_ends, cu, sequences, pid, per_sequence, tokens, chunk)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    if cos is not None:
        cos += first * (D // 2)
        sin += first * (D // 2)
    q += batch * q_batch + first * q_row + head * q_head
    grad_out += ((batch * tokens + first) * HEADS + head) * E
    d_q += ((batch * tokens + first) * HEADS + head) * D
    if query_weight is not None:
        query_weight += batch * w_batch + first * w_row + head * w_head
        d_weight += (batch * tokens + first) * HEADS + head
    prepared += (sequence * HEADS + head) * ((D + 1) * (E + 1))
    vector, constant = _vectors(prepared, d, e, D, E)
    matrix = _matrix(prepared, d, e, D, E)
    d_matrix = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    d_vector = tl.zeros([BLOCK_D], tl.float32)
    d_constant = tl.zeros([BLOCK_E], tl.float32)
    for n in range(0, count, BLOCK):
        rows = n + tl.arange(0, BLOCK)
        inside = (rows < count)[:, None] & (d < D)[None, :]
        f = _features(_rows(q, rows, q_row, count, d, D), inside, slope, MAP)
        rotated = _rotate(f, cos, sin, rows, count, D, BLOCK, BLOCK_D, False)
        grad = _rows(grad_out, rows, HEADS * E, count, e, E)
        weight = _weight(query_weight, rows, w_row, count)
        a, b, a_slope = _row_weights(tl.sum(f * vector[None, :], 1), eps, KIND)
        along_constant = tl.sum(grad * constant[None, :], 1)
        along_rows = tl.zeros([BLOCK], tl.float32)
        if (KIND == "mala") or (KIND == "ratio") or (KIND == "floor") or (query_weight is not None):
            result = tl.dot(rotated, matrix, input_precision=PRECISION)
            along_rows = tl.sum(result * grad, 1)
        if query_weight is not None:
            tl.store(d_weight + rows * HEADS, a * along_rows + b * along_constant, mask=rows < count)
            grad *= weight[:, None]
        d_constant += tl.sum(grad * b[:, None], 0)
        grad *= a[:, None]
        d_matrix += tl.dot(tl.trans(rotated), grad, input_precision=PRECISION)
        d_f = tl.dot(grad, tl.trans(matrix), input_precision=PRECISION)
        d_f = _rotate(d_f, cos, sin, rows, count, D, BLOCK, BLOCK_D, True)
        if (KIND != "linear") and (KIND != "affine"):
            d_z = a_slope * along_rows
            if (KIND == "mala") or (KIND == "shift"):
                d_z -= along_constant
            d_z *= weight
            d_vector += tl.sum(f * d_z[:, None], 0)
            d_f += d_z[:, None] * vector[None, :]
        _store_rows(d_q, rows, HEADS * D, count, d, _times_slope(d_f, f, slope, MAP), D)
    partials += (pid.to(tl.int64) * HEADS + head) * ((D + 1) * (E + 1))
    _store_state(partials, d, e, d_matrix, d_vector, d_constant, 0.0, D, E)


@triton.jit
def key_gradients(
    k, v, key_weight, cos, sin, cu, chunk_ends, d_state, d_k, d_v, d_weight, slope,
    sequences, per_sequence, tokens, chunk,
    k_batch, v_batch, w_batch, k_row, v_row, w_row, k_head, v_head, w_head,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    sequence, batch, first, count = _find_chunk(
        chunk_ends, cu, sequences, tl.program_id(0), per_sequence, tokens, chunk
    )
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    if cos is not None:
        cos += first * (D // 2)
        sin += first * (D // 2)
    k += batch * k_batch + first * k_row + head * k_head
    v += batch * v_batch + first * v_row + head * v_head
    d_k += ((batch * tokens + first) * HEADS + head) * D
    d_v += ((batch * tokens + first) * HEADS + head) * E
    if key_weight is not None:
        key_weight += batch * w_batch + first * w_row + head * w_head
        d_weight += (batch * tokens + first) * HEADS + head
    d_state += (sequence * HEADS + head) * ((D + 1) * (E + 1))
    d_keys, d_values = _vectors(d_state, d, e, D, E)
    d_sums = _matrix(d_state, d, e, D, E)
    d_count = tl.load(d_state + D * (E + 1) + E)
    for n in range(0, count, BLOCK):
        rows = n + tl.arange(0, BLOCK)
        inside = (rows < count)[:, None] & (d < D)[None, :]
        g = _features(_rows(k, rows, k_row, count, d, D), inside, slope, MAP)
        rotated = _rotate(g, cos, sin, rows, count, D, BLOCK, BLOCK_D, False)
        v_tile = _rows(v, rows, v_row, count, e, E)
        d_g = tl.dot(v_tile, tl.trans(d_sums), input_precision=PRECISION)
        d_g = _rotate(d_g, cos, sin, rows, count, D, BLOCK, BLOCK_D, True) + d_keys[None, :]
        values = tl.dot(rotated, d_sums, input_precision=PRECISION) + d_values[None, :]
        if key_weight is not None:
            weight = _weight(key_weight, rows, w_row, count)
            along = tl.sum(g * d_g, 1) + tl.sum(v_tile * d_values[None, :], 1) + d_count
            tl.store(d_weight + rows * HEADS, along, mask=rows < count)
            d_g *= weight[:, None]
            values *= weight[:, None]
        _store_rows(d_k, rows, HEADS * D, count, d, _times_slope(d_g, g, slope, MAP), D)
        _store_rows(d_v, rows, HEADS * E, count, e, values, E)
