"""Weights and inputs of "recipe" cases: numbers made from each tensor's name and place, so that no file holds them.

A case that says so has no ``state.*`` tensors. Every floating tensor of its ``state_shapes`` is filled by
:func:`fill`, its input by :func:`fill_input`; large outputs are kept as 512 samples and three statistics.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_POSITIONS = ("rpb", "relative_position", "pos_embed", "rel_pos", "_rel")


def uniform(name: str, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1): a hash of the name's polynomial hash and each flat index."""
    seed = 0
    for byte in name.encode():
        seed = (31 * seed + byte) % 2**32
    x = (np.arange(count, dtype=np.uint64) + np.uint64(2654435761 * (seed + 1) % 2**32)) % np.uint64(2**32)
    x = x.astype(np.uint32)
    with np.errstate(over="ignore"):  # modulo 2**32
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x7FEB352D)
        x ^= x >> np.uint32(15)
        x *= np.uint32(0x846CA68B)
        x ^= x >> np.uint32(16)
    return x / 2.0**32


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor called ``name``, at a scale that fits what the name says it is."""
    count = int(np.prod(shape, dtype=np.int64))
    u = uniform(name, count)
    t = 2 * u - 1
    leaf = name.rpartition(".")[2]
    if leaf == "running_var":
        values = 0.5 + u
    elif leaf == "running_mean":
        values = 0.2 * t
    elif any(part in name for part in _POSITIONS):
        values = 0.5 * t
    elif len(shape) <= 1 or count == max(shape):
        values = 0.75 + 0.5 * u if leaf == "weight" or leaf.startswith("gamma") else 0.2 * t
    else:
        values = t * np.sqrt(3 / (count / shape[0]))
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def fill_input(name: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 input called ``name``."""
    u = uniform(f"input.{name}", int(np.prod(shape, dtype=np.int64)))
    return torch.from_numpy((1.7 * (2 * u - 1)).astype(np.float32)).reshape(shape)


def about(name: str) -> dict[str, Any]:
    """What the case's JSON file says."""
    from tests.parity.harness import case_paths

    path: Path = case_paths()[name]
    return json.loads(path.read_text())


def recipe_state(name: str) -> dict[str, Tensor]:
    """The official state dict of a recipe case; integer buffers, which it leaves as constructed, are not in it."""
    return {key: fill(key, tuple(shape)) for key, shape in about(name)["state_shapes"].items()}


def recipe_inputs(name: str) -> dict[str, Tensor]:
    """The inputs of a recipe case."""
    found = {}
    for key, text in about(name)["input_recipe"].items():
        match = re.search(r"name '(\w+)', shape \[([\d, ]+)\]", text)
        assert match is not None, text
        found[key] = fill_input(match[1], tuple(int(n) for n in match[2].split(",")))
    return found


def as_kept(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by name, in the form the case keeps them: whole, or ``@sample512`` and ``@stats``."""
    found = {}
    for key in expected:
        name, _, form = key.partition("@")
        if name not in outputs:
            continue
        values = outputs[name].detach().float()
        if form == "sample512":
            # Python rounds halves to even, as the recipe asks.
            places = [round(j * (values.numel() - 1) / 511) for j in range(512)]
            values = values.flatten()[torch.tensor(places)]
        elif form == "stats":
            deviation = values.double().std(correction=0)
            values = torch.stack([values.double().mean(), deviation, values.abs().max().double()]).float()
        found[key] = values
    return found
