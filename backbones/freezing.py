"""Which modules of a pyramid are its stem and its first stages, and keeping them as they are while the rest trains."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kernels.errors import InputError

# Levels that are no stages: what stands before the first one.
_STEM = re.compile(r"(.*\.)?model\.(features\.)?(stem|act|relu|conv|bn|norm|maxpool|patch_embed)")
_LEVEL_NORM = re.compile(r"(^|\.model\.|^model\.)(dense\.)?(level_norms|norms|extra_norms?)\.(\d+)$")


def frozen_names(network: nn.Module, levels: Sequence[str], image: Tensor, stages: int) -> list[str]:
    """Names of the modules of ``network`` to freeze: the stem and the first ``stages`` stages with their norms.

    The order is that of a run on ``image``, so that it does not matter where in the network a module is kept.

    Args:
        levels: name of the module that each feature map comes out of, finest first.
        stages: 0 for the stem alone.

    Raises:
        InputError: there are fewer stages.
    """
    stage_levels = [name for name in levels if not _STEM.match(name)]
    if not 0 <= stages <= len(stage_levels) or not stage_levels:
        raise InputError(
            f"frozen_stages={stages} is not possible: this backbone has {len(stage_levels)} stages up to the last map "
            "that is asked for, so give -1 for nothing, 0 for the stem, or up to that number."
        )
    done = _order(network, image)
    names = {module: name for name, module in network.named_modules()}
    unknown = [level for level in stage_levels if not any(_inside(names[module], level) for module in done)]
    if unknown:
        raise InputError(
            f"frozen_stages={stages} is not possible: the stages of this backbone are not modules of their own "
            f"({unknown[0].removeprefix('body.model.')}), so freeze its parameters by their names instead."
        )
    end = _end(done, names, stage_levels, stages)
    ended = [names[module] for module in done[:end]]
    for name in names.values():
        found = _LEVEL_NORM.search(name)
        if found and int(found[4]) < len(levels) and levels[int(found[4])] in stage_levels[: max(stages, 0)]:
            ended.append(name)
    # What ends later is not frozen, and neither is what holds it.
    later = [names[module] for module in done[end:] if names[module] not in ended]
    kept = {part for name in later for part in _with_parents(name)}
    return [name for name in dict.fromkeys(ended) if name and name not in kept]


def freeze(network: nn.Module, names: Sequence[str]) -> None:
    """Evaluation mode and no gradients for the modules ``names``.

    No gradients either for what the modules around them hold themselves: class tokens and position embeddings.
    """
    for name in names:
        network.get_submodule(name).train(False).requires_grad_(False)
    for part in {part for name in names for part in _with_parents(name)[:-1]}:
        for parameter in network.get_submodule(part).parameters(recurse=False):
            parameter.requires_grad_(False)


def norms_in_evaluation(network: nn.Module) -> None:
    """Every batch norm in evaluation mode."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.train(False)


def _order(network: nn.Module, image: Tensor) -> list[nn.Module]:
    """Modules in the order in which they end, each where it ends last."""
    ended: dict[nn.Module, None] = {}

    def note(module: nn.Module, _inputs: Any, _output: Any) -> None:
        ended.pop(module, None)
        ended[module] = None

    handles = [module.register_forward_hook(note) for module in network.modules()]
    training = [module for module in network.modules() if module.training]
    try:
        network.eval()
        with torch.no_grad():
            network(image)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return list(ended)


def _end(done: Sequence[nn.Module], names: dict[nn.Module, str], levels: Sequence[str], stages: int) -> int:
    """How many of ``done`` belong to the stem and the first ``stages`` stages."""
    if stages == 0:
        return next(i for i, module in enumerate(done) if _inside(names[module], levels[0]))
    return max(i + 1 for i, module in enumerate(done) if _inside(names[module], levels[stages - 1]))


def _inside(name: str, level: str) -> bool:
    return name == level or name.startswith(f"{level}.")


def _with_parents(name: str) -> list[str]:
    """``a.b.c`` as ``["", "a", "a.b", "a.b.c"]``."""
    parts = name.split(".") if name else []
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]


def is_level_norm(name: str) -> bool:
    """Whether the module ``name`` is the norm of one level, which dense versions have and others have not."""
    return _LEVEL_NORM.search(name) is not None
