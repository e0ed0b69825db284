"""From a table of one number per head and offset to the bias of every query and key of a window."""

from __future__ import annotations

from torch import Tensor

from kernels.errors import InputError, unknown_name

LAYOUTS = ("swin", "maxvit", "maxvit_tf")


def relative_position_bias(table: Tensor, window_size: int | tuple[int, int], layout: str = "swin") -> Tensor:
    """Bias of a window's queries and keys by their offset.

    Args:
        table: for ``swin`` and ``maxvit`` ((2h - 1) (2w - 1), heads), where the offset is **query minus key**; for
            ``maxvit_tf`` (weights that come from TensorFlow) (heads, 2h - 1, 2w - 1), **key minus query**. In both the
            smallest offset comes first.
        window_size: h and w.

    Returns:
        (heads, h w, h w), queries by keys, differentiable in ``table``.

    Raises:
        InputError: the layout is not known, or the table's shape is not that of the window.
    """
    if layout not in LAYOUTS:
        raise unknown_name("relative_position_bias: layout", layout, LAYOUTS)
    h, w = (window_size, window_size) if isinstance(window_size, int) else window_size
    rows, columns = 2 * h - 1, 2 * w - 1
    fits = table.shape[1:] == (rows, columns) if layout == "maxvit_tf" else table.shape[:1] == (rows * columns,)
    if table.dim() != (3 if layout == "maxvit_tf" else 2) or not fits:
        wanted = f"(heads, {rows}, {columns})" if layout == "maxvit_tf" else f"({rows * columns}, heads)"
        raise InputError(
            f"relative_position_bias: the table of a {h} x {w} window in layout '{layout}' is {wanted}; "
            f"got {tuple(table.shape)}."
        )
    # Entry a + b of an axis is entry (a, b) of its sliding windows. With a = query and b = last - key that is the
    # offset query minus key, with a = last - query and b = key the other one. Unlike an index table this costs no
    # memory, and its gradient is a sum in a fixed order.
    if layout == "maxvit_tf":
        return table.unfold(1, h, 1).unfold(2, w, 1).flip(1, 2).reshape(-1, h * w, h * w)
    slid = table.t().unflatten(1, (rows, columns)).unfold(1, h, 1).unfold(2, w, 1)
    return slid.flip(3, 4).reshape(-1, h * w, h * w)
