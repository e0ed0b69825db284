"""Window attention whose queries are those of the whole image, in turn with ordinary window attention.

Source: Hatamizadeh et al., Global Context Vision Transformers, ICML 2023, arXiv 2206.09959. All windows of an image
share one global query, made from the map by :class:`GlobalQueryGenerator`; a network computes it once per stage and
hands it to :meth:`GlobalContextAttention.with_query`. The first released code mixed the queries of different images;
the corrected order is the one here. Maps of other sizes than the windows' multiples are extended, and a global query of
another size than the window is resized, as in the released code for detection and segmentation; there the extension is
seen (``padding="released"``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, attend, depthwise, projection
from attention.layout import split_heads, to_channels_first, to_channels_last
from attention.masking import blank, hide_keys
from attention.parameters import Probability
from attention.registry import register
from attention.window import PADDINGS, WindowAttention
from kernels.errors import InputError, unknown_name

FORMS = ("alternate", "local", "global")


class GlobalQueryGenerator(nn.Module):
    """The query of a whole image: convolutions with a channel gate, each followed by pooling, down to one window.

    Args:
        dim: channels C.
        window_size: height and width of the query.
        repeats: how often the map is convolved and halved; 0 is one convolution without pooling.
    """

    def __init__(self, dim: int, window_size: Sequence[int], repeats: int) -> None:
        super().__init__()
        self.window_size = list(window_size)
        self.repeats = repeats
        self.blocks = nn.ModuleList(_GatedConvolution(dim) for _ in range(max(repeats, 1)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The query (B, *window, C) of ``x`` (B, H, W, C), where ``mask`` (B, H, W) is true for real tokens."""
        x = to_channels_first(blank(x, mask))
        seen = None if mask is None else mask[:, None]
        for block in self.blocks:
            x = block(x, seen)
            if self.repeats and seen is None:
                x = F.max_pool2d(x, 3, 2, 1)
            elif self.repeats and seen is not None:
                x = F.max_pool2d(x.masked_fill(~seen, torch.finfo(x.dtype).min), 3, 2, 1)
                seen = F.max_pool2d(seen.float(), 3, 2, 1) > 0
                x = x.masked_fill(~seen, 0)
        if list(x.shape[2:]) != self.window_size:
            x = F.interpolate(x, self.window_size, mode="bicubic", align_corners=False)
        return to_channels_last(x)

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State of the released generator (``to_q_global.``) or of timm's (``blocks.conv``) under our names."""
        names = {"conv.0": "conv_dw", "conv.2.fc.0": "fc1", "conv.2.fc.2": "fc2", "conv.3": "conv_pw"}
        names |= {"conv_dw": "conv_dw", "se.fc1": "fc1", "se.fc2": "fc2", "conv_pw": "conv_pw"}
        renamed = {}
        for key, value in state.items():
            found = re.fullmatch(r"(?:to_q_global\.|blocks\.conv)(\d+)\.(.+)\.weight", key)
            if found and found[2] in names:
                block = int(found[1]) - (key.startswith("blocks"))
                layer = names[found[2]]
                renamed[f"blocks.{block}.{layer}.weight"] = value.flatten(1) if layer.startswith("fc") else value
            else:
                renamed[key] = value
        return renamed


