"""Window attention: every backend against the reference in float64, over maps, windows, shifts, extensions and layouts;
the reference against plain loops and the released formulation."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import explain
from kernels.errors import InputError
from kernels.window_attention import eager, relative_position_bias, window_attention
from kernels.window_attention.geometry import Axis, spans
from tests.kernels.contract import (
    assert_any_incoming_gradient,
    assert_compiles,
    assert_gradcheck,
    assert_matches,
    assert_opcheck,
    assert_runs_under_autocast,
    poisoned,
)

BACKENDS = ["torch", "triton"]


def inputs(
    height: int, width: int, heads: int = 2, channels: int = 16, value_channels: int | None = None, batch: int = 1
) -> list[Tensor]:
    shape = (batch, height, width, heads)
    return [torch.randn(*shape, c) for c in (channels, channels, value_channels or channels)]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: object) -> object:
    return window_attention(q, k, v, bias=bias, return_lse=True, **options)  # type: ignore[arg-type]


# Map, window, options; the first are of one tile for Triton, the last of several blocks.
CASES: dict[str, tuple[tuple[int, int], int | tuple[int, int], dict]] = {
    "windows": ((6, 9), 3, {}),
    "rectangles": ((4, 10), (2, 5), {}),
    "strips": ((3, 8), (1, 8), {}),
    "single tokens": ((2, 3), 1, {}),
    "the whole map": ((5, 7), (5, 7), {}),
    "grid": ((6, 8), (3, 2), {"kind": "grid"}),
    "shifted": ((6, 6), 3, {"shift": 1}),
    "shifted on one axis": ((4, 6), (2, 3), {"shift": (0, 2)}),
    "shifted, released mask": ((6, 6), 3, {"shift": (1, 2), "shift_mask": "released"}),
    "extended": ((5, 7), 3, {"padding": "hide"}),
    "extended with zeros": ((5, 7), (3, 4), {"padding": "zero"}),
    "extended grid": ((5, 7), (3, 4), {"kind": "grid", "padding": "hide"}),
    "extended grid with zeros": ((4, 5), (3, 2), {"kind": "grid", "padding": "zero"}),
    "window larger than the map": ((2, 3), 5, {"padding": "hide", "shift": 2}),
    "extended and shifted": ((7, 5), 4, {"padding": "hide", "shift": (3, 1)}),
    "extended with zeros and shifted": ((5, 4), 3, {"padding": "zero", "shift": 2, "shift_mask": "released"}),
    "large windows": ((9, 16), (9, 8), {}),
    "large windows, extended and shifted": ((8, 10), (9, 8), {"padding": "hide", "shift": 4}),
    "large grid": ((4, 33), (4, 17), {"kind": "grid", "padding": "zero"}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_it_matches_the_reference(case: str, backend: str) -> None:
    size, window, options = CASES[case]
    h, w = (window, window) if isinstance(window, int) else window
    heads = 1 if h * w > 64 else 2
    tensors = inputs(*size, heads, channels=12)
    call = partial(attention, window_size=window, **options)
    for bias in (None, torch.randn(heads, h * w, h * w)):
        assert_matches(partial(call, backend=backend), partial(call, backend="reference"), [*tensors, bias])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("channels", "value_channels"), [(8, 20), (20, 8), (40, 40)])
@pytest.mark.parametrize("window", [(2, 3), (2, 33)])
def test_any_width_of_heads(window: tuple[int, int], channels: int, value_channels: int, backend: str) -> None:
    tensors = inputs(2, 2 * window[1], heads=1, channels=channels, value_channels=value_channels)
    call = partial(attention, window_size=window, scale=0.3)
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(3, 4), (9, 8)])
def test_a_frozen_bias(window: tuple[int, int], backend: str) -> None:
    tensors = inputs(9, 8, heads=1)
    tokens = window[0] * window[1]
    bias = torch.randn(1, tokens, tokens)

    def call(q: Tensor, k: Tensor, v: Tensor, backend: str) -> object:
        frozen = bias.to(q.dtype) if backend == "reference" else bias
        return window_attention(q, k, v, window, bias=frozen, backend=backend)

    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), tensors)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("window", [(4, 3), (8, 9)])
def test_a_bias_may_hide_keys(window: tuple[int, int], backend: str) -> None:
    tensors = inputs(8, 9)
    tokens = window[0] * window[1]
    bias = torch.randn(2, tokens, tokens)
    bias[0, :, 1] = -torch.inf
    bias[1, 2] = -torch.inf  # the third query sees nothing
    call = partial(attention, window_size=window)
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), [*tensors, bias])
    out, lse = call(*tensors, bias, backend=backend)
    blind = (0, 0, 2)  # of the first window
    assert (out[(*blind, 1)] == 0).all() and lse[(*blind, 1)] == -torch.inf
    frozen = window_attention(*(t.requires_grad_() for t in tensors), window, bias=bias, backend=backend)
    assert isinstance(frozen, Tensor)
    assert all(g.isfinite().all() for g in torch.autograd.grad(frozen.sum(), tensors))


# --------------------------------------------------------------------------------------- the reference itself


def test_the_reference_is_attention_among_the_tokens_of_a_window() -> None:
    """Every query by a loop over the keys that share its window, found from the definition."""
    for kind, size, window, shift in (
        ("window", (5, 7), (2, 3), (0, 0)),
        ("window", (6, 5), (3, 4), (2, 1)),
        ("grid", (6, 5), (3, 2), (0, 0)),
    ):
        q, k, v = (t.double() for t in inputs(*size, heads=1, channels=3))
        tokens = window[0] * window[1]
        bias = torch.randn(1, tokens, tokens, dtype=torch.float64)
        out = window_attention(
            q, k, v, window, kind=kind, shift=shift, bias=bias, padding="hide", backend="reference", scale=1.0
        )
        counts = [-(-n // w) for n, w in zip(size, window, strict=True)]

        def home(place: int, axis: int) -> tuple[int, int, bool]:
            """Window, token and whether it was carried around, of a place of an axis."""
            length = counts[axis] * window[axis]  # noqa: B023
            rolled = (place - shift[axis]) % length  # noqa: B023
            wrapped = place < shift[axis]  # noqa: B023
            if kind == "grid":  # noqa: B023
                return rolled % counts[axis], rolled // counts[axis], wrapped  # noqa: B023
            return rolled // window[axis], rolled % window[axis], wrapped  # noqa: B023

        for y, x in itertools.product(range(size[0]), range(size[1])):
            mine = home(y, 0), home(x, 1)
            scores, values = [], []
            for y2, x2 in itertools.product(range(size[0]), range(size[1])):
                theirs = home(y2, 0), home(x2, 1)
                if all(a[0] == b[0] and a[2] == b[2] for a, b in zip(mine, theirs, strict=True)):
                    row, column = (pair[0][1] * window[1] + pair[1][1] for pair in (mine, theirs))
                    scores.append(q[0, y, x, 0] @ k[0, y2, x2, 0] + bias[0, row, column])
                    values.append(v[0, y2, x2, 0])
            expected = torch.stack(scores).softmax(0) @ torch.stack(values)
            torch.testing.assert_close(out[0, y, x, 0], expected)  # type: ignore[index]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("size", "shift"), [((8, 12), (2, 2)), ((8, 8), (0, 3)), ((4, 8), (1, 0))])
def test_a_shift_is_the_released_roll_and_mask(size: tuple[int, int], shift: tuple[int, int], backend: str) -> None:
    """Against the mask that timm's Swin builds for its rolled and partitioned map."""
    swin = pytest.importorskip("timm.models.swin_transformer")
    block = swin.SwinTransformerBlock(8, size, 2, window_size=4, shift_size=shift, always_partition=True)
    q, k, v = (t.double() for t in inputs(*size, batch=2))

    def windows(x: Tensor) -> Tensor:
        rolled = x.flatten(3).roll((-shift[0], -shift[1]), (1, 2))
        return swin.window_partition(rolled, (4, 4)).view(2, -1, 16, 2, 16).transpose(2, 3)

    mask = block.get_attn_mask(dtype=torch.float64)[:, None]
    out = F.scaled_dot_product_attention(windows(q), windows(k), windows(v), attn_mask=mask)
    out = swin.window_reverse(out.transpose(2, 3).reshape(-1, 4, 4, 32), (4, 4), *size)
    expected = out.roll(shift, (1, 2)).view_as(q)
    ours = window_attention(q, k, v, 4, shift=shift, shift_mask="released", backend=backend)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", ["window", "grid"])
