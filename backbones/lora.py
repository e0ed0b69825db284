"""Training a backbone by low-rank adapters of its linear layers, through the library peft."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from backbones.pyramid import Pyramid
from kernels.errors import InputError

_DEFAULTS = {"rank": 8, "alpha": 16, "dropout": 0.0}


def add_lora(model: nn.Module, lora: str | Mapping[str, Any]) -> list[str]:
    """Put low-rank adapters beside linear layers of ``model``, in place, and train nothing else; return their names.

    Args:
        lora: a wildcard pattern for the names of the linear layers, such as ``"*.qkv"``, or a mapping of ``target``
            (that pattern), ``rank`` (8), ``alpha`` (16) and ``dropout`` (0).

    Raises:
        InputError: peft is not installed, an option is unknown, or no linear layer has such a name.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685.
    """
    given = {"target": lora} if isinstance(lora, str) else dict(lora)
    unknown = [key for key in given if key not in {"target", *_DEFAULTS}]
    if unknown or not isinstance(given.get("target"), str):
        said = f"lora={lora!r} is not understood"
        raise InputError(f"{said}; give a pattern such as '*.qkv', or a mapping of target, rank, alpha and dropout.")
    options = _DEFAULTS | given
    if not isinstance(options["rank"], int) or options["rank"] < 1:
        raise InputError(f"lora.rank={options['rank']} must be a whole number from 1.")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in linear if fnmatch.fnmatchcase(name, options["target"])]
    if not chosen:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        told = f"they end in {', '.join(ends[:12])}" if ends else "it has none"
        raise InputError(f"lora.target='{options['target']}' names no linear layer of this backbone; {told}.")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("lora needs the library peft; install it with: pip install peft") from error
    config = LoraConfig(
        r=options["rank"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        target_modules="|".join(re.escape(name) for name in chosen),
    )
    training = {module: module.training for module in model.modules()}
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for module in model.modules():
        module.training = training.get(module, model.training)
    if isinstance(model, Pyramid):
        model.train(model.training)  # adapters in stages that are frozen are frozen too
    return chosen
