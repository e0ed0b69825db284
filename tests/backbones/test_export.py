"""torch.export of the feature maps, and ONNX where its packages are installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import backbones
from backbones.pyramid import Pyramid
from tests.backbones.small import OF_TIMM, OURS, small_params

# One of each of our families, which the registry is asked for so that none is forgotten.
FAMILIES: dict[str, str] = {}
for _name in backbones.available():
    if timm.model_entrypoint(_name).__module__.startswith("backbones."):
        _start = max((start for start in OURS if _name.startswith(start)), key=len, default=_name)
        FAMILIES.setdefault(_start, _name)
IMPOSSIBLE = {
    "conch": "gives no feature maps",
    "dependencyvit": "how many tokens it attends to depends on the image",
}
NAMES = [*FAMILIES.values(), *OF_TIMM]


def build(name: str) -> Pyramid:
    reason = next((said for start, said in IMPOSSIBLE.items() if name.startswith(start)), None)
    if reason is not None:
        pytest.skip(reason)
    model = backbones.create(name, features_only=True, **small_params(name))
    assert isinstance(model, Pyramid)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_exported_pyramid_gives_the_same_maps(name: str) -> None:
    model, x = build(name), torch.randn(1, 3, 75, 106)
    exported = torch.export.export(model, (x,)).module()
    for ours, theirs in zip(exported(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES.values(), "resnet18", "convnext_atto"])
@torch.no_grad()
def test_onnx_gives_the_same_maps(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = build(name), torch.randn(1, 3, 75, 106)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, input_names=["image"])
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for ours, theirs in zip(session.run(None, {"image": x.numpy()}), model(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-3, atol=1e-4)
