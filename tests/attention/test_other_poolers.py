"""Mean, max, ABMIL, DSMIL and TransMIL, each against what its paper says in plain code."""

import math

import pytest
import torch
import torch.nn.functional as F

import attention
from attention.abmil import BagNorm
from attention.transmil import NystromAttention, PositionalConvolution, TransMIL, pseudo_inverse
from kernels.errors import InputError
from tests.attention.common import CLASSES, DIM, CrossEntropy, bounds, make


def test_mean_pooling_averages_the_logits_of_instances() -> None:
    pooler = make("mean").eval()
    bags = pooler(torch.randn(9, DIM), bounds([4, 5]))
    expected = torch.stack([part.mean(1) for part in bags.attention.split([4, 5], -1)])
    torch.testing.assert_close(bags.logits, expected)


def test_max_pooling_takes_each_classs_highest_instance_or_one_instance_for_all() -> None:
    features = torch.randn(9, DIM)
    by_class = make("max").eval()(features, bounds([4, 5]))
    parts = by_class.attention.split([4, 5], -1)
    torch.testing.assert_close(by_class.logits, torch.stack([part.amax(1) for part in parts]))
    by_instance = make("max", select="instance").eval()(features, bounds([4, 5]))
    chosen = [part.t()[part.softmax(0).amax(0).argmax()] for part in parts]
    torch.testing.assert_close(by_instance.logits, torch.stack(chosen))


def test_max_pooling_of_two_classes_ranks_by_the_second() -> None:
    torch.manual_seed(0)
    pooler = attention.create("max", dim=DIM, num_classes=2, hidden_dim=8, select="instance").eval()
    bags = pooler(torch.randn(30, DIM), bounds([30]))
    expected = bags.attention.t()[bags.attention.softmax(0)[1].argmax()]
    torch.testing.assert_close(bags.logits[0], expected)


@pytest.mark.parametrize("name", ["mean", "max"])
def test_the_logits_are_those_of_the_embedding(name: str) -> None:
    pooler = make(name, **({"select": "instance"} if name == "max" else {})).eval()
    bags = pooler(torch.randn(9, DIM), bounds([4, 5]))
    torch.testing.assert_close(pooler.classifier(bags.embeddings), bags.logits)


@pytest.mark.parametrize(("name", "gated"), [("abmil", False), ("gated_abmil", True)])
def test_abmil_is_the_papers_equation(name: str, gated: bool) -> None:
    pooler = make(name, input_bias=True).eval()
    features = torch.randn(7, DIM)
    hidden = pooler.embed(features).relu()
    tanh, *sigmoid = pooler.gate(hidden).split(4, 1)
    assert bool(sigmoid) is gated
    inner = tanh.tanh() * sigmoid[0].sigmoid() if gated else tanh.tanh()
    weights = pooler.score(inner).softmax(0)
    bags = pooler(features, bounds([7]))
    torch.testing.assert_close(bags.logits, pooler.classifier(weights.t() @ hidden))
    torch.testing.assert_close(bags.attention.softmax(-1), weights.t())


def test_batch_normalisation_uses_real_instances_and_survives_one_bag() -> None:
    pooler = make("abmil", norm="batch").train()
    features = torch.randn(50, DIM) * 3 + 2
    pooler(features, bounds([20, 30]))
    torch.testing.assert_close(pooler.input_norm.running_mean, 0.1 * features.mean(0))
    bags = pooler(features, bounds([50]))
    assert bags.logits.isfinite().all()
    norm = BagNorm(4).train()
    torch.testing.assert_close(norm(torch.ones(1, 4)), torch.ones(1, 4) / math.sqrt(1 + 1e-5))


def test_dsmil_attends_from_the_critical_instance() -> None:
    pooler = make("dsmil", passing_v=False).eval()
    features = torch.randn(11, DIM)
    bags = pooler(features, bounds([11]))
    instance = pooler.instance_classifier(features)
    queries = pooler.query_out(pooler.query(features).relu()).tanh()
    weights = (queries @ queries[instance.argmax(0)].t() / math.sqrt(6)).softmax(0)
    torch.testing.assert_close(bags.attention.softmax(-1), weights.t())
    torch.testing.assert_close(bags.logits, pooler.classifier((weights.t() @ features).flatten()[None]))
    target = torch.tensor([2])
    expected = (F.cross_entropy(bags.logits, target) + F.cross_entropy(instance.amax(0)[None], target)) / 2
    torch.testing.assert_close(pooler.loss(bags, target, bounds([11]), CrossEntropy())["total"], expected)


