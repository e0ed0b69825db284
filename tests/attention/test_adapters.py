"""Mixers in place of a self-attention on tokens, and in MONAI's networks where MONAI is installed."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

import attention
from attention.adapters import TokenBlockMixer, replace_monai_attention
from attention.mixer import Mixer
from attention.softmax import SoftmaxAttention
from attention.window import WindowAttention
from kernels.errors import InputError


def softmax(dim: int = 16, heads: int = 2) -> SoftmaxAttention:
    torch.manual_seed(0)
    return SoftmaxAttention(dim, heads).eval()


def test_tokens_are_the_map_with_its_last_axis_fastest() -> None:
    torch.manual_seed(0)
    mixer = WindowAttention(16, 2, window_size=2, shift=0).eval()
    x = torch.randn(2, 4, 6, 16)
    torch.testing.assert_close(TokenBlockMixer(mixer, (4, 6))(x.flatten(1, 2)), mixer(x).flatten(1, 2))


@pytest.mark.parametrize("grid", [None, (12,), (3, 4), (2, 3, 2)])
def test_a_mixer_of_any_grid_gives_the_same_whatever_the_grid(grid: tuple[int, ...] | None) -> None:
    mixer, x = softmax(), torch.randn(2, 12, 16)
    torch.testing.assert_close(TokenBlockMixer(mixer, grid)(x), mixer(x))


def test_masked_tokens_are_not_seen() -> None:
    block, x = TokenBlockMixer(softmax(), (2, 3, 2), prefix=1).eval(), torch.randn(2, 13, 16)
    mask = torch.ones(2, 13).index_fill(1, torch.tensor([4, 9]), 0)
    poisoned = x.masked_fill(mask[..., None] == 0, torch.nan)
    out = block(x, mask)
    torch.testing.assert_close(block(poisoned, mask), out)
    assert (out[mask == 0] == 0).all() and not torch.equal(out, block(x))


def test_a_class_token_reads_all_tokens_and_the_map_does_not_see_it() -> None:
    block, x = TokenBlockMixer(softmax(), (3, 4), prefix=1).eval(), torch.randn(2, 13, 16)
    out = block(x)
    other = block(torch.cat([torch.randn(2, 1, 16), x[:, 1:]], 1))
    assert torch.equal(out[:, 1:], other[:, 1:]) and not torch.equal(out[:, :1], other[:, :1])
    moved = block(torch.cat([x[:, :12], torch.randn(2, 1, 16)], 1))
    assert not torch.equal(out[:, :1], moved[:, :1])
    assert torch.equal(TokenBlockMixer(softmax(), prefix=1)(x), softmax()(x)), "a sequence has a place for it"


def test_weights_are_kept_on_request() -> None:
    block = TokenBlockMixer(softmax(), (3, 4), save_attn=True)
    block(torch.randn(2, 12, 16))
    assert block.att_mat.shape == (2, 2, 12, 12) and not block.att_mat.requires_grad
    torch.testing.assert_close(block.att_mat.sum(-1), torch.ones(2, 2, 12))


def test_grids_that_do_not_fit_are_refused_with_the_mixers_that_do() -> None:
    with pytest.raises(InputError, match=r"'window' takes maps of 2 axes, and these have 3; those that fit: .*softmax"):
        TokenBlockMixer(WindowAttention(16, 2), (2, 2, 2))
    with pytest.raises(InputError, match=r"\(3, 4\) and 0 tokens in front are 12 tokens; got \(2, 13, 16\)"):
        TokenBlockMixer(softmax(), (3, 4))(torch.randn(2, 13, 16))
    with pytest.raises(InputError, match="prefix=-1 must not be negative"):
        TokenBlockMixer(softmax(), (3, 4), prefix=-1)


def monai_networks() -> Any:
    pytest.importorskip("einops")  # without it MONAI has no transformers
    return pytest.importorskip("monai.networks.nets")


def unetr() -> nn.Module:
    nets = monai_networks()
    torch.manual_seed(0)
    net: nn.Module = nets.UNETR(1, 2, 32, feature_size=4, hidden_size=24, mlp_dim=32, num_heads=3, dropout_rate=0.0)
    return net.eval()


def test_softmax_in_unetr_with_its_weights_changes_nothing() -> None:
    net, x = unetr(), torch.randn(1, 1, 32, 32, 32)
    before = net(x)
    replace_monai_attention(net, "softmax", grid=(2, 2, 2), copy_projections=True)
    assert sum(isinstance(m, TokenBlockMixer) for m in net.modules()) == 12
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


def test_every_mixer_of_volumes_trains_in_unetr() -> None:
    names = [name for name in attention.available("mixer") if 3 in _grids(name)]
    assert "softmax" in names
    for name in names:
        net = replace_monai_attention(unetr(), name, grid=(2, 2, 2)).train()
        net(torch.randn(1, 1, 32, 32, 32)).sum().backward()
        found = [p.grad for m in net.modules() if isinstance(m, TokenBlockMixer) for p in m.parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in found), name


def test_blocks_alternate_where_a_mixer_does_and_a_classifier_keeps_its_class_token() -> None:
    nets = monai_networks()
    net = nets.ViT(
        1, (32, 48), 8, hidden_size=16, mlp_dim=16, num_layers=2, num_heads=2, classification=True, spatial_dims=2
    )
    replace_monai_attention(net, "window", grid=(4, 6), window_size=2, shift="alternate")
    mixers: list[Any] = [m.mixer for m in net.modules() if isinstance(m, TokenBlockMixer)]
    assert [mixer.shift for mixer in mixers] == [0, 1]
    logits, _ = net(torch.randn(3, 1, 32, 48))
    assert logits.shape == (3, 2)


def test_a_maker_of_mixers_may_be_given() -> None:
    net = replace_monai_attention(unetr(), softmax, grid=None)
    assert net(torch.randn(1, 1, 32, 32, 32)).shape == (1, 2, 32, 32, 32)


def test_a_network_that_cannot_take_it_is_left_as_it_was() -> None:
    net = unetr()
    before = list(net.state_dict())
    with pytest.raises(InputError, match=r"'window' takes maps of 2 axes, and these have 3; those that fit: .*softmax"):
        replace_monai_attention(net, "window", grid=(2, 2, 2))
    assert list(net.state_dict()) == before
    with pytest.raises(InputError, match="Linear has no TransformerBlock of MONAI"):
        replace_monai_attention(nn.Linear(2, 2), "softmax", grid=None)


class Attention(nn.Module):
    """The parts of a MONAI self-attention that are looked at."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.causal, self.save_attn = 2, causal, True
        self.qkv = nn.Linear(16, 48, bias=False)
        self.out_proj = nn.Linear(16, 16)


