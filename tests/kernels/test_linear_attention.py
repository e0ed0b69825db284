"""Linear attention: the definition against weights written out, every backend against the definition in float64."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import explain
from kernels.errors import InputError
from kernels.linear_attention import channel_attention, flow_attention, linear_attention_2pass
from kernels.linear_attention.forms import FEATURE_MAPS, NORMALISERS
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
    queries: int = 21,
    keys: int | None = None,
    batch: int = 2,
    heads: int = 2,
    width: int = 8,
    values: int | None = None,
) -> list[Tensor]:
    keys = queries if keys is None else keys
    q = torch.randn(batch, queries, heads, width)
    return [q, torch.randn(batch, keys, heads, width), torch.randn(batch, keys, heads, values or width)]


def angles(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    turns = torch.rand(tokens, width // 2) * 6.3
    return turns.cos(), turns.sin()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    return linear_attention_2pass(q, k, v, key_weight=key_weight, query_weight=query_weight, **options)


def check(backend: str, tensors: list[Tensor | None], **options: Any) -> None:
    call = partial(attention, **options)
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), tensors)


def cuts(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


# -------------------------------------------------------------------------------------------- the definition's own test

MAPS = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp_min(0),
    "leaky_relu": lambda x: torch.maximum(x, 0.01 * x),
    "elu_plus_one": lambda x: torch.where(x > 0, x + 1, x.clamp_max(0).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "exp": lambda x: x.exp(),
}


def written_out(
    q: Tensor, k: Tensor, v: Tensor, normaliser: str, feature_map: str, turns: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Every weight between a query and a key as a matrix, from the papers' equations."""
    d, keys = q.shape[-1], k.shape[1]
    f, g = MAPS[feature_map](q), MAPS[feature_map](k)
    plain = torch.einsum("bihd,bjhd->bhij", f, g)
    if turns is not None:  # MALA's code: x cos + (-x_odd, x_even) sin, each angle written twice
        cos, sin = (t.repeat_interleave(2, -1)[:, None] for t in turns)
        f, g = (x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (f, g))
    rotated = torch.einsum("bihd,bjhd->bhij", f, g)
    total = plain.sum(-1, keepdim=True)
    s = d**-0.5
    if normaliser == "channel":
        mixing = (s * torch.einsum("bjhd,bjhe->bhde", g, v)).softmax(-2)
        return torch.einsum("bihd,bhde->bihe", f, mixing)
    z = s * plain.mean(-1, keepdim=True)
    weights = {
        "none": rotated,
        "sum": rotated / (total + 1e-6),
        "l2vit": rotated / total.clamp_min(100),
        "inline": s / keys * rotated - z / keys + 1 / keys,
        "mala": (1 + 1 / (z + 1e-6)) * s / keys * rotated - z / keys,
    }[normaliser]
    return torch.einsum("bhij,bjhe->bihe", weights, v)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_the_reference_is_the_published_equation(normaliser: str, feature_map: str, turned: bool) -> None:
    q, k, v = (t.double() for t in inputs(31, width=12, values=7))
    if normaliser in ("sum", "mala"):  # with features of both signs a denominator may be 0
        q, k = q.abs(), k.abs()
    turns = angles(31, 12) if turned else None
    out = linear_attention_2pass(
        q, k, v, normaliser=normaliser, feature_map=feature_map, rotary=turns, backend="reference"
    )
    turns = None if turns is None else (turns[0].double(), turns[1].double())
    torch.testing.assert_close(out, written_out(q, k, v, normaliser, feature_map, turns))