def test_partitions_are_those_of_maxvit(kind: str, backend: str) -> None:
    maxvit = pytest.importorskip("timm.models.maxxvit")
    q, k, v = (t.double() for t in inputs(6, 12, batch=2))
    size = [3, 4]
    split = maxvit.grid_partition if kind == "grid" else maxvit.window_partition
    join = maxvit.grid_reverse if kind == "grid" else maxvit.window_reverse
    a, b, c = (split(t.flatten(3), size).view(-1, 12, 2, 16).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(a, b, c).transpose(1, 2).reshape(-1, 3, 4, 32)
    ours = window_attention(q, k, v, (3, 4), kind=kind, backend=backend)
    torch.testing.assert_close(ours, join(out, size, [6, 12]).view_as(q))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_the_whole_map_is_full_attention(backend: str) -> None:
    q, k, v = inputs(5, 6)
    full = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)))
    for kind in ("window", "grid"):
        out = window_attention(q, k, v, (5, 6), kind=kind, backend=backend)
        assert isinstance(out, Tensor)
        torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), full, rtol=1e-5, atol=1e-5)


def test_a_projection_without_bias_makes_padding_zero_the_released_one() -> None:
    """Padding the map before a projection without a bias is padding='zero' after it."""
    x, weight = torch.randn(1, 5, 6, 8).double(), torch.randn(24, 8).double()

    def project(x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, weight).unflatten(-1, (3, 2, 4)).unbind(3)

    padded = window_attention(*project(F.pad(x, (0, 0, 0, 2, 0, 3))), 4, shift=1)
    assert isinstance(padded, Tensor)
    torch.testing.assert_close(window_attention(*project(x), 4, shift=1, padding="zero"), padded[:, :5, :6])


