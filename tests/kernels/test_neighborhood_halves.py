"""The halves of neighbourhood attention: against the reference, brute force and the published operators."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.backend import explain
from kernels.dynamic_conv import band, eager, neighborhood_av, neighborhood_qk, sparse
from kernels.dynamic_conv.taps import taps
from kernels.errors import InputError
from kernels.windows import window, window_mask
from tests.kernels.contract import (
    assert_any_incoming_gradient,
    assert_compiles,
    assert_gradcheck,
    assert_matches,
    assert_opcheck,
    assert_runs_under_autocast,
    poisoned,
)
from tests.parity.harness import case_paths, load_case

BACKENDS = ["torch", "triton"]
PARITY = ["kern_na1d_rpb", "kern_na2d_rpb", "kern_na2d_rpb_k7", "kern_na3d_rpb"]

# grid, kernel, dilation, width of a head
WINDOWS = {
    "1-D": ((13,), (5,), (2,), 5),
    "1-D exactly fitting": ((12,), (4,), (3,), 4),
    "square": ((7, 9), (5, 5), (1, 1), 8),
    "even": ((7, 6), (4, 2), (1, 1), 12),
    "dilated unevenly": ((7, 9), (3, 2), (2, 3), 5),
    "the whole map": ((4, 5), (4, 5), (1, 1), 20),
    "a strip": ((1, 17), (1, 7), (1, 2), 3),
    "an axis of two": ((2, 9), (2, 3), (1, 1), 17),
    "3-D": ((4, 5, 4), (3, 2, 3), (1, 2, 1), 6),
}


def tensors_of(name: str, heads: int = 1, batch: int = 1) -> tuple[list[Tensor], dict[str, object]]:
    grid, kernel, dilation, width = WINDOWS[name]
    q, k, v = (torch.randn(batch, heads, *grid, width) for _ in range(3))
    attn = torch.randn(batch, heads, *grid, math.prod(kernel))
    rpb = torch.randn(heads, *(2 * n - 1 for n in kernel))
    return [q, k, v, attn, rpb], {"kernel_size": kernel, "dilation": dilation}


def logits(q: Tensor, k: Tensor, rpb: Tensor | None = None, **options: object) -> Tensor:
    return neighborhood_qk(q, k, rpb=rpb, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["shift", "zero"])
@pytest.mark.parametrize("name", WINDOWS)
def test_they_match_the_reference(name: str, padding: str, backend: str) -> None:
    (q, k, v, attn, rpb), options = tensors_of(name)
    for call, tensors in ((neighborhood_av, [attn, v]), (logits, [q, k, rpb])):
        bound = partial(call, **options, padding=padding)
        assert_matches(partial(bound, backend=backend), partial(bound, backend="reference"), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_images_and_heads(backend: str) -> None:
    (q, k, v, attn, rpb), options = tensors_of("1-D", heads=2, batch=2)
    for call, tensors in ((neighborhood_av, [attn, v]), (partial(logits, scale=0.0), [q, k, rpb])):
        bound = partial(call, **options)
        assert_matches(partial(bound, backend=backend), partial(bound, backend="reference"), tensors)


@pytest.mark.parametrize("method", [sparse, band])
@pytest.mark.parametrize("padding", ["shift", "zero"])
@pytest.mark.parametrize("name", WINDOWS)
def test_sparse_and_dense_products_alike(
    name: str, padding: str, method: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method is sparse and not sparse.available():
        pytest.skip("this PyTorch has no fast sparse products")
    monkeypatch.setattr(eager, "_method", lambda *_: method)
    monkeypatch.setattr(sparse, "TAPS_AT_ONCE", 400)  # several heads a time, and a last time with fewer
    monkeypatch.setattr(band, "LEAST_BAND", 6)
    monkeypatch.setattr(band, "SMALL_GRID", 0)
    band._bands.cache_clear()
    (q, k, v, attn, rpb), options = tensors_of(name, heads=3, batch=3)
    for call, tensors in ((neighborhood_av, [attn, v]), (logits, [q, k, rpb])):
        bound = partial(call, **options, padding=padding)
        assert_matches(partial(bound, backend="torch"), partial(bound, backend="reference"), tensors)
    band._bands.cache_clear()


def test_wide_windows_on_a_cpu() -> None:
    q, k, v = (torch.randn(1, 2, 14, 14, 16) for _ in range(3))
    attn = torch.randn(1, 2, 14, 14, 169)
    for call, tensors in ((neighborhood_av, [attn, v]), (logits, [q, k, torch.randn(2, 25, 25)])):
        bound = partial(call, kernel_size=13)
        assert_matches(partial(bound, backend="torch"), partial(bound, backend="reference"), tensors)


# ------------------------------------------------------------------------------------------------- what they must mean


def by_force(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Neighbourhood attention by dense attention under a mask, with the bias looked up pair by pair."""
    grid, heads = q.shape[2:-1], q.shape[1]
    mask = window_mask(window(grid, kernel, dilation=dilation))
    bias = q.new_zeros(heads, *mask.shape)
    places = list(itertools.product(*(range(n) for n in grid)))
    for i, j in mask.nonzero().tolist():
        steps = [(b - a) // d + n - 1 for a, b, n, d in zip(places[i], places[j], kernel, dilation, strict=True)]
        bias[:, i, j] = rpb[(slice(None), *steps)]
    a, b, c = (t.flatten(2, -2) for t in (q, k, v))
    scores = (a @ b.mT * q.shape[-1] ** -0.5 + bias).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ c).view(q.shape)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("name", ["1-D", "even", "dilated unevenly", "3-D", "the whole map"])
