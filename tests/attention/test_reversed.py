"""Reversed attention: what is sent is what arrives, messages from layer to layer, dependencies."""

import pytest
import torch

import attention
from attention.mixer import Mixer
from attention.reversed import ReversedAttention
from kernels.errors import InputError
from tests.attention.contract import make_mixer


def mixer(**changes: object) -> ReversedAttention:
    made = make_mixer("reversed", **changes)
    assert isinstance(made, ReversedAttention)
    return made


def test_over_all_heads_and_parents_a_token_sends_its_message() -> None:
    module, x, extras = mixer(), torch.randn(2, 4, 5, 32), {}
    weights = module(x, return_attention=True)[1]
    module(x, extras=extras)
    torch.testing.assert_close(weights.sum((1, 2)), extras["message"].flatten(1))
    torch.testing.assert_close(module.dependency(x), weights.sum(1))


def test_within_a_head_the_columns_sum_to_the_selectors_share() -> None:
    module, x = mixer(temperature=2.0), torch.randn(1, 9, 32)
    weights = module(x, return_attention=True)[1]
    share = (module.head_selector(x) / 2).softmax(-1)
    message = torch.sigmoid(module.message_fc2(torch.nn.functional.gelu(module.message_fc1(x))))
    torch.testing.assert_close(weights.sum(2), (share * message).transpose(1, 2))


def test_the_order_of_tokens_does_not_matter() -> None:
    module, x = mixer(), torch.randn(2, 23, 32)
    order = torch.randperm(23)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order], rtol=1e-4, atol=1e-5)


def test_the_message_goes_from_layer_to_layer_and_shrinks() -> None:
    first, second = mixer(seed=1), mixer(seed=2)
    x, extras = torch.randn(2, 3, 4, 32), {}
    y = first(x, extras=extras)
    before = extras["message"]
    out = second(y, extras=extras)
    alone: dict[str, torch.Tensor] = {}
    second(y, extras=alone)
    torch.testing.assert_close(extras["message"], before * alone["message"])
    assert (extras["message"] < before).all() and (before < 1).all()
    torch.testing.assert_close(second.dependency(y, message=before).sum(1), extras["message"].flatten(1))
    assert not torch.allclose(out, second(y), atol=1e-3)


def test_a_message_of_zero_silences_a_token() -> None:
    module, x = mixer(), torch.randn(1, 8, 32)
    message = torch.ones(1, 8)
    message[0, 3] = 0
    sent = module.dependency(x, message=message)
    assert (sent[:, :, 3] == 0).all() and (sent[:, :, 4] > 0).any()


def test_extreme_scores_stay_finite_and_conserve_the_message() -> None:
    module, x = mixer(), torch.randn(1, 40, 32)
    with torch.no_grad():
        module.qkv.weight[:64] *= 30
    weights = module(x, return_attention=True)[1]
    extras: dict[str, torch.Tensor] = {}
    assert module(x, extras=extras).isfinite().all()
    torch.testing.assert_close(weights.sum((1, 2)), extras["message"], rtol=1e-3, atol=1e-4)


def test_masked_tokens_send_and_receive_nothing_whatever_they_score() -> None:
    module, x = mixer(qkv_bias=True), torch.randn(2, 10, 32)
    with torch.no_grad():
        module.qkv.bias[:64] = 4  # of queries and keys: masked keys would win every softmax
    mask = torch.arange(10).expand(2, 10) < 7
    extras: dict[str, torch.Tensor] = {}
    weights = module(x, mask, return_attention=True)[1]
    out = module(x, mask, extras=extras)
    assert (weights[:, :, 7:] == 0).all() and (weights[..., 7:] == 0).all() and (extras["message"][:, 7:] == 0).all()
    torch.testing.assert_close(weights[:, :, :7].sum((1, 2))[:, :7], extras["message"][:, :7])
    torch.testing.assert_close(out[:, :7], module(x[:, :7]), rtol=1e-4, atol=1e-5)


def test_masked_tokens_take_no_part_in_gradients() -> None:
    module, x = mixer(), torch.randn(2, 10, 32)
    mask = torch.arange(10).expand(2, 10) < 7
    weight = torch.randn(2, 7, 32)
    found = []
    for tokens, seen in ((x, mask), (x[:, :7], None)):
        given = tokens.clone().requires_grad_()
        out = module(given, seen)[:, :7]
        found.append(torch.autograd.grad((out * weight).sum(), [given, *module.parameters()]))
    assert (found[0][0][:, 7:] == 0).all()
    for masked, short in zip((found[0][0][:, :7], *found[0][1:]), found[1], strict=True):
        torch.testing.assert_close(masked, short, rtol=1e-4, atol=1e-5)


def test_biases_are_optional() -> None:
    plain, biased = mixer(), mixer(qkv_bias=True, gate_bias=True)
    assert {n for n, _ in plain.named_parameters() if n.endswith("bias")} == {"proj.bias"}
    assert sum(n.endswith("bias") for n, _ in biased.named_parameters()) == 5


def test_bad_values_are_refused() -> None:
    with pytest.raises(InputError, match="temperature=0 must be greater than 0"):
        attention.create("reversed", dim=8, num_heads=2, temperature=0)
    module: Mixer = mixer()
    with pytest.raises(InputError, match=r"must be \(1, 3, 4\), one number per token; got \(1, 12\)"):
        module(torch.randn(1, 3, 4, 32), extras={"message": torch.ones(1, 12)})
