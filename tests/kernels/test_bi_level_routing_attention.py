"""Bi-level routing attention: every backend against the reference in float64, over sizes, graphs and layouts."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import explain
from kernels.bi_level_routing_attention import (
    bi_level_routing_attention,
    eager,
    route_regions,
    routing_probabilities,
)
from kernels.bi_level_routing_attention.regions import Regions
from kernels.errors import InputError
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


def maps(
    size: tuple[int, int],
    heads: int = 2,
    width: int = 8,
    value_width: int | None = None,
    key_size: tuple[int, int] | None = None,
    batch: int = 2,
) -> list[Tensor]:
    q = torch.randn(batch, *size, heads, width)
    k, v = (torch.randn(batch, *(key_size or size), heads, w) for w in (width, value_width or width))
    return [q, k, v]


def planes(x: Tensor) -> Tensor:
    """(B, H, W, heads, D) as a dense (B, C, H, W)."""
    return x.permute(0, 3, 4, 1, 2).flatten(1, 2).contiguous()


def drawn(batch: int, heads: int, queries: int, keys: int, topk: int) -> Tensor:
    """A graph with repeated regions."""
    return torch.randint(0, keys, (batch, heads, queries, topk))


def attention(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    out, _, lse = bi_level_routing_attention(q, k, v, **options)  # type: ignore[arg-type]
    return out, lse


def both(**options: object) -> dict[str, partial]:
    return {b: partial(attention, backend=b, **options) for b in ("reference", *BACKENDS)}


CASES: dict[str, tuple[list[Tensor], dict[str, object]]] = {
    "small regions": (maps((4, 6)), {"region_size": 2, "region_graph": drawn(2, 1, 6, 6, 3)}),
    "oblong regions, a graph for each head": (
        maps((6, 8), heads=3, batch=1),
        {"region_size": (3, 4), "region_graph": drawn(1, 3, 4, 4, 2)},
    ),
    "sizes that do not divide": (
        maps((5, 10)),
        {"region_size": (3, 4), "region_graph": drawn(2, 1, 6, 6, 3)},
    ),
    "padding masked": (
        maps((7, 10), batch=1),
        {"region_size": (3, 4), "region_graph": drawn(1, 2, 9, 9, 3), "mask_padding": True},
    ),
    "keys of another size": (
        maps((8, 8), key_size=(5, 4)),
        {"region_size": 4, "kv_region_size": 2, "region_graph": drawn(2, 1, 4, 6, 3)},
    ),
    "one region larger than the map": (maps((3, 5)), {"region_size": 6, "region_graph": drawn(2, 1, 1, 1, 1)}),
    "single tokens": (maps((2, 3)), {"region_size": 1, "region_graph": drawn(2, 1, 6, 6, 5)}),
    "odd widths": (
        maps((4, 6), heads=1, width=20, value_width=12),
        {"region_size": 2, "region_graph": drawn(2, 1, 6, 6, 2)},
    ),
    "a strip": (maps((1, 13), width=3), {"region_size": (1, 5), "region_graph": drawn(2, 1, 3, 3, 2)}),
    "large regions": (maps((5, 24), heads=1, batch=1), {"region_size": (5, 6), "region_graph": drawn(1, 1, 4, 4, 2)}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_it_matches_the_reference(case: str, backend: str) -> None:
    tensors, options = CASES[case]
    calls = both(scale=0.4, **options)
    assert_matches(calls[backend], calls["reference"], tensors)


@pytest.mark.parametrize("case", CASES)
def test_gathering_matches_where_dense_would_be_faster(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = CASES[case]
    calls = both(scale=0.4, **options)
    monkeypatch.setattr(eager, "DENSE", 0)
    monkeypatch.setattr(eager, "CHUNK", 4096)
    assert_matches(calls["torch"], calls["reference"], tensors)
    monkeypatch.setattr(eager, "FUSED", 0)
    assert_matches(calls["torch"], calls["reference"], tensors)
    without_lse = {b: lambda *t, c=c: c(*t)[0] for b, c in calls.items()}
    assert_matches(without_lse["torch"], without_lse["reference"], tensors)
    half = [t.half() for t in tensors]
    assert_matches(calls["torch"], calls["reference"], half)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [8, 40])
@pytest.mark.parametrize("layout", ["planes", "planes, channels last", "views of one projection", "transposed"])
def test_layouts(layout: str, width: int, backend: str) -> None:
    tensors = maps((5, 6), width=width, batch=1)
    options: dict[str, object] = {"region_size": 2, "region_graph": drawn(1, 1, 9, 9, 2)}
    if layout.startswith("planes"):
        tensors = [planes(t) for t in tensors]
        options["num_heads"] = 2
        if layout.endswith("channels last"):
            tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    elif layout == "transposed":
        tensors = [t.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0) for t in tensors]
    else:
        tensors = list(torch.randn(1, 5, 6, 3, 2, width)[:, :, :, [0, 1, 2]].unbind(3))
    calls = both(**options)
    assert_matches(calls[backend], calls["reference"], tensors)
    out, _ = calls[backend](*tensors)
    if layout.startswith("planes"):
        assert out.stride()[1:] == tensors[0].stride()[1:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_outside_the_tensors_is_not_read(backend: str) -> None:
    for options in ({}, {"mask_padding": True}):
        calls = both(region_size=(3, 4), region_graph=drawn(2, 1, 4, 4, 2), **options)
        assert_matches(calls[backend], calls["reference"], [poisoned(t) for t in maps((5, 7), width=12)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_region_is_blind_to_what_it_is_not_routed_to(backend: str) -> None:
    q, k, v = maps((4, 8))
    graph = torch.tensor([0, 1]).expand(2, 1, 8, 2).clone()
    graph[:, :, 4:] = torch.tensor([6, 7])
    call = partial(attention, region_size=2, region_graph=graph, backend=backend)
    before, _ = call(q, k, v)
    for t in (k, v):
        t[:, :2, :4] += 3  # regions 0 and 1, which the lower half does not see
    after, _ = call(q, k, v)
    assert torch.equal(before[:, 2:], after[:, 2:]) and not torch.equal(before[:, :2], after[:, :2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_the_graph_does_not_matter_and_a_repeat_counts_twice(backend: str) -> None:
    q, k, v = maps((4, 6))
    call = partial(attention, q, k, v, region_size=2, backend=backend)
    graph = torch.stack([torch.randperm(6)[:3] for _ in range(12)]).view(2, 1, 6, 3)
    out, lse = call(region_graph=graph)
    torch.testing.assert_close(call(region_graph=graph.flip(3))[0], out, rtol=1e-5, atol=1e-5)
    twice = call(region_graph=torch.cat([graph, graph], 3))
    torch.testing.assert_close(twice[0], out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(twice[1], lse + torch.tensor(2.0).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_all_regions_are_plain_attention(backend: str) -> None:
    q, k, v = maps((4, 6))
    out, graph, _ = bi_level_routing_attention(q, k, v, 2, topk=6, backend=backend)
    assert graph.shape == (2, 1, 6, 6)
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    dense = F.scaled_dot_product_attention(*flat, scale=16**-0.5)  # all 16 channels scale the scores
    torch.testing.assert_close(out, dense.transpose(1, 2).view_as(out), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_takes_part_unless_masked(backend: str) -> None:
    q, k, v = maps((2, 3), heads=1, batch=1)
    call = partial(attention, q, k, v, region_size=2, region_graph=torch.tensor([[[[1], [1]]]]), backend=backend)
    _, lse = call()
    score = torch.einsum("hwc,yc->hwy", q[0, :, :, 0], k[0, :, 2, 0]) * 8**-0.5
    seen = torch.cat([score, torch.zeros(2, 3, 2)], -1)  # two tokens on the map, two zeros beside it
    torch.testing.assert_close(lse[0, 0], seen.logsumexp(-1), rtol=1e-5, atol=1e-5)
    _, lse = call(mask_padding=True)
    torch.testing.assert_close(lse[0, 0], score.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "region"), [((8, 8), (2, 4)), ((13, 18), (3, 4)), ((5, 7), (4, 3))])
def test_routing_is_by_the_means_of_the_released_model(size: tuple[int, int], region: tuple[int, int]) -> None:
    q, k, _ = maps(size)
    pooled = [F.avg_pool2d(planes(t), region, ceil_mode=True, count_include_pad=False).flatten(2) for t in (q, k)]
    expected = (pooled[0].mT @ pooled[1]).topk(3, -1).indices[:, None]
    assert torch.equal(route_regions(q, k, region, 3), expected)
    assert torch.equal(route_regions(planes(q), planes(k), region, 3), expected)
    assert not route_regions(q.requires_grad_(), k, region, 3).requires_grad
    given = bi_level_routing_attention(q, k, k, region, region_graph=expected)
    routed = bi_level_routing_attention(q, k, k, region, topk=3)
    assert torch.equal(given[0], routed[0]) and torch.equal(given[1], routed[1])


def test_many_regions_are_inverted_by_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from kernels.bi_level_routing_attention import triton_path

    monkeypatch.setattr(triton_path, "LARGEST_TABLE", 3)
    tensors = maps((4, 6))
    calls = both(region_size=2, region_graph=drawn(2, 2, 6, 6, 3))
    assert_matches(calls["triton"], calls["reference"], tensors)


def test_the_inverse_names_every_edge_once() -> None:
    pytest.importorskip("triton")
    from kernels.bi_level_routing_attention import triton_path

    graph = drawn(2, 2, 70, 9, 18)
    entries, starts, ends = triton_path._inverse(graph, Regions(9, 1, 1, 1))
    for batch in range(2):
        for head in range(2):
            for region in range(9):
                listed = entries.flatten()[starts[batch, head, region] : ends[batch, head, region]]
                times = (graph[batch, head] == region).sum(1)
                assert torch.equal(listed % 70, times.nonzero()[:, 0]) and torch.equal(listed // 70, times[times > 0])


def test_probabilities() -> None:
    q, k, v = maps((5, 7))
    graph = drawn(2, 2, 4, 4, 2)
    weights = routing_probabilities(q, k, (3, 4), graph)
    assert weights.shape == (2, 2, 4, 12, 24)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 4, 12))
    out, _ = attention(q, k, v, region_size=(3, 4), region_graph=graph, backend="torch")
    values = Regions(5, 7, 3, 4).split(v)
    first = torch.cat([values[1, 1, r] for r in graph[1, 1, 0]])
    torch.testing.assert_close(weights[1, 1, 0, 0] @ first, out[1, 0, 0, 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_and_outliers_stay_finite(backend: str) -> None:
    q, k, v = maps((4, 6))
    k[:, 1, 2] *= 1e4
    calls = both(region_size=2, region_graph=drawn(2, 1, 6, 6, 2))
    assert_matches(calls[backend], calls["reference"], [q, k, v], scale=30)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bit_for_bit(backend: str) -> None:
    tensors, options = CASES["sizes that do not divide"]
    leaves = [t.clone().requires_grad_() for t in tensors]
    runs = []
    for _ in range(2):
        out, lse = attention(*leaves, backend=backend, **options)
        runs.append([out, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_an_empty_batch(backend: str) -> None:
    q = torch.zeros(0, 4, 4, 2, 8, requires_grad=True)
    out, graph, lse = bi_level_routing_attention(q, q, q, 2, topk=2, backend=backend)
    out.sum().backward()
    assert out.shape == q.shape and graph.shape == (0, 1, 4, 2) and lse.shape == (0, 2, 4, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_an_operator_to_the_compiler(backend: str) -> None:
    tensors = maps((3, 2), batch=1)
    assert_compiles(partial(attention, region_size=2, topk=2, backend=backend), tensors)
    calls = both(region_size=2, region_graph=drawn(1, 1, 2, 2, 2), num_heads=2)
    assert_compiles(calls[backend], [planes(t) for t in tensors])
    assert_any_incoming_gradient(calls[backend], tensors)
    assert_any_incoming_gradient(calls[backend], [planes(t) for t in tensors])


def test_it_is_registered_properly() -> None:
    q, k, v = maps((3, 4), value_width=5)
    q.requires_grad_()
    operator = torch.ops.fovea.bi_level_routing_attention.default
    for planes_, size in ((False, 2), (True, 3)):
        count = 4 if size == 2 else 2
        graph = drawn(2, 1, count, count, 2)
        assert_opcheck(operator, (q, k, v, graph, [size, size], [size, size], 0.3, False, planes_, "torch"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_numerical_gradients(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = maps((3, 4), heads=2, width=2, batch=1)
    for options in ({}, {"mask_padding": True}):
        call = partial(attention, region_size=2, region_graph=drawn(1, 2, 4, 4, 2), backend=backend, **options)
        assert_gradcheck(call, tensors)
        monkeypatch.setattr(eager, "DENSE", 0)
        assert_gradcheck(call, tensors)


def test_autocast() -> None:
    graph = drawn(2, 1, 6, 6, 2)
    assert_runs_under_autocast(partial(attention, region_size=2, region_graph=graph), maps((4, 6)), torch.bfloat16)


def test_half_precision_is_near_float64() -> None:
    calls = both(region_size=2, region_graph=drawn(2, 1, 6, 6, 3))
    tensors = maps((4, 6))
    for dtype in (torch.float16, torch.bfloat16):
        assert_matches(calls["torch"], calls["reference"], [t.to(dtype) for t in tensors])
    assert_matches(calls["triton"], calls["reference"], [t.half() for t in tensors])


def test_the_choice_is_explained_and_never_silent() -> None:
    q, k, v = maps((4, 6))
    assert explain("bi_level_routing_attention", q, k, v, 2, topk=2).backend == "torch"
    call = partial(bi_level_routing_attention, q, k, v)
    with pytest.raises(InputError, match="either topk or a region_graph"):
        call(2)
    with pytest.raises(InputError, match="from 1 to the 6 key regions"):
        call(2, topk=7)
    with pytest.raises(InputError, match="one or two positive numbers"):
        call((2, 2, 2), topk=1)
    with pytest.raises(InputError, match=r"1 or 2, 6, at least 1\); got \(2, 1, 5, 2\)"):
        call(2, region_graph=drawn(2, 1, 5, 6, 2))
    with pytest.raises(InputError, match="must be int64"):
        call(2, region_graph=drawn(2, 1, 6, 6, 2).int())
    with pytest.raises(InputError, match="num_heads must divide its 16 channels; got None"):
        bi_level_routing_attention(*(planes(t) for t in (q, k, v)), 2, topk=1)
    with pytest.raises(InputError, match="with 2 heads, not 3"):
        call(2, topk=1, num_heads=3)
    with pytest.raises(InputError, match="differ in batch, heads or width"):
        bi_level_routing_attention(q[..., :4], k, v, 2, topk=1)
    with pytest.raises(InputError, match="at least one token"):
        bi_level_routing_attention(q[:, :0], k, v, 2, topk=1)
    with pytest.raises(InputError, match="300 wide"):
        wide = torch.zeros(1, 2, 2, 1, 300)
        bi_level_routing_attention(wide, wide, wide, 2, topk=1, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "size", [(2, 56, 56, 8, 2, 1), (2, 28, 28, 4, 4, 4), (2, 14, 14, 2, 8, 16), (1, 45, 61, 7, 3, 5)]
)
def test_on_a_gpu(size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, height, width, region, heads, topk = size
    shape = (batch, height, width, heads, 32)
    tensors = [torch.randn(shape, device="cuda").to(dtype) for _ in range(3)]
    graph = route_regions(tensors[0], tensors[1], region, topk)
    for options in ({}, {"mask_padding": True}):
        calls = both(region_size=region, region_graph=graph, scale=0.2, **options)
        assert_matches(calls["triton"], calls["reference"], tensors)
    calls = both(region_size=region, region_graph=graph, scale=0.2, num_heads=heads)
    assert_matches(calls["triton"], calls["reference"], [planes(t) for t in tensors])


@pytest.mark.gpu
def test_nothing_is_gathered_on_a_gpu() -> None:
    q, k, v = (torch.randn(8, 56, 56, 4, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    graph = route_regions(q, k, 8, 8)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = attention(q, k, v, region_size=8, region_graph=graph)
    out.backward(torch.ones_like(out))
    # The output, what arrives, three gradients, and two float32 numbers for each token and head.
    allowed = 5 * q.nbytes + 2 * q.numel() // 32 * 4
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * allowed
