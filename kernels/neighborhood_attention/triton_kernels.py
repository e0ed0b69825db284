"""Kernels of neighbourhood attention: forward, gradients of queries, of keys and values, and of the bias table.

The grid always has three axes here, the leading ones of length 1 where ``AXES`` is less. For axis ``i``: ``L`` its
length, ``K`` kernel size, ``S`` stride, ``D`` dilation, ``C`` whether causal. A program takes one head and a tile of
``T0`` x ``T1`` x ``T2`` tokens of one dilation group, so that dilation is nothing but a longer stride; it walks the box
of tokens its own can see (or be seen by) in flattened chunks. Coordinates are those within the group. A query sees
``count`` keys from ``start`` on each axis, which is one unsigned comparison per axis and score.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Sizes that change from call to call do not deserve a compilation each; a stride or dilation of 1 does.
_SIZES = ["L0", "L1", "L2", "K0", "K1", "K2", "S0", "S1", "S2", "D0", "D1", "D2"]


@triton.jit
def _tiles(L, D, T: tl.constexpr):
    """Tiles of an axis, all dilation groups together."""
    return tl.cdiv(tl.cdiv(L, D), T) * D


@triton.jit
def _place(t, L, D, tiles):
    """Dilation group of tile ``t`` of an axis, its number within the group, the group's length."""
    group = t // (tiles // D)
    return group, t % (tiles // D), (L - group + D - 1) // D


@triton.jit
def _window(x, length, K, S, C):
    """First key of the queries ``x`` of a group and how many they see from there on."""
    block = x // S * S
    causal_start = tl.maximum(tl.minimum(block + S - 1, length - 1) - K + 1, 0)
    start = tl.minimum(tl.maximum(tl.minimum(block + S // 2, length - 1) - K // 2, 0), length - K)
    start = tl.where(C != 0, causal_start, start)
    return start, tl.where(C != 0, x + 1 - start, K)


@triton.jit
def _view(first, T: tl.constexpr, length, K, S, C):
    """First key that a tile of queries sees and how many there are up to its last one."""
    low, count = _window(first, length, K, S, C)
    end, count = _window(tl.minimum(first + T, length) - 1, length, K, S, C)
    return low, end + count - low


@triton.jit
def _reach(first, last, length, K, S, C):
    """First query that sees a key from ``first`` to ``last`` and how many queries there are up to the last one."""
    low = tl.where(first < K, 0, (first - K + 1 + K // 2 - S // 2 + S - 1) // S * S)
    low = tl.where(C != 0, first, low)
    ahead = tl.where(C != 0, K - S, K // 2 - S // 2)
    high = tl.minimum((last + ahead) // S * S + S - 1, length - 1)
    high = tl.where(last + K >= length, length - 1, high)
    return low, high - low + 1


@triton.jit
def _tile_tokens(T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr):
    """Coordinates of the tokens of a tile relative to its first."""
    m = tl.arange(0, T0 * T1 * T2)
    return m // (T1 * T2), m // T2 % T1, m % T2


@triton.jit
def _box_tokens(j, low0, low1, low2, width1, width2, AXES: tl.constexpr):
    """Coordinates of the tokens ``j`` of a box; past its end they leave it on the first axis."""
    y0 = j * 0 + low0
    y1 = j * 0 + low1
    y2 = low2 + j
    if AXES > 1:
        y1 = low1 + j // width2
        y2 = low2 + j % width2
    if AXES > 2:
        y0 = low0 + j // (width1 * width2)
        y1 = low1 + j // width2 % width1
    return y0, y1, y2


@triton.jit
def _within(key, start, count):
    return (key - start).to(tl.uint32) < count.to(tl.uint32)


@triton.jit
def _seen(y0, y1, y2, start0, start1, start2, count0, count1, count2, AXES: tl.constexpr):
    """Whether queries see keys, by broadcasting."""
    seen = _within(y2, start2, count2)
    if AXES > 1:
        seen = seen & _within(y1, start1, count1)
    if AXES > 2:
        seen = seen & _within(y0, start0, count0)
    return seen


@triton.jit
def _offsets(x0, x1, x2, g0, g1, g2, D0, D1, D2, stride0, stride1, stride2):
    """Offsets of tokens in a tensor with these strides; 64 bits."""
    p0 = (x0 * D0 + g0).to(tl.int64) * stride0
    p1 = (x1 * D1 + g1).to(tl.int64) * stride1
    return p0 + p1 + (x2 * D2 + g2).to(tl.int64) * stride2


@triton.jit
def _rows(base, offsets, known, columns, WIDTH: tl.constexpr):
    """Rows at ``offsets`` as a tile; zeros where not ``known`` and past the width."""
    mask = known[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _entry(x0, x1, x2, K1, K2):
    """Position in a flattened table with 2K - 1 entries per axis; differences of positions are what counts."""
    return (x0 * (2 * K1 - 1) + x1) * (2 * K2 - 1) + x2


@triton.jit
def _base2(products, seen, table, entries, scale):
    """Base-2 scores, -inf where a query does not see a key."""
    scores = products * (scale * LOG2E)
    if table is not None:
        scores += tl.load(table + entries, mask=seen, other=0.0).to(tl.float32) * LOG2E
    return tl.where(seen, scores, float("-inf"))


@triton.jit(do_not_specialize_on_alignment=_SIZES)
def attention_forward(
    q, k, v, rpb, out, lse, scale, heads, group,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, C0, C1, C2,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, AXES: tl.constexpr,
    PRECISION: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = T0 * T1 * T2
    n0 = _tiles(L0, D0, T0)
    n1 = _tiles(L1, D1, T1)
    n2 = _tiles(L2, D2, T2)
    pid = tl.program_id(0)
    g0, f0, len0 = _place(pid // (n1 * n2) % n0, L0, D0, n0)
    g1, f1, len1 = _place(pid // n2 % n1, L1, D1, n1)
    g2, f2, len2 = _place(pid % n2, L2, D2, n2)
    f0 = f0 * T0
    f1 = f1 * T1
    f2 = f2 * T2
    if (f0 >= len0) | (f1 >= len1) | (f2 >= len2):  # a group may be one shorter than the first
        return
    head = (pid // (n0 * n1 * n2) % heads).to(tl.int64)
    batch = (pid // (n0 * n1 * n2) // heads).to(tl.int64)
    x0, x1, x2 = _tile_tokens(T0, T1, T2)
    x0 += f0
    x1 += f1
    x2 += f2
    inside = (x0 < len0) & (x1 < len1) & (x2 < len2)
    start0, count0, start1, count1 = x0, x0, x1, x1  # absent axes hide nothing
    if AXES > 2:
        start0, count0 = _window(x0, len0, K0, S0, C0)
    if AXES > 1:
        start1, count1 = _window(x1, len1, K1, S1, C1)
    start2, count2 = _window(x2, len2, K2, S2, C2)
    count2 = tl.where(inside, count2, 0)
    low0, width0, low1, width1 = 0, 1, 0, 1
    if AXES > 2:
        low0, width0 = _view(f0, T0, len0, K0, S0, C0)
    if AXES > 1:
        low1, width1 = _view(f1, T1, len1, K1, S1, C1)
    low2, width2 = _view(f2, T2, len2, K2, S2, C2)
    total_keys = width0 * width1 * width2
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    q_tile = _rows(
        q + batch * q_b + head * q_h, _offsets(x0, x1, x2, g0, g1, g2, D0, D1, D2, q_0, q_1, q_2), inside, d, D
    )
    k_base = k + batch * k_b + head // group * k_h
    v_base = v + batch * v_b + head // group * v_h
    entry = _entry(x0 - (K0 - 1), x1 - (K1 - 1), x2 - (K2 - 1), K1, K2)
    table = rpb
    if table is not None:
        table += head * ((2 * K0 - 1) * (2 * K1 - 1) * (2 * K2 - 1))
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for n in range(0, total_keys, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        known = j < total_keys
        y0, y1, y2 = _box_tokens(j, low0, low1, low2, width1, width2, AXES)
        k_tile = _rows(k_base, _offsets(y0, y1, y2, g0, g1, g2, D0, D1, D2, k_0, k_1, k_2), known, d, D)
        seen = _seen(
            y0[None, :], y1[None, :], y2[None, :], start0[:, None], start1[:, None], start2[:, None],
            count0[:, None], count1[:, None], count2[:, None], AXES,
        )  # fmt: skip
        entries = _entry(y0, y1, y2, K1, K2)[None, :] - entry[:, None]
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        scores = _base2(products, seen, table, entries, scale)
        new = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(highest - finite)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = _rows(v_base, _offsets(y0, y1, y2, g0, g1, g2, D0, D1, D2, v_0, v_1, v_2), known, e, E)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        highest = new
    total = tl.where(inside, total, 1.0)  # every query sees itself; the padding of a tile sees nothing
    highest = tl.where(inside, highest, 0.0)
    rows = _offsets(x0, x1, x2, g0, g1, g2, D0, D1, D2, L1 * L2, L2, 1) + batch * L0 * L1 * L2
    rows = rows * heads + head
    tl.store(
        out + rows[:, None] * E + e[None, :],
        (sums / total[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None] & (e < E)[None, :],
    )
    tl.store(lse + rows, (highest + tl.log2(total)) * LN2, mask=inside)


@triton.jit(do_not_specialize_on_alignment=_SIZES)
def query_gradient(
    q, k, v, rpb, grad_out, grad_lse, out, lse, delta, d_q, scale, heads, group,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, C0, C1, C2,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, AXES: tl.constexpr,
    PRECISION: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = T0 * T1 * T2
    n0 = _tiles(L0, D0, T0)
    n1 = _tiles(L1, D1, T1)
    n2 = _tiles(L2, D2, T2)
    pid = tl.program_id(0)
    g0, f0, len0 = _place(pid // (n1 * n2) % n0, L0, D0, n0)
    g1, f1, len1 = _place(pid // n2 % n1, L1, D1, n1)
    g2, f2, len2 = _place(pid % n2, L2, D2, n2)
    f0 = f0 * T0
    f1 = f1 * T1
    f2 = f2 * T2
    if (f0 >= len0) | (f1 >= len1) | (f2 >= len2):
        return
    head = (pid // (n0 * n1 * n2) % heads).to(tl.int64)
    batch = (pid // (n0 * n1 * n2) // heads).to(tl.int64)
    x0, x1, x2 = _tile_tokens(T0, T1, T2)
    x0 += f0
    x1 += f1
    x2 += f2
    inside = (x0 < len0) & (x1 < len1) & (x2 < len2)
    start0, count0, start1, count1 = x0, x0, x1, x1  # absent axes hide nothing
    if AXES > 2:
        start0, count0 = _window(x0, len0, K0, S0, C0)
    if AXES > 1:
        start1, count1 = _window(x1, len1, K1, S1, C1)
    start2, count2 = _window(x2, len2, K2, S2, C2)
    count2 = tl.where(inside, count2, 0)
    low0, width0, low1, width1 = 0, 1, 0, 1
    if AXES > 2:
        low0, width0 = _view(f0, T0, len0, K0, S0, C0)
    if AXES > 1:
        low1, width1 = _view(f1, T1, len1, K1, S1, C1)
    low2, width2 = _view(f2, T2, len2, K2, S2, C2)
    total_keys = width0 * width1 * width2
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    rows = _offsets(x0, x1, x2, g0, g1, g2, D0, D1, D2, L1 * L2, L2, 1) + batch * L0 * L1 * L2
    rows = rows * heads + head
    q_tile = _rows(
        q + batch * q_b + head * q_h, _offsets(x0, x1, x2, g0, g1, g2, D0, D1, D2, q_0, q_1, q_2), inside, d, D
    )
    d_out = _rows(grad_out, rows * E, inside, e, E)
    o_tile = _rows(out, rows * E, inside, e, E)
    # The gradient of the log-sum-exp enters here and nowhere else.
    mean = tl.sum(d_out.to(tl.float32) * o_tile.to(tl.float32), 1)
    if grad_lse is not None:
        mean -= tl.load(grad_lse + rows, mask=inside, other=0.0)
    tl.store(delta + rows, mean, mask=inside)
    total = tl.load(lse + rows, mask=inside, other=0.0) * LOG2E
    k_base = k + batch * k_b + head // group * k_h
    v_base = v + batch * v_b + head // group * v_h
    entry = _entry(x0 - (K0 - 1), x1 - (K1 - 1), x2 - (K2 - 1), K1, K2)
    table = rpb
    if table is not None:
        table += head * ((2 * K0 - 1) * (2 * K1 - 1) * (2 * K2 - 1))
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for n in range(0, total_keys, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        known = j < total_keys
        y0, y1, y2 = _box_tokens(j, low0, low1, low2, width1, width2, AXES)
        k_tile = _rows(k_base, _offsets(y0, y1, y2, g0, g1, g2, D0, D1, D2, k_0, k_1, k_2), known, d, D)
        seen = _seen(
            y0[None, :], y1[None, :], y2[None, :], start0[:, None], start1[:, None], start2[:, None],
            count0[:, None], count1[:, None], count2[:, None], AXES,
        )  # fmt: skip
        entries = _entry(y0, y1, y2, K1, K2)[None, :] - entry[:, None]
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        weights = tl.exp2(_base2(products, seen, table, entries, scale) - total[:, None])
        v_tile = _rows(v_base, _offsets(y0, y1, y2, g0, g1, g2, D0, D1, D2, v_0, v_1, v_2), known, e, E)
        d_weights = tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION)
        d_scores = weights * (d_weights - mean[:, None])
        sums += tl.dot(d_scores.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    tl.store(
        d_q + rows[:, None] * D + d[None, :],
        (sums * scale).to(d_q.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )


@triton.jit(do_not_specialize_on_alignment=_SIZES)
def key_gradients(
    q, k, v, rpb, grad_out, lse, delta, d_k, d_v, scale, heads, group,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, C0, C1, C2,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, AXES: tl.constexpr,
    PRECISION: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = T0 * T1 * T2
    n0 = _tiles(L0, D0, T0)
    n1 = _tiles(L1, D1, T1)
    n2 = _tiles(L2, D2, T2)
    pid = tl.program_id(0)
    g0, f0, len0 = _place(pid // (n1 * n2) % n0, L0, D0, n0)
    g1, f1, len1 = _place(pid // n2 % n1, L1, D1, n1)
    g2, f2, len2 = _place(pid % n2, L2, D2, n2)
    f0 = f0 * T0
    f1 = f1 * T1
    f2 = f2 * T2
    if (f0 >= len0) | (f1 >= len1) | (f2 >= len2):
        return
    key_heads = heads // group
    key_head = (pid // (n0 * n1 * n2) % key_heads).to(tl.int64)
    batch = (pid // (n0 * n1 * n2) // key_heads).to(tl.int64)
    y0, y1, y2 = _tile_tokens(T0, T1, T2)
    y0 += f0
    y1 += f1
    y2 += f2
    inside = (y0 < len0) & (y1 < len1) & (y2 < len2)
    low0, width0, low1, width1 = 0, 1, 0, 1
    if AXES > 2:
        low0, width0 = _reach(f0, tl.minimum(f0 + T0, len0) - 1, len0, K0, S0, C0)
    if AXES > 1:
        low1, width1 = _reach(f1, tl.minimum(f1 + T1, len1) - 1, len1, K1, S1, C1)
    low2, width2 = _reach(f2, tl.minimum(f2 + T2, len2) - 1, len2, K2, S2, C2)
    total_queries = width0 * width1 * width2
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    k_tile = _rows(
        k + batch * k_b + key_head * k_h, _offsets(y0, y1, y2, g0, g1, g2, D0, D1, D2, k_0, k_1, k_2), inside, d, D
    )
    v_tile = _rows(
        v + batch * v_b + key_head * v_h, _offsets(y0, y1, y2, g0, g1, g2, D0, D1, D2, v_0, v_1, v_2), inside, e, E
    )
    entry = _entry(y0 + (K0 - 1), y1 + (K1 - 1), y2 + (K2 - 1), K1, K2)
    first_row = batch * L0 * L1 * L2
    k_sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    v_sums = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for member in range(group):
        head = key_head * group + member
        q_base = q + batch * q_b + head * q_h
        table = rpb
        if table is not None:
            table += head * ((2 * K0 - 1) * (2 * K1 - 1) * (2 * K2 - 1))
        for n in range(0, total_queries, BLOCK_N):
            j = n + tl.arange(0, BLOCK_N)
            known = j < total_queries
            x0, x1, x2 = _box_tokens(j, low0, low1, low2, width1, width2, AXES)
            start0, count0, start1, count1 = x0, x0, x1, x1  # absent axes hide nothing
            if AXES > 2:
                start0, count0 = _window(x0, len0, K0, S0, C0)
            if AXES > 1:
                start1, count1 = _window(x1, len1, K1, S1, C1)
            start2, count2 = _window(x2, len2, K2, S2, C2)
            count2 = tl.where(known, count2, 0)
            rows = _offsets(x0, x1, x2, g0, g1, g2, D0, D1, D2, L1 * L2, L2, 1) + first_row
            rows = rows * heads + head
            q_tile = _rows(q_base, _offsets(x0, x1, x2, g0, g1, g2, D0, D1, D2, q_0, q_1, q_2), known, d, D)
            d_out = _rows(grad_out, rows * E, known, e, E)
            total = tl.load(lse + rows, mask=known, other=0.0) * LOG2E
            mean = tl.load(delta + rows, mask=known, other=0.0)
            seen = _seen(
                y0[:, None], y1[:, None], y2[:, None], start0[None, :], start1[None, :], start2[None, :],
                count0[None, :], count1[None, :], count2[None, :], AXES,
            )  # fmt: skip
            entries = entry[:, None] - _entry(x0, x1, x2, K1, K2)[None, :]
            products = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            weights = tl.exp2(_base2(products, seen, table, entries, scale) - total[None, :])
            v_sums += tl.dot(weights.to(d_out.dtype), d_out, input_precision=PRECISION)
            d_weights = tl.dot(v_tile, tl.trans(d_out), input_precision=PRECISION)
            d_scores = weights * (d_weights - mean[None, :])
            k_sums += tl.dot(d_scores.to(q_tile.dtype), q_tile, input_precision=PRECISION)
    rows = _offsets(y0, y1, y2, g0, g1, g2, D0, D1, D2, L1 * L2, L2, 1) + first_row
    rows = rows * key_heads + key_head
    tl.store(
        d_k + rows[:, None] * D + d[None, :],
        (k_sums * scale).to(d_k.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    tl.store(
        d_v + rows[:, None] * E + e[None, :],
        v_sums.to(d_v.dtype.element_ty),
        mask=inside[:, None] & (e < E)[None, :],
    )


@triton.jit(do_not_specialize_on_alignment=[*_SIZES, "items", "splits"])
def frame_gradient(
    q, k, v, rpb, grad_out, lse, delta, frames, scale, heads, group, items, splits, chunks,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, C0, C1, C2,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, AXES: tl.constexpr,
    PRECISION: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Score gradients summed over tiles, laid out relative to a tile: the frame of all keys any tile could see.

    One program per chunk of the frame, share of the tiles of all images, and head.
    """
    BLOCK: tl.constexpr = T0 * T1 * T2
    n0 = _tiles(L0, D0, T0)
    n1 = _tiles(L1, D1, T1)
    n2 = _tiles(L2, D2, T2)
    pid = tl.program_id(0)
    chunk = pid % chunks
    split = pid // chunks % splits
    head = (pid // (chunks * splits)).to(tl.int64)
    width1 = T1 + 2 * K1 - 2
    width2 = T2 + 2 * K2 - 2
    j = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    z0, z1, z2 = _box_tokens(j, 1 - K0, 1 - K1, 1 - K2, width1, width2, AXES)
    # The chunk's extent on the first axis, to pass by tiles that see nothing of it.
    per_slice = 1
    if AXES == 2:
        per_slice = width2
    if AXES == 3:
        per_slice = width1 * width2
    nearest = chunk * BLOCK_N // per_slice
    farthest = (chunk * BLOCK_N + BLOCK_N - 1) // per_slice
    m0, m1, m2 = _tile_tokens(T0, T1, T2)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    entries = _entry(z0 + K0 - 1, z1 + K1 - 1, z2 + K2 - 1, K1, K2)[None, :] - _entry(m0, m1, m2, K1, K2)[:, None]
    table = rpb + head * ((2 * K0 - 1) * (2 * K1 - 1) * (2 * K2 - 1))
    sums = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    for item in range(split, items, splits):
        g0, f0, len0 = _place(item // (n1 * n2) % n0, L0, D0, n0)
        g1, f1, len1 = _place(item // n2 % n1, L1, D1, n1)
        g2, f2, len2 = _place(item % n2, L2, D2, n2)
        f0 = f0 * T0
        f1 = f1 * T1
        f2 = f2 * T2
        first, length, reach = f0, len0, K0 - 1
        low, width = _view(tl.minimum(f0, len0 - 1), T0, len0, K0, S0, C0)
        if AXES == 2:
            first, length, reach = f1, len1, K1 - 1
            low, width = _view(tl.minimum(f1, len1 - 1), T1, len1, K1, S1, C1)
        if AXES == 1:
            first, length, reach = f2, len2, K2 - 1
            low, width = _view(tl.minimum(f2, len2 - 1), T2, len2, K2, S2, C2)
        if (first < length) & (first - reach + nearest < low + width) & (first - reach + farthest >= low):
            batch = (item // (n0 * n1 * n2)).to(tl.int64)
            x0 = f0 + m0
            x1 = f1 + m1
            x2 = f2 + m2
            inside = (x0 < len0) & (x1 < len1) & (x2 < len2)
            start0, count0, start1, count1 = x0, x0, x1, x1  # absent axes hide nothing
            if AXES > 2:
                start0, count0 = _window(x0, len0, K0, S0, C0)
            if AXES > 1:
                start1, count1 = _window(x1, len1, K1, S1, C1)
            start2, count2 = _window(x2, len2, K2, S2, C2)
            count2 = tl.where(inside, count2, 0)
            y0 = f0 + z0
            y1 = f1 + z1
            y2 = f2 + z2
            known = (y0 >= 0) & (y0 < len0) & (y1 >= 0) & (y1 < len1) & (y2 >= 0) & (y2 < len2)
            rows = _offsets(x0, x1, x2, g0, g1, g2, D0, D1, D2, L1 * L2, L2, 1) + batch * L0 * L1 * L2
            rows = rows * heads + head
            q_rows = _offsets(x0, x1, x2, g0, g1, g2, D0, D1, D2, q_0, q_1, q_2)
            q_tile = _rows(q + batch * q_b + head * q_h, q_rows, inside, d, D)
            d_out = _rows(grad_out, rows * E, inside, e, E)
            total = tl.load(lse + rows, mask=inside, other=0.0) * LOG2E
            mean = tl.load(delta + rows, mask=inside, other=0.0)
            k_rows = _offsets(y0, y1, y2, g0, g1, g2, D0, D1, D2, k_0, k_1, k_2)
            k_tile = _rows(k + batch * k_b + head // group * k_h, k_rows, known, d, D)
            v_rows = _offsets(y0, y1, y2, g0, g1, g2, D0, D1, D2, v_0, v_1, v_2)
            v_tile = _rows(v + batch * v_b + head // group * v_h, v_rows, known, e, E)
            seen = _seen(
                y0[None, :], y1[None, :], y2[None, :], start0[:, None], start1[:, None], start2[:, None],
                count0[:, None], count1[:, None], count2[:, None], AXES,
            )  # fmt: skip
            products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            weights = tl.exp2(_base2(products, seen, table, entries, scale) - total[:, None])
            d_weights = tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION)
            sums += weights * (d_weights - mean[:, None])
    m = tl.arange(0, BLOCK)
    frame = (split * heads + head) * BLOCK + m[:, None]
    tl.store(frames + frame * (chunks * BLOCK_N) + j[None, :], sums)


@triton.jit(do_not_specialize_on_alignment=["splits", "K0", "K1", "K2"])
def table_gradient(
    frames, d_rpb, heads, splits, chunks, K0, K1, K2,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Entries of the table for one head: the frames' places at their distance from each query of a tile, summed."""
    BLOCK: tl.constexpr = T0 * T1 * T2
    size1 = 2 * K1 - 1
    size2 = 2 * K2 - 1
    table = (2 * K0 - 1) * size1 * size2
    blocks = tl.cdiv(table, BLOCK_N)
    pid = tl.program_id(0)
    entry = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    head = (pid // blocks).to(tl.int64)
    m0, m1, m2 = _tile_tokens(T0, T1, T2)
    z0 = m0[:, None] + (entry // (size1 * size2))[None, :]
    z1 = m1[:, None] + (entry // size2 % size1)[None, :]
    z2 = m2[:, None] + (entry % size2)[None, :]
    m = tl.arange(0, BLOCK)
    place = m[:, None] * (chunks * BLOCK_N) + (z0 * (T1 + size1 - 1) + z1) * (T2 + size2 - 1) + z2
    sums = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    for split in range(splits):
        frame = (split * heads + head) * BLOCK * (chunks * BLOCK_N)
        sums += tl.load(frames + frame + place, mask=(entry < table)[None, :], other=0.0)
    tl.store(d_rpb + head * table + entry, tl.sum(sums, 0), mask=entry < table)
