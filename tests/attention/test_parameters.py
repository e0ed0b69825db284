"""What every module's parameters may be: wrong types and ranges are answered with one sentence."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, get_type_hints

import pytest
import torch
from torch import Tensor, nn

import attention
from attention.__main__ import main
from attention.mixer import Mixer
from attention.parameters import check_parameters
from attention.registry import build_in_block
from attention.window import WindowAttention
from kernels.errors import InputError
from tests.attention.contract import DIM, HEADS, configured

ENTRIES = [(name, kind) for name in attention.available() for kind in attention.kinds_of(name)]
OF_ANOTHER_TYPE: dict[type, list[Any]] = {
    bool: ["false", 3, None],
    int: ["x", 1.5, -1, True],
    float: ["x", float("nan"), True],
    str: [7, "nothing of the kind"],
    tuple: [3, "8x8", (0, 3), (-1, 2), ("a", 2), (), None],
}
FREE = {"scale", "seed", "scale_power", "threshold", "repeats", "input_size"}


def base(name: str, kind: attention.registry.Kind) -> dict[str, Any]:
    accepted = attention.parameters_of(name, kind)
    given = {"dim": DIM, "num_heads": HEADS, "input_size": (8, 8), "num_classes": 2, **configured(name)}
    return {key: value for key, value in given.items() if key in accepted}


@pytest.mark.parametrize(("name", "kind"), ENTRIES)
def test_every_wrong_value_is_refused_in_one_sentence_before_a_layer_sees_it(
    name: str, kind: attention.registry.Kind
) -> None:
    params = base(name, kind)
    for key, value in params.items():
        for wrong in OF_ANOTHER_TYPE.get(type(value), []):
            if wrong == -1 and key in FREE:
                continue
            with pytest.raises(InputError) as caught:
                attention.create(name, kind=kind, **{**params, key: wrong})
            message = str(caught.value)
            assert "\n" not in message and message.endswith(".") and len(message) < 400, message


@pytest.mark.parametrize(("name", "kind"), ENTRIES)
def test_annotations_can_be_read(name: str, kind: attention.registry.Kind) -> None:
    cls = attention.class_of(name, kind)
    assert get_type_hints(cls.__init__).keys() >= inspect.signature(cls).parameters.keys()


@pytest.mark.parametrize(
    ("name", "params", "sentence"),
    [
        ("softmax", {"proj_drop": 2.0}, "attention 'softmax': proj_drop=2.0 must be from 0 to 1, a number."),
        ("softmax", {"qkv_bias": "false"}, "attention 'softmax': qkv_bias='false' must be true or false."),
        ("window", {"window_size": 2.5}, "window_size=2.5 must be a whole number or a list of whole numbers."),
        ("halo", {"head_dim": "8"}, "head_dim='8' must be a whole number or None."),
        ("dynamic_mask", {"rms_eps": -1.0}, "rms_eps=-1.0 must be at least 0, a number."),
    ],
)
def test_the_sentence_says_value_and_remedy(name: str, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        attention.create(name, dim=DIM, num_heads=HEADS, **params)
    assert sentence in str(caught.value)


def test_annotations_that_say_nothing_or_cannot_be_read_are_passed_over() -> None:
    class Open(nn.Module):
        def __init__(self, dim: int, layer: nn.Module, names: Sequence[Any], extra: Any = None) -> None:
            super().__init__()

    class Unreadable(nn.Module):
        def __init__(self, dim: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
            super().__init__()

    check_parameters("open", Open, {"dim": 3, "layer": 5, "names": [1, "a"], "other": None})
    with pytest.raises(InputError, match="dim='x' must be a whole number"):
        check_parameters("open", Open, {"dim": "x"})
    check_parameters("unreadable", Unreadable, {"dim": "x"})


def test_a_block_takes_its_form_from_parameters_that_were_left_at_their_defaults() -> None:
    shifts = [
        build_in_block(WindowAttention, "window", index, dim=8, offers={"num_heads": 2, "no": 1}, params={}).shift
        for index in range(3)
    ]
    assert shifts == [0, 3, 0]
    given = {"window_size": "big"}
    with pytest.raises(InputError, match="window_size='big' must be"):
        build_in_block(WindowAttention, "window", 1, dim=8, offers={"num_heads": 2}, params=given)


class Mine(Mixer):
    """A module as a user writes it."""

    kind: ClassVar[str] = "mixer"

    def __init__(self, dim: int, num_heads: int = 1, strength: float = 1.0) -> None:
        super().__init__(dim, num_heads)
        self.strength = strength

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        return x * self.strength


class MyWindow(WindowAttention):
    """A registered module, changed."""


@pytest.mark.parametrize("given", [Mine, f"{__name__}:Mine"], ids=["class", "path"])
def test_a_class_of_ones_own_is_taken_and_named_in_messages(given: str | type[nn.Module]) -> None:
    module = attention.create(given, dim=8, strength=2.0)
    assert torch.equal(module(torch.ones(1, 2, 2, 8)), torch.full((1, 2, 2, 8), 2.0))
    with pytest.raises(InputError, match=r"Mine' has no parameter 'strenght'\. Did you mean 'strength'"):
        attention.create(given, dim=8, strenght=2.0)
    with pytest.raises(InputError, match="Mine': strength='x' must be a number"):
        attention.create(given, dim=8, strength="x")
    with pytest.raises(InputError, match="attention 'Mine' takes"):
        module(torch.ones(1, 2, 2, 7))
    with pytest.raises(InputError, match="Mine' is of kind 'mixer'"):
        attention.create(given, kind="gate", dim=8)


def test_a_subclass_has_its_own_name_in_messages() -> None:
    assert MyWindow.name == "MyWindow" and WindowAttention.name == "window"
    with pytest.raises(InputError, match="attention 'MyWindow': dim=7"):
        attention.create(MyWindow, dim=7, num_heads=2)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("math:pi", "is no class"),
        ("math:", "cannot be imported"),
        (":Window", "cannot be imported"),
        ("nowhere.at_all:X", "cannot be imported"),
        ("torch.nn:Linear", "no class attribute 'kind'"),
    ],
)
def test_a_path_that_leads_nowhere_is_answered_in_one_sentence(path: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        attention.create(path, dim=8)


def test_names_that_could_not_be_found_again_are_not_registered() -> None:
    for name in ("Window2", "a:b"):
        with pytest.raises(ValueError, match="lower case"):
            attention.register(name, kind="mixer")


@pytest.mark.parametrize("name", [7, None, ["window"], {"name": "window"}])
def test_what_is_no_name_is_answered_in_one_sentence(name: Any) -> None:
    with pytest.raises(InputError, match=r"takes a name, package\.module:Class or a class"):
        attention.create(name, dim=8)


class Bare(nn.Module):
    """A mixer that derives from nothing of ours."""

    kind: ClassVar[str] = "mixer"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize("name", ["Mine", "Bare"])
def test_a_class_of_ones_own_is_shown_without_costs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", f"{__name__}:{name}", "--dim", "8", "--heads", "2"]) == 0
    shown = capsys.readouterr().out
    assert "no method cost(shape)" in shown and "A m" in shown