@pytest.mark.parametrize("window", [(3, 5), (4, 4), (1, 6)])
def test_relative_tables_are_read_as_timm_reads_them(window: tuple[int, int]) -> None:
    relative = pytest.importorskip("timm.layers.pos_embed_rel")
    flat, square = relative.RelPosBias(window, num_heads=3), relative.RelPosBiasTf(window, num_heads=3)
    for module, layouts in ((flat, ("swin", "maxvit")), (square, ("maxvit_tf",))):
        table = module.relative_position_bias_table
        torch.nn.init.normal_(table)
        expected = module.get_bias().reshape(3, window[0] * window[1], -1)
        cotangent = torch.randn_like(expected)
        (expected_gradient,) = torch.autograd.grad(expected, table, cotangent)
        for layout in layouts:
            bias = relative_position_bias(table, window, layout)
            torch.testing.assert_close(bias, expected)
            (gradient,) = torch.autograd.grad(bias, table, cotangent)
            torch.testing.assert_close(gradient, expected_gradient)


# --------------------------------------------------------------------------------------- layouts, values, isolation


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_one_projection_in_either_order_of_channels(backend: str) -> None:
    fused = torch.randn(2, 4, 6, 3, 2, 16)  # projection first
    head_first = torch.randn(2, 4, 6, 2, 3, 16)

    def call(fused: Tensor, axis: int, backend: str) -> object:
        return window_attention(*fused.unbind(axis), (2, 3), shift=1, backend=backend)

    for x, axis in ((fused, 3), (head_first, 4)):
        assert_matches(partial(call, axis=axis, backend=backend), partial(call, axis=axis, backend="reference"), [x])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    call = partial(attention, window_size=2)
    q, k, v = inputs(4, 6)
    channels_first = torch.randn(1, 2, 16, 4, 6).permute(0, 3, 4, 1, 2)
    flipped_grid = torch.randn(1, 6, 4, 2, 16).transpose(1, 2)
    offset = torch.randn(1 + q.numel())[1:].view_as(q)
    expanded = k[:, :1].expand(1, 4, 6, 2, 16)
    for tensors in ([channels_first, flipped_grid, v], [offset, expanded, channels_first]):
        assert_matches(partial(call, backend=backend), partial(call, backend="reference"), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("padding", "value"), [("hide", torch.nan), ("zero", torch.inf)])
