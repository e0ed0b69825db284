"""Dynamic convolutions and outlook attention: every backend against the reference and against the plain formulas."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import explain, using
from kernels.dynamic_conv import dynamic_conv, outlook
from kernels.errors import InputError
from tests.kernels.contract import (
    assert_any_incoming_gradient,
    assert_compiles,
    assert_gradcheck,
    assert_matches,
    assert_runs_under_autocast,
    poisoned,
)

BACKENDS = ["torch", "triton"]


def inputs(
    grid: tuple[int, ...], taps: int, groups: int = 1, channels: int = 6, batch: int = 1, channels_last: bool = False
) -> list[Tensor]:
    value = torch.randn(batch, channels, *grid)
    if channels_last:
        value = value.movedim(1, -1).contiguous().movedim(-1, 1)
    return [value, torch.randn(batch, groups, *grid, taps)]


def unfolded(value: Tensor, weights: Tensor, kernel: int, dilation: int) -> Tensor:
    """Zero-padded dynamic convolution by unfolding, odd windows."""
    batch, channels, height, width = value.shape
    seen = F.unfold(value, kernel, dilation=dilation, padding=kernel // 2 * dilation)
    seen = seen.view(batch, weights.shape[1], channels // weights.shape[1], kernel**2, height, width)
    return torch.einsum("bghwk,bgckhw->bgchw", weights, seen).reshape(value.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["shift", "zero"])
@pytest.mark.parametrize(
    ("grid", "kernel", "groups", "batch", "channels_last"),
    [
        ((7, 9), 5, 2, 1, False),
        ((6, 5), 3, 1, 2, True),
        ((7, 6), (4, 3), 3, 1, True),
        ((11,), 4, 2, 1, False),
        ((3, 5, 4), (1, 3, 2), 2, 1, True),
    ],
)
def test_it_matches_the_reference(
    grid: tuple[int, ...],
    kernel: int | tuple[int, ...],
    groups: int,
    batch: int,
    channels_last: bool,
    padding: str,
    backend: str,
) -> None:
    taps = kernel ** len(grid) if isinstance(kernel, int) else torch.tensor(kernel).prod().item()
    tensors = inputs(grid, taps, groups, batch=batch, channels_last=channels_last)
    call = partial(dynamic_conv, kernel_size=kernel, padding=padding)
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), tensors)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2)])
def test_zero_padding_is_that_of_unfold(kernel: int, dilation: int, backend: str) -> None:
    tensors = inputs((5, 6), kernel**2, groups=2)
    call = partial(dynamic_conv, kernel_size=kernel, dilation=dilation, padding="zero", backend=backend)
    assert_matches(call, partial(unfolded, kernel=kernel, dilation=dilation), tensors)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_kernel_that_is_the_same_everywhere_is_a_depthwise_convolution(backend: str) -> None:
    value, kernel = torch.randn(2, 4, 6, 7), torch.randn(4, 1, 3, 3)
    weights = kernel.view(1, 4, 1, 1, 9).expand(2, 4, 6, 7, 9)
    out = dynamic_conv(value, weights, 3, padding="zero", backend=backend)
    torch.testing.assert_close(out, F.conv2d(value, kernel, padding=1, groups=4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["shift", "zero"])
def test_kernels_of_the_identity_give_the_input(padding: str, backend: str) -> None:
    value = torch.randn(1, 4, 6, 8)
    y, x = torch.arange(6), torch.arange(8)
    start_y, start_x = ((y - 1).clamp(0, 3), (x - 1).clamp(0, 5)) if padding == "shift" else (y - 1, x - 1)
    own = (y - start_y)[:, None] * 3 + x - start_x
    weights = F.one_hot(own, 9).float().expand(1, 2, 6, 8, 9)
    torch.testing.assert_close(dynamic_conv(value, weights, 3, padding=padding, backend=backend), value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layout_of_the_input_is_kept_and_changes_nothing(backend: str) -> None:
    value, weights = inputs((6, 7), 9, groups=2, batch=2)
    plain = dynamic_conv(value, weights, 3, backend=backend)
    last = dynamic_conv(value.contiguous(memory_format=torch.channels_last), weights, 3, backend=backend)
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, plain, rtol=1e-6, atol=1e-6)
    channels_first = weights.movedim(-1, 2).contiguous()  # (B, G, K K, H, W), as a convolution makes them
    given = dynamic_conv(value, channels_first.movedim(2, -1), 3, backend=backend)
    torch.testing.assert_close(given, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_outside_the_tensors_is_not_read(backend: str) -> None:
    value, weights = inputs((5, 6), 9, groups=2)
    channels_last = poisoned(value.movedim(1, -1)).movedim(-1, 1)
    for padding in ("shift", "zero"):
        call = partial(dynamic_conv, kernel_size=3, padding=padding)
        tensors = [channels_last, poisoned(weights)]
        assert_matches(partial(call, backend=backend), partial(call, backend="reference"), tensors)


# ----------------------------------------------------------------------------------------------------------- outlook


def folded(attn: Tensor, value: Tensor, stride: int) -> Tensor:
    """Outlook attention patch by patch, 3 x 3 with a margin of 1."""
    batch, heads, height, width, channels = value.shape
    padded = F.pad(value, (0, 0, 1, 1, 1, 1))
    out = torch.zeros_like(padded)
    for i in range(attn.shape[2]):
        for j in range(attn.shape[3]):
            window = (slice(None), slice(None), slice(i * stride, i * stride + 3), slice(j * stride, j * stride + 3))
            patch = padded[window].reshape(batch, heads, 9, channels)
            mixed = (attn[:, :, i, j] @ patch).view(batch, heads, 3, 3, channels)
            out = out + _placed(mixed, out, window)
    return out[:, :, 1 : height + 1, 1 : width + 1]


def _placed(patch: Tensor, like: Tensor, window: tuple[slice, ...]) -> Tensor:
    placed = torch.zeros_like(like)
    placed[window] = patch
    return placed


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_outlook_attention_unfolds_mixes_and_folds(stride: int, backend: str) -> None:
    patches = [(n - 1) // stride + 1 for n in (5, 6)]
    tensors = [torch.randn(1, 2, *patches, 9, 9), torch.randn(1, 2, 5, 6, 4)]
    call = partial(outlook, kernel_size=3, stride=stride, backend=backend)
    assert_matches(call, partial(folded, stride=stride), tensors)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((3, 5), 2, (1, 1)), (2, 2, 0), (2, 1, 1), (4, 3, None), (3, 5, 0), (5, 1, 4)]
)
def test_outlook_windows_of_any_shape(
    kernel: int | tuple[int, int], stride: int, padding: int | tuple[int, int] | None
) -> None:
    k = (kernel, kernel) if isinstance(kernel, int) else kernel
    p = padding if padding is not None else (k[0] // 2, k[1] // 2)
    p = (p, p) if isinstance(p, int) else p
    patches = [(n + 2 * m - side) // stride + 1 for n, m, side in zip((7, 9), p, k, strict=True)]
    tensors = [torch.randn(2, 2, *patches, k[0] * k[1], k[0] * k[1]), torch.randn(2, 2, 7, 9, 5)]
    call = partial(outlook, kernel_size=kernel, stride=stride, padding=padding)
    assert_matches(partial(call, backend="torch"), partial(call, backend="reference"), tensors)


# -------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_are_operators_to_the_compiler(backend: str) -> None:
    tensors = inputs((4, 5), 9, groups=2, channels_last=True)
    call = partial(dynamic_conv, kernel_size=3, backend=backend)
    assert_compiles(call, tensors)
    assert_any_incoming_gradient(call, tensors)


def test_outlook_attention_is_one_graph_to_the_compiler() -> None:
    call = partial(outlook, kernel_size=3, stride=2, backend="torch")
    assert_compiles(call, [torch.randn(1, 1, 2, 2, 9, 9), torch.randn(1, 1, 4, 4, 3)])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_numerical_gradients(backend: str) -> None:
    for padding in ("shift", "zero"):
        call = partial(dynamic_conv, kernel_size=(2, 3), padding=padding, backend=backend)
        assert_gradcheck(call, inputs((2, 3), 6, groups=2, channels=4))
    call = partial(outlook, kernel_size=2, stride=2, backend=backend)
    assert_gradcheck(call, [torch.randn(1, 1, 2, 2, 4, 4), torch.randn(1, 1, 3, 3, 2)])


def test_autocast() -> None:
    assert_runs_under_autocast(partial(dynamic_conv, kernel_size=3), inputs((5, 6), 9, groups=2), torch.bfloat16)
    tensors = [torch.randn(1, 2, 3, 3, 9, 9).softmax(-1), torch.randn(1, 2, 5, 6, 4)]
    assert_runs_under_autocast(partial(outlook, kernel_size=3, stride=2), tensors, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend: str) -> None:
    value, weights = inputs((5, 6), 9, groups=2, batch=0)
    out = dynamic_conv(value.requires_grad_(), weights.requires_grad_(), 3, backend=backend)
    assert out.shape == value.shape
    out.sum().backward()
    assert value.grad is not None and weights.grad is not None and weights.grad.shape == weights.shape


def test_the_choice_is_explained_and_wrong_input_is_told() -> None:
    value, weights = inputs((5, 6), 9, groups=2)
    assert explain(dynamic_conv, value, weights, 3).backend == "torch"
    with using(backend="reference"):
        assert explain("dynamic_conv", value, weights, 3).backend == "reference"
    with pytest.raises(InputError, match="6 channels are not a multiple of 4 groups"):
        dynamic_conv(value, torch.randn(1, 4, 5, 6, 9), 3)
    with pytest.raises(InputError, match=r"takes weights \(B, G, \*grid, P\)"):
        dynamic_conv(value, weights, 5)
    with pytest.raises(InputError, match="more than the 5 tokens"):
        dynamic_conv(value, torch.randn(1, 2, 5, 6, 49), 7)
    with pytest.raises(InputError, match="'reflect' is not known"):
        dynamic_conv(value, weights, 3, padding="reflect")
    with pytest.raises(InputError, match="cast one to the other's dtype"):
        dynamic_conv(value.half(), weights, 3)
    with pytest.raises(InputError, match="cannot serve because Triton serves float32"):
        dynamic_conv(value.double(), weights.double(), 3, backend="triton")
    with pytest.raises(InputError, match="300 wide"):
        dynamic_conv(torch.zeros(1, 300, 3, 3), torch.zeros(1, 1, 3, 3, 9), 3, backend="triton")
    with pytest.raises(InputError, match="outlook takes attn"):
        outlook(torch.zeros(1, 1, 5, 6, 9, 9), torch.zeros(1, 1, 5, 6, 4), 3, stride=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("side", "kernel", "groups", "channels"), [(28, 17, 8, 128), (28, 5, 4, 96), (14, 13, 3, 72)])
def test_contmix_sizes_on_a_gpu(side: int, kernel: int, groups: int, channels: int, dtype: torch.dtype) -> None:
    value = torch.randn(2, channels, side, side, device="cuda").to(dtype)
    weights = torch.randn(2, groups, side, side, kernel**2, device="cuda").softmax(-1).to(dtype)
    for padding in ("shift", "zero"):
        for layout in (torch.contiguous_format, torch.channels_last):
            call = partial(dynamic_conv, kernel_size=kernel, padding=padding)
            tensors = [value.contiguous(memory_format=layout), weights]
            assert_matches(partial(call, backend="triton"), partial(call, backend="torch"), tensors)
