"""NiNformer: resizing of token layers, masks, dropout, the block's one LayerNorm."""

import pytest
import torch

import attention
from attention.ninformer import NiNBlock, NiNformerGating
from kernels.errors import InputError
from tests.attention.contract import make_mixer


def mixer(**changes: object) -> NiNformerGating:
    made = make_mixer("ninformer", **changes)
    assert isinstance(made, NiNformerGating)
    return made


def test_an_output_is_the_projection_times_a_gate() -> None:
    module, x = mixer(), torch.randn(1, 8, 8, 32)
    with torch.no_grad():
        for layer in (module.token_fc2, module.channel_fc2):
            layer.weight.zero_()
            layer.bias.zero_()
    torch.testing.assert_close(module(x), module.proj(x) * x)


def test_a_constant_map_is_mixed_the_same_at_every_size() -> None:
    module = mixer()
    with torch.no_grad():  # token layers that treat all tokens alike
        for layer in (module.token_fc1.weight, module.token_fc2.weight.t(), module.token_fc2.bias[None]):
            layer.copy_(layer.mean(1, keepdim=True).expand_as(layer))
    token = torch.randn(32)
    expected = module(token.expand(1, 8, 8, 32))[0, 0, 0]
    for grid in ((5, 7), (16, 12), (1, 1), (30,), (2, 3, 4)):
        out = module(token.expand(1, *grid, 32))
        torch.testing.assert_close(out, expected.expand(1, *grid, 32), rtol=1e-4, atol=1e-5)


def test_a_finer_map_gives_nearly_the_same_where_the_token_layers_are_smooth() -> None:
    module, fine = mixer(input_size=(6, 6)), mixer(input_size=(12, 12))
    names = ("token_fc1.weight", "token_fc2.weight", "token_fc2.bias")
    state = {k: v for k, v in module.state_dict().items() if k not in names}
    x = torch.randn(2, 12, 12, 32)
    read, write = (
        module._resized(module.token_fc1.weight, (12, 12)),
        module._resized(module.token_fc2.weight.t(), (12, 12)),
    )
    fine.load_state_dict(
        state
        | {
            "token_fc1.weight": read / 4,
            "token_fc2.weight": write.t(),
            "token_fc2.bias": module._resized(module.token_fc2.bias[None], (12, 12))[0],
        }
    )
    torch.testing.assert_close(module(x), fine(x), rtol=1e-4, atol=1e-5)


def test_a_sequence_of_as_many_tokens_takes_the_layers_as_they_are() -> None:
    module, x = mixer(), torch.randn(2, 8, 8, 32)
    torch.testing.assert_close(module(x.flatten(1, 2)).view_as(x), module(x))
    volume = mixer(input_size=(2, 4, 8))
    volume.load_state_dict(module.state_dict())
    torch.testing.assert_close(volume(x.view(2, 2, 4, 8, 32)).view_as(x), module(x))


def test_masked_tokens_add_nothing_to_the_sums_over_tokens() -> None:
    module, x = mixer(), torch.randn(1, 8, 8, 32)
    mask = torch.rand(1, 8, 8) < 0.6
    out = module(x, mask)
    with torch.no_grad():  # the same with the masked tokens' columns of the token layer set to 0
        module.token_fc1.weight.mul_(mask.flatten())
    torch.testing.assert_close(out[mask], module(x.masked_fill(~mask[..., None], 5.0))[mask], rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_alone() -> None:
    module, x = mixer(dropout=0.5), torch.randn(1, 8, 8, 32)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))


def test_the_blocks_two_halves_share_one_layer_norm() -> None:
    torch.manual_seed(0)
    block = NiNBlock(8, (3, 4), dropout=0.0)
    assert [name for name, _ in block.named_parameters() if name.startswith("norm")] == ["norm.weight", "norm.bias"]
    x = torch.randn(2, 3, 4, 8)
    middle = x + block.mgu(block.norm(x))
    expected = middle + block.ffn_fc2(torch.nn.functional.gelu(block.ffn_fc1(block.norm(middle))))
    torch.testing.assert_close(block(x), expected)
    mask = torch.rand(2, 3, 4) < 0.7
    out = block(x.masked_fill(~mask[..., None], torch.nan), mask)
    assert out.isfinite().all() and (out[~mask] == 0).all()


def test_bad_values_are_refused() -> None:
    with pytest.raises(InputError, match=r"input_size=\(0, 4\) must be 1 to 3 sides"):
        attention.create("ninformer", dim=8, input_size=(0, 4))
    with pytest.raises(InputError, match="hidden_dim=0 must be at least 1"):
        attention.create("ninformer", dim=8, input_size=(4, 4), hidden_dim=0)
    with pytest.raises(InputError, match=r"dropout=1\.0 from 0 to less than 1"):
        attention.create("ninformer", dim=8, input_size=(4, 4), dropout=1.0)
