"""Kernels of group attention: forward, gradient of the queries, of keys and values, of the global tokens.

A program handles a tile of sorted positions for one head; rows are read and written where they lie, through the order.
Scores are in base 2 (``scale`` times log2 e), softmax statistics and all sums in float32. The head's width is padded to
a power of two with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _program(tiles, heads):
    """Tile, head and batch of this program; the last two in 64 bits."""
    pid = tl.program_id(0)
    pair = pid // tiles
    return pid % tiles, (pair % heads).to(tl.int64), (pair // heads).to(tl.int64)


@triton.jit
def _tile(base, rows, stride, known, columns, WIDTH: tl.constexpr):
    """Rows of a tensor as a tile; zeros where they are not ``known`` and past the width."""
    return tl.load(
        base + rows.to(tl.int64)[:, None] * stride + columns[None, :],
        mask=known[:, None] & (columns < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def _source(position, tokens):
    """The sorted position that a position is, or is a mirror image of."""
    turned = position % (2 * tokens)
    return tl.minimum(turned, 2 * tokens - 1 - turned)


@triton.jit
def _step(scores, v_tile, highest, total, sums, PRECISION: tl.constexpr):
    """One tile of keys added to a running softmax."""
    new = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - new[:, None])  # the first tile holds a key, so that the maximum is finite
    shrink = tl.exp2(highest - new)
    total = total * shrink + tl.sum(weights, 1)
    sums = sums * shrink[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
    return new, total, sums


@triton.jit
def attention_forward(
    q, k, v, order, k_global, v_global, out, lse, lse_global, scale, heads, tokens, size, keys, tiles, members,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    kg_batch, kg_row, kg_head, vg_batch, vg_row, vg_head,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, head, batch = _program(tiles * ((tokens + size - 1) // size), heads)
    first = tile // tiles * size
    within = tile % tiles * BLOCK + tl.arange(0, BLOCK)
    position = first + within
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    inside = (within < size) & (position < tokens)
    sorted_rows = order + batch * tokens
    rows = tl.load(sorted_rows + position, mask=inside, other=0)
    q_tile = _tile(q + batch * q_batch + head * q_head, rows, q_row, inside, d, D)
    k_base = k + batch * k_batch + head * k_head
    v_base = v + batch * v_batch + head * v_head
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for n in range(0, keys, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        known = j < keys
        key_rows = tl.load(sorted_rows + _source(first + j, tokens), mask=known, other=0)
        k_tile = _tile(k_base, key_rows, k_row, known, d, D)
        v_tile = _tile(v_base, key_rows, v_row, known, e, E)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(known[None, :], scores, float("-inf"))
        highest, total, sums = _step(scores, v_tile, highest, total, sums, PRECISION)
    place = (batch * heads + head) * tokens + position
    tl.store(lse + place, (highest + tl.log2(total)) * LN2, mask=inside)
    result = sums / total[:, None]
    if k_global is not None:
        k_base = k_global + batch * kg_batch + head * kg_head
        v_base = v_global + batch * vg_batch + head * vg_head
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        sums = tl.zeros([BLOCK, BLOCK_E], tl.float32)
        for n in range(0, members, BLOCK_N):
            j = n + tl.arange(0, BLOCK_N)
            known = j < members
            k_tile = _tile(k_base, j, kg_row, known, d, D)
            v_tile = _tile(v_base, j, vg_row, known, e, E)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
            scores = tl.where(known[None, :], scores, float("-inf"))
            highest, total, sums = _step(scores, v_tile, highest, total, sums, PRECISION)
        tl.store(lse_global + place, (highest + tl.log2(total)) * LN2, mask=inside)
        result += sums / total[:, None]
    tl.store(
        out + ((batch * tokens + rows) * heads + head)[:, None] * E + e[None, :],
        result.to(out.dtype.element_ty),
        mask=inside[:, None] & (e < E)[None, :],
    )


@triton.jit
def query_gradient(
    q, k, v, order, k_global, v_global, grad_out, out, lse, lse_global, delta, delta_global, d_q, scale,
    heads, tokens, size, keys, tiles, members,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    kg_batch, kg_row, kg_head, vg_batch, vg_row, vg_head,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, head, batch = _program(tiles * ((tokens + size - 1) // size), heads)
    first = tile // tiles * size
    within = tile % tiles * BLOCK + tl.arange(0, BLOCK)
    position = first + within
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    inside = (within < size) & (position < tokens)
    sorted_rows = order + batch * tokens
    rows = tl.load(sorted_rows + position, mask=inside, other=0)
    q_tile = _tile(q + batch * q_batch + head * q_head, rows, q_row, inside, d, D)
    out_rows = (batch * tokens + rows) * heads + head
    d_out = _tile(grad_out, out_rows, E, inside, e, E)
    o_tile = _tile(out, out_rows, E, inside, e, E)
    mean = tl.sum(d_out.to(tl.float32) * o_tile.to(tl.float32), 1)
    place = (batch * heads + head) * tokens + position
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    if k_global is not None:
        # The output is the sum of two attentions: what the global one has of the mean is found first.
        k_base = k_global + batch * kg_batch + head * kg_head
        v_base = v_global + batch * vg_batch + head * vg_head
        total = tl.load(lse_global + place, mask=inside, other=0.0) * LOG2E
        mean_global = tl.zeros([BLOCK], tl.float32)
        all_weights = tl.zeros([BLOCK], tl.float32)
        for n in range(0, members, BLOCK_N):
            j = n + tl.arange(0, BLOCK_N)
            known = j < members
            k_tile = _tile(k_base, j, kg_row, known, d, D)
            v_tile = _tile(v_base, j, vg_row, known, e, E)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
            weights = tl.exp2(tl.where(known[None, :], scores - total[:, None], float("-inf")))
            d_weights = tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION)
            mean_global += tl.sum(weights * d_weights, 1)
            all_weights += tl.sum(weights, 1)
        # Weights of large scores miss 1 by what their log-sum-exp was rounded by.
        mean_global = mean_global / tl.where(inside, all_weights, 1.0)
        tl.store(delta_global + place, mean_global, mask=inside)
        mean -= mean_global
        for n in range(0, members, BLOCK_N):
            j = n + tl.arange(0, BLOCK_N)
            known = j < members
            k_tile = _tile(k_base, j, kg_row, known, d, D)
            v_tile = _tile(v_base, j, vg_row, known, e, E)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
            weights = tl.exp2(tl.where(known[None, :], scores - total[:, None], float("-inf")))
            d_weights = tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION)
            d_scores = weights * (d_weights - mean_global[:, None])
            sums += tl.dot(d_scores.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    tl.store(delta + place, mean, mask=inside)
    k_base = k + batch * k_batch + head * k_head
    v_base = v + batch * v_batch + head * v_head
    total = tl.load(lse + place, mask=inside, other=0.0) * LOG2E
    for n in range(0, keys, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        known = j < keys
        key_rows = tl.load(sorted_rows + _source(first + j, tokens), mask=known, other=0)
        k_tile = _tile(k_base, key_rows, k_row, known, d, D)
        v_tile = _tile(v_base, key_rows, v_row, known, e, E)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.exp2(tl.where(known[None, :], scores - total[:, None], float("-inf")))
        d_weights = tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION)
        d_scores = weights * (d_weights - mean[:, None])
        sums += tl.dot(d_scores.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    tl.store(
        d_q + ((batch * tokens + rows) * heads + head)[:, None] * D + d[None, :],
        (sums * scale).to(d_q.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )


@triton.jit
def _times(position, group, keys):
    """1 where a group that starts at ``group`` attends to ``position``, else 0."""
    # Below the window the difference is negative, and without a sign it is large.
    return ((position[None, :] - group[:, None]).to(tl.uint32) < keys.to(tl.uint32)).to(tl.float32)


@triton.jit
def key_gradients(
    q, k, v, order, grad_out, lse, delta, d_k, d_v, scale, heads, tokens, size, keys, tiles,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, head, batch = _program(tiles, heads)
    first = tile * BLOCK
    position = first + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    inside = position < tokens
    sorted_rows = order + batch * tokens
    rows = tl.load(sorted_rows + position, mask=inside, other=0)
    k_tile = _tile(k + batch * k_batch + head * k_head, rows, k_row, inside, d, D)
    v_tile = _tile(v + batch * v_batch + head * v_head, rows, v_row, inside, e, E)
    q_base = q + batch * q_batch + head * q_head
    # A position is read by its own group and the one before; near the end the last groups read its mirror images.
    last = tl.minimum(first + BLOCK, tokens) - 1
    mirrored = 2 * tokens - 1 - last < (tokens - 1) // size * size + keys
    begin = tl.maximum(first // size - 1, 0) * size
    end = tl.minimum((last // size + 1) * size, tokens)
    if mirrored:
        end = tokens
    width = tl.full([1], 0, tl.int32) + keys
    k_sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    v_sums = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for n in range(begin, end, BLOCK_N):
        i = n + tl.arange(0, BLOCK_N)
        known = i < end
        group = i // size * size
        times = _times(position, group, width)
        if mirrored:
            times += _times(2 * tokens - 1 - position, group, width) + _times(2 * tokens + position, group, width)
        query_rows = tl.load(sorted_rows + i, mask=known, other=0)
        q_tile = _tile(q_base, query_rows, q_row, known, d, D)
        d_out = _tile(grad_out, (batch * tokens + query_rows) * heads + head, E, known, e, E)
        place = (batch * heads + head) * tokens + i
        total = tl.load(lse + place, mask=known, other=0.0) * LOG2E
        mean = tl.load(delta + place, mask=known, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        seen = known[:, None] & (times > 0)
        weights = tl.exp2(tl.where(seen, scores - total[:, None], float("-inf"))) * times
        v_sums += tl.dot(tl.trans(weights).to(d_out.dtype), d_out, input_precision=PRECISION)
        d_weights = tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION)
        d_scores = weights * (d_weights - mean[:, None])
        k_sums += tl.dot(tl.trans(d_scores).to(q_tile.dtype), q_tile, input_precision=PRECISION)
    out_rows = (batch * tokens + rows) * heads + head
    tl.store(
        d_k + out_rows[:, None] * D + d[None, :],
        (k_sums * scale).to(d_k.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    tl.store(
        d_v + out_rows[:, None] * E + e[None, :],
        v_sums.to(d_v.dtype.element_ty),
        mask=inside[:, None] & (e < E)[None, :],
    )


@triton.jit
def global_gradients(
    q, order, k_global, v_global, grad_out, lse_global, delta_global, d_known, d_worth, scale,
    heads, tokens, tiles, members, parts, part,
    q_batch, q_row, q_head, kg_batch, kg_row, kg_head, vg_batch, vg_row, vg_head,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, head, batch = _program(tiles * parts, heads)
    number = tile // tiles
    member = tile % tiles * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    inside = member < members
    k_tile = _tile(k_global + batch * kg_batch + head * kg_head, member, kg_row, inside, d, D)
    v_tile = _tile(v_global + batch * vg_batch + head * vg_head, member, vg_row, inside, e, E)
    q_base = q + batch * q_batch + head * q_head
    end = tl.minimum((number + 1) * part, tokens)
    k_sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    v_sums = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for n in range(number * part, end, BLOCK_N):
        i = n + tl.arange(0, BLOCK_N)
        known = i < end
        query_rows = tl.load(order + batch * tokens + i, mask=known, other=0)
        q_tile = _tile(q_base, query_rows, q_row, known, d, D)
        d_out = _tile(grad_out, (batch * tokens + query_rows) * heads + head, E, known, e, E)
        place = (batch * heads + head) * tokens + i
        total = tl.load(lse_global + place, mask=known, other=0.0) * LOG2E
        mean = tl.load(delta_global + place, mask=known, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.exp2(tl.where(known[:, None], scores - total[:, None], float("-inf")))
        v_sums += tl.dot(tl.trans(weights).to(d_out.dtype), d_out, input_precision=PRECISION)
        d_weights = tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION)
        d_scores = weights * (d_weights - mean[:, None])
        k_sums += tl.dot(tl.trans(d_scores).to(q_tile.dtype), q_tile, input_precision=PRECISION)
    # (B, parts, M, H, width): summed over parts, and over items that share the global tokens, in a second pass.
    place = ((batch * parts + number) * members + member) * heads + head
    tl.store(d_known + place[:, None] * D + d[None, :], k_sums * scale, mask=inside[:, None] & (d < D)[None, :])
    tl.store(d_worth + place[:, None] * E + e[None, :], v_sums, mask=inside[:, None] & (e < E)[None, :])
