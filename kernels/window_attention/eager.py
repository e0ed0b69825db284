"""Window attention on any device: windows are copied together a few at a time and attended to as dense problems.

Only the windows at an edge that a shift or an extension touches have a mask; windows that are alike share it. On the
CPU the forward pass, and the backward pass where the bias is frozen, go through PyTorch's fused kernel; the gradient of
the bias needs the scores, and takes matrix products on scores that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.softmax_attention import attend
from kernels.window_attention.geometry import Geometry, Piece, Span, mask, spans

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_softmax_backward = torch.ops.aten._softmax_backward_data

# Numbers per operand of windows that are computed together, and scores where they are kept: what stays in the cache of
# a CPU.
TOKENS_AT_ONCE = 1 << 20
SCORES_AT_ONCE = 1 << 20


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, W, heads, E) and log-sum-exp (B, H, W, heads), both contiguous."""
    out = q.new_empty(*q.shape[:4], v.shape[4])
    lse = q.new_empty(q.shape[:4], dtype=torch.promote_types(q.dtype, torch.float32))
    scratch = Scratch(lse)
    for block in _blocks(q, v, geometry, fused=True):
        a, b, c = _operands(q, k, v, block, scratch)
        part, sums = _attend(a, b, c, scale, block.added(bias, geometry, lse))
        block.scatter(out, part)
        block.scatter(lse, sums)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    geometry: Geometry,
    scale: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, on request, of the bias."""
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (q, k, v))
    # A row that sees nothing gets weights of zero, exp(-inf), and so does the extension.
    divisor = lse.masked_fill(lse == -torch.inf, torch.inf)
    scratch = Scratch(lse)
    if _fused_serves(q, v) and grad_lse is None and not bias_gradient:
        for block in _blocks(q, v, geometry, fused=True):
            a, b, c = _operands(q, k, v, block, scratch)
            d_o, o = (block.tokens(t, scratch[n]).transpose(1, 2) for n, t in ((3, grad_out), (4, out)))
            sums = block.heads_first(divisor, scratch[5], fill=torch.inf)
            added = block.added(bias, geometry, lse)
            grads = _flash_backward(d_o, a, b, c, o, sums, 0.0, False, attn_mask=added, scale=scale)
            for target, grad in zip((d_q, d_k, d_v), grads, strict=True):
                block.scatter(target, grad)
        return d_q, d_k, d_v, None
    tokens, heads = geometry.tokens, q.shape[3]
    d_bias = lse.new_zeros(1, heads * tokens**2) if bias_gradient else None
    for block in _blocks(q, v, geometry, fused=False):
        d_o, a, b, c = (block.heads_first(t, scratch[n]).flatten(0, 1) for n, t in enumerate((grad_out, q, k, v)))
        sums = block.heads_first(divisor, scratch[4], fill=torch.inf)[..., None]
        weights = scratch[5](len(sums), heads, tokens, tokens)
        added = block.added(bias, geometry, lse)
        if added is None:
            torch.neg(sums.expand_as(weights), out=weights)
        else:
            torch.sub(added, sums, out=weights)
        weights = weights.flatten(0, 1).baddbmm_(a, b.mT, alpha=scale).exp_()
        product = torch.bmm(weights.mT, d_o, out=scratch[6](*c.shape))
        block.scatter(d_v, product.unflatten(0, (-1, heads)))
        d_scores = torch.bmm(d_o, c.mT, out=scratch[7](*weights.shape))
        _softmax_backward.out(d_scores, weights, -1, lse.dtype, grad_input=d_scores)
        if grad_lse is not None:
            d_scores.addcmul_(weights, block.heads_first(grad_lse, scratch[4]).flatten(0, 1)[..., None])
        if d_bias is not None:
            windows = d_scores.view(-1, d_bias.shape[1])
            d_bias.addmm_(windows.new_ones(1, len(windows)), windows)
        # The scale goes to the smaller factor.
        product = torch.bmm(d_scores, b.mul_(scale), out=scratch[6](*a.shape))
        block.scatter(d_q, product.unflatten(0, (-1, heads)))
        product = torch.bmm(d_scores.mT, a.mul_(scale), out=scratch[6](*a.shape))
        block.scatter(d_k, product.unflatten(0, (-1, heads)))
    if d_bias is not None and bias is not None:
        d_bias = d_bias.view(bias.shape).to(bias.dtype)
    return d_q, d_k, d_v, d_bias


def _fused_serves(q: Tensor, v: Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[4] == v.shape[4]


def _operands(q: Tensor, k: Tensor, v: Tensor, block: Block, scratch: Scratch) -> tuple[Tensor, ...]:
    """Queries, keys and values of a block for the fused kernel, (windows, heads, tokens, ...) of any strides.

    Views of one projection are copied together: whole rows of a window are then adjacent in memory.
    """
    apart = k.storage_offset() - q.storage_offset()
    if (
        q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        and q.dtype == k.dtype == v.dtype
        and q.stride() == k.stride() == v.stride()
        and q.shape == v.shape
        and v.storage_offset() - k.storage_offset() == apart > 0
    ):
        batch, row, column, head, channel = q.stride()
        fused = q.as_strided((*q.shape[:3], 3, *q.shape[3:]), (batch, row, column, apart, head, channel))
        return block.tokens(fused, scratch[0]).permute(2, 0, 3, 1, 4).unbind(0)
    return tuple(block.tokens(t, scratch[n]).transpose(1, 2) for n, t in enumerate((q, k, v)))


def _attend(a: Tensor, b: Tensor, c: Tensor, scale: float, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exp of dense windows (windows, heads, tokens, ...)."""
    if a.device.type != "cpu" or a.shape[3] != c.shape[3]:
        return attend(a, b, c, scale, bias=added)
    out, lse = _flash(a, b, c, attn_mask=added, scale=scale)
    if added is not None:
        lse = lse.masked_fill((added == -torch.inf).all(-1), -torch.inf)
    return out, lse


