"""CLAM's instance loss, held against a bag-by-bag, class-by-class reading of the paper."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attention.clam_sb import CLAM
from kernels.segment import segment_lengths
from tests.attention.common import CLASSES, DIM, CrossEntropy, MultiLabel, bounds, make


def smooth_svm(logits: Tensor, labels: Tensor) -> Tensor:
    margin = 1 - F.one_hot(labels, 2).float()
    return ((logits + margin).logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).mean()


def instance_loss(pooler: CLAM, hidden: Tensor, scores: Tensor, active: Tensor) -> Tensor:
    """Of one bag, as the paper says it."""
    criterion = smooth_svm if pooler.instance_loss == "svm" else F.cross_entropy
    k = min(pooler.num_samples, len(hidden))
    losses = []
    for number in range(CLASSES):
        row = scores[number if len(scores) > 1 else 0].softmax(0)
        top, bottom = row.topk(k).indices, (-row).topk(k).indices
        weight, bias = pooler.instance_weight[number], pooler.instance_bias[number]
        if active[number]:
            chosen = torch.cat([top, bottom])
            labels = torch.cat([torch.ones(k), torch.zeros(k)]).long()
        elif pooler.subtyping:
            chosen, labels = top, torch.zeros(k).long()
        else:
            continue
        losses.append(criterion(F.linear(hidden[chosen], weight, bias), labels))
    count = CLASSES if pooler.subtyping else int(active.sum())
    return torch.stack(losses).sum() / count


@pytest.mark.parametrize("name", ["clam_sb", "clam_mb"])
@pytest.mark.parametrize("subtyping", [True, False])
@pytest.mark.parametrize("kind", ["ce", "svm"])
@pytest.mark.parametrize("multi_label", [True, False])
def test_the_instance_loss_is_the_papers_in_bags_of_any_size(
    name: str, subtyping: bool, kind: str, multi_label: bool
) -> None:
    pooler = make(name, subtyping=subtyping, instance_loss=kind, num_samples=4, gate=name == "clam_mb").train()
    assert isinstance(pooler, CLAM)
    sizes = [20, 1, 3, 7, 2]
    cu_seqlens = bounds(sizes)
    target = torch.tensor([0, 2, 1, 1, 0])
    objective = MultiLabel() if multi_label else CrossEntropy()
    if multi_label:
        target = torch.tensor([[1.0, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 1], [1, 0, 1]])
    bags = pooler(torch.randn(sum(sizes), DIM), cu_seqlens)
    hidden = bags.extras["hidden"].split(sizes)
    scores = bags.attention.split(sizes, -1)
    expected = [instance_loss(pooler, *bag) for bag in zip(hidden, scores, objective.active(target), strict=True)]
    losses = pooler.loss(bags, target, cu_seqlens, objective)
    torch.testing.assert_close(
        pooler.instance_losses(bags, cu_seqlens, objective.active(target)), torch.stack(expected)
    )
    torch.testing.assert_close(losses["instance"], torch.stack(expected).mean())
    torch.testing.assert_close(losses["total"], 0.7 * losses["bag"] + 0.3 * losses["instance"])


def test_an_empty_bag_has_no_instance_loss() -> None:
    pooler = make("clam_mb")
    assert isinstance(pooler, CLAM)
    for sizes in ([0], [5, 0]):
        cu_seqlens = bounds(sizes)
        bags = pooler(torch.randn(sum(sizes), DIM), cu_seqlens)
        losses = pooler.instance_losses(bags, cu_seqlens, CrossEntropy().active(torch.zeros(len(sizes)).long()))
        assert (losses == 0).tolist() == (segment_lengths(cu_seqlens) == 0).tolist()


def test_the_whole_weight_on_the_bag_switches_the_instance_loss_off() -> None:
    pooler = make("clam_sb", bag_weight=1.0).train()
    cu_seqlens = bounds([9])
    losses = pooler.loss(pooler(torch.randn(9, DIM), cu_seqlens), torch.tensor([1]), cu_seqlens, CrossEntropy())
    assert set(losses) == {"bag", "total"}
    losses["total"].backward()
    assert isinstance(pooler, CLAM)
    assert pooler.instance_weight.grad is None


@pytest.mark.parametrize(("size", "width"), [("small", 256), ("big", 384)])
def test_sizes_are_the_papers(size: str, width: int) -> None:
    pooler = make("clam_sb", size=size, hidden_dim=512, attention_dim=None)
    assert pooler.gate.weight.shape == (2 * width, 512)


def test_dropout_acts_in_training_only() -> None:
    pooler = make("clam_sb", dropout=0.5)
    features, cu_seqlens = torch.randn(40, DIM), bounds([40])
    assert torch.equal(pooler.eval()(features, cu_seqlens).logits, pooler(features, cu_seqlens).logits)
    pooler.train()
    assert not torch.equal(pooler(features, cu_seqlens).logits, pooler(features, cu_seqlens).logits)
