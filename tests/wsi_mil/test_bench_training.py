"""The peer of the training benchmark is the same model: from the same weights it has the same loss and gradients."""

import pytest
import torch

import attention
from tasks.wsi_mil.bench_training import PlainACMIL, _alone
from tasks.wsi_mil.targets import Target


@pytest.mark.parametrize("count", [40, 6, 3000])
def test_the_plain_formulation_and_ours_take_the_same_step(count: int) -> None:
    plain = PlainACMIL(24, 2).train()
    ours = attention.load_official(attention.create("acmil", dim=24, num_classes=2), plain.state_dict()).train()
    bag, noise, label = torch.randn(count, 24), torch.rand(5, 10), torch.tensor([1])
    cu_seqlens = torch.tensor([0, count])

    expected = plain.loss(plain(bag, noise), label)
    expected.backward()
    bags = ours(bag, cu_seqlens, mask_noise=noise[:, None])
    losses = ours.loss(bags, label, cu_seqlens, Target("binary", ("negative", "positive")))  # type: ignore[operator]
    losses["total"].backward()

    torch.testing.assert_close(losses["total"], expected)
    torch.testing.assert_close(ours.embed.weight.grad, plain.dimreduction["fc1"].weight.grad, rtol=1e-4, atol=1e-5)
    tanh, sigmoid = ours.gate.weight.grad.chunk(2)
    torch.testing.assert_close(tanh, plain.attention["attention_V"][0].weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sigmoid, plain.attention["attention_U"][0].weight.grad, rtol=1e-4, atol=1e-5)
    branch = torch.stack([head["fc"].weight.grad for head in plain.classifier])
    torch.testing.assert_close(ours.branch_weight.grad, branch, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["ours", "plain"])
def test_a_side_can_be_measured_in_a_process_of_its_own(side: str) -> None:
    measured = _alone(side, 50, 16)
    assert measured["seconds"] > 0
    assert 50 < measured["peak_mb"] < 20_000