class _GatedConvolution(nn.Module):
    """x + pointwise(gate(GELU(depthwise(x)))), the gate from the mean over the real tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(dim // 4, 1)
        self.conv_dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.conv_pw = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        y = F.gelu(self.conv_dw(x))
        if seen is None:
            mean = y.mean((2, 3))
        else:
            y = y.masked_fill(~seen, 0)
            wide = torch.promote_types(y.dtype, torch.float32)
            mean = (y.sum((2, 3), dtype=wide) / seen.sum((2, 3)).clamp_min(1)).to(y.dtype)
        gate = torch.sigmoid(self.fc2(F.gelu(self.fc1(mean))))
        mixed = F.linear(to_channels_last(y * gate[..., None, None]), self.conv_pw.weight.flatten(1))
        return x + to_channels_first(mixed)


@register("global_context", kind="mixer")
class GlobalContextAttention(WindowAttention):
    """Window attention with queries of the whole image, in turn with its own (GC ViT, Hatamizadeh et al. 2023).

    Args:
        dim: channels C.
        num_heads: heads.
        input_size: size of the map that ``repeats`` follows from.
        window_size: side of a window, or (height, width); P is the number of its tokens. The global query has this
            size.
        form: ``"local"``: the queries of each window; ``"global"``: those of the image. ``"alternate"`` is local in
            even blocks of a stage and global in odd ones, and global by itself.
        repeats: halvings of the map on the way to the global query; by default as many as lead from ``input_size`` to
            the window.
        own_query: whether the global query is made from the map. Otherwise there is no generator and
            :meth:`with_query` is to be called.
        qkv_bias: whether the projection to (queries,) keys and values has a bias.
        padding: of maps that the windows do not divide: ``"hide"``: what sticks out is not seen. ``"released"``: it is
            seen, as zeros before the projection.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: the window is not possible, or a choice is not known.
    """

    about = About(
        "Hatamizadeh et al. (GC ViT), ICML 2023, 2206.09959", "O(N P)", "window_attention", "non-commercial (NVIDIA)"
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        input_size: Sequence[int] = (56, 56),
        window_size: int | Sequence[int] = 7,
        form: str = "alternate",
        repeats: int | None = None,
        own_query: bool = True,
        qkv_bias: bool = True,
        padding: str = "hide",
        proj_drop: Probability = 0.0,
    ) -> None:
        sides = [window_size, window_size] if isinstance(window_size, int) else list(window_size)
        if len(sides) != 2 or min(sides) < 1:
            raise InputError(f"attention 'global_context': window_size={window_size} must be at least 1 on both axes.")
        if form not in FORMS:
            raise unknown_name("attention.form", form, FORMS)
        if padding not in PADDINGS:
            raise unknown_name("attention.padding", padding, PADDINGS)
        if len(input_size) != 2 or min(input_size) < 1 or (repeats is not None and repeats < 0):
            raise InputError(
                f"attention 'global_context': input_size={tuple(input_size)} must be two sizes of at least 1, and "
                f"repeats={repeats} at least 0."
            )
        super().__init__(dim, num_heads, sides, shift=0, qkv_bias=qkv_bias, padding=padding, proj_drop=proj_drop)
        self.form = "global" if form == "alternate" else form
        self.generator: GlobalQueryGenerator | None = None
        if self.form == "global":
            self.qkv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
            if own_query:
                halvings = [math.log2(n / side) for n, side in zip(input_size, sides, strict=True)]
                steps = max(round(min(halvings)), 0) if repeats is None else repeats
                self.generator = GlobalQueryGenerator(dim, sides, steps)

    @classmethod
    def for_block(cls, params: Mapping[str, Any], index: int) -> dict[str, Any]:
        chosen = dict(params)
        if chosen.get("form", "alternate") == "alternate":
            chosen["form"] = "global" if index % 2 else "local"
        return chosen

    def with_query(self, x: Tensor, query: Tensor, mask: Tensor | None = None) -> Tensor:
        """Like calling the module, with the global query given.

        Args:
            x: (B, H, W, C).
            query: (B, *window, C), or (G, *window, C) where ``x`` holds B / G maps of each image one after the other.
            mask: (B, H, W) bool, true for real tokens.

        Raises:
            InputError: the form is local, or the query is not of the window's size.
        """
        self._check(x, mask)
        fits = query.dim() == 4 and tuple(query.shape[1:]) == (*self.window_size, self.dim)
        if self.form != "global" or not fits or not len(query) or len(x) % len(query):
            raise InputError(
                f"attention 'global_context': the form '{self.form}' with windows of {self.window_size} and "
                f"{len(x)} maps takes no query {tuple(query.shape)}; it must be (images, *window, {self.dim}) for the "
                "form 'global'."
            )
        query = query.repeat_interleave(len(x) // len(query), 0)
        return blank(self._mix(blank(x, mask), mask, query), mask)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        return self._mix(x, mask, None)

    def _mix(self, x: Tensor, mask: Tensor | None, query: Tensor | None) -> Tensor:
        if self.form == "local":
            return super().mix(x, mask, None)
        q, k, v = self._global(x, mask, query)
        out = self._core(q, k, v)[:, : x.shape[1], : x.shape[2]]
        return self.proj_drop(self.proj(out.flatten(-2)))

    def _qkv(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return super()._qkv(x, mask) if self.form == "local" else self._global(x, mask, None)

    def _global(self, x: Tensor, mask: Tensor | None, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The image's query in every window, and the map's keys and values."""
        if query is None:
            if self.generator is None:
                raise InputError("attention 'global_context' has no query of its own; call with_query, or own_query.")
            query = self.generator(x, mask)
        size = x.shape[1:3]
        below, right = (-n % side for n, side in zip(size, self.window_size, strict=True))
        if self.padding == "released":
            x = F.pad(x, (0, 0, 0, right, 0, below))
            mask = None if mask is None else F.pad(mask, (0, right, 0, below), value=True)
        k, v = split_heads(blank(self.qkv(x), mask), 2 * self.num_heads).chunk(2, -2)
        counts = [-(-n // side) for n, side in zip(size, self.window_size, strict=True)]
        q = split_heads(query, self.num_heads).to(k.dtype).repeat(1, *counts, 1, 1)
        q, k = hide_keys(q[:, : x.shape[1], : x.shape[2]], k, mask, self.head_dim**-0.5)
        return q, k, v

    def cost(self, shape: Sequence[int]) -> list[Part]:
        if self.form == "local":
            return super().cost(shape)
        tokens = math.prod(shape)
        seen = math.prod(self.window_size)
        parts = [
            projection("keys and values", tokens, self.dim, 2 * self.dim),
            attend("attention", tokens, seen, self.dim, tokens, self.num_heads * seen**2),
            projection("output", tokens, self.dim, self.dim),
        ]
        for block in range(0 if self.generator is None else len(self.generator.blocks)):
            parts.append(depthwise(f"global query, convolution {block + 1}", tokens / 4**block, self.dim, 9))
            parts.append(projection(f"global query, projection {block + 1}", tokens / 4**block, self.dim, self.dim))
        return parts

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state, in the names of the paper's code or of timm, without what follows from the window's size."""
        named = {key.removeprefix("rel_pos."): value for key, value in state.items()}
        return {key: value for key, value in named.items() if key != "relative_position_index"}
