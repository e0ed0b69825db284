"""Images per second of each backbone beside timm's model of about its size, and beside its attention as released.

Inference and training steps at 224 and 512 pixels. Peers: timm's twin where there is one, else timm's model that is
nearest in parameters; for the models whose attention is the point, the same model with the released formulation of its
attention (the repository's tests hold it) in place of ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn

import backbones
from attention.mixer import Mixer
from tasks.common.bench import BenchRow, each_apart, median_times


@dataclass(frozen=True)
class Pair:
    """A backbone and timm's model beside it; ``twin`` when that is the same network but for the attention."""

    ours: str
    peer: str
    twin: bool = False


PAIRS = (
    Pair("biformer_tiny", "pvt_v2_b1"),
    Pair("biformer_small", "davit_tiny"),
    Pair("biformer_stl", "swin_tiny_patch4_window7_224"),
    Pair("nat_mini", "pvt_v2_b1"),
    Pair("nat_tiny", "volo_d1_224"),
    Pair("dinat_tiny", "swin_tiny_patch4_window7_224"),
    Pair("overlock_xtiny", "pvt_v2_b1"),
    Pair("overlock_tiny", "maxvit_tiny_tf_224"),
    Pair("metaformer_tiny", "pvt_v2_b1"),
    Pair("mavit_tiny", "pvt_v2_b1"),
    Pair("l2vit_tiny", "swin_tiny_patch4_window7_224"),
    Pair("agent_swin_tiny", "swin_tiny_patch4_window7_224", twin=True),
    Pair("inline_swin_tiny", "swin_tiny_patch4_window7_224", twin=True),
    Pair("agent_deit_tiny", "deit_tiny_patch16_224", twin=True),
    Pair("inline_deit_tiny", "deit_tiny_patch16_224", twin=True),
    Pair("dependencyvit_tiny", "deit_tiny_patch16_224"),
    Pair("dynperceiver_reg400m_t128", "regnety_004"),
    Pair("gcvit_any_xxtiny", "gcvit_xxtiny", twin=True),
)
RELEASED = ("biformer_tiny", "nat_mini", "dinat_mini")
"""Models that are also timed with the released formulation of their attention."""
LARGEST = 512


def rows() -> Iterator[BenchRow]:
    """One row per backbone, size and direction; sizes and repeats shrink with ``FOVEA_BENCH_QUICK=1``."""
    quick = os.environ.get("FOVEA_BENCH_QUICK", "0") == "1"
    repeats = 1 if quick else 3
    beside_timm = ((64, 1),) if quick else ((224, 1), (224, 8), (LARGEST, 1))
    beside_released = ((64, 1),) if quick else ((224, 2), (224, 8), (224, 16))
    known = set(backbones.available())
    yield from each_apart(_compare, [(p, beside_timm, repeats) for p in PAIRS if {p.ours, p.peer} <= known])
    yield from each_apart(_beside_released, [(n, beside_released, repeats) for n in RELEASED if n in known])


def _compare(pair: Pair, sizes: Sequence[tuple[int, int]], repeats: int) -> list[BenchRow]:
    what = "timm's twin" if pair.twin else "timm, of similar size"
    found: list[BenchRow] = []
    for pixels, batch in sizes:
        ours, peer = _build(pair.ours, pixels), _build(pair.peer, pixels)
        found += _timed(pair.ours, ours, peer, f"{pair.peer} ({what})", pixels, batch, repeats)
    return found


def _beside_released(name: str, sizes: Sequence[tuple[int, int]], repeats: int) -> list[BenchRow]:
    found: list[BenchRow] = []
    for pixels, batch in sizes:
        ours, peer = _build(name, pixels), _build(name, pixels)
        if sum(_use_released(module) for module in peer.modules() if isinstance(module, Mixer)):
            found += _timed(name, ours, peer, "itself, attention as released", pixels, batch, repeats)
    return found


def _timed(
    name: str, ours: nn.Module, peer: nn.Module, peer_name: str, pixels: int, batch: int, repeats: int
) -> Iterator[BenchRow]:
    device = next(ours.parameters()).device
    # Two images train at least: batch normalisation of a single pooled vector has no variance.
    for direction, step, count in (("inference", _inference, batch), ("training step", _training, max(batch, 2))):
        images = torch.randn(count, 3, pixels, pixels, device=device)
        times = median_times({"ours": step(ours, images), "peer": step(peer, images)}, repeats)
        title = f"{name} {pixels} px, batch {count}, {direction}"
        rates = {who: count / seconds for who, seconds in times.items()}
        yield BenchRow(title, rates["ours"], rates["peer"], peer_name, "images/s", _peak(step(ours, images), device))


def _inference(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def run() -> None:
        model.eval()
        with torch.inference_mode():
            model(images)
        _wait(images.device)

    return run


def _training(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def run() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        model(images).square().mean().backward()
        _wait(images.device)

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(call: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory of one call in MB, weights included, on a GPU; what a CPU's call allocates, by the profiler."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) / 1e6
    from kernels.measure import peak_memory

    found = peak_memory(call, device)
    return None if found is None else found / 1e6


def _build(name: str, pixels: int) -> nn.Module:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return backbones.create(name, img_size=pixels).to(device)


def _use_released(mixer: Mixer) -> bool:
    """Let the mixer compute by the released formulation; whether there is one."""
    place = f"tests.attention.released.{mixer.name}"
    try:
        found = importlib.util.find_spec(place)
    except ModuleNotFoundError:
        return False
    if found is None:
        return False
    run = importlib.import_module(place).released(mixer)
    mixer.forward = MethodType(lambda self, x, *_, **__: run(x), mixer)  # type: ignore[method-assign]
    return True