def test_the_floor_of_l2vit_holds_some_rows_and_not_others() -> None:
    q, k, v = inputs(60, batch=1, heads=1)
    totals = torch.einsum("bihd,bhd->bi", q.relu(), k.relu().sum(1))
    assert totals.min() < 100 < totals.max()
    out = linear_attention_2pass(q, k, v, normaliser="l2vit", feature_map="relu", backend="torch")
    torch.testing.assert_close(out, written_out(q, k, v, "l2vit", "relu", None), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- every backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("turned", "weighed"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_every_normaliser_matches_the_reference(normaliser: str, turned: bool, weighed: bool, backend: str) -> None:
    q, k, v = inputs(37, 19, batch=1, width=12, values=20)
    turns = {"rotary": angles(37, 12), "key_rotary": angles(19, 12)} if turned else {}
    eps = {"eps": 60.0} if normaliser == "l2vit" else {}  # between the smallest and the largest sum
    weights = [torch.rand(1, 19, 2) + 0.1, torch.randn(1, 37, 2)] if weighed else []
    check(backend, [q, k, v, *weights], normaliser=normaliser, **turns, **eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_every_feature_map_matches_the_reference(feature_map: str, backend: str) -> None:
    slope = {"slope": 0.2} if feature_map in ("leaky_relu", "exp") else {}
    check(backend, list(inputs(18)), normaliser="inline", feature_map=feature_map, **slope)
    check(backend, list(inputs(18)), normaliser="l2vit", eps=5.0, feature_map=feature_map, **slope)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "width", "heads"),
    [((1, 1), 16, 1), ((1, 7), 8, 3), ((16, 16), 16, 1), ((33, 17), 24, 2), ((70, 70), 40, 1)],
)
def test_sizes_around_a_tile(tokens: tuple[int, int], width: int, heads: int, backend: str) -> None:
    turns = {"rotary": angles(tokens[0], width), "key_rotary": angles(tokens[1], width)}
    check(backend, list(inputs(*tokens, heads=heads, width=width)), normaliser="mala", **turns)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normaliser", ["sum", "inline", "mala", "channel"])
def test_packed_segments_match_the_reference(normaliser: str, backend: str) -> None:
    q, k, v = (t[0] for t in inputs(40, 50, batch=1, heads=1, values=6))
    weights = [torch.rand(50, 1) + 0.1, torch.randn(40, 1)]
    turns = {"rotary": angles(40, 8), "key_rotary": angles(50, 8)} if normaliser == "mala" else {}
    for cu_k in (cuts(20, 0, 3, 27), cuts(0, 9, 35, 6)):
        options = {"cu_seqlens": cuts(5, 0, 33, 2), "cu_seqlens_k": cu_k, **turns}
        check(backend, [q, k, v, *weights], normaliser=normaliser, **options)
    check(backend, [q, k[:40], v[:40]], normaliser=normaliser, cu_seqlens=cuts(40))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_packed_segments_are_what_each_gives_alone(normaliser: str, backend: str) -> None:
    q, k, v = (t[0] for t in inputs(45, batch=1))
    lengths = (9, 0, 33, 3)
    call = partial(linear_attention_2pass, normaliser=normaliser, backend=backend)
    packed = call(q, k, v, cu_seqlens=cuts(*lengths))
    alone = [call(a[None], b[None], c[None])[0] for a, b, c in zip(*(t.split(lengths) for t in (q, k, v)), strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)
    for t in (q, k, v):
        t[9:42] = torch.nan
    assert torch.equal(call(q, k, v, cu_seqlens=cuts(*lengths))[:9], packed[:9])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_without_keys_the_output_is_zero(normaliser: str, backend: str) -> None:
    q, k, v = inputs(5, 0)
    out = linear_attention_2pass(q, k, v, normaliser=normaliser, backend=backend)
    assert out.shape == q.shape and (out == 0).all()
    mask = torch.zeros(5, dtype=torch.bool)[:, None]
    assert (linear_attention_2pass(q, q, q, key_weight=mask, normaliser=normaliser, backend=backend) == 0).all()
    check(backend, [q, k, v], normaliser=normaliser)
    check(backend, [q[0], q[0], q[0]], normaliser=normaliser, cu_seqlens=cuts(5), cu_seqlens_k=cuts(5))
    for shape in ((0, 4, 2, 8), (3, 0, 2, 8)):
        nothing = torch.zeros(shape)
        assert linear_attention_2pass(nothing, nothing, nothing, backend=backend).shape == shape
    for cu in (cuts(), cuts(0, 0)):
        nothing = torch.zeros(0, 2, 8)
        assert linear_attention_2pass(nothing, nothing, nothing, cu_seqlens=cu, backend=backend).shape == (0, 2, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_a_weight_of_two_is_a_key_given_twice_and_of_zero_none(normaliser: str, backend: str) -> None:
    q, k, v = inputs(20, 15)
    order = torch.tensor([0, 1, 1, 2, 4, 5, 6, 7, 8, 9, 9, 10, 12, 13, 14])
    weight = order.bincount(minlength=15).float()[:, None]
    call = partial(linear_attention_2pass, normaliser=normaliser, backend=backend)
    expected = call(q, k[:, order], v[:, order])
    torch.testing.assert_close(call(q, k, v, key_weight=weight), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normaliser", ["sum", "inline", "mala"])
def test_equal_values_are_kept(normaliser: str, backend: str) -> None:
    q, k, v = inputs(30)
    same = v[:, :1].expand_as(v)
    out = linear_attention_2pass(q, k, same, normaliser=normaliser, backend=backend)
    torch.testing.assert_close(out, same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_tokens_give_permuted_outputs(backend: str) -> None:
    q, k, v = inputs(24, batch=1, heads=1)
    order = torch.randperm(24)
    for normaliser in NORMALISERS:
        call = partial(linear_attention_2pass, normaliser=normaliser, backend=backend)
        moved = call(q[:, order], k[:, order], v[:, order])
        torch.testing.assert_close(moved, call(q, k, v)[:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_and_what_lies_around_it_is_not_read(backend: str) -> None:
    turns = {"rotary": angles(22, 12)}
    fused = torch.randn(2, 22, 3, 2, 12)
    check(backend, list(fused.unbind(2)), normaliser="mala", **turns)
    image = torch.randn(2, 3 * 2 * 12, 22).mT.view(2, 22, 3, 2, 12)  # channels first: the width has a stride
    check(backend, list(image.unbind(2)), normaliser="inline")
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs(22)]
    check(backend, heads_first)
    for value in (torch.nan, torch.inf):
        spoiled = [poisoned(t, value) for t in inputs(22, 13, width=12)]
        weights = [poisoned(torch.rand(2, 13, 2), value), poisoned(torch.rand(2, 22, 2), value)]
        check(backend, [*spoiled, *weights], normaliser="mala", rotary=angles(22, 12), key_rotary=angles(13, 12))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_and_small_features_stay_finite(backend: str) -> None:
    q, k, v = inputs(30, batch=1)
    q[:, 3], k[:, 5] = 1e4, -1e4
    for normaliser in ("sum", "inline", "mala"):
        check(backend, [q, k, v], normaliser=normaliser)
    # Features that underflow leave a denominator of eps.
    low = torch.full_like(k, -200.0)
    out = linear_attention_2pass(q, low, v, backend=backend)
    assert (out == 0).all()
    # Sums beyond the range of float16 cancel in the quotient.
    many = [torch.full((1, 150, 1, 16), x, dtype=torch.float16) for x in (60.0, 60.0, 2.0)]
    out = linear_attention_2pass(*many, feature_map="relu", backend=backend)
    torch.testing.assert_close(out, many[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_bit_for_bit(backend: str) -> None:
    leaves = [t.requires_grad_() for t in inputs(50, batch=1, heads=1)]
    runs = []
    for _ in range(2):
        out = linear_attention_2pass(*leaves, normaliser="mala", backend=backend)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_long_sequences_are_cut_and_many_short_ones_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.linear_attention import eager

    monkeypatch.setitem(eager._PIECE, "cpu", 16 * 10)
    weights = [torch.rand(5, 7, 2), torch.rand(5, 7, 2)]
    check("torch", [*inputs(7, batch=5, width=3, values=5), *weights], normaliser="mala")
    check("torch", list(inputs(33, 47, batch=2)), normaliser="inline")
    q, k, v = (t[0] for t in inputs(33, batch=1))
    check("torch", [q, k, v], normaliser="sum", cu_seqlens=cuts(2, 27, 4), rotary=angles(33, 8))


# ------------------------------------------------------------------------------------------------------- compositions


@pytest.mark.parametrize("backend", BACKENDS)
def test_channel_attention_is_softmax_between_channels(backend: str) -> None:
    q, k, v = inputs(26, width=12)
    a, b, c = (t.transpose(1, 2) for t in (q, k, v))
    first = ((b * 12**-0.5).mT @ c).softmax(-1) @ a.mT
    torch.testing.assert_close(
        channel_attention(q, k, v, backend=backend), first.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5
    )
    second = (26**-0.5 * a.mT @ b).softmax(-1) @ c.mT
    out = channel_attention(q, k, v, query_of_key=True, backend=backend)
    torch.testing.assert_close(out, second.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)
    packed = channel_attention(*(t.flatten(0, 1) for t in (q, k, v)), cu_seqlens=cuts(26, 26), backend=backend)
    torch.testing.assert_close(packed.view(q.shape), first.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="differ in length"):
        channel_attention(q[0], k[0], v[0], query_of_key=True, cu_seqlens=cuts(26))


def flow_written_out(q: Tensor, k: Tensor, v: Tensor, after: float) -> Tensor:
    f, g, e = q.sigmoid().transpose(1, 2), k.sigmoid().transpose(1, 2), 1e-6
    sinks, sources = f.shape[2], g.shape[2]
    incoming = 1 / (((f + e) * (g.sum(2, keepdim=True) + e)).sum(-1, keepdim=True) + after)
    outgoing = 1 / (((g + e) * (f.sum(2, keepdim=True) + e)).sum(-1, keepdim=True) + after)
    kept_in = ((f + e) * ((g * outgoing).sum(2, keepdim=True) + e)).sum(-1, keepdim=True) + after
    kept_out = ((g + e) * ((f * incoming).sum(2, keepdim=True) + e)).sum(-1, keepdim=True) + after
    competition = kept_out.clamp(-1, 1).softmax(2) * sources
    out = (f * incoming) @ (g.mT @ (v.transpose(1, 2) * competition)) * (kept_in * sinks / sources).sigmoid()
    return out.transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flow_attention_is_the_published_equation(backend: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flow_attention(q, k, v, eps_after=1e-6, backend=backend)

    assert_matches(call, partial(flow_written_out, after=1e-6), inputs(13, 37, width=12, values=6))
    assert_matches(partial(flow_attention, backend=backend), partial(flow_written_out, after=0.0), inputs(20, batch=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_flow_attention_is_what_each_segment_gives_alone(backend: str) -> None:
    q, k, v = (t[0] for t in inputs(20, 30, batch=1))
    queries, keys = (6, 0, 14), (11, 4, 15)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flow_attention(q, k, v, cu_seqlens=cuts(*queries), cu_seqlens_k=cuts(*keys), backend=backend)

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        return torch.cat([flow_written_out(a[None], b[None], c[None], 0.0)[0] for a, b, c in parts])

    assert_matches(packed, alone, [q, k, v])


# ----------------------------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_an_operator_to_the_compiler(backend: str) -> None:
    q, k, v = inputs(9)
    weights = [torch.rand(2, 9, 2), torch.rand(9, 1)]
    call = partial(attention, normaliser="mala", backend=backend)
    assert_compiles(partial(call, rotary=angles(9, 8)), [q, k, v, *weights])
    assert_any_incoming_gradient(call, [q, k, v])
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    assert_compiles(partial(attention, cu_seqlens=cuts(5, 0, 13), backend=backend), packed)


def test_it_is_registered_properly() -> None:
    q, k, v = inputs(6)
    q.requires_grad_()
    form = ("mala", "elu_plus_one", 0.0, 0.3, 1e-6)
    operator = torch.ops.fovea.linear_attention_2pass.default
    assert_opcheck(operator, (q, k, v, *[None] * 8, *form, "torch"))
    weight = torch.rand(2, 6, 2, requires_grad=True)
    assert_opcheck(operator, (q, k, v, weight, weight, *angles(6, 8), *angles(6, 8), None, None, *form, "torch"))
    one = q.detach()[:1].requires_grad_()
    assert_opcheck(operator, (one, k[:1], v[:1], *[None] * 6, cuts(4, 0, 2), cuts(0, 3, 3), *form, "torch"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_numerical_gradients(normaliser: str, backend: str) -> None:
    tensors = [*inputs(4, 5, batch=1, heads=2, width=4, values=3), torch.rand(1, 5, 2) + 0.1, torch.randn(1, 4, 2)]
    turns = {"rotary": tuple(t.double() for t in angles(4, 4)), "key_rotary": tuple(t.double() for t in angles(5, 4))}
    eps = {"eps": 0.5} if normaliser == "l2vit" else {}
    assert_gradcheck(partial(attention, normaliser=normaliser, backend=backend, **eps), tensors)
    assert_gradcheck(partial(attention, normaliser=normaliser, backend=backend, **turns, **eps), tensors)


def test_autocast() -> None:
    assert_runs_under_autocast(partial(attention, rotary=angles(21, 8)), inputs(), torch.bfloat16)


def test_half_precision_is_near_float64() -> None:
    tensors = inputs(40, batch=1, width=16)
    for normaliser in ("sum", "inline", "mala"):
        for dtype in (torch.float16, torch.bfloat16):
            check("torch", [t.to(dtype) for t in tensors], normaliser=normaliser)
        check("triton", [t.half() for t in tensors], normaliser=normaliser)


def test_the_choice_is_explained_and_never_silent() -> None:
    q, k, v = inputs(4)
    assert explain("linear_attention_2pass", q, k, v).backend == "torch"
    assert "asks for it" in str(explain(linear_attention_2pass, q, k, v, backend="reference"))
    with pytest.raises(InputError, match="cannot serve because Triton serves float32"):
        linear_attention_2pass(q.double(), k.double(), v.double(), backend="triton")
    wide = torch.zeros(1, 4, 1, 72)
    with pytest.raises(InputError, match="72 wide and the kernels take up to 64"):
        linear_attention_2pass(wide, wide, wide, backend="triton")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"normaliser": "inlin"}, "Did you mean 'inline'"),
        ({"feature_map": "rel"}, "Did you mean 'relu'"),
        ({"slope": 0.1}, "it is for leaky_relu and exp"),
        ({"eps": 0.0}, "above 0"),
        ({"normaliser": "inline", "eps": 1.0}, "it is for sum, l2vit and mala"),
        ({"rotary": (torch.ones(4, 8), torch.ones(4, 8))}, r"\(4, 4\) with an even D"),
        ({"key_rotary": (torch.ones(4, 4), torch.ones(4, 4))}, "without rotary"),
        ({"key_weight": torch.ones(3, 2)}, r"key_weight \(3, 2\) does not broadcast"),
        ({"cu_seqlens_k": torch.tensor([0, 4])}, "without cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "or packed"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        linear_attention_2pass(*inputs(4), **options)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = inputs(4)
    for wrong in ((q[:1], k, v), (q[..., :4], k, v), (q, k[:, :3], v), (q, k[:, :, :1], v)):
        with pytest.raises(InputError, match="must share"):
            linear_attention_2pass(*wrong)
    with pytest.raises(InputError, match="need a cu_seqlens_k"):
        linear_attention_2pass(q[0], k[0, :3], v[0, :3], cu_seqlens=cuts(4))
    with pytest.raises(InputError, match=r"must both be"):
        linear_attention_2pass(q[0], k[0], v[0], cu_seqlens=cuts(4), cu_seqlens_k=cuts(2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [20, 32, 64, 96])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_on_a_gpu(normaliser: str, width: int, dtype: torch.dtype) -> None:
    fused = torch.randn(4, 1201, 3, 3, width, device="cuda", dtype=dtype)
    backend = "torch" if dtype == torch.float32 and width > 64 else "triton"
    turns = {"rotary": tuple(t.cuda() for t in angles(1201, width))}
    weights = [torch.rand(4, 1201, 3, device="cuda") + 0.1, torch.rand(4, 1201, 1, device="cuda")]
    scale = {"scale": 0.02} if normaliser == "channel" else {"scale": 1e-3} if normaliser == "none" else {}
    call = partial(attention, normaliser=normaliser, **scale)
    mixed = [*fused.unbind(2), *weights]
    reference = partial(call, backend="reference")
    assert_matches(partial(call, backend=backend), reference, list(fused.unbind(2)))
    assert_matches(partial(call, backend=backend, **turns), partial(reference, **turns), mixed)
    packed = [t.flatten(0, 1) for t in fused.unbind(2)]
    cu = {"cu_seqlens": cuts(1, 3000, 0, 777, 1026).cuda()}
    assert_matches(partial(call, backend=backend, **cu), partial(reference, **cu), packed)
