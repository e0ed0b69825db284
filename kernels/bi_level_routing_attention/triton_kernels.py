"""Kernels of bi-level routing attention: forward, gradient of the queries, inverse graph, gradients of keys and values.

A program handles a tile of tokens of one region for one head. What it attends to (or, for keys, is attended by) is a
list of regions; the tokens of the list are taken end to end, so that a tile of them spans several small regions or a
part of a large one, and they are read where they lie. Scores are in base 2 (``scale`` times log2 e), softmax statistics
and all sums in float32. The head's width is padded to a power of two with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _program(tiles, regions, heads):
    """Tile, region, head and batch of this program; the last two in 64 bits."""
    pid = tl.program_id(0)
    tile = pid % tiles
    region = pid // tiles % regions
    head = pid // tiles // regions
    return tile, region, (head % heads).to(tl.int64), (head // heads).to(tl.int64)


@triton.jit
def _tokens(region, token, across, rows, columns):
    """Row and column on the map of tokens of a region."""
    y = region // across * rows + token // columns
    x = region % across * columns + token % columns
    return y.to(tl.int64), x.to(tl.int64)


@triton.jit
def _tile(base, y, x, known, d, row_stride, column_stride, channel_stride, WIDTH: tl.constexpr):
    """Tokens of a map as a tile; zeros where they are not ``known`` and past the width."""
    return tl.load(
        base + (y * row_stride + x * column_stride)[:, None] + (d.to(tl.int64) * channel_stride)[None, :],
        mask=known[:, None] & (d < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def _place(batch, head, y, x, d, heads, height, width, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """Offsets in a dense (B, heads, WIDTH, height, width) or (B, height, width, heads, WIDTH) tensor."""
    if PLANES:
        token = (batch * heads + head) * WIDTH * height * width + y * width + x
        place = token[:, None] + (d.to(tl.int64) * height * width)[None, :]
    else:
        token = ((batch * height + y) * width + x) * heads + head
        place = token[:, None] * WIDTH + d[None, :]
    return place


@triton.jit
def attention_forward(
    q, k, v, graph, out, lse, scale, heads, tiles, regions, topk, graph_batch, graph_head,
    height, width, across, rows, columns, key_height, key_width, key_across, key_rows, key_columns,
    q_batch, q_row, q_column, q_head, q_channel, k_batch, k_row, k_column, k_head, k_channel,
    v_batch, v_row, v_column, v_head, v_channel,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PLANES: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, region, head, batch = _program(tiles, regions, heads)
    token = tile * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    y, x = _tokens(region, token, across, rows, columns)
    inside = (token < rows * columns) & (y < height) & (x < width)
    q_tile = _tile(q + batch * q_batch + head * q_head, y, x, inside, d, q_row, q_column, q_channel, D)
    k_base = k + batch * k_batch + head * k_head
    v_base = v + batch * v_batch + head * v_head
    routed = graph + batch * graph_batch + head * graph_head + region.to(tl.int64) * topk
    key_tokens = key_rows * key_columns
    listed = topk * key_tokens
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for n in range(0, listed, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        seen = j < listed
        key_region = tl.load(routed + j // key_tokens, mask=seen, other=0).to(tl.int32)
        key_y, key_x = _tokens(key_region, j % key_tokens, key_across, key_rows, key_columns)
        known = seen & (key_y < key_height) & (key_x < key_width)
        k_tile = _tile(k_base, key_y, key_x, known, d, k_row, k_column, k_channel, D)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        if MASK:
            seen = known
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(highest - finite)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = _tile(v_base, key_y, key_x, known, e, v_row, v_column, v_channel, E)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        highest = new
    sums = sums / total[:, None]  # every region has a token on the map, so that no sum is empty
    place = _place(batch, head, y, x, e, heads, height, width, E, PLANES)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])
    place = ((batch * heads + head) * height + y) * width + x
    tl.store(lse + place, (highest + tl.log2(total)) * LN2, mask=inside)


@triton.jit
def query_gradient(
    q, k, v, graph, grad_out, grad_lse, out, lse, delta, d_q, scale, heads, tiles, regions, topk,
    graph_batch, graph_head,
    height, width, across, rows, columns, key_height, key_width, key_across, key_rows, key_columns,
    q_batch, q_row, q_column, q_head, q_channel, k_batch, k_row, k_column, k_head, k_channel,
    v_batch, v_row, v_column, v_head, v_channel,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, region, head, batch = _program(tiles, regions, heads)
    token = tile * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    y, x = _tokens(region, token, across, rows, columns)
    inside = (token < rows * columns) & (y < height) & (x < width)
    q_tile = _tile(q + batch * q_batch + head * q_head, y, x, inside, d, q_row, q_column, q_channel, D)
    place = _place(batch, head, y, x, e, heads, height, width, E, PLANES)
    here = inside[:, None] & (e < E)[None, :]
    d_out = tl.load(grad_out + place, mask=here, other=0.0)
    o_tile = tl.load(out + place, mask=here, other=0.0)
    place = ((batch * heads + head) * height + y) * width + x
    # The gradient of the log-sum-exp enters here and nowhere else.
    mean = tl.sum(d_out.to(tl.float32) * o_tile.to(tl.float32), 1)
    if grad_lse is not None:
        mean -= tl.load(grad_lse + place, mask=inside, other=0.0)
    tl.store(delta + place, mean, mask=inside)
    total = tl.load(lse + place, mask=inside, other=0.0) * LOG2E
    k_base = k + batch * k_batch + head * k_head
    v_base = v + batch * v_batch + head * v_head
    routed = graph + batch * graph_batch + head * graph_head + region.to(tl.int64) * topk
    key_tokens = key_rows * key_columns
    listed = topk * key_tokens
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for n in range(0, listed, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        seen = j < listed
        key_region = tl.load(routed + j // key_tokens, mask=seen, other=0).to(tl.int32)
        key_y, key_x = _tokens(key_region, j % key_tokens, key_across, key_rows, key_columns)
        # Keys outside the map have weight, but they are zero and add nothing to this gradient.
        known = seen & (key_y < key_height) & (key_x < key_width)
        k_tile = _tile(k_base, key_y, key_x, known, d, k_row, k_column, k_channel, D)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.exp2(tl.where(known[None, :], scores - total[:, None], float("-inf")))
        v_tile = _tile(v_base, key_y, key_x, known, e, v_row, v_column, v_channel, E)
        d_weights = tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION)
        d_scores = weights * (d_weights - mean[:, None])
        sums += tl.dot(d_scores.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    place = _place(batch, head, y, x, d, heads, height, width, D, PLANES)
    tl.store(d_q + place, (sums * scale).to(d_q.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def invert_graph(graph, entries, starts, ends, regions, key_regions, topk, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """For one key region, the query regions routed to it, each as ``times named * regions + number``, in order."""
    pid = tl.program_id(0).to(tl.int64)
    key_region = (pid % key_regions).to(tl.int32)
    routed = graph + pid // key_regions * regions * topk
    start = pid * regions
    end = start
    for first in range(0, regions, BLOCK):
        region = first + tl.arange(0, BLOCK)
        times = tl.zeros([BLOCK], tl.int32)
        for n in range(0, topk, BLOCK_N):
            j = n + tl.arange(0, BLOCK_N)
            named = tl.load(
                routed + region.to(tl.int64)[:, None] * topk + j[None, :],
                mask=(region < regions)[:, None] & (j < topk)[None, :],
                other=-1,
            )
            times += tl.sum((named.to(tl.int32) == key_region).to(tl.int32), 1)
        some = (times > 0).to(tl.int32)
        tl.store(entries + end + tl.cumsum(some, 0) - 1, times * regions + region, mask=some > 0)
        end += tl.sum(some, 0)
    tl.store(starts + pid, start)
    tl.store(ends + pid, end)


@triton.jit
def key_gradients(
    q, k, v, entries, starts, ends, grad_out, lse, delta, d_k, d_v, scale, heads, tiles, regions, key_regions,
    graph_heads, height, width, across, rows, columns, key_height, key_width, key_across, key_rows, key_columns,
    q_batch, q_row, q_column, q_head, q_channel, k_batch, k_row, k_column, k_head, k_channel,
    v_batch, v_row, v_column, v_head, v_channel,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, key_region, head, batch = _program(tiles, key_regions, heads)
    token = tile * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    key_y, key_x = _tokens(key_region, token, key_across, key_rows, key_columns)
    inside = (token < key_rows * key_columns) & (key_y < key_height) & (key_x < key_width)
    k_tile = _tile(k + batch * k_batch + head * k_head, key_y, key_x, inside, d, k_row, k_column, k_channel, D)
    v_tile = _tile(v + batch * v_batch + head * v_head, key_y, key_x, inside, e, v_row, v_column, v_channel, E)
    q_base = q + batch * q_batch + head * q_head
    inverse = (batch * graph_heads + head % graph_heads) * key_regions + key_region
    start = tl.load(starts + inverse)
    tokens = rows * columns
    listed = (tl.load(ends + inverse) - start).to(tl.int32) * tokens
    k_sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    v_sums = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for n in range(0, listed, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        entry = tl.load(entries + start + j // tokens, mask=j < listed, other=0)
        y, x = _tokens(entry % regions, j % tokens, across, rows, columns)
        known = (j < listed) & (y < height) & (x < width)
        times = (entry // regions).to(tl.float32)
        q_tile = _tile(q_base, y, x, known, d, q_row, q_column, q_channel, D)
        place = _place(batch, head, y, x, e, heads, height, width, E, PLANES)
        d_out = tl.load(grad_out + place, mask=known[:, None] & (e < E)[None, :], other=0.0)
        place = ((batch * heads + head) * height + y) * width + x
        total = tl.load(lse + place, mask=known, other=0.0) * LOG2E
        mean = tl.load(delta + place, mask=known, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.exp2(tl.where(known[:, None], scores - total[:, None], float("-inf"))) * times[:, None]
        v_sums += tl.dot(tl.trans(weights).to(d_out.dtype), d_out, input_precision=PRECISION)
        d_weights = tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION)
        d_scores = weights * (d_weights - mean[:, None])
        k_sums += tl.dot(tl.trans(d_scores).to(q_tile.dtype), q_tile, input_precision=PRECISION)
    place = _place(batch, head, key_y, key_x, d, heads, key_height, key_width, D, PLANES)
    tl.store(d_k + place, (k_sums * scale).to(d_k.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
    place = _place(batch, head, key_y, key_x, e, heads, key_height, key_width, E, PLANES)
    tl.store(d_v + place, v_sums.to(d_v.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])