def test_dsmil_can_start_orthogonal_and_with_linear_queries() -> None:
    pooler = make("dsmil", init="orthogonal", nonlinear=False)
    weight = pooler.query.weight
    torch.testing.assert_close(weight @ weight.t(), torch.eye(6), rtol=1e-5, atol=1e-5)
    assert not pooler.query.bias.any()
    assert pooler(torch.randn(5, DIM), bounds([5])).logits.shape == (1, CLASSES)


@pytest.mark.parametrize("count", [1, 4, 7, 30])
def test_the_first_tokens_result_alone_is_that_of_the_whole_sequence(count: int) -> None:
    attend = NystromAttention(16, 4, 4, 0.0).eval()
    tokens = torch.randn(count, 16)
    alone, row = attend.first(tokens, with_row=True)
    torch.testing.assert_close(alone, attend(tokens)[0])
    assert row is not None
    assert row.shape == (count,)


def test_nystrom_attention_is_the_exact_one_where_every_token_is_a_landmark() -> None:
    attend = NystromAttention(16, 4, 8, 0.0).eval()
    tokens = torch.randn(8, 16) * 4
    q, k, v = attend.qkv(tokens).unflatten(1, (3, 4, 4)).permute(1, 2, 0, 3)
    weights = (q @ k.transpose(1, 2) / 2).softmax(-1)
    exact = weights @ v + attend.residual(v[None])[0]
    torch.testing.assert_close(attend(tokens), attend.out(exact.transpose(0, 1).flatten(1)), rtol=0.02, atol=0.02)
    torch.testing.assert_close(attend.first(tokens, True)[1], weights[:, 0].mean(0), rtol=0.02, atol=0.02)


def test_the_pseudo_inverse_inverts() -> None:
    x = (torch.randn(3, 6, 6) + 4 * torch.eye(6)).softmax(-1)
    torch.testing.assert_close(x @ pseudo_inverse(x), torch.eye(6).expand(3, 6, 6), rtol=1e-3, atol=1e-3)


def test_the_merged_convolution_is_the_sum_of_the_three() -> None:
    layer = PositionalConvolution(5)
    tokens = torch.randn(36, 5)
    grid = tokens.t().view(1, 5, 6, 6)
    expected = grid + layer.conv7(grid) + layer.conv5(grid) + layer.conv3(grid)
    torch.testing.assert_close(layer(tokens, 6), expected.view(5, 36).t())


def test_transmil_brings_attention_of_repeated_instances_back() -> None:
    pooler = make("transmil").eval()
    assert isinstance(pooler, TransMIL)
    features = torch.randn(5, DIM)  # a square of 9: the first four instances stand in it twice
    seen: list[torch.Tensor] = []
    first = pooler.attention2.first

    def spy(tokens: torch.Tensor, with_row: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        outcome = first(tokens, with_row)
        assert outcome[1] is not None
        seen.append(outcome[1])
        return outcome

    pooler.attention2.first = spy  # type: ignore[method-assign]
    scores = pooler(features, bounds([5])).attention[0]
    row = seen[0]
    expected = (row[1:6] + F.pad(row[6:], (0, 1))).clamp_min(torch.finfo(torch.float32).tiny).log()
    torch.testing.assert_close(scores, expected)


def test_transmil_leaves_attention_out_while_training() -> None:
    assert not make("transmil").train()(torch.randn(5, DIM), bounds([5])).attention.any()


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model."])
def test_checkpoints_saved_through_a_wrapper_load(prefix: str) -> None:
    one, other = make("clam_sb", 1), make("clam_sb", 2)
    attention.load_official(other, {prefix + key: value for key, value in one.state_dict().items()})
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_a_checkpoint_of_another_model_is_refused_with_the_names() -> None:
    with pytest.raises(InputError, match=r"does not fit ACMIL: missing: .*unexpected: "):
        attention.load_official(make("acmil"), make("transmil").state_dict())


def test_a_checkpoint_with_another_number_of_branches_is_refused_by_shape() -> None:
    with pytest.raises(InputError, match=r"branch_weight \(5, 3, 8\) instead of \(3, 3, 8\)"):
        attention.load_official(make("acmil"), make("acmil", num_branches=5).state_dict())
