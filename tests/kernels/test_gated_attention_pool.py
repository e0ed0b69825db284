"""Attention pooling: every backend against the reference in float64, over bags, widths, branches, masks and layouts."""

from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.backend import INTERPRETING, explain
from kernels.errors import InputError
from kernels.gated_attention_pool import MASKED, PoolWeights, eager, gated_attention_pool, operator
from kernels.gated_attention_pool.embedded import AttentionWeights, embedded_attention_pool
from tests.kernels.contract import (
    assert_any_incoming_gradient,
    assert_compiles,
    assert_gradcheck,
    assert_matches,
    assert_opcheck,
    assert_runs_under_autocast,
    outputs_and_gradients,
    poisoned,
)

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETING, reason="tensors on the CPU"))
BACKENDS = ["torch", TRITON]


def cuts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def weights(depth: int, width: int, branches: int, gated: bool = True, dtype: torch.dtype = torch.float32) -> list:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).div(shape[-1] ** 0.5).to(dtype)

    gate = [draw(width, depth), draw(width)] if gated else [None, None]
    return [draw(width, depth), draw(width), *gate, draw(branches, width), draw(branches)]


def pool(x: Tensor, *rest: Tensor | None, lengths: list[int], **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """``rest``: the six weights and, perhaps, the values."""
    values = rest[6] if len(rest) > 6 else None
    return gated_attention_pool(x, PoolWeights(*rest[:6]), cuts(lengths), values=values, **options)  # type: ignore[arg-type]


def bags(lengths: list[int], depth: int = 24, width: int = 20, branches: int = 3, gated: bool = True) -> list:
    return [torch.randn(sum(lengths), depth), *weights(depth, width, branches, gated)]


CASES = {
    "one": ([37], bags([37])),
    "many with empty": ([17, 0, 40, 3, 0], bags([17, 0, 40, 3, 0])),
    "one branch, tanh alone": ([20, 33], bags([20, 33], branches=1, gated=False)),
    "many branches": ([20, 6], bags([20, 6], depth=16, width=16, branches=17)),
    "small and odd": ([1, 1, 9, 5], bags([1, 1, 9, 5], depth=13, width=7, branches=2)),
    "several blocks": ([70], bags([70], depth=72, width=40, branches=5)),
    "only empty": ([0, 0], bags([0, 0])),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extra", ["", "hidden", "values"])
@pytest.mark.parametrize("case", CASES)
def test_it_matches_the_reference(case: str, extra: str, backend: str) -> None:
    lengths, tensors = CASES[case]
    drop_mask, values = None, None
    if extra == "hidden":
        drop_mask = torch.rand(sum(lengths), len(tensors[5])) < 0.4
        drop_mask[: lengths[0]] = True  # the first bag hides all
    if extra == "values":
        values = torch.randn(sum(lengths), 12)
    call = partial(pool, lengths=lengths, drop_mask=drop_mask)
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), [*tensors, values])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outputs", [[0], [1], [2], [0, 2]], ids=str)
def test_each_output_has_its_gradient(outputs: list[int], backend: str) -> None:
    lengths = [9, 0, 14]
    values = torch.randn(23, 8)

    def call(*tensors: Tensor, backend: str) -> tuple[Tensor, ...]:
        results = pool(*tensors, lengths=lengths, backend=backend)
        return tuple(results[i] for i in outputs)

    for tensors in (bags(lengths), [*bags(lengths), values]):
        assert_matches(partial(call, backend=backend), partial(call, backend="reference"), tensors)


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_gradients_that_nobody_wants_are_not_made(backend: str) -> None:
    lengths = [9, 4]
    tensors = bags(lengths)
    values = torch.randn(13, 8)
    for wanted in ([0], [7], [1, 2, 3, 4, 5, 6]):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate([*tensors, values])]
        precise = [t.detach().double().requires_grad_(i in wanted) for i, t in enumerate([*tensors, values])]
        pool(*leaves, lengths=lengths, backend=backend)[0].square().sum().backward()
        pool(*precise, lengths=lengths, backend="reference")[0].square().sum().backward()
        for i, (leaf, exact) in enumerate(zip(leaves, precise, strict=True)):
            assert (leaf.grad is None) == (i not in wanted)
            if i in wanted:
                torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_bags_too_short_to_cut_and_long_ones_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [3, 0, 9, 1, 30, 5]
    tensors = [*bags(lengths), torch.randn(48, 8)]
    call = partial(pool, lengths=lengths, drop_mask=torch.rand(48, 3) < 0.3)
    for form in ("per_bag", "flat"):
        monkeypatch.setattr(eager, "choose_form", lambda *_, form=form: form)
        for rows, gathered in ((7, 200), (4096, 1 << 22)):
            monkeypatch.setattr(eager, "FORWARD_ROWS", rows)
            monkeypatch.setattr(eager, "BACKWARD_ROWS", rows)
            monkeypatch.setattr(eager, "_GATHERED", gathered)
            assert_matches(partial(call, backend="torch"), partial(call, backend="reference"), tensors)


