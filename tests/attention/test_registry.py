"""Names, kinds, YAML files and what is said of each module."""

from __future__ import annotations

import inspect
import re

import pytest
import yaml

import attention
from attention.about import About
from kernels.backend import OPERATORS
from kernels.errors import InputError
from tests.attention.contract import CONFIGURATIONS, configured

ENTRIES = [(name, kind) for name in attention.available() for kind in attention.kinds_of(name)]
GIVEN_BY_THE_CALLER = ("dim", "num_heads", "num_classes", "input_size")


@pytest.mark.parametrize(("name", "kind"), ENTRIES)
def test_its_yaml_holds_its_own_defaults(name: str, kind: attention.registry.Kind) -> None:
    values = configured(name)
    accepted = inspect.signature(attention.class_of(name, kind)).parameters
    defaults = {key: p.default for key, p in accepted.items()}
    several = len(attention.kinds_of(name)) > 1
    expected = {
        key: default
        for key, default in defaults.items()
        if key not in GIVEN_BY_THE_CALLER or (default is not inspect.Parameter.empty and key in values)
    }
    if several:  # one file serves all kinds, with what they share
        expected = {key: default for key, default in expected.items() if key in values}
    assert values == expected


@pytest.mark.parametrize(("name", "kind"), ENTRIES)
def test_it_says_where_it_comes_from_and_what_it_costs(name: str, kind: attention.registry.Kind) -> None:
    about = attention.class_of(name, kind).about
    assert isinstance(about, About)
    assert re.search(r"\d{4}", about.paper) and about.complexity.startswith("O(")
    assert about.operator in {"", "sdpa", *OPERATORS}
    assert len(attention.describe(name, kind)) > 20


def test_every_yaml_names_a_registered_module() -> None:
    names = [yaml.safe_load(path.read_text())["name"] for path in sorted(CONFIGURATIONS.glob("*.yaml"))]
    assert names == attention.available()


def test_a_misspelt_name_or_parameter_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'window'"):
        attention.create("windov", dim=8, num_heads=2)
    with pytest.raises(InputError, match=r"'window' has no parameter 'window'\. Did you mean 'window_size'"):
        attention.create("window", dim=8, num_heads=2, window=3)


def test_a_module_of_another_kind_is_refused_with_those_that_fit() -> None:
    with pytest.raises(InputError, match=r"'acmil' is of kind 'pooling' and a 'mixer' .*those that fit: .*window"):
        attention.create("acmil", kind="mixer", dim=8, num_heads=2)
