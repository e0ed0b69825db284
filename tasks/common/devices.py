"""Where a model runs when it is not being trained."""

from __future__ import annotations

import torch

from kernels.errors import InputError


def device_for(setting: str) -> torch.device:
    """The device asked for, or the best one there is."""
    if setting == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(setting)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"inference.device={setting} is not to be had here; use auto or cpu.") from error
    return device
