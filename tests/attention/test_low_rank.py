"""LAMA: closed forms of pooling, bounds of weights, the mixer's relation to it, blocks of queries."""

import pytest
import torch

import attention
from attention import low_rank
from attention.low_rank import LowRankMixer, LowRankPool
from attention.mixer import Mixer
from kernels.errors import InputError
from tests.attention.common import bounds, make
from tests.attention.contract import compiled_agrees, make_mixer


def test_a_bag_is_pooled_as_the_equations_say() -> None:
    torch.manual_seed(0)
    pool, x = LowRankPool(6, 4), torch.randn(7, 6)
    scores = torch.tanh((x.mean(0) @ pool.p) * (x @ pool.q))
    scores = scores / scores.square().sum(1, keepdim=True).sqrt()
    sums, _, found = pool(x, bounds([7]))
    torch.testing.assert_close(found, scores.t())
    torch.testing.assert_close(sums[0], scores.softmax(0).t() @ x)


def test_no_instance_has_more_than_e_squared_times_the_weight_of_another() -> None:
    pooler = make("low_rank").eval()
    bags = pooler(torch.randn(40, 12) * 20, bounds([40]))
    weights = bags.extras["weights"]
    assert (weights.amax(1) / weights.amin(1) <= torch.tensor(2.0).exp() * 1.0001).all()
    torch.testing.assert_close(bags.attention.square().sum(0), torch.ones(40))  # unit length over heads


def test_a_bag_of_equal_instances_pools_to_that_instance() -> None:
    pool, instance = LowRankPool(6, 3), torch.randn(6)
    sums, _, _ = pool(instance.expand(9, 6), bounds([9]))
    torch.testing.assert_close(sums[0], instance.expand(3, 6))


def test_a_mixer_scores_what_pooling_would_with_that_token_as_the_mean() -> None:
    mixer = make_mixer("low_rank")
    assert isinstance(mixer, LowRankMixer)
    x = torch.randn(1, 5, 32)
    weights = mixer(x, return_attention=True)[1]
    for i in range(5):
        scores = torch.tanh((x[0, i] @ mixer.p) * (x[0] @ mixer.q))
        torch.testing.assert_close(weights[0, :, i], torch.nn.functional.normalize(scores).softmax(0).t())


def test_the_order_of_tokens_does_not_matter_and_equal_values_stay() -> None:
    mixer, x = make_mixer("low_rank"), torch.randn(2, 21, 32)
    order = torch.randperm(21)
    torch.testing.assert_close(mixer(x[:, order]), mixer(x)[:, order], rtol=1e-4, atol=1e-5)
    constant = x[:, :1].expand(2, 21, 32)
    torch.testing.assert_close(mixer(constant), mixer.proj(mixer.v(constant)), rtol=1e-4, atol=1e-5)


def test_queries_in_blocks_give_the_same_output_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = make_mixer("low_rank"), torch.randn(2, 17, 32)
    mask = torch.rand(2, 17) < 0.7
    found = []
    for rows in (128, 4):
        monkeypatch.setattr(low_rank, "QUERY_ROWS", rows)
        given = x.clone().requires_grad_()
        out = mixer(given, mask)
        found.append((out, *torch.autograd.grad(out.square().sum(), [given, *mixer.parameters()])))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    compiled_agrees(mixer, x)


def test_both_kinds_are_found_by_kind() -> None:
    assert attention.kinds_of("low_rank") == ["mixer", "pooling"]
    assert isinstance(attention.create("low_rank", dim=16), Mixer)
    with pytest.raises(InputError, match="num_heads=0 must be at least 1"):
        attention.create("low_rank", kind="pooling", dim=8, num_classes=2, num_heads=0)


def test_a_checkpoint_with_a_classifier_is_taken() -> None:
    pooler = make("low_rank")
    state = pooler.state_dict()
    official = {key.removeprefix("pool."): value + 1 for key, value in state.items()}
    attention.load_official(pooler, official)
    torch.testing.assert_close(pooler.pool.p, official["p"])
