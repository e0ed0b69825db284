"""Draw what each operator reads: ``python -m kernels.picture [FILE]`` (default: ``kernels/access_patterns.png``).

Nothing is drawn from memory: an operator is run, and a token is coloured by the gradient that one query's output sends
to its value. Needs matplotlib.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDE = 16
HEADS, WIDTH = 1, 8
QUERY = (5, 9)


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        reach: gradients, (rows, columns); of a map's tokens, or of packed tokens by what reads them.
        query: the token marked as the one that reads, row and column.
        lines: where regions, windows or segments end, on both axes.
    """

    title: str
    reach: Tensor
    query: tuple[int, int] | None = None
    lines: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())


def _map(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _read_by(values: Tensor, output: Tensor) -> Tensor:
    """Summed absolute gradients of ``values (1, SIDE, SIDE, ...)`` from one query's ``output``, (SIDE, SIDE)."""
    (gradient,) = torch.autograd.grad(output.sum(), values)
    return gradient[0].reshape(SIDE, SIDE, -1).abs().sum(-1)


def _qkv() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_map(3, 1, SIDE, SIDE, HEADS, WIDTH) * 0.3).unbind(0)
    return q, k, v.clone().requires_grad_()


def _neighborhood(title: str, query: tuple[int, int] = QUERY, **options: Any) -> Panel:
    from kernels.neighborhood_attention import neighborhood_attention

    q, k, v = _qkv()
    out: Any = neighborhood_attention(q, k, v, **options)
    return Panel(title, _read_by(v, out[0, query[0], query[1]]), query)


def _routing() -> Panel:
    from kernels.bi_level_routing_attention import bi_level_routing_attention

    q, k, v = _qkv()
    out = bi_level_routing_attention(q, k, v, 4, topk=3)[0]
    cuts = tuple(n - 0.5 for n in range(4, SIDE, 4))
    return Panel("bi_level_routing_attention\nregions 4 x 4, top 3", _read_by(v, out[0, *QUERY]), QUERY, (cuts, cuts))


def _window(title: str, cuts: tuple[float, ...], **options: Any) -> Panel:
    from kernels.window_attention import window_attention

    q, k, v = _qkv()
    out: Any = window_attention(q, k, v, 4, **options)
    return Panel(title, _read_by(v, out[0, *QUERY]), QUERY, (cuts, cuts))


def _linear() -> Panel:
    from kernels.linear_attention import linear_attention_2pass

    q, k, v = _qkv()
    out = linear_attention_2pass(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)).unflatten(1, (SIDE, SIDE))
    return Panel("linear_attention_2pass\nevery token, through one small matrix", _read_by(v, out[0, *QUERY]), QUERY)


def _group() -> Panel:
    from kernels.group_attention import group_attention, group_order

    q, k, v = (t.flatten(1, 2) for t in _qkv())
    v = v.detach().requires_grad_()
    smooth = torch.nn.functional.interpolate(_map(1, 1, 4, 4), (SIDE, SIDE), mode="bicubic")
    order = group_order((smooth.flatten(1) * 2).round().long())
    out = group_attention(q, k, v, order, 24).unflatten(1, (SIDE, SIDE))
    return Panel("group_attention\ntokens of one cluster, wherever they are", _read_by(v, out[0, *QUERY]), QUERY)


def _deformable() -> Panel:
    from kernels.ms_deform_attn import ms_deform_attn

    value = _map(1, SIDE * SIDE, HEADS, WIDTH).requires_grad_()
    places = torch.tensor([QUERY[1] + 0.5, QUERY[0] + 0.5]) / SIDE + 0.18 * _map(1, 1, HEADS, 1, 6, 2)
    weights = torch.full((1, 1, HEADS, 1, 6), 1 / 6)
    out = ms_deform_attn(value, [(SIDE, SIDE)], places, weights)
    return Panel("ms_deform_attn\nbilinear samples at learned places", _read_by(value, out), QUERY)


def _dynamic() -> Panel:
    from kernels.dynamic_conv import dynamic_conv

    value = _map(1, WIDTH, SIDE, SIDE).requires_grad_()
    weights = _map(1, 2, SIDE, SIDE, 25).softmax(-1)
    out = dynamic_conv(value, weights, 5)
    (gradient,) = torch.autograd.grad(out[0, :4, *QUERY].sum(), value)
    return Panel("dynamic_conv 5 x 5\na kernel of its own at every position", gradient[0].abs().sum(0), QUERY)


