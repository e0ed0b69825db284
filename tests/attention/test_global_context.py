"""Window attention with the image's queries: who shares them, where they come from, and its local form."""

from __future__ import annotations

from typing import Any

import pytest
import timm.models.gcvit
import torch

import attention
from attention.global_context import GlobalContextAttention, GlobalQueryGenerator
from kernels.errors import InputError


def make(**params: Any) -> GlobalContextAttention:
    torch.manual_seed(0)
    module = attention.create("global_context", dim=16, num_heads=4, **{"window_size": 4, **params})
    assert isinstance(module, GlobalContextAttention)
    return module.eval()


def test_every_window_of_an_image_asks_with_the_same_query() -> None:
    module = make(own_query=False)
    window, query = torch.randn(1, 4, 4, 16), torch.randn(1, 4, 4, 16)
    out = module.with_query(window.repeat(1, 2, 3, 1), query)
    torch.testing.assert_close(out, module.with_query(window, query).repeat(1, 2, 3, 1))
    several = module.with_query(torch.cat([window, window * 2, window * 3, window]), torch.cat([query, -query]))
    torch.testing.assert_close(several[1:2], module.with_query(window * 2, query))
    torch.testing.assert_close(several[2:3], module.with_query(window * 3, -query))


def test_its_own_query_is_that_of_the_generator() -> None:
    module, x = make(input_size=(8, 8)), torch.randn(2, 8, 8, 16)
    assert module.generator is not None and module.generator.repeats == 1
    torch.testing.assert_close(module.with_query(x, module.generator(x)), module(x))


@pytest.mark.parametrize(("size", "window", "repeats"), [(56, 7, 3), (28, 7, 2), (14, 14, 0), (7, 7, 0), (5, 7, 0)])
def test_halvings_follow_from_the_sizes_as_in_the_paper(size: int, window: int, repeats: int) -> None:
    module = make(input_size=(size, size), window_size=window)
    assert module.generator is not None and module.generator.repeats == repeats
    assert len(module.generator.blocks) == max(repeats, 1)
    assert module.generator(torch.randn(1, size, size, 16)).shape == (1, window, window, 16)


def test_the_generator_is_that_of_timm() -> None:
    torch.manual_seed(0)
    theirs = timm.models.gcvit.FeatureBlock(32, levels=2).eval()
    ours = GlobalQueryGenerator(32, (3, 5), 2)
    attention.load_official(ours, theirs.state_dict())
    x = torch.randn(2, 32, 12, 20)
    torch.testing.assert_close(ours(x.permute(0, 2, 3, 1)), theirs(x).permute(0, 2, 3, 1))


def test_released_names_of_the_generator_are_known() -> None:
    ours = GlobalQueryGenerator(8, (3, 3), 2)
    names = {"conv_dw": "conv.0", "fc1": "conv.2.fc.0", "fc2": "conv.2.fc.2", "conv_pw": "conv.3"}
    state = {}
    for key, value in ours.state_dict().items():
        _, block, layer, _ = key.split(".")
        state[f"to_q_global.{block}.{names[layer]}.weight"] = value + 1
    attention.load_official(GlobalQueryGenerator(8, (3, 3), 2), state)
    assert GlobalQueryGenerator.checkpoint_filter(state).keys() == ours.state_dict().keys()


def test_masked_tokens_take_no_part_in_the_query() -> None:
    generator = GlobalQueryGenerator(8, (4, 4), 1).eval()
    x = torch.randn(2, 8, 8, 8)
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    torch.testing.assert_close(generator(x, mask), generator(x))
    mask[0, :, 4:], mask[1] = False, False
    query = generator(x.masked_fill(~mask[..., None], torch.nan), mask)
    assert query.isfinite().all() and (query[1] == 0).all()
    half = GlobalQueryGenerator(8, (4, 2), 1)
    half.load_state_dict(generator.state_dict())
    torch.testing.assert_close(query[:1, :, :2], half(x[:1, :, :4]))


def test_blocks_take_turns_and_the_local_form_is_window_attention_without_a_shift() -> None:
    params = {"window_size": 4, "form": "alternate"}
    assert [GlobalContextAttention.for_block(params, i)["form"] for i in range(3)] == ["local", "global", "local"]
    assert GlobalContextAttention.for_block({"form": "global"}, 0)["form"] == "global"
    local = make(form="local")
    window = attention.create("window", dim=16, num_heads=4, window_size=4, shift=0).eval()
    window.load_state_dict(local.state_dict())
    x = torch.randn(2, 6, 9, 16)
    torch.testing.assert_close(local(x), window(x))
    assert local.flops((2, 8, 8)) == window.flops((2, 8, 8))


def test_what_sticks_out_of_the_map_is_hidden_or_seen_as_zeros() -> None:
    hidden, seen, x = make(input_size=(8, 8)), make(input_size=(8, 8), padding="released"), torch.randn(1, 6, 7, 16)
    with torch.no_grad():
        hidden.qkv.bias.add_(1)
    seen.load_state_dict(hidden.state_dict())
    query = torch.randn(1, 4, 4, 16)
    extended = torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 2))
    torch.testing.assert_close(seen.with_query(x, query), seen.with_query(extended, query)[:, :6, :7])
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :6, :7] = True
    torch.testing.assert_close(hidden.with_query(x, query), hidden.with_query(extended, query, mask)[:, :6, :7])
    assert not torch.allclose(seen.with_query(x, query), hidden.with_query(x, query), atol=1e-3)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"window_size": 0}, "window_size=0 must be at least 1"),
        ({"form": "globl"}, "Did you mean 'global'"),
        ({"padding": "hidden"}, "Did you mean 'hide'"),
        ({"repeats": -1}, "repeats=-1 at least 0"),
        ({"input_size": (0, 4)}, r"input_size=\(0, 4\)"),
    ],
)
def test_choices_that_do_not_exist_are_refused(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make(**params)


def test_a_query_that_does_not_fit_is_refused() -> None:
    x = torch.randn(4, 8, 8, 16)
    with pytest.raises(InputError, match="has no query of its own; call with_query"):
        make(own_query=False)(x)
    for module, query in [
        (make(form="local"), torch.randn(4, 4, 4, 16)),
        (make(), torch.randn(4, 4, 5, 16)),
        (make(), torch.randn(3, 4, 4, 16)),
    ]:
        with pytest.raises(InputError, match="takes no query"):
            module.with_query(x, query)