class Scratch:
    """Memory that blocks use one after another: fresh memory costs more than the copy into it.

    ``scratch[n](*shape)`` is a tensor of that shape in slot ``n``, of unknown contents.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._slots: dict[int, Tensor] = {}

    def __getitem__(self, slot: int) -> Callable[..., Tensor]:
        def take(*shape: int) -> Tensor:
            numbers = math.prod(shape)
            if slot not in self._slots or self._slots[slot].numel() < numbers:
                self._slots[slot] = self._like.new_empty(numbers)
            return self._slots[slot][:numbers].view(shape)

        return take


@dataclass(frozen=True)
class Block:
    """Windows that are computed together: some rows and columns of windows of some maps."""

    first: int
    maps: int
    rows: Span
    columns: Span

    @property
    def windows(self) -> tuple[int, int, int]:
        """Of how many maps, and rows and columns of windows of each."""
        return self.maps, self.rows.count, self.columns.count

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of tokens of a window."""
        return self.rows.axis.window, self.columns.axis.window

    def tokens(self, x: Tensor, take: Callable[..., Tensor], fill: float = 0) -> Tensor:
        """(B, H, W, ...) to contiguous (windows, tokens, ...); ``fill`` stands for the extension."""
        buffer = take(*self.windows, *self.sides, *x.shape[3:])
        self._copy(x, buffer, fill)
        return buffer.flatten(3, 4).flatten(0, 2)

    def heads_first(self, x: Tensor, take: Callable[..., Tensor], fill: float = 0) -> Tensor:
        """(B, H, W, heads, ...) to contiguous (windows, heads, tokens, ...)."""
        buffer = take(*self.windows, x.shape[3], *self.sides, *x.shape[4:])
        self._copy(x, buffer.movedim(3, 5), fill)
        return buffer.flatten(4, 5).flatten(0, 2)

    def _copy(self, x: Tensor, buffer: Tensor, fill: float) -> None:
        if not (self.rows.whole and self.columns.whole):
            buffer.fill_(fill)
        for row in self.rows.pieces:
            for column in self.columns.pieces:
                buffer[:, :, :, row.start : row.stop, column.start : column.stop] = self._view(x, row, column)

    def scatter(self, target: Tensor, values: Tensor) -> None:
        """(windows, heads, tokens, ...) into their places of (B, H, W, heads, ...); the extension is dropped."""
        values = values.transpose(1, 2).unflatten(1, self.sides).unflatten(0, self.windows)
        for row in self.rows.pieces:
            for column in self.columns.pieces:
                part = values[:, :, :, row.start : row.stop, column.start : column.stop]
                self._view(target, row, column).copy_(part)

    def added(self, bias: Tensor | None, geometry: Geometry, like: Tensor) -> Tensor | None:
        """Bias and mask together, (1, heads or 1, tokens, tokens), in the dtype of ``like``."""
        hidden = mask(
            (self.rows.padded, self.rows.wrapped),
            (self.columns.padded, self.columns.wrapped),
            geometry.released,
            geometry.hide,
        )
        if hidden is None:
            return None if bias is None else bias.to(like)[None]
        if bias is None:
            return hidden.to(like)[None, None]
        return (bias.to(like) + hidden.to(like))[None]

    def _view(self, x: Tensor, row: Piece, column: Piece) -> Tensor:
        """The tokens of a piece of every window, (windows, rows and columns of tokens, ...), viewed."""
        batch, down, right, *rest = x.stride()
        size = (*self.windows, row.stop - row.start, column.stop - column.start, *x.shape[3:])
        stride = (
            batch,
            down * self.rows.axis.window_step,
            right * self.columns.axis.window_step,
            down * self.rows.axis.token_step,
            right * self.columns.axis.token_step,
            *rest,
        )
        start = self.first * batch + row.position * down + column.position * right
        return x.as_strided(size, stride, x.storage_offset() + start)


def _blocks(q: Tensor, v: Tensor, geometry: Geometry, fused: bool) -> Iterator[Block]:
    """All windows, a few at a time; those of a block are alike.

    Args:
        fused: whether no scores will be kept.
    """
    batch, _, _, heads, width = q.shape
    if q.numel() == 0 or v.numel() == 0:
        return
    numbers = heads * geometry.tokens * max(width, v.shape[4])
    most = TOKENS_AT_ONCE // numbers if fused else SCORES_AT_ONCE // max(heads * geometry.tokens**2, numbers)
    most = max(most, 1)
    for rows in spans(geometry.rows):
        for columns in spans(geometry.columns):
            across = min(columns.count, most)
            down = min(rows.count, max(most // across, 1))
            maps = min(batch, max(most // (across * down), 1))
            for b in range(0, batch, maps):
                for y in range(0, rows.count, down):
                    for x in range(0, columns.count, across):
                        yield Block(b, min(maps, batch - b), rows.part(y, down), columns.part(x, across))