LENGTHS = (9, 4, 11, 8)


def _packed() -> tuple[Tensor, tuple[float, ...]]:
    cuts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return cuts, tuple(float(c) - 0.5 for c in cuts[1:-1])


def _varlen() -> Panel:
    from kernels.varlen_attention import varlen_attention

    cuts, lines = _packed()
    q, k, v = _map(3, sum(LENGTHS), HEADS, WIDTH).unbind(0)
    v.requires_grad_()
    out = varlen_attention(q, k, v, cuts, cuts)[0]
    rows = [torch.autograd.grad(row.sum(), v, retain_graph=True)[0].abs().sum((1, 2)) for row in out]
    return Panel("varlen_attention\nrows: queries, columns: keys, packed", torch.stack(rows), None, (lines, lines))


def _pool() -> Panel:
    from kernels.gated_attention_pool import PoolWeights, gated_attention_pool

    cuts, lines = _packed()
    total, branches = sum(LENGTHS), 3
    values = _map(total, WIDTH).requires_grad_()
    weights = PoolWeights(*(_map(*s) for s in ((16, WIDTH), (16,), (16, WIDTH), (16,), (branches, 16), (branches,))))
    pooled = gated_attention_pool(_map(total, WIDTH), weights, cuts, values=values)[0].flatten(0, 1)
    rows = [torch.autograd.grad(row.sum(), values, retain_graph=True)[0].abs().sum(1) for row in pooled]
    ends = tuple(branches * n - 0.5 for n in range(1, len(LENGTHS)))
    return Panel(
        "gated_attention_pool\nrows: 3 branches of 4 bags, columns: instances", torch.stack(rows), None, (ends, lines)
    )


PANELS: tuple[Callable[[], Panel], ...] = (
    lambda: _neighborhood("neighborhood_attention\nkernel 7", kernel_size=7),
    lambda: _neighborhood("at a border the window\nis shifted inwards", query=(1, 14), kernel_size=7),
    lambda: _neighborhood("dilation 3", kernel_size=5, dilation=3),
    lambda: _neighborhood("stride 4, causal rows", kernel_size=(6, 7), stride=(1, 4), is_causal=(True, False)),
    lambda: _window("window_attention 4 x 4", tuple(n - 0.5 for n in range(4, SIDE, 4))),
    lambda: _window("shifted by 2", tuple(n - 0.5 for n in range(2, SIDE, 4)), shift=2),
    lambda: _window("grid 4 x 4", (), kind="grid"),
    _routing,
    _dynamic,
    _group,
    _deformable,
    _linear,
    _varlen,
    _pool,
)


def draw(path: Path) -> None:
    """Draw every panel into one PNG file."""
    import matplotlib.pyplot as plt

    columns = 5
    rows = -(-len(PANELS) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 3.0 * rows), dpi=110, layout="constrained")
    for axis in axes.flat[len(PANELS) :]:
        axis.axis("off")
    for axis, make in zip(axes.flat, PANELS, strict=False):
        _draw(axis, make())
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _draw(axis: Axes, panel: Panel) -> None:
    reach = panel.reach / panel.reach.max()
    shown = torch.where(reach > 0, 0.25 + 0.75 * reach, 0.0)  # the least that is read is still seen
    axis.imshow(shown.numpy(), cmap="Blues", vmin=0, vmax=1.2, aspect="auto" if panel.query is None else "equal")
    axis.set_xticks([n - 0.5 for n in range(reach.shape[1] + 1)], minor=True)
    axis.set_yticks([n - 0.5 for n in range(reach.shape[0] + 1)], minor=True)
    axis.grid(which="minor", color="0.88", linewidth=0.5)
    axis.tick_params(which="both", bottom=False, left=False, labelbottom=False, labelleft=False)
    for end in panel.lines[0]:
        axis.axhline(end, color="0.35", linewidth=1)
    for end in panel.lines[1]:
        axis.axvline(end, color="0.35", linewidth=1)
    if panel.query is not None:
        axis.plot(panel.query[1], panel.query[0], marker="s", color="#d1495b", markersize=6)
    axis.set_title(panel.title, fontsize=8)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "access_patterns.png")
