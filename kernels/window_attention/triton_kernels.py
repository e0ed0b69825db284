"""Kernels of window attention.

A token's place in the map is computed from the number of its window and its own within the window, so that neither the
partition nor the shift nor the extension is ever carried out. Scores are in base 2 (``scale`` times log2 e), softmax
statistics and all sums in float32. The head's width and the window's tokens are padded to powers of two with zeros.

A window of one tile is attended to at once, by programs that go through many windows of one head and keep its bias;
larger ones in blocks of queries and keys.

``PADDED``: 0, the windows fill the map; 1, the extension is hidden; 2, it is seen as zeros. ``SHIFTED``: 0, no shift;
1, tokens on two sides of an edge are hidden from each other; 2, they are kept apart by -100. ``WIDE``: whether places
within one map need 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
RELEASED_MASK = tl.constexpr(-144.26950408889634)  # -100 log2 e


@triton.jit
def _axis(index, token, window, windows, shift, GRID: tl.constexpr, SHIFTED: tl.constexpr):
    """Place of a window's token on an axis, and whether the shift carried it around the edge."""
    if GRID:
        place = index + token * windows
    else:
        place = index * window + token
    wrapped = place < 0
    if SHIFTED:
        wrapped = place >= windows * window - shift
        place = tl.where(wrapped, place + shift - windows * window, place + shift)
    return place, wrapped


