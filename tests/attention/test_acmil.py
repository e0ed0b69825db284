"""ACMIL: sizes, hiding of top instances, loss switches, entropy; the multi-head form against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attention
from attention.acmil import ACMIL, branch_similarity, negative_entropy
from attention.acmil_mha import ACMILMultiHead
from kernels.gated_attention_pool import MASKED
from kernels.segment import segment_softmax
from tests.attention.common import DIM, CrossEntropy, bounds, make


@pytest.mark.parametrize(
    ("dim", "hidden_dim", "acmil", "gated_abmil"),
    [
        (384, 128, 84_369, 82_563),
        (512, 256, 200_593, 197_507),
        (768, 384, 398_737, 394_371),
        (1024, 512, 662_417, 656_771),
        (1536, 768, 1_386_385, 1_378_179),
    ],
)
def test_the_sizes_of_the_paper_have_its_number_of_parameters(
    dim: int, hidden_dim: int, acmil: int, gated_abmil: int
) -> None:
    for name, expected in (("acmil", acmil), ("gated_abmil", gated_abmil)):
        pooler = attention.create(name, dim=dim, num_classes=2)
        assert sum(p.numel() for p in pooler.parameters()) == expected
        assert pooler.embed.out_features == hidden_dim  # type: ignore[union-attr]


def hidden_instances(pooler: ACMIL, sizes: list[int]) -> list[Tensor]:
    bags = pooler(torch.randn(sum(sizes), DIM), bounds(sizes))
    return list((bags.attention == MASKED).split(sizes, -1))


@pytest.mark.parametrize("mask_drop", [0.0, 0.3, 0.6, 1.0])
def test_a_fixed_count_of_the_top_instances_is_hidden_in_every_branch_and_bag(mask_drop: float) -> None:
    sizes = [30, 2, 0, 1, 8]
    pooler = make("acmil", num_masked=5, mask_drop=mask_drop).train()
    assert isinstance(pooler, ACMIL)
    for size, hidden in zip(sizes, hidden_instances(pooler, sizes), strict=True):
        assert hidden.sum(1).tolist() == [int(min(5, size) * mask_drop)] * 3


def test_only_instances_of_highest_score_are_hidden_and_the_choice_varies() -> None:
    pooler = make("acmil", num_masked=4, mask_drop=0.5).train()
    features, cu_seqlens = torch.randn(30, DIM), bounds([30])
    raw = pooler.eval()(features, cu_seqlens).attention
    top = torch.zeros_like(raw, dtype=torch.bool).scatter(1, raw.topk(4).indices, True)
    pooler.train()
    choices = [pooler(features, cu_seqlens).attention == MASKED for _ in range(20)]
    assert all((choice & ~top).sum() == 0 for choice in choices)
    assert (torch.stack(choices).any(0) == top).all()
    torch.testing.assert_close(
        raw[~choices[0]], pooler(features, cu_seqlens).attention.where(choices[0], raw)[~choices[0]]
    )


def test_nothing_is_hidden_outside_training_or_when_switched_off() -> None:
    for pooler in (make("acmil").eval(), make("acmil", num_masked=0).train(), make("acmil", mask_drop=0.0).train()):
        assert isinstance(pooler, ACMIL)
        assert not hidden_instances(pooler, [20])[0].any()


def test_weights_of_zero_switch_losses_off_and_others_scale_them() -> None:
    weights = {"semantic_weight": 2.0, "diversity_weight": 3.0, "bag_weight": 0.5, "entropy_weight": 0.25}
    cu_seqlens, target = bounds([10, 15]), torch.tensor([0, 2])
    features = torch.randn(25, DIM)
    pooler = make("acmil", **weights).eval()
    losses = pooler.loss(pooler(features, cu_seqlens), target, cu_seqlens, CrossEntropy())
    assert set(losses) == {"semantic", "diversity", "bag", "entropy", "total"}
    expected = sum(weights[f"{name}_weight"] * losses[name] for name in ("semantic", "diversity", "bag", "entropy"))
    torch.testing.assert_close(losses["total"], expected)
    for name in ("semantic", "diversity", "bag", "entropy"):
        pooler = make("acmil", **{**weights, f"{name}_weight": 0}).eval()
        without = pooler.loss(pooler(features, cu_seqlens), target, cu_seqlens, CrossEntropy())
        assert set(losses) - set(without) == {name}
        torch.testing.assert_close(losses["total"] - without["total"], weights[f"{name}_weight"] * losses[name])


def test_identical_branches_are_entirely_similar_and_disjoint_ones_not_at_all() -> None:
    same = torch.tensor([0.2, 0.8, 1.0]).repeat(3, 1)
    cu_seqlens = bounds([2, 1, 0])
    torch.testing.assert_close(branch_similarity(same, cu_seqlens, 3), torch.tensor([1.0, 1.0, 0.0]))
    disjoint = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(branch_similarity(disjoint, bounds([2]), 2), torch.zeros(1))


def test_similarity_is_the_mean_cosine_of_the_pairs_head_by_head() -> None:
    weights = torch.rand(3 * 2, 9)
    parts = weights.split([4, 5], -1)
    for bag, part in enumerate(parts):
        maps = part.unflatten(0, (3, 2))
        cosines = [F.cosine_similarity(maps[i], maps[j], dim=-1).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
        torch.testing.assert_close(branch_similarity(weights, bounds([4, 5]), 3)[bag], torch.stack(cosines).mean())


def test_entropy_is_highest_for_uniform_attention_and_can_be_taken_over_the_top() -> None:
    weights = torch.tensor([[0.25] * 4 + [1.0, 0.0, 0.0, 0.0]])
    cu_seqlens = bounds([4, 4, 0])
    torch.testing.assert_close(negative_entropy(weights, cu_seqlens), torch.tensor([-math.log(4), 0.0, 0.0]))
    torch.testing.assert_close(negative_entropy(weights, cu_seqlens, 2), torch.tensor([-math.log(2), 0.0, 0.0]))
    torch.testing.assert_close(negative_entropy(weights, cu_seqlens, 100), negative_entropy(weights, cu_seqlens))


def test_entropy_of_hidden_instances_has_a_finite_gradient() -> None:
    scores = torch.tensor([[1.0, MASKED, 2.0]], requires_grad=True)
    for top_k in (None, 3):
        negative_entropy(segment_softmax(scores, bounds([3])), bounds([3]), top_k).sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all()


def test_the_bag_feature_is_what_the_mean_attention_pools() -> None:
    pooler = make("acmil").eval()
    features = torch.randn(13, DIM)
    bags = pooler(features, bounds([13]))
    mean = bags.attention.softmax(-1).mean(0)
    torch.testing.assert_close(bags.embeddings[0], mean @ (features @ pooler.embed.weight.t()).relu())


def test_multi_head_attention_equals_attention_with_full_projections() -> None:
    pooler = make("acmil_mha").eval()
    assert isinstance(pooler, ACMILMultiHead)
    features = torch.randn(14, DIM)
    hidden = (features @ pooler.embed.weight.t()).relu()

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, 4)).transpose(0, 1)  # (heads, n, width)

    bags = pooler(features, bounds([14]))
    maps = []
    for branch in range(3):
        q = F.linear(pooler.queries[branch : branch + 1], pooler.q.weight[branch], pooler.q.bias[branch])
        k = F.linear(hidden, pooler.k.weight[branch], pooler.k.bias[branch])
        v = F.linear(hidden, pooler.v.weight[branch], pooler.v.bias[branch])
        maps.append((heads(q) @ heads(k).transpose(1, 2) / 2).softmax(-1))
        merged = (maps[-1] @ heads(v)).transpose(0, 1).flatten(1)
        out = F.linear(merged, pooler.out.weight[branch], pooler.out.bias[branch])
        out = F.layer_norm(out, (8,), pooler.norm_weight[branch], pooler.norm_bias[branch], 1e-6)
        logits = F.linear(out, pooler.branch_weight[branch], pooler.branch_bias[branch])
        torch.testing.assert_close(bags.extras["branch_logits"][0, branch], logits[0])
    mean = torch.stack(maps).mean(0)
    merged = (mean @ heads(F.linear(hidden, pooler.bag_v.weight[0], pooler.bag_v.bias[0]))).transpose(0, 1).flatten(1)
    expected = pooler.classifier(pooler.bag_norm(F.linear(merged, pooler.bag_out.weight[0], pooler.bag_out.bias[0])))
    torch.testing.assert_close(bags.logits, expected)
