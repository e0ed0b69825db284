"""Flow attention: its conservation, masks on either side, forms and widths."""

from __future__ import annotations

import pytest
import torch

from attention.flow import FlowAttention, FlowCross, masked_flow
from kernels.errors import InputError
from kernels.linear_attention import flow_attention


def test_equal_keys_share_the_competition_and_equal_queries_the_flow() -> None:
    # With all tokens equal every flow is N, so that each query carries 1 / N and is allocated sigmoid(1).
    q = torch.full((1, 6, 2, 4), 0.3)
    v = torch.randn(1, 6, 2, 4)
    mask = torch.ones(1, 6, dtype=torch.bool)
    expected = v.mean(1, keepdim=True).expand_as(v) * torch.tensor(1.0).sigmoid()
    for out in (flow_attention(q, q, v), masked_flow(q, q, v, mask, mask)):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_the_order_of_tokens_does_not_matter() -> None:
    torch.manual_seed(0)
    module, x = FlowAttention(16, 2).eval(), torch.randn(2, 12, 16)
    order = torch.randperm(12)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])
    torch.testing.assert_close(module(x.view(2, 3, 4, 16)).flatten(1, 2), module(x))


@pytest.mark.parametrize("eps_after", [0.0, 1e-6])
def test_masked_tokens_are_in_no_flow_and_no_count(eps_after: float) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 9, 2, 4), torch.randn(1, 13, 2, 4), torch.randn(1, 13, 2, 4)
    queries, keys = (torch.rand(1, n) < 0.6 for n in (9, 13))
    out = masked_flow(q, k, v, queries, keys, eps_after)
    alone = flow_attention(q[queries][None], k[keys][None], v[keys][None], eps_after=eps_after)
    torch.testing.assert_close(out[queries][None], alone, rtol=1e-4, atol=1e-6)
    assert (out[~queries] == 0).all()
    torch.testing.assert_close(
        masked_flow(q, k, v, None, keys)[0], flow_attention(q, k[keys][None], v[keys][None])[0], rtol=1e-4, atol=1e-6
    )


def test_masked_tokens_anywhere_in_an_image_are_as_if_absent() -> None:
    torch.manual_seed(0)
    module, x = FlowAttention(16, 2).eval(), torch.randn(1, 4, 5, 16)
    mask = torch.rand(1, 4, 5) < 0.5
    torch.testing.assert_close(module(x, mask)[mask], module(x[mask][None])[0], rtol=1e-4, atol=1e-5)


def test_the_vision_form_adds_to_every_flow() -> None:
    x = torch.randn(1, 1, 16) * 1e-3
    outputs = []
    for form in ("paper", "vision"):
        torch.manual_seed(0)
        module = FlowAttention(16, 2, form=form).eval().double()
        with torch.no_grad():
            module.qkv.bias[:32] = -12.0  # features so small that 1e-6 shows
        outputs.append(module(x.double()))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3 * outputs[0].abs().max()


def test_inner_width_is_that_of_queries_keys_and_values() -> None:
    torch.manual_seed(0)
    module, cross = FlowAttention(10, 2, inner_dim=16).eval(), FlowCross(10, 2, inner_dim=16).eval()
    assert module.qkv.weight.shape == (48, 10) and cross.kv.weight.shape == (32, 10)
    assert module(torch.randn(1, 3, 4, 10)).shape == (1, 3, 4, 10)
    assert cross(torch.randn(1, 3, 10), torch.randn(1, 7, 10)).shape == (1, 3, 10)


def test_cross_attention_of_a_sequence_to_itself_is_the_mixer() -> None:
    torch.manual_seed(0)
    module, cross, x = FlowAttention(16, 2).eval(), FlowCross(16, 2).eval(), torch.randn(2, 7, 16)
    with torch.no_grad():
        cross.q.weight.copy_(module.qkv.weight[:16])
        cross.q.bias.copy_(module.qkv.bias[:16])
        cross.kv.weight.copy_(module.qkv.weight[16:])
        cross.kv.bias.copy_(module.qkv.bias[16:])
    cross.proj.load_state_dict(module.proj.state_dict())
    torch.testing.assert_close(cross(x, x), module(x))


def test_values_may_come_from_other_tokens_than_keys() -> None:
    torch.manual_seed(0)
    cross, q, kv = FlowCross(16, 2).eval(), torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    torch.testing.assert_close(cross(q, kv, values=kv), cross(q, kv))
    values = torch.randn(2, 7, 16)
    mask = torch.arange(7).expand(2, 7) < 4
    poisoned = values.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(
        cross(q, kv, mask, values=poisoned), cross(q, kv[:, :4], values=values[:, :4]), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(InputError, match=r"values \(2, 6, 16\) must have the shape of the tokens"):
        cross(q, kv, values=values[:, :6])


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(InputError, match=r"Did you mean 'vision'"):
        FlowAttention(16, 2, form="vison")
    with pytest.raises(InputError, match="inner_dim=15 is not divisible into num_heads=2 heads"):
        FlowCross(16, 2, inner_dim=15)