@triton.jit
def _places(
    window, tokens, height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
    GRID: tl.constexpr, PADDED: tl.constexpr, SHIFTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of a window's tokens: row and column in the map, whether they exist, are seen, and their side of the edges."""
    window = window % (rows_of_windows * columns_of_windows)
    row = tokens // columns
    y, below = _axis(window // columns_of_windows, row, rows, rows_of_windows, shift_y, GRID, SHIFTED)
    x, beyond = _axis(
        window % columns_of_windows, tokens - row * columns, columns, columns_of_windows, shift_x, GRID, SHIFTED
    )
    seen = tokens < rows * columns
    real = seen
    if PADDED:
        real = seen & (y < height) & (x < width)
        if PADDED == 1:
            seen = real
    side = 2 * below.to(tl.int32) + beyond.to(tl.int32)
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    return y, x, real, seen, side


@triton.jit
def _tile(base, y, x, row_stride, column_stride, real, channels, WIDTH: tl.constexpr):
    """Tokens of the map as a tile; zeros where there are none and past the width."""
    return tl.load(
        base + (y * row_stride + x * column_stride)[:, None] + channels[None, :],
        mask=real[:, None] & (channels < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def _bias_tile(bias, queries, keys, tokens):
    """Base-2 bias of a block of queries and keys."""
    inside = (queries < tokens)[:, None] & (keys < tokens)[None, :]
    return tl.load(bias + queries[:, None] * tokens + keys[None, :], mask=inside, other=0.0) * LOG2E


@triton.jit
def _scores(q_tile, k_tile, scale, q_side, k_side, seen, added, SHIFTED: tl.constexpr, PRECISION: tl.constexpr):
    """Base-2 scores of a tile, -inf where a query does not see a key."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
    if added is not None:
        scores += added
    visible = seen[None, :]
    if SHIFTED == 1:
        visible = visible & (q_side[:, None] == k_side[None, :])
    if SHIFTED == 2:
        scores += tl.where(q_side[:, None] == k_side[None, :], 0.0, RELEASED_MASK)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _normaliser(lse, token, real):
    """Base-2 log-sum-exp to subtract; rows that do not exist or see nothing then get weights of zero."""
    total = tl.load(lse + token, mask=real, other=float("inf"))
    return tl.where(total == float("-inf"), float("inf"), total) * LOG2E


@triton.jit
def tile_forward(
    q, k, v, bias, out, lse, scale, total_windows, per_program,
    height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head, v_batch, v_row, v_column, v_head,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    GRID: tl.constexpr, PADDED: tl.constexpr, SHIFTED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(0) // HEADS * per_program
    tokens = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    added = bias
    if added is not None:
        added = _bias_tile(bias + head * rows * columns * rows * columns, tokens, tokens, rows * columns)
    for window in range(first, tl.minimum(first + per_program, total_windows)):
        image = (window // (rows_of_windows * columns_of_windows)).to(tl.int64)
        y, x, real, seen, side = _places(
            window, tokens, height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
            GRID, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        q_tile = _tile(q + image * q_batch + head * q_head, y, x, q_row, q_column, real, d, D)
        k_tile = _tile(k + image * k_batch + head * k_head, y, x, k_row, k_column, real, d, D)
        v_tile = _tile(v + image * v_batch + head * v_head, y, x, v_row, v_column, real, e, E)
        scores = _scores(q_tile, k_tile, scale, side, side, seen, added, SHIFTED, PRECISION)
        highest = tl.max(scores, 1)
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - finite[:, None])
        total = tl.sum(weights, 1)
        some = total > 0
        total = tl.where(some, total, 1.0)
        sums = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION) / total[:, None]
        origin = image * height * width * HEADS + head
        token = (y * width + x) * HEADS
        tl.store(
            out + origin * E + token[:, None] * E + e[None, :],
            sums.to(out.dtype.element_ty),
            mask=real[:, None] & (e < E)[None, :],
        )
        tl.store(lse + origin + token, tl.where(some, (finite + tl.log2(total)) * LN2, float("-inf")), mask=real)


@triton.jit
def tile_backward(
    q, k, v, bias, grad_out, grad_lse, lse, d_q, d_k, d_v, d_bias, scale, total_windows, per_program,
    height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head, v_batch, v_row, v_column, v_head,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    GRID: tl.constexpr, PADDED: tl.constexpr, SHIFTED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(0) // HEADS * per_program
    tokens = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    size = rows * columns
    added = bias
    if added is not None:
        added = _bias_tile(bias + head * size * size, tokens, tokens, size)
    bias_sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    nought = 0
    for window in range(first, tl.minimum(first + per_program, total_windows)):
        image = (window // (rows_of_windows * columns_of_windows)).to(tl.int64)
        y, x, real, seen, side = _places(
            window, tokens, height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
            GRID, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        origin = image * height * width * HEADS + head
        token = (y * width + x) * HEADS
        q_tile = _tile(q + image * q_batch + head * q_head, y, x, q_row, q_column, real, d, D)
        k_tile = _tile(k + image * k_batch + head * k_head, y, x, k_row, k_column, real, d, D)
        scores = _scores(q_tile, k_tile, scale, side, side, seen, added, SHIFTED, PRECISION)
        weights = tl.exp2(scores - _normaliser(lse + origin, token, real)[:, None])
        d_out = tl.load(
            grad_out + origin * E + token[:, None] * E + e[None, :], mask=real[:, None] & (e < E)[None, :], other=0.0
        )
        v_sums = tl.dot(tl.trans(weights).to(d_out.dtype), d_out, input_precision=PRECISION)
        tl.store(
            d_v + origin * E + token[:, None] * E + e[None, :],
            v_sums.to(d_v.dtype.element_ty),
            mask=real[:, None] & (e < E)[None, :],
        )
        v_tile = _tile(v + image * v_batch + head * v_head, y, x, v_row, v_column, real, e, E)
        d_scores = tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION)
        mean = tl.sum(weights * d_scores, 1)
        # The gradient of the log-sum-exp enters here and nowhere else.
        if grad_lse is not None:
            mean -= tl.load(grad_lse + origin + token, mask=real, other=0.0)
        d_scores = weights * (d_scores - mean[:, None])
        if d_bias is not None:
            bias_sums += d_scores
        nought = tl.minimum(window, 0)
        narrow = d_scores.to(q_tile.dtype)
        q_sums = tl.dot(narrow, k_tile, input_precision=PRECISION) * scale
        k_sums = tl.dot(tl.trans(narrow), q_tile, input_precision=PRECISION) * scale
        inside = real[:, None] & (d < D)[None, :]
        tl.store(d_q + origin * D + token[:, None] * D + d[None, :], q_sums.to(d_q.dtype.element_ty), mask=inside)
        tl.store(d_k + origin * D + token[:, None] * D + d[None, :], k_sums.to(d_k.dtype.element_ty), mask=inside)
    if d_bias is not None:
        # Addresses of the bias would else be kept through the loop, in registers that it needs.
        queries = tokens + nought
        inside = (queries < size)[:, None] & (tokens < size)[None, :]
        part = d_bias + tl.program_id(0).to(tl.int64) * size * size
        tl.store(part + queries[:, None] * size + tokens[None, :], bias_sums, mask=inside)


@triton.jit
def block_forward(
    q, k, v, bias, out, lse, scale,
    height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head, v_batch, v_row, v_column, v_head,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    GRID: tl.constexpr, PADDED: tl.constexpr, SHIFTED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    size = rows * columns
    blocks = tl.cdiv(size, BLOCK)
    # Blocks of a window and a head are neighbours: they read the same keys.
    head = (tl.program_id(0) // blocks % HEADS).to(tl.int64)
    window = tl.program_id(0) // (blocks * HEADS)
    image = (window // (rows_of_windows * columns_of_windows)).to(tl.int64)
    queries = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    y, x, real, _, q_side = _places(
        window, queries, height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
        GRID, PADDED, SHIFTED, WIDE,
    )  # fmt: skip
    q_tile = _tile(q + image * q_batch + head * q_head, y, x, q_row, q_column, real, d, D)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for n in range(0, size, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        k_y, k_x, k_real, seen, k_side = _places(
            window, keys, height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
            GRID, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        k_tile = _tile(k + image * k_batch + head * k_head, k_y, k_x, k_row, k_column, k_real, d, D)
        added = bias
        if added is not None:
            added = _bias_tile(bias + head * size * size, queries, keys, size)
        scores = _scores(q_tile, k_tile, scale, q_side, k_side, seen, added, SHIFTED, PRECISION)
        new = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(highest - finite)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = _tile(v + image * v_batch + head * v_head, k_y, k_x, v_row, v_column, k_real, e, E)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        highest = new
    some = total > 0
    total = tl.where(some, total, 1.0)
    origin = image * height * width * HEADS + head
    token = (y * width + x) * HEADS
    tl.store(
        out + origin * E + token[:, None] * E + e[None, :],
        (sums / total[:, None]).to(out.dtype.element_ty),
        mask=real[:, None] & (e < E)[None, :],
    )
    tl.store(lse + origin + token, tl.where(some, (highest + tl.log2(total)) * LN2, float("-inf")), mask=real)


@triton.jit
def query_gradient(
    q, k, v, bias, grad_out, grad_lse, out, lse, delta, d_q, scale,
    height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head, v_batch, v_row, v_column, v_head,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    GRID: tl.constexpr, PADDED: tl.constexpr, SHIFTED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    size = rows * columns
    blocks = tl.cdiv(size, BLOCK)
    head = (tl.program_id(0) // blocks % HEADS).to(tl.int64)
    window = tl.program_id(0) // (blocks * HEADS)
    image = (window // (rows_of_windows * columns_of_windows)).to(tl.int64)
    queries = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    y, x, real, _, q_side = _places(
        window, queries, height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
        GRID, PADDED, SHIFTED, WIDE,
    )  # fmt: skip
    origin = image * height * width * HEADS + head
    token = (y * width + x) * HEADS
    q_tile = _tile(q + image * q_batch + head * q_head, y, x, q_row, q_column, real, d, D)
    inside = real[:, None] & (e < E)[None, :]
    d_out = tl.load(grad_out + origin * E + token[:, None] * E + e[None, :], mask=inside, other=0.0)
    o_tile = tl.load(out + origin * E + token[:, None] * E + e[None, :], mask=inside, other=0.0)
    # The gradient of the log-sum-exp enters here and nowhere else.
    mean = tl.sum(d_out.to(tl.float32) * o_tile.to(tl.float32), 1)
    if grad_lse is not None:
        mean -= tl.load(grad_lse + origin + token, mask=real, other=0.0)
    tl.store(delta + origin + token, mean, mask=real)
    normaliser = _normaliser(lse + origin, token, real)
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for n in range(0, size, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        k_y, k_x, k_real, seen, k_side = _places(
            window, keys, height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
            GRID, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        k_tile = _tile(k + image * k_batch + head * k_head, k_y, k_x, k_row, k_column, k_real, d, D)
        v_tile = _tile(v + image * v_batch + head * v_head, k_y, k_x, v_row, v_column, k_real, e, E)
        added = bias
        if added is not None:
            added = _bias_tile(bias + head * size * size, queries, keys, size)
        scores = _scores(q_tile, k_tile, scale, q_side, k_side, seen, added, SHIFTED, PRECISION)
        weights = tl.exp2(scores - normaliser[:, None])
        d_scores = weights * (tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION) - mean[:, None])
        sums += tl.dot(d_scores.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    tl.store(
        d_q + origin * D + token[:, None] * D + d[None, :],
        (sums * scale).to(d_q.dtype.element_ty),
        mask=real[:, None] & (d < D)[None, :],
    )


@triton.jit
def key_gradients(
    q, k, v, bias, grad_out, lse, delta, d_k, d_v, scale,
    height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head, v_batch, v_row, v_column, v_head,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    GRID: tl.constexpr, PADDED: tl.constexpr, SHIFTED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    size = rows * columns
    blocks = tl.cdiv(size, BLOCK)
    head = (tl.program_id(0) // blocks % HEADS).to(tl.int64)
    window = tl.program_id(0) // (blocks * HEADS)
    image = (window // (rows_of_windows * columns_of_windows)).to(tl.int64)
    origin = image * height * width * HEADS + head
    keys = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    y, x, real, seen, k_side = _places(
        window, keys, height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
        GRID, PADDED, SHIFTED, WIDE,
    )  # fmt: skip
    k_tile = _tile(k + image * k_batch + head * k_head, y, x, k_row, k_column, real, d, D)
    v_tile = _tile(v + image * v_batch + head * v_head, y, x, v_row, v_column, real, e, E)
    k_sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    v_sums = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for n in range(0, size, BLOCK_N):
        queries = n + tl.arange(0, BLOCK_N)
        q_y, q_x, q_real, _, q_side = _places(
            window, queries, height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
            GRID, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        q_token = (q_y * width + q_x) * HEADS
        q_tile = _tile(q + image * q_batch + head * q_head, q_y, q_x, q_row, q_column, q_real, d, D)
        added = bias
        if added is not None:
            added = _bias_tile(bias + head * size * size, queries, keys, size)
        scores = _scores(q_tile, k_tile, scale, q_side, k_side, seen, added, SHIFTED, PRECISION)
        weights = tl.exp2(scores - _normaliser(lse + origin, q_token, q_real)[:, None])
        d_out = tl.load(
            grad_out + origin * E + q_token[:, None] * E + e[None, :],
            mask=q_real[:, None] & (e < E)[None, :],
            other=0.0,
        )
        v_sums += tl.dot(tl.trans(weights).to(d_out.dtype), d_out, input_precision=PRECISION)
        mean = tl.load(delta + origin + q_token, mask=q_real, other=0.0)
        d_scores = weights * (tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION) - mean[:, None])
        k_sums += tl.dot(tl.trans(d_scores).to(q_tile.dtype), q_tile, input_precision=PRECISION)
    token = (y * width + x) * HEADS
    tl.store(
        d_k + origin * D + token[:, None] * D + d[None, :],
        (k_sums * scale).to(d_k.dtype.element_ty),
        mask=real[:, None] & (d < D)[None, :],
    )
    tl.store(
        d_v + origin * E + token[:, None] * E + e[None, :],
        v_sums.to(d_v.dtype.element_ty),
        mask=real[:, None] & (e < E)[None, :],
    )


@triton.jit
def bias_gradient(
    q, k, v, bias, grad_out, lse, delta, d_bias, scale, total_windows, per_program,
    height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head, v_batch, v_row, v_column, v_head,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    GRID: tl.constexpr, PADDED: tl.constexpr, SHIFTED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries and keys of one head, summed over some windows."""
    size = rows * columns
    across = tl.cdiv(size, BLOCK_N)
    blocks = tl.cdiv(size, BLOCK) * across
    pid = tl.program_id(0)
    head = (pid // blocks % HEADS).to(tl.int64)
    first = pid // (blocks * HEADS) * per_program
    queries = pid % blocks // across * BLOCK + tl.arange(0, BLOCK)
    keys = pid % across * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    added = _bias_tile(bias + head * size * size, queries, keys, size)
    sums = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    for window in range(first, tl.minimum(first + per_program, total_windows)):
        image = (window // (rows_of_windows * columns_of_windows)).to(tl.int64)
        y, x, real, _, q_side = _places(
            window, queries, height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
            GRID, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        k_y, k_x, k_real, seen, k_side = _places(
            window, keys, height, width, rows, columns, rows_of_windows, columns_of_windows, shift_y, shift_x,
            GRID, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        origin = image * height * width * HEADS + head
        token = (y * width + x) * HEADS
        q_tile = _tile(q + image * q_batch + head * q_head, y, x, q_row, q_column, real, d, D)
        k_tile = _tile(k + image * k_batch + head * k_head, k_y, k_x, k_row, k_column, k_real, d, D)
        scores = _scores(q_tile, k_tile, scale, q_side, k_side, seen, added, SHIFTED, PRECISION)
        weights = tl.exp2(scores - _normaliser(lse + origin, token, real)[:, None])
        v_tile = _tile(v + image * v_batch + head * v_head, k_y, k_x, v_row, v_column, k_real, e, E)
        d_out = tl.load(
            grad_out + origin * E + token[:, None] * E + e[None, :], mask=real[:, None] & (e < E)[None, :], other=0.0
        )
        mean = tl.load(delta + origin + token, mask=real, other=0.0)
        sums += weights * (tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION) - mean[:, None])
    part = (pid // (blocks * HEADS)).to(tl.int64) * HEADS + head
    tl.store(
        d_bias + (part * size + queries[:, None]) * size + keys[None, :],
        sums,
        mask=(queries < size)[:, None] & (keys < size)[None, :],
    )