def test_what_lies_outside_the_map_is_not_read(padding: str, value: float, backend: str) -> None:
    call = partial(attention, window_size=(3, 4), shift=2, padding=padding)
    for size, window in (((5, 6), (3, 4)), ((7, 8), (9, 8))):
        spoiled = [poisoned(t, value) for t in inputs(*size, heads=1, channels=12)]
        call = partial(call, window_size=window)
        assert_matches(partial(call, backend=backend), partial(call, backend="reference"), spoiled)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(2, 3), (8, 9)])
def test_a_window_is_blind_to_the_others(window: tuple[int, int], backend: str) -> None:
    tensors = inputs(8, 18)
    before = window_attention(*tensors, window, backend=backend)
    for t in tensors:
        t[:, :, 9:] = torch.nan
    after = window_attention(*tensors, window, backend=backend)
    assert torch.equal(before[:, :, :9], after[:, :, :9])  # type: ignore[index]
    assert after[:, :, 9:].isnan().all()  # type: ignore[index]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [4, (8, 12)])
def test_tokens_on_two_sides_of_an_edge_do_not_see_each_other(window: int | tuple[int, int], backend: str) -> None:
    q, k, v = inputs(8, 12)
    before = window_attention(q, k, v, window, shift=2, backend=backend)
    k[:, :2], v[:, :2] = 50 * torch.randn(2, 1, 2, 12, 2, 16)  # carried from the top to the bottom
    after = window_attention(q, k, v, window, shift=2, backend=backend)
    assert torch.equal(before[:, 2:], after[:, 2:])  # type: ignore[index]
    assert not torch.equal(before[:, :2], after[:, :2])  # type: ignore[index]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [3, (9, 9)])