class Block(nn.Module):
    """The parts of a MONAI transformer block that are looked at."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(16)
        self.attn: nn.Module = Attention(causal)


@pytest.fixture
def blocks_of_monai(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("monai.networks.blocks.transformerblock")
    stand_in.TransformerBlock = Block  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)


@pytest.mark.usefixtures("blocks_of_monai")
def test_dtype_mode_saved_weights_and_projections_are_those_of_the_block() -> None:
    net = nn.Sequential(Block(), Block()).double().eval()
    old = net[0].attn
    replace_monai_attention(net, "softmax", grid=(3, 4), prefix=1, copy_projections=True)
    new = net[0].attn
    assert isinstance(new, TokenBlockMixer) and isinstance(new.mixer, SoftmaxAttention)
    assert new.prefix == 1 and new.save_attn and not new.training
    assert torch.equal(new.mixer.qkv.weight, old.qkv.weight) and torch.equal(new.mixer.proj.bias, old.out_proj.bias)
    assert new.mixer.qkv.bias is not None and (new.mixer.qkv.bias == 0).all()
    assert new(torch.randn(2, 13, 16).double()).dtype == torch.float64


@pytest.mark.usefixtures("blocks_of_monai")
def test_causal_attention_is_not_replaced() -> None:
    with pytest.raises(InputError, match="Sequential is causal, and mixers look both ways"):
        replace_monai_attention(nn.Sequential(Block(causal=True)), "softmax", grid=None)


def test_without_monai_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.networks.blocks.transformerblock", None)
    with pytest.raises(InputError, match="install it with 'pip install monai'"):
        replace_monai_attention(nn.Linear(2, 2), "softmax", grid=None)


def _grids(name: str) -> tuple[int, ...]:
    cls = attention.class_of(name, "mixer")
    assert issubclass(cls, Mixer)
    return cls.grids
