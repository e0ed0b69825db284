"""QTSeg beside its published formulation and beside a U-Net of as many parameters, and a step with everything.

:func:`rows` measures; the published formulation is the one that the repository's tests hold. :func:`matrix` takes one
training step and one prediction with every backbone of ours, a sample of timm's, and every mixer and gate.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

import attention
import backbones
from kernels.errors import InputError
from kernels.measure import peak_memory
from tasks.common.bench import BenchRow, median_times
from tasks.qtseg.losses import QTSegLoss
from tasks.qtseg.networks.build import build_network

UNET_WIDTH = 35
"""Of the U-Net that has as many parameters as QTSeg: 9.29 million beside 9.21."""
RELEASED = "tests.qtseg.networks.released"
ODD = (75, 93)
OF_TIMM = (
    "resnet18",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "convnext_atto",
    "regnety_002",
    "swin_tiny_patch4_window7_224",
    "maxvit_pico_rw_256",
    "pvt_v2_b0",
    "davit_tiny",
    "crossvit_tiny_240",
    "volo_d1_224",
    "halonet26t",
    "vit_tiny_patch16_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "mixer_s32_224",
)
LARGEST = 150e6
"""Parameters above which a vision transformer is tried with two of its blocks."""


# ------------------------------------------------------------------------------------------------------------ speed


def rows() -> Iterator[BenchRow]:
    """Operations, inference and training steps; sizes and repeats shrink with ``FOVEA_BENCH_QUICK=1``."""
    quick = os.environ.get("FOVEA_BENCH_QUICK", "0") == "1"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, batches, repeats = (64, (1,), 1) if quick else (512, (1, 4), 5)
    torch.manual_seed(0)
    ours = build_network({"decoder": "qtseg"}).to(device)
    unet = build_network({"decoder": {"name": "unet", "width": UNET_WIDTH}}).to(device)
    peers: list[tuple[str, Callable[[Tensor], Tensor]]] = [("U-Net of as many parameters", unet)]
    released = _released()
    if released is not None:
        published = released(ours)
        peers.insert(0, ("itself as published", published))
    for name, peer in peers:
        mine, theirs = (_multiply_adds(run, pixels, device) for run in (ours, peer))
        title = f"QTSeg {pixels} px, images per 10^12 multiply-adds"
        yield BenchRow(title, 1e12 / mine, 1e12 / theirs, name, "images")
    for batch in batches:
        x = torch.randn(batch, 3, pixels, pixels, device=device)
        target = torch.randint(2, (batch, pixels, pixels), device=device)
        for name, peer in peers:
            networks = [ours, unet]
            for direction, calls in (
                ("inference", {"ours": _inference(ours, networks, x), "peer": _inference(peer, networks, x)}),
                (
                    "training step",
                    {"ours": _training(ours, networks, x, target), "peer": _training(peer, networks, x, target)},
                ),
            ):
                times = median_times(calls, repeats)
                peak = peak_memory(calls["ours"], device)
                title = f"QTSeg {pixels} px, batch {batch}, {direction}"
                rates = {who: batch / seconds for who, seconds in times.items()}
                yield BenchRow(
                    title, rates["ours"], rates["peer"], name, "images/s", None if peak is None else peak / 1e6
                )


def _released() -> Callable[[nn.Module], Callable[[Tensor], Tensor]] | None:
    """The published formulation, where the tests are there."""
    try:
        if importlib.util.find_spec(RELEASED) is None:
            return None
    except ModuleNotFoundError:
        return None
    return importlib.import_module(RELEASED).released


def _multiply_adds(run: Callable[[Tensor], Tensor], pixels: int, device: torch.device) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run(torch.zeros(1, 3, pixels, pixels, device=device))
    return counter.get_total_flops() / 2


def _inference(run: Callable[[Tensor], Tensor], networks: Sequence[nn.Module], x: Tensor) -> Callable[[], object]:
    def call() -> None:
        for network in networks:
            network.eval()
        with torch.inference_mode():
            run(x)
        _wait(x)

    return call


def _training(
    run: Callable[[Tensor], Tensor], networks: Sequence[nn.Module], x: Tensor, target: Tensor
) -> Callable[[], object]:
    loss = QTSegLoss()

    def call() -> None:
        for network in networks:
            network.train().zero_grad(set_to_none=True)
        loss(run(x), target).backward()
        _wait(x)

    return call


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


# ----------------------------------------------------------------------------------------------------------- matrix


@dataclass(frozen=True)
class Tried:
    """One combination.

    Attributes:
        name: of the backbone, or of the attention and what it was in.
        ok: whether a training step and a prediction went well.
        said: what went wrong, or how many parameters the network has.
    """

    name: str
    ok: bool
    said: str


def combinations(decoder: Mapping[str, Any] | str = "qtseg") -> dict[str, dict[str, Any]]:
    """Settings of :func:`tasks.qtseg.networks.build.build_network` for every backbone and attention, by name."""
    ours = [n for n in backbones.available() if timm.model_entrypoint(n).__module__.startswith("backbones.")]
    found: dict[str, dict[str, Any]] = {
        f"backbone {name}": {"decoder": decoder, "backbone": {"name": name}} for name in (*ours, *OF_TIMM)
    }
    host = {"name": "metaformer_tiny", "params": {"depths": (2, 2, 2, 2)}}
    for kind, backbone in (("mixer", host), ("gate", None)):
        for name in attention.available(kind):  # type: ignore[arg-type]
            if 2 in getattr(attention.class_of(name, kind), "grids", (2,)):  # type: ignore[arg-type]
                chosen = {"decoder": decoder, "backbone": backbone, "attention": {"name": name}}
                found[f"{kind} {name}"] = chosen
    return found


def matrix(
    decoder: Mapping[str, Any] | str = "qtseg", names: Sequence[str] | None = None, size: tuple[int, int] = ODD
) -> Iterator[Tried]:
    """One training step and one prediction with each combination, on images of an odd size.

    A vision transformer of more than :data:`LARGEST` parameters has two blocks. Backbones without feature maps are
    refused by a sentence, which counts as well only where the sentence is ours.

    Args:
        decoder: a name, or a name with parameters.
        names: of :func:`combinations`; all of them when left out.
    """
    every = combinations(decoder)
    for name in every if names is None else names:
        yield _tried(name, every[name], size)
        gc.collect()


def _tried(name: str, settings: dict[str, Any], size: tuple[int, int]) -> Tried:
    torch.manual_seed(0)
    try:
        network = build_network(_lightened(settings))
        count = sum(p.numel() for p in network.parameters())
        _step(network, size)
    except InputError as error:
        # What gives no maps can be no encoder; that it says so is all that can be asked.
        return Tried(name, "gives no feature maps" in str(error), str(error))
    except Exception as error:  # whatever a network raises is what this is to find
        reason = (str(error).strip() or "no message").splitlines()[0][:160]
        return Tried(name, False, f"{type(error).__name__}: {reason}")
    return Tried(name, True, f"{count / 1e6:.1f} M parameters")


def _lightened(settings: dict[str, Any]) -> dict[str, Any]:
    """The same with two blocks, for networks that would not fit into a workstation's memory with their gradients."""
    backbone = settings["backbone"]
    if backbone is None or "params" in backbone:
        return settings
    with torch.device("meta"):
        try:
            count = sum(p.numel() for p in backbones.create(backbone["name"], num_classes=0).parameters())
        except (NotImplementedError, RuntimeError, InputError):
            return settings
    if count < LARGEST or not any(part in timm.model_entrypoint(backbone["name"]).__module__ for part in _ISOTROPIC):
        return settings
    return settings | {"backbone": backbone | {"params": {"depth": 2}}}


_ISOTROPIC = ("architectures", "isotropic", "vision_transformer", "eva", "beit")


def _step(network: nn.Module, size: tuple[int, int]) -> None:
    """A step of gradient descent in training mode, then a prediction.

    Raises:
        RuntimeError: logits are of another shape or not finite, the loss has no gradient, or nothing was learnt.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=generator)
    target = torch.randint(2, (2, *size), generator=generator)
    logits = network.train()(x)
    QTSegLoss()(logits, target).backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if not gradients or not all(bool(g.isfinite().all()) for g in gradients):
        raise RuntimeError("gradients are missing or not finite")
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-3 * parameter.grad)
        predicted = network.eval()(x)
    if predicted.shape != (2, 2, *size) or not predicted.isfinite().all():
        raise RuntimeError(f"the prediction is {tuple(predicted.shape)} or not finite")
