"""Group attention: every backend against the reference in float64, over lengths, group sizes and global tokens."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import explain
from kernels.errors import InputError
from kernels.group_attention import group_attention, group_order
from kernels.group_attention.groups import groups
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
    tokens: int,
    members: int = 0,
    batch: int = 1,
    heads: int = 2,
    width: int = 9,
    value_width: int = 10,
    own: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Tensors and an order; ``own`` gives every item its own global tokens."""
    tensors = [torch.randn(batch, tokens, heads, w) for w in (width, width, value_width)]
    if members:
        lead = (batch, members) if own else (members,)
        tensors += [torch.randn(*lead, heads, w) for w in (width, value_width)]
    return tensors, torch.stack([torch.randperm(tokens) for _ in range(batch)])


def attention(q: Tensor, k: Tensor, v: Tensor, known: Tensor | None = None, worth: Tensor | None = None, **options):
    return group_attention(q, k, v, k_global=known, v_global=worth, **options)


def both(**options: object) -> dict[str, partial]:
    return {b: partial(attention, backend=b, **options) for b in ("reference", *BACKENDS)}


CASES = {
    "whole groups": (inputs(48, 4), 16),
    "a short tail": (inputs(45, 5, batch=2), 16),
    "a tail of one": (inputs(33, 3), 16),
    "a mirror that is too short": (inputs(18), 16),
    "the same with global tokens": (inputs(20, 2), 16),
    "a single full group": (inputs(16, 2), 16),
    "fewer tokens than a group": (inputs(10, 3), 16),
    "one token": (inputs(1, 1, batch=2), 4),
    "groups of one": (inputs(12), 1),
    "groups of an odd size": (inputs(40, 2, heads=1), 13),
    "own global tokens": (inputs(21, 3, batch=2, own=True), 8),
    "more global tokens than keys": (inputs(18, 40, heads=1), 6),
    "wide values": (inputs(21, 2, heads=1, width=20, value_width=36), 8),
    "three heads": (inputs(24, 3, heads=3, width=16, value_width=16), 8),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_it_matches_the_reference(case: str, backend: str) -> None:
    (tensors, order), size = CASES[case]
    calls = both(order=order, group_size=size, scale=0.4)
    assert_matches(calls[backend], calls["reference"], tensors)


@pytest.mark.parametrize("tokens", [1, 2, 5, 7, 8, 9, 12, 16, 17, 31])
def test_groups_see_themselves_the_next_and_a_mirror(tokens: int) -> None:
    size = 8
    cut = groups(tokens, size)
    sequence = list(range(tokens))
    endless = (sequence + sequence[::-1]) * 9
    seen = cut.positions(torch.device("cpu"))
    for group in range(cut.count):
        first = group * cut.size
        assert seen[first : first + cut.keys].tolist() == endless[first : first + cut.keys]
    if cut.count > 1 and 2 * size + cut.padded - tokens <= tokens:  # where the released code runs
        tail = sequence + sequence[tokens - (cut.padded - tokens) - size :][::-1]
        assert seen.tolist() == tail
    weights = torch.randn(cut.extended, 3)
    folded = torch.zeros(tokens, 3).index_add_(0, seen, weights)
    torch.testing.assert_close(cut.fold(weights), folded)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_one_group_is_plain_attention_and_a_sum_of_two(backend: str) -> None:
    (q, k, v, known, worth), order = inputs(14, 6, batch=2)
    out = attention(q, k, v, known, worth, order=order, group_size=99, backend=backend)
    a, b, c = (t.transpose(1, 2) for t in (q, k, v))
    known, worth = (t.transpose(0, 1).expand(2, -1, -1, -1) for t in (known, worth))
    expected = F.scaled_dot_product_attention(a, b, c) + F.scaled_dot_product_attention(a, known, worth)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_relabelled_tokens_give_relabelled_outputs(backend: str) -> None:
    (q, k, v, known, worth), order = inputs(21, 3)
    moved = torch.randperm(21)
    call = partial(attention, group_size=8, backend=backend)
    out = call(q, k, v, known, worth, order=order)
    back = moved.argsort()[order[0]][None]
    torch.testing.assert_close(
        call(q[:, moved], k[:, moved], v[:, moved], known, worth, order=back), out[:, moved], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_is_blind_to_what_is_not_its_own_or_the_next(backend: str) -> None:
    (q, k, v), order = inputs(40)
    call = partial(attention, order=order, group_size=8, backend=backend)
    before = call(q, k, v)
    for t in (k, v):
        t[0, order[0, 16:24]] += 3
    after = call(q, k, v)
    same, changed = order[0, [*range(8), *range(24, 40)]], order[0, 8:24]
    assert torch.equal(before[:, same], after[:, same])
    assert (before[:, changed] != after[:, changed]).any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_items_are_apart(backend: str) -> None:
    (q, k, v, known, worth), order = inputs(20, 3, batch=2)
    call = partial(attention, group_size=8, backend=backend)
    before = call(q, k, v, known, worth, order=order)
    for t in (q, k, v):
        t[1] = torch.nan
    assert torch.equal(call(q, k, v, known, worth, order=order)[0], before[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_surroundings(backend: str) -> None:
    (tensors, order), size = CASES["a short tail"]
    calls = both(order=order.t().contiguous().t(), group_size=size)
    assert_matches(calls[backend], calls["reference"], [poisoned(t) for t in tensors])
    fused = torch.randn(1, 20, 2, 29)
    views = [fused[..., :9], fused[..., 9:18], fused[..., 18:28]]
    calls = both(order=torch.randperm(20)[None], group_size=8)
    assert_matches(calls[backend], calls["reference"], views)
    turned = [t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in views]
    assert_matches(calls[backend], calls["reference"], turned)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_and_outliers_stay_finite(backend: str) -> None:
    (q, k, v, known, worth), order = inputs(20, 3)
    k[0, 4] *= 1e4
    known[1] *= 1e4
    calls = both(order=order, group_size=8)
    # Keys of 1e4 magnify the last digit of float32 in the gradient of the queries.
    assert_matches(calls[backend], calls["reference"], [q, k, v, known, worth], scale=100)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bit_for_bit(backend: str) -> None:
    (tensors, order), size = CASES["the same with global tokens"]
    leaves = [t.clone().requires_grad_() for t in tensors]
    runs = []
    for _ in range(2):
        out = attention(*leaves, order=order, group_size=size, backend=backend)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_global_gradients_are_summed_over_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from kernels.group_attention import triton_path

    monkeypatch.setattr(triton_path, "PART", 7)
    tensors, order = inputs(20, 18, batch=2, heads=1)
    calls = both(order=order, group_size=8)
    assert_matches(calls["triton"], calls["reference"], tensors)


def test_work_is_bounded_where_scores_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.group_attention import eager

    monkeypatch.setattr(eager, "_chunks", lambda queries, keys: (slice(n, n + 1) for n in range(queries.shape[1])))
    (tensors, order), size = CASES["a short tail"]
    calls = both(order=order, group_size=size)
    assert_matches(calls["torch"], calls["reference"], tensors)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0)])
def test_nothing(batch: int, tokens: int, backend: str) -> None:
    q = torch.zeros(batch, tokens, 2, 8, requires_grad=True)
    known = torch.zeros(3, 2, 8, requires_grad=True)
    order = torch.zeros(batch, tokens, dtype=torch.int64)
    out = attention(q, q, q, known, known, order=order, group_size=4, backend=backend)
    out.sum().backward()
    assert out.shape == q.shape and q.grad is not None


def test_the_order_is_stable() -> None:
    order = group_order(torch.tensor([[2, 0, 1, 0, 2, 1], [1, 1, 1, 0, 0, 0]]))
    assert order.tolist() == [[1, 3, 2, 5, 0, 4], [3, 4, 5, 0, 1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_an_operator_to_the_compiler(backend: str) -> None:
    tensors, order = inputs(7, 2, heads=1)
    call = partial(attention, order=order, group_size=4, backend=backend)
    assert_compiles(call, tensors)
    assert_compiles(call, tensors[:3])
    assert_any_incoming_gradient(call, tensors)


def test_it_is_registered_properly() -> None:
    (q, k, v, known, worth), order = inputs(7, 2)
    q.requires_grad_()
    operator = torch.ops.fovea.group_attention.default
    assert_opcheck(operator, (q, k, v, order, known[None], worth[None], 4, 0.3, "torch"))
    assert_opcheck(operator, (q, k, v, order, None, None, 4, 0.3, "torch"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_numerical_gradients(backend: str) -> None:
    for tokens in (7, 5, 3):
        tensors, order = inputs(tokens, 2, heads=1, width=2, value_width=3)
        assert_gradcheck(partial(attention, order=order, group_size=4, backend=backend), tensors)


def test_autocast() -> None:
    tensors, order = inputs(20, 3)
    assert_runs_under_autocast(partial(attention, order=order, group_size=8), tensors, torch.bfloat16)


def test_half_precision_is_near_float64() -> None:
    tensors, order = inputs(20, 3)
    calls = both(order=order, group_size=8)
    for dtype in (torch.float16, torch.bfloat16):
        assert_matches(calls["torch"], calls["reference"], [t.to(dtype) for t in tensors])
    assert_matches(calls["triton"], calls["reference"], [t.half() for t in tensors])


def test_the_choice_is_explained_and_never_silent() -> None:
    (q, k, v, known, worth), order = inputs(12, 3)
    assert explain("group_attention", q, k, v, order, 4).backend == "torch"
    call = partial(group_attention, q, k, v)
    with pytest.raises(InputError, match="group_size must be positive"):
        call(order, 0)
    with pytest.raises(InputError, match=r"must be \(1, 12\) int64; got \(1, 11\)"):
        call(order[:, 1:], 4)
    with pytest.raises(InputError, match=r"torch\.int32"):
        call(order.int(), 4)
    with pytest.raises(InputError, match="come together"):
        call(order, 4, k_global=known)
    with pytest.raises(InputError, match=r"\(M, 2, 9\) and \(M, 2, 10\)"):
        call(order, 4, k_global=known, v_global=worth[1:])
    with pytest.raises(InputError, match="takes q"):
        group_attention(q, k[:, 1:], v, order, 4)
    with pytest.raises(InputError, match="not float64"):
        group_attention(q.double(), k.double(), v.double(), order, 4, backend="triton")
    with pytest.raises(InputError, match="300 wide"):
        wide = torch.zeros(1, 12, 1, 300)
        group_attention(wide, wide, wide, order, 4, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "size", "members"), [(4096, 256, 16), (1000, 32, 128), (300, 256, 16), (100, 128, 3), (2049, 100, 40)]
)
def test_on_a_gpu(tokens: int, size: int, members: int, dtype: torch.dtype) -> None:
    tensors, order = inputs(tokens, members, batch=2, heads=4)
    tensors, order = [t.cuda().to(dtype) for t in tensors], order.cuda()
    calls = both(order=order, group_size=size)
    assert_matches(calls["triton"], calls["reference"], tensors)
    assert_matches(calls["triton"], calls["reference"], tensors[:3])