def test_activations_that_are_not_kept_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [30, 7]
    tensors = bags(lengths)
    kept = outputs_and_gradients(partial(pool, lengths=lengths, backend="torch"), tensors)
    monkeypatch.setattr(operator, "_KEPT_GATES", 0)
    outputs, gradients, _ = outputs_and_gradients(partial(pool, lengths=lengths, backend="torch"), tensors, kept[2])
    for ours, expected in zip([*outputs, *gradients], [*kept[0], *kept[1]], strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_lies_outside_the_tensors_is_not_read(value: float, backend: str) -> None:
    lengths = [7, 25]
    tensors = [None if t is None else poisoned(t, value) for t in [*bags(lengths), torch.randn(32, 10)]]
    drop_mask = torch.ones(40, 9, dtype=torch.bool)[4:36, 2:5]
    drop_mask[:] = torch.rand(32, 3) < 0.3
    call = partial(pool, lengths=lengths, drop_mask=drop_mask)
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), tensors)
    call = partial(pool, lengths=lengths, drop_mask=drop_mask.t().contiguous().t())
    transposed = [t.t().contiguous().t() if t is not None and t.dim() == 2 else t for t in tensors]
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), transposed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bag_is_blind_to_the_others(backend: str) -> None:
    lengths = [9, 30, 5]
    x, *rest = bags(lengths)
    before = pool(x, *rest, lengths=lengths, backend=backend)
    x[9:39] = torch.nan
    after = pool(x, *rest, lengths=lengths, backend=backend)
    for mine, again in zip(before[:2], after[:2], strict=True):
        assert torch.equal(mine[[0, 2]], again[[0, 2]])
        assert again[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_bags_give_what_each_gives_alone(backend: str) -> None:
    lengths = [13, 0, 40, 1]
    x, *rest = bags(lengths)
    packed = pool(x, *rest, lengths=lengths, backend=backend)
    alone = [pool(bag, *rest, lengths=[len(bag)], backend=backend) for bag in x.split(lengths)]
    for ours, parts in zip(packed, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_bags_and_of_instances_does_not_matter(backend: str) -> None:
    lengths = [13, 6, 40]
    x, *rest = bags(lengths)
    pooled, lse, scores = pool(x, *rest, lengths=lengths, backend=backend)
    order = torch.cat([19 + torch.randperm(40), torch.randperm(13), 13 + torch.randperm(6)])
    moved = pool(x[order], *rest, lengths=[40, 13, 6], backend=backend)
    bag_order = [2, 0, 1]
    for ours, expected in zip(moved, (pooled[bag_order], lse[bag_order], scores[order]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_ties_and_outliers(backend: str) -> None:
    lengths = [20, 11]
    x, *rest = bags(lengths)
    rest[4] *= 1e4 / 3
    call = partial(pool, lengths=lengths)
    tensors = [x, *rest]
    # Scores of 1e4 hold three digits after the point in float32.
    got = call(*tensors, backend=backend)
    exact = call(*(t.double() for t in tensors), backend="reference")
    torch.testing.assert_close(got[2].double(), exact[2], rtol=1e-5, atol=5e-2)
    assert all(part.isfinite().all() for part in got)
    x[:20] = x[0]  # every score of the first bag is the same: its mean
    tied = call(*tensors, backend=backend)[0][0]
    torch.testing.assert_close(tied, x[0].expand(3, -1), rtol=1e-4, atol=1e-4)
    outputs, gradients, _ = outputs_and_gradients(partial(call, backend=backend), tensors)
    assert all(part.isfinite().all() for part in [*outputs, *gradients])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_bag_with_every_instance_hidden_has_their_mean(backend: str) -> None:
    x, *rest = bags([6, 100])
    drop_mask = torch.ones(106, 3, dtype=torch.bool)
    drop_mask[50, 1] = False  # all but one
    pooled, lse, scores = pool(x, *rest, lengths=[6, 100], drop_mask=drop_mask, backend=backend)
    torch.testing.assert_close(pooled[0], x[:6].mean(0).expand(3, -1))
    torch.testing.assert_close(pooled[1, 0], x[6:].mean(0))
    torch.testing.assert_close(pooled[1, 1], x[50])
    torch.testing.assert_close(lse[0], torch.full((3,), MASKED))
    torch.testing.assert_close(scores, pool(x, *rest, lengths=[6, 100])[2])  # the raw ones
    _, gradients, _ = outputs_and_gradients(partial(pool, lengths=[6], drop_mask=drop_mask[:6]), [x[:6], *rest], None)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_no_bags_and_no_instances(backend: str) -> None:
    for lengths in ([], [0, 0], [0]):
        pooled, lse, scores = pool(*bags(lengths), lengths=lengths, backend=backend)
        assert pooled.shape == (len(lengths), 3, 24) and scores.shape == (0, 3)
        assert (pooled == 0).all() and (lse == -torch.inf).all()
    leaves = [t.requires_grad_() for t in bags([])]
    pool(*leaves, lengths=[], backend=backend)[0].sum().backward()
    assert all(leaf.grad is None or (leaf.grad == 0).all() for leaf in leaves)


def test_one_bag_of_200_000_instances() -> None:
    x, *rest = bags([200_000], depth=16, width=8, branches=2)
    assert_matches(
        partial(pool, lengths=[200_000], backend="torch"), partial(pool, lengths=[200_000], backend="reference"),
        [x, *rest],
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_an_operator_to_the_compiler(backend: str) -> None:
    lengths = [5, 0, 9]
    x, *rest = bags(lengths)
    call = partial(pool, lengths=lengths, backend=backend)
    assert_compiles(lambda x: call(x, *rest), [x])
    assert_any_incoming_gradient(call, [x, *rest])

    cu = cuts(lengths)
    hidden = torch.rand(14, 3) < 0.4

    def masked(x: Tensor, tanh: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        own = PoolWeights(tanh, *rest[1:])
        return gated_attention_pool(x, own, cu, values=values, drop_mask=hidden, backend=backend)

    assert_compiles(masked, [x, rest[0], torch.randn(14, 8)])


def test_compiling_the_embedded_form_breaks_no_graph() -> None:
    draw = weights(20, 8, 3)
    params = AttentionWeights(torch.randn(20, 12) / 4, None, torch.cat(draw[:3:2]), torch.cat(draw[1:4:2]), *draw[4:])
    cu = cuts([30])
    assert_compiles(lambda x, *p: embedded_attention_pool(x, AttentionWeights(*p), cu), [torch.randn(30, 12), *params])


def test_it_is_registered_properly() -> None:
    x, tanh, tanh_bias, sigmoid, sigmoid_bias, score, score_bias = (t.requires_grad_() for t in bags([5, 0, 4]))
    stacked = (torch.cat([tanh, sigmoid]), torch.cat([tanh_bias, sigmoid_bias]), score, score_bias, cuts([5, 0, 4]))
    values = torch.randn(9, 4, requires_grad=True)
    mask = torch.rand(9, 3) < 0.5
    operator_ = torch.ops.fovea.gated_attention_pool.default
    assert_opcheck(operator_, (x, *stacked, None, None, True, "torch"))
    assert_opcheck(operator_, (x, *stacked, values, mask, False, "torch"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_numerical_gradients(backend: str) -> None:
    lengths = [2, 0, 3]
    mask = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1], [0, 1]]).bool()
    tensors = bags(lengths, depth=3, width=2, branches=2)

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled, lse, scores = pool(*tensors, lengths=lengths, drop_mask=mask, backend=backend)
        return pooled, lse[[0, 2]], scores

    assert_gradcheck(call, tensors)
    assert_gradcheck(call, [*tensors, torch.randn(5, 2)])
    ungated = [t for t in bags(lengths, depth=3, width=2, branches=2, gated=False) if t is not None]
    assert_gradcheck(lambda x, v, b, *w: call(x, v, b, None, None, *w), ungated)


def test_autocast() -> None:
    tensors = bags([20, 11])
    assert_runs_under_autocast(partial(pool, lengths=[20, 11]), tensors, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        pooled, lse, scores = pool(*tensors, lengths=[20, 11])
    assert pooled.dtype == lse.dtype == scores.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_float64(dtype: torch.dtype) -> None:
    lengths = [50, 13]
    half = [t.to(dtype) for t in [*bags(lengths, depth=48, width=32), torch.randn(63, 16)]]
    call = partial(pool, lengths=lengths)
    assert_matches(partial(call, backend="torch"), partial(call, backend="reference"), half)
    if dtype == torch.float16 and INTERPRETING:
        assert_matches(partial(call, backend="triton"), partial(call, backend="reference"), half)
        assert_matches(partial(call, backend="triton"), partial(call, backend="reference"), half[:7])
    pooled, lse, scores = call(*half)
    assert pooled.dtype == dtype and lse.dtype == scores.dtype == torch.float32


def test_the_choice_is_explained_and_never_silent() -> None:
    x, *rest = bags([4])
    own, cu = PoolWeights(*rest), cuts([4])
    assert explain("gated_attention_pool", x, own, cu).backend == "torch"
    assert "asks for it" in str(explain(gated_attention_pool, x, own, cu, backend="reference"))
    with pytest.raises(InputError, match="cannot serve because"):
        pool(*(t.double() for t in [x, *rest]), lengths=[4], backend="triton")
    with pytest.raises(InputError, match="Did you mean 'triton'"):
        gated_attention_pool(x, own, cu, backend="tritn")


@pytest.mark.skipif(not INTERPRETING, reason="tensors on the CPU")
def test_too_many_branches_for_the_kernels_are_refused() -> None:
    with pytest.raises(InputError, match="65 branches"):
        pool(*bags([4], branches=65), lengths=[4], backend="triton")


def test_what_does_not_fit_is_said() -> None:
    x, *rest = bags([4])
    own, cu = PoolWeights(*rest), cuts([4])
    wrong = {
        "takes x": (x[:, :5], own, {}),
        "together, or neither": (x, own._replace(sigmoid=None), {}),
        "must have the shapes of the tanh's": (x, own._replace(sigmoid=rest[2][:3]), {}),
        r"score weights \(K, 20\)": (x, own._replace(score=rest[4][:, :3]), {}),
        r"values must be \(4, E\)": (x, own, {"values": x[:3]}),
        r"drop_mask must be bool \(4, 3\)": (x, own, {"drop_mask": torch.zeros(4, 3)}),
        "convert one of them": (x.half(), own, {}),
    }
    for sentence, (features, these, options) in wrong.items():
        with pytest.raises(InputError, match=sentence):
            gated_attention_pool(features, these, cu, **options)
    with pytest.raises(InputError, match="cu_seqlens must be"):
        gated_attention_pool(x, own, cu[None])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(512, 128, 5), (1024, 256, 1), (384, 96, 20), (500, 100, 2)], ids=str)
def test_on_a_gpu(shape: tuple[int, int, int], gated: bool, dtype: torch.dtype) -> None:
    lengths = [20_000, 1, 0, 300, 64, 4097]
    depth, width, branches = shape
    x = torch.randn(sum(lengths), depth)
    tensors = [None if t is None else t.to("cuda", dtype) for t in [x, *weights(depth, width, branches, gated)]]
    drop_mask = (torch.rand(len(x), branches) < 0.2).cuda()
    cu = cuts(lengths).cuda()

    def call(*tensors: Tensor, backend: str, hidden: Tensor | None) -> tuple[Tensor, ...]:
        return gated_attention_pool(tensors[0], PoolWeights(*tensors[1:]), cu, drop_mask=hidden, backend=backend)

    for hidden in (None, drop_mask):
        assert_matches(
            partial(call, backend="triton", hidden=hidden), partial(call, backend="reference", hidden=hidden), tensors
        )


@pytest.mark.gpu
def test_two_runs_on_a_gpu_are_equal_and_use_little_memory() -> None:
    lengths = [100_000, 200, 3000]
    tensors = [t.to("cuda", torch.bfloat16) for t in bags(lengths, 512, 128, 5)]
    leaves = [t.requires_grad_() for t in tensors]
    cu = cuts(lengths).cuda()

    def call() -> list[Tensor]:
        pooled, _, _ = gated_attention_pool(leaves[0], PoolWeights(*leaves[1:]), cu, backend="triton")
        return [pooled, *torch.autograd.grad(pooled.sum(), leaves)]

    first = call()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    second = call()
    # The gradient of the features and what comes before the activations, half as large, are all that is large.
    assert torch.cuda.max_memory_allocated() - before < 1.75 * tensors[0].numel() * 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