def test_large_scores_and_outliers_stay_finite(window: int | tuple[int, int], backend: str) -> None:
    q, k, v = inputs(9, 9, heads=1)
    k[0, 4, 4] *= 1e4
    call = partial(attention, window_size=window)
    # Scores of 1e4 hold three digits after the point in float32.
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), [q, k, v], scale=30)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_bit_for_bit(backend: str) -> None:
    tensors = [t.requires_grad_() for t in inputs(6, 9, batch=2)]
    bias = torch.randn(2, 9, 9, requires_grad=True)
    runs = []
    for _ in range(2):
        out = window_attention(*tensors, 3, bias=bias, backend=backend)
        assert isinstance(out, Tensor)
        runs.append([out, *torch.autograd.grad(out.square().sum(), [*tensors, bias])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_maps_and_no_tokens(backend: str) -> None:
    bias = torch.randn(2, 4, 4, requires_grad=True)
    for shape in ((0, 4, 4, 2, 16), (2, 0, 4, 2, 16)):
        x = torch.zeros(shape, requires_grad=True)
        out, lse = window_attention(x, x, x, 2, bias=bias, return_lse=True, backend=backend)
        assert out.shape == shape and lse.shape == shape[:4]
        d_x, d_bias = torch.autograd.grad(out.sum(), [x, bias])
        assert d_x.shape == shape and (d_bias == 0).all()


@pytest.mark.parametrize("fused", [True, False])
def test_chunks_change_nothing(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One window at a time gives what all at once give."""
    tensors = inputs(7, 10, batch=2, channels=8)
    bias = torch.randn(2, 9, 9)
    call = partial(attention, window_size=3, shift=1, padding="hide", backend="torch")
    if fused:
        call = partial(call, bias=bias.double())
        tensors = [t.double() for t in tensors]
    else:
        tensors = [*tensors, bias]
    for most in (1, 700, 1500):
        monkeypatch.setattr(eager, "TOKENS_AT_ONCE", most)
        monkeypatch.setattr(eager, "SCORES_AT_ONCE", most)
        assert_matches(call, partial(call, backend="reference"), tensors)


def test_spans_cover_each_token_once() -> None:
    for length, window, grid in itertools.product(range(1, 12), range(1, 6), (False, True)):
        for shift in range(1 if grid else window):
            axis = Axis(length, window, grid, shift)
            found = spans(axis)
            assert sum(span.count for span in found) == axis.windows and len(found) <= 4
            places = [
                piece.position + i * axis.window_step + t * axis.token_step
                for span in found
                for piece in span.pieces
                for i in range(span.count)
                for t in range(piece.stop - piece.start)
            ]
            assert sorted(places) == list(range(length))


def test_places_beyond_32_bits_take_wide_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.window_attention import triton_path

    monkeypatch.setattr(triton_path, "NARROW", 0)
    for window in (3, (9, 9)):
        call = partial(attention, window_size=window, shift=1)
        assert_matches(partial(call, backend="triton"), partial(call, backend="reference"), inputs(9, 9, heads=1))


# --------------------------------------------------------------------------------------- PyTorch's machinery


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_an_operator_to_the_compiler(backend: str) -> None:
    tensors = inputs(4, 6)
    call = partial(attention, window_size=(2, 3), shift=1, backend=backend)
    assert_compiles(call, tensors)
    assert_compiles(call, [*tensors, torch.randn(2, 6, 6)])
    assert_any_incoming_gradient(call, [*tensors, torch.randn(2, 6, 6)])


def test_the_table_and_the_operator_compile_together() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> object:
        return window_attention(q, k, v, 2, bias=relative_position_bias(table, 2), backend="torch")

    assert_compiles(call, [*inputs(4, 4), torch.randn(9, 2)])


def test_it_is_registered_properly() -> None:
    q, k, v = inputs(4, 6)
    q.requires_grad_()
    bias = torch.randn(2, 6, 6, requires_grad=True)
    for added, options in (
        (None, ([2, 3], False, [1, 0], False, True)),
        (bias, ([2, 3], True, [0, 0], True, False)),
    ):
        assert_opcheck(torch.ops.fovea.window_attention.default, (q, k, v, added, *options, 0.3, "torch"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_numerical_gradients(backend: str) -> None:
    tensors = inputs(3, 4, channels=3, value_channels=2)
    call = partial(attention, window_size=2, shift=1, padding="hide", backend=backend)
    assert_gradcheck(call, [*tensors, torch.randn(2, 4, 4)])
    assert_gradcheck(lambda *t: call(*t)[0], inputs(3, 2, channels=2))


@pytest.mark.parametrize("used", ["out", "lse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_either_output_alone_has_gradients(backend: str, used: str) -> None:
    call = partial(attention, window_size=3)
    pick = int(used == "lse")
    assert_matches(
        lambda *t: call(*t, backend=backend)[pick],
        lambda *t: call(*t, backend="reference")[pick],
        [*inputs(6, 3), torch.randn(2, 9, 9)],
    )


def test_only_the_bias_has_a_gradient() -> None:
    q, k, v = inputs(4, 4)
    bias = torch.randn(2, 4, 4, requires_grad=True)
    gradients = []
    for backend in [*BACKENDS, "reference"]:
        out = window_attention(q, k, v, 2, bias=bias, backend=backend)
        assert isinstance(out, Tensor)
        gradients.append(torch.autograd.grad(out.square().sum(), bias)[0])
    for gradient in gradients[:-1]:
        torch.testing.assert_close(gradient, gradients[-1], rtol=1e-4, atol=1e-4)


def test_autocast() -> None:
    call = partial(attention, window_size=3, shift=1)
    assert_runs_under_autocast(call, [*inputs(6, 6), torch.randn(2, 9, 9)], torch.bfloat16)


def test_half_precision_is_near_float64() -> None:
    tensors = inputs(6, 12, channels=32)
    for window in (3, (6, 12)):
        call = partial(attention, window_size=window)
        for dtype in (torch.float16, torch.bfloat16):
            half = [t.to(dtype) for t in tensors]
            assert_matches(partial(call, backend="torch"), partial(call, backend="reference"), half)
        half = [t.half() for t in tensors]
        assert_matches(partial(call, backend="triton"), partial(call, backend="reference"), half)


def test_the_choice_is_explained_and_never_silent() -> None:
    q, k, v = inputs(6, 6)
    assert explain("window_attention", q, k, v, 3).backend == "torch"
    assert "asks for it" in str(explain(window_attention, q, k, v, 3, backend="reference"))
    wide = torch.zeros(1, 2, 2, 1, 160)
    with pytest.raises(InputError, match="160 wide and the kernels take up to 128 of float32"):
        window_attention(wide, wide, wide, 2, backend="triton")
    with pytest.raises(InputError, match="Did you mean 'triton'"):
        window_attention(q, k, v, 3, backend="tritn")


def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    q, k, v = inputs(6, 6)
    for message, arguments, options in (
        (r"q and k \(B, H, W, heads, D\)", (q, k[:, :3], v, 3), {}),
        ("does not divide the map 6 x 6", (q, k, v, 4), {}),
        ("window_size must be at least 1", (q, k, v, (3, 0)), {}),
        ("less than the window", (q, k, v, 3), {"shift": 3}),
        ("takes no shift", (q, k, v, 3), {"shift": 1, "kind": "grid"}),
        (r"= \(2, 9, 9\); got \(2, 9, 8\)", (q, k, v, 3), {"bias": torch.zeros(2, 9, 8)}),
        ("Did you mean 'window'", (q, k, v, 3), {"kind": "windw"}),
        ("Did you mean 'hidden'", (q, k, v, 3), {"shift_mask": "hiden"}),
        ("Did you mean 'zero'", (q, k, v, 3), {"padding": "zeros"}),
    ):
        with pytest.raises(InputError, match=message):
            window_attention(*arguments, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"layout 'swin' is \(25, heads\); got \(24, 2\)"):
        relative_position_bias(torch.zeros(24, 2), 3)
    with pytest.raises(InputError, match=r"is \(heads, 5, 3\)"):
        relative_position_bias(torch.zeros(15, 2), (3, 2), "maxvit_tf")
    with pytest.raises(InputError, match="Did you mean 'maxvit_tf'"):
        relative_position_bias(torch.zeros(25, 2), 3, "maxvit-tf")


# --------------------------------------------------------------------------------------- on a GPU

LARGE: dict[str, tuple[tuple[int, int], int, dict]] = {
    "Swin": ((56, 56), 7, {}),
    "Swin, shifted": ((56, 56), 7, {"shift": 3}),
    "Swin, extended and shifted": ((61, 50), 7, {"shift": 3, "padding": "hide"}),
    "window of 4": ((32, 32), 4, {}),
    "MaxViT grid": ((56, 56), 7, {"kind": "grid"}),
    "window of 16": ((64, 64), 16, {"shift": 8, "shift_mask": "released"}),
    "window of 12, extended": ((60, 50), 12, {"padding": "zero"}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("case", LARGE)
def test_large_maps_on_a_gpu(case: str, channels: int, dtype: torch.dtype) -> None:
    size, window, options = LARGE[case]
    qkv = torch.randn(2, *size, 3, 4, channels, device="cuda").to(dtype)
    bias = torch.randn(4, window**2, window**2, device="cuda")
    call = partial(attention, window_size=window, **options)
    for added in (bias, None):
        assert_matches(
            partial(call, backend="triton"), partial(call, backend="reference"), [*qkv.unbind(3), added], scale=2
        )


@pytest.mark.gpu
def test_two_runs_on_a_gpu_are_equal_bit_for_bit() -> None:
    for side, window in ((56, 7), (64, 16)):
        tensors = [torch.randn(4, side, side, 4, 32, device="cuda", requires_grad=True) for _ in range(3)]
        bias = torch.randn(4, window**2, window**2, device="cuda", requires_grad=True)
        runs = []
        for _ in range(2):
            out = window_attention(*tensors, window, bias=bias, backend="triton")
            assert isinstance(out, Tensor)
            runs.append([out, *torch.autograd.grad(out.square().sum(), [*tensors, bias])])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