def test_logits_softmax_and_sum_are_neighbourhood_attention(name: str, backend: str) -> None:
    (q, k, v, _, rpb), options = tensors_of(name)

    def halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = neighborhood_qk(q, k, rpb=rpb.to(q), backend=backend, **options).softmax(-1)  # type: ignore[arg-type]
        return neighborhood_av(weights, v, backend=backend, **options)  # type: ignore[arg-type]

    def force(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_force(q, k, v, rpb.to(q), *WINDOWS[name][1:3])

    assert_matches(halves, force, [q, k, v])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_the_whole_map_is_dense(backend: str) -> None:
    (q, k, v, attn, _), options = tensors_of("the whole map", heads=2)
    a, b, c = (t.flatten(2, -2) for t in (q, k, v))
    torch.testing.assert_close(
        neighborhood_qk(q, k, scale=1.0, backend=backend, **options).flatten(2, -2), a @ b.mT, rtol=1e-5, atol=1e-5
    )
    out = neighborhood_av(attn, v, backend=backend, **options)
    torch.testing.assert_close(out.flatten(2, -2), attn.flatten(2, -2) @ c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_keys_beyond_the_grid_have_the_logit_of_a_zero(backend: str) -> None:
    q, k, rpb = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 5)
    got = neighborhood_qk(q, k, 3, rpb=rpb, padding="zero", backend=backend)
    torch.testing.assert_close(got[0, 0, 0, 0], rpb[0, 1])  # one step before the first token
    torch.testing.assert_close(got[0, 0, 4, 2], rpb[0, 3])
    torch.testing.assert_close(got[0, 0, 2, 0], q[0, 0, 2] @ k[0, 0, 1] / 2 + rpb[0, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_heads_and_grid_changes_nothing(backend: str) -> None:
    (q, k, v, attn, rpb), options = tensors_of("an axis of two", heads=2)

    def heads_last(*tensors: Tensor) -> list[Tensor]:
        return [t.movedim(1, -2).contiguous() for t in tensors]

    out = neighborhood_av(*heads_last(attn, v), heads_first=False, backend=backend, **options)
    assert out.is_contiguous()
    expected = neighborhood_av(attn, v, backend=backend, **options)
    torch.testing.assert_close(out.movedim(-2, 1), expected, rtol=1e-6, atol=1e-6)
    made = neighborhood_qk(*heads_last(q, k), rpb=rpb, heads_first=False, backend=backend, **options)
    assert made.is_contiguous()
    expected = neighborhood_qk(q, k, rpb=rpb, backend=backend, **options)
    torch.testing.assert_close(made.movedim(-2, 1), expected, rtol=1e-6, atol=1e-6)
    last = partial(neighborhood_av, heads_first=False, **options)
    assert_matches(partial(last, backend=backend), partial(last, backend="reference"), heads_last(attn, v))
    last = partial(logits, heads_first=False, **options)
    assert_matches(partial(last, backend=backend), partial(last, backend="reference"), [*heads_last(q, k), rpb])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_is_blind_to_those_outside_its_window(backend: str) -> None:
    v, attn = torch.randn(1, 1, 6, 7, 4), torch.randn(1, 1, 6, 7, 9)
    before = neighborhood_av(attn, v, 3, backend=backend)
    seen = window_mask(window((6, 7), 3)).view(42, 6, 7)
    for token in (0, 17, 41):
        other = torch.where(seen[token][..., None], v, 1e3 * torch.randn_like(v))
        after = neighborhood_av(attn, other, 3, backend=backend)
        assert torch.equal(before.view(42, 4)[token], after.view(42, 4)[token])
        assert not torch.equal(before, after)


@pytest.mark.parametrize("name", PARITY)
def test_they_reproduce_the_released_operators(name: str) -> None:
    if name not in case_paths():
        pytest.skip("the shared parity tensors are not beside this checkout")
    case = load_case(case_paths()[name])
    q, k, v, rpb = (case.inputs[n].requires_grad_() for n in ("q", "k", "v", "rpb"))
    options = {"dilation": case.config["dilation"], "heads_first": False}
    made = neighborhood_qk(q, k, case.config["kernel_size"], rpb=rpb, scale=case.config["scale"], **options)
    out = neighborhood_av(made.softmax(-1), v, case.config["kernel_size"], **options)
    out.backward(case.inputs["grad_out"])
    got = {"output.logits": made, "output.out": out, "output.lse": made.logsumexp(-1)}
    got |= {f"grad.{n}": t.grad for n, t in (("q", q), ("k", k), ("v", v), ("rpb", rpb))}
    for key, expected in case.expected.items():
        tolerance = case.tolerance * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got[key], expected, rtol=case.tolerance, atol=tolerance, msg=lambda m, n=key: n + m)


# -------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil", [torch.nan, torch.inf])
def test_what_lies_outside_the_tensors_is_not_read(spoil: float, backend: str) -> None:
    (q, k, v, attn, rpb), options = tensors_of("even")
    q, k, v, attn, rpb = (poisoned(t, spoil) for t in (q, k, v, attn, rpb))
    for call, tensors in ((neighborhood_av, [attn, v]), (logits, [q, k, rpb])):
        bound = partial(call, **options)
        assert_matches(partial(bound, backend=backend), partial(bound, backend="reference"), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_a_fused_projection(backend: str) -> None:
    fused = torch.randn(1, 5, 6, 3, 2, 4)  # (B, H, W, qkv, heads, D)
    q, k, v = fused.unbind(3)
    call = partial(neighborhood_qk, kernel_size=3, heads_first=False)
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), [q, k])
    flipped = v.permute(0, 3, 4, 1, 2)  # (B, H, D, ...): the last axis is not dense
    attn = torch.randn(1, 2, 4, 5, 3)
    call = partial(neighborhood_av, kernel_size=(1, 3))
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), [attn, flipped])


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_numbers_stay_exact(backend: str) -> None:
    (q, k, v, attn, _), options = tensors_of("square")
    q[0, 0, 3, 4] *= 1e4
    v[0, 0, 0, 0] *= 1e4
    for call, tensors in ((neighborhood_av, [attn, v]), (logits, [q, k])):
        bound = partial(call, **options)
        assert_matches(partial(bound, backend=backend), partial(bound, backend="reference"), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend: str) -> None:
    q = torch.zeros(0, 2, 5, 6, 4, requires_grad=True)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    made = neighborhood_qk(q, q, 3, rpb=rpb, backend=backend)
    out = neighborhood_av(made, q, 3, backend=backend)
    assert made.shape == (0, 2, 5, 6, 9) and out.shape == q.shape
    out.sum().backward()
    assert rpb.grad is not None and (rpb.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_table_has_a_gradient(backend: str) -> None:
    q, rpb = torch.randn(2, 2, 5, 6, 4), torch.randn(2, 5, 5, requires_grad=True)
    neighborhood_qk(q, q, 3, rpb=rpb, backend=backend).sum().backward()
    assert rpb.grad is not None
    torch.testing.assert_close(rpb.grad.sum((1, 2)), torch.full((2,), 2 * 30 * 9.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_the_same_to_the_bit(backend: str) -> None:
    (q, k, v, attn, rpb), options = tensors_of("even")
    leaves = [t.requires_grad_() for t in (q, k, v, attn, rpb)]
    runs = []
    for _ in range(2):
        made = neighborhood_qk(q, k, rpb=rpb, backend=backend, **options)
        out = neighborhood_av(made * attn, v, backend=backend, **options)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_are_operators_to_the_compiler(backend: str) -> None:
    (q, k, v, attn, rpb), options = tensors_of("1-D exactly fitting")
    assert_compiles(partial(logits, backend=backend, **options), [q, k, rpb])
    last = [t.movedim(1, -2) for t in (attn, v)]
    assert_compiles(partial(neighborhood_av, heads_first=False, backend=backend, **options), last)
    assert_any_incoming_gradient(partial(neighborhood_av, backend=backend, **options), [attn, v])
    assert_any_incoming_gradient(partial(logits, backend=backend, **options), [q, k, rpb])


def test_they_are_registered_properly() -> None:
    (q, k, v, attn, rpb), _ = tensors_of("even")
    q, k, v, attn, rpb = (t.requires_grad_() for t in (q, k, v, attn, rpb))
    av, qk = torch.ops.fovea.neighborhood_av.default, torch.ops.fovea.neighborhood_qk.default
    assert_opcheck(av, (attn, v, [4, 2], [1, 1], "shift", True, "torch"))
    last = [t.detach().movedim(1, -2).requires_grad_() for t in (attn, v)]
    assert_opcheck(av, (*last, [4, 2], [1, 1], "zero", False, "torch"))
    assert_opcheck(qk, (q, k, rpb, 0.3, [4, 2], [1, 1], "shift", True, "torch"))
    assert_opcheck(qk, (q, k, None, 0.3, [4, 2], [1, 1], "zero", True, "torch"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("padding", ["shift", "zero"])
def test_numerical_gradients(padding: str, backend: str) -> None:
    q, k, v = (torch.randn(1, 2, 3, 4, 2) for _ in range(3))
    options = {"kernel_size": (2, 3), "padding": padding, "backend": backend}
    assert_gradcheck(partial(neighborhood_av, **options), [torch.randn(1, 2, 3, 4, 6), v])
    assert_gradcheck(partial(logits, **options), [q, k, torch.randn(2, 3, 5)])


def test_half_precision_is_near_float64_and_autocast_uses_it() -> None:
    (q, k, v, attn, rpb), options = tensors_of("square", heads=2)
    for dtype, backend in ((torch.float16, "torch"), (torch.bfloat16, "torch"), (torch.float16, "triton")):
        for call, tensors in ((neighborhood_av, [attn, v]), (logits, [q, k, rpb])):
            bound = partial(call, **options)
            half = [t.to(dtype) for t in tensors]
            assert_matches(partial(bound, backend=backend), partial(bound, backend="reference"), half)
    attn = attn.softmax(-1)
    assert_runs_under_autocast(partial(neighborhood_av, **options), [attn, v], torch.bfloat16)
    assert_runs_under_autocast(partial(logits, **options), [q, k, rpb], torch.bfloat16)


def test_tables_of_taps_are_those_of_the_windows() -> None:
    where = taps((5, 4), (3, 2), 1, "shift")
    mask = window_mask(window((5, 4), (3, 2)))
    assert torch.equal(where.index(), mask.nonzero()[:, 1].view(20, 6))
    assert torch.equal(taps((3,), 3, 2, "zero").index(), torch.tensor([[0, 2, 4], [1, 3, 5], [2, 4, 6]]))
    assert torch.equal(taps((3,), 3, 1, "shift").relative(), torch.tensor([[2, 3, 4], [1, 2, 3], [0, 1, 2]]))


def test_the_choice_is_explained_and_wrong_input_is_told() -> None:
    (q, k, v, attn, rpb), options = tensors_of("square")
    assert explain(neighborhood_av, attn, v, **options).backend == "torch"
    assert explain("neighborhood_qk", q, k, backend="reference", **options).backend == "reference"
    with pytest.raises(InputError, match="P = 9 taps"):
        neighborhood_av(attn, v, 3)
    with pytest.raises(InputError, match="q and k of one shape"):
        neighborhood_qk(q, k[..., :4], 5)
    with pytest.raises(InputError, match=r"rpb must be \(heads, 2 k - 1 per axis\) = \(1, 9, 9\)"):
        neighborhood_qk(q, k, 5, rpb=rpb[:, 1:])
    with pytest.raises(InputError, match="more than the 7 tokens on axis 0"):
        neighborhood_qk(q, k, 5, dilation=2)
    with pytest.raises(InputError, match="has 3 values for a grid of 2 axes"):
        neighborhood_qk(q, k, (3, 3, 3))
    with pytest.raises(InputError, match="must be at least 1"):
        neighborhood_qk(q, k, 0, padding="zero")
    with pytest.raises(InputError, match="grid of 1 to 3 axes"):
        neighborhood_av(torch.zeros(2, 3), torch.zeros(2, 3), 3)
    with pytest.raises(InputError, match="cannot serve because Triton serves float32"):
        neighborhood_av(attn.double(), v.double(), backend="triton", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("grid", "kernel", "dilation", "width"),
    [
        ((56, 56), 7, 1, 32),
        ((31, 45), 13, 2, 24),
        ((500,), 63, 3, 64),
        ((12, 13, 14), 5, (1, 2, 1), 40),
        ((9, 8), 4, 2, 256),
    ],
)
def test_larger_sizes_on_a_gpu(
    grid: tuple[int, ...], kernel: int, dilation: int | tuple[int, ...], width: int, dtype: torch.dtype
) -> None:
    q, k, v = (torch.randn(2, 3, *grid, width, device="cuda").to(dtype) for _ in range(3))
    attn = torch.randn(2, 3, *grid, kernel ** len(grid), device="cuda").softmax(-1).to(dtype)
    rpb = torch.randn(3, *(2 * kernel - 1,) * len(grid), device="cuda")
    for padding in ("shift", "zero"):
        options = {"kernel_size": kernel, "dilation": dilation, "padding": padding}
        for call, tensors in ((neighborhood_av, [attn, v]), (logits, [q, k, rpb])):
            bound = partial(call, **options)
            assert_matches(partial(bound, backend="triton"), partial(bound, backend="torch"), tensors)
