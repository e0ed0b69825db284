"""Keras's weights files: written here in its layout from a known state, read back, refused where they do not fit."""

import json
import logging
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from attention.dual_position_channel import ChannelAttention, PositionAttention
from kernels.errors import InputError
from tasks.meningioma.networks.agunet import AGUNet
from tasks.meningioma.networks.blocks import UpConv
from tasks.meningioma.networks.daunet import DAUNet
from tasks.meningioma.networks.official import load_keras
from tasks.meningioma.networks.volume import VolumeNetwork
from tests.meningioma.networks.small import SMALL, dagunet, varied

NETWORKS = pytest.mark.parametrize("build", [AGUNet, DAUNet, dagunet])
Layer = tuple[str, dict[str, np.ndarray]]


def keras_layers(network: nn.Module, first: int = 0) -> list[Layer]:
    """Layers by Keras's names, numbered by kind as the released code makes them."""
    counts: dict[str, int] = {}
    layers = []

    def name(kind: str) -> str:
        number = counts.get(kind, first)
        counts[kind] = number + 1
        return f"{kind}_{number}" if number else kind

    for module in network.modules():
        if isinstance(module, UpConv | nn.Conv3d | nn.Conv1d):
            weight = module.weight.detach()
            kernel = weight.reshape(*weight.shape[:2], *([1] * (5 - weight.dim())), *weight.shape[2:])
            assert module.bias is not None
            kind = "conv3d_transpose" if isinstance(module, UpConv) else "conv3d"
            arrays = {"kernel": kernel.permute(2, 3, 4, 1, 0).numpy(), "bias": module.bias.detach().numpy()}
            layers.append((name(kind), arrays))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            arrays = {
                "gamma": module.weight.detach().numpy(),
                "beta": module.bias.detach().numpy(),
                "moving_mean": module.running_mean.numpy(),
                "moving_variance": module.running_var.numpy(),
            }
            layers.append((name("batch_normalization"), arrays))
        elif isinstance(module, PositionAttention | ChannelAttention):
            # The projections of the position attention are made within its call: their names are used up.
            for _ in range(3 if isinstance(module, PositionAttention) else 0):
                name("conv3d")
            kind = "pam" if isinstance(module, PositionAttention) else "cam"
            layers.append((name(kind), {"gamma": module.gamma.detach().numpy()}))
    return layers


def write_keras(
    path: Path,
    layers: list[Layer],
    whole: bool = False,
    scope: str = "",
    attributes: dict[str, Any] | None = None,
    chunks: int = 1,
) -> Path:
    """The HDF5 layout of ``save_weights``, or with ``whole`` of a saved model, with layers that have no weights."""
    # The order of a functional model is that of its graph, not that in which its layers were made.
    empty: list[Layer] = [("input_1", {}), ("activation", {}), ("concatenate_2", {})]
    order = sorted([*layers, *empty], key=lambda item: item[0][::-1])
    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights") if whole else file
        names = np.array([name.encode() for name, _ in order])
        if chunks == 1:
            group.attrs["layer_names"] = names
        else:
            for index, part in enumerate(np.array_split(names, chunks)):
                group.attrs[f"layer_names{index}"] = part
        for name, arrays in order:
            layer = group.create_group(name)
            weights = {f"{scope}{name}/{key}:0": value for key, value in arrays.items()}
            layer.attrs["weight_names"] = np.array([key.encode() for key in weights], dtype="S80")
            for key, value in weights.items():
                layer.create_dataset(key, data=value)
        if whole:
            file.create_group("optimizer_weights").create_dataset("Adam/iterations:0", data=np.int64(7))
        file.attrs.update(attributes or {})
    return path


def same_output(network: VolumeNetwork, other: VolumeNetwork) -> bool:
    x = torch.randn(1, 1, 12, 9, 10)
    return all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(network.forward_levels(x), other.forward_levels(x), strict=True)
    )


@NETWORKS
@pytest.mark.parametrize("whole", [False, True], ids=["weights", "model"])
def test_a_file_in_keras_layout_is_read_into_the_network(build: Any, whole: bool, tmp_path: Path) -> None:
    network = varied(build(filters=SMALL)).eval()
    path = write_keras(tmp_path / "weights.h5", keras_layers(network), whole=whole)
    other = varied(build(filters=SMALL)).eval()
    if build is not AGUNet:  # which no file has
        other.dual.position.attention.qkv.load_state_dict(network.dual.position.attention.qkv.state_dict())
    assert not same_output(network, other)
    load_keras(other, path)
    assert same_output(network, other)
    assert all(
        torch.equal(value, other.state_dict()[key]) for key, value in network.state_dict().items() if "num_" not in key
    )


def test_numbers_may_start_anywhere_and_names_may_be_scoped_and_split(tmp_path: Path) -> None:
    network, other = varied(AGUNet(filters=SMALL)).eval(), AGUNet(filters=SMALL).eval()
    path = write_keras(tmp_path / "w.h5", keras_layers(network, first=96), scope="model_1/", chunks=4)
    assert same_output(network, load_keras(other, path))


def test_a_model_in_a_model_is_read_by_the_names_of_its_weights(tmp_path: Path) -> None:
    network, other = varied(AGUNet(filters=SMALL)).eval(), AGUNet(filters=SMALL).eval()
    weights = {f"{name}/{key}:0": value for name, arrays in keras_layers(network) for key, value in arrays.items()}
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names"] = [b"model_1"]
        group = file.create_group("model_1")
        for index, part in enumerate(np.array_split(np.array([key.encode() for key in weights]), 3)):
            group.attrs[f"weight_names{index}"] = part
        for key, value in weights.items():
            group.create_dataset(key, data=value)
    assert same_output(network, load_keras(other, tmp_path / "w.h5"))


def test_layers_of_other_names_are_known_by_the_description_of_the_model(tmp_path: Path) -> None:
    network, other = varied(AGUNet(filters=SMALL)).eval(), AGUNet(filters=SMALL).eval()
    layers = keras_layers(network)
    renamed = [(f"layer_{index}", arrays) for index, (_, arrays) in enumerate(layers)]
    classes = [
        {"class_name": "Conv3DTranspose" if "transpose" in old else "Layer", "config": {"name": new}}
        for (old, _), (new, _) in zip(layers, renamed, strict=True)
    ]
    config = json.dumps({"class_name": "Model", "config": {"name": "model", "layers": classes}})
    path = write_keras(tmp_path / "w.h5", renamed, whole=True, attributes={"model_config": config})
    assert same_output(network, load_keras(other, path))


def test_missing_projections_are_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = varied(DAUNet(filters=SMALL)).eval()
    path = write_keras(tmp_path / "w.h5", keras_layers(network))
    other = DAUNet(filters=SMALL).eval()
    before = other.dual.position.attention.qkv.weight.clone()  # type: ignore[union-attr]
    with caplog.at_level(logging.INFO):
        load_keras(other, path)
    assert [record.message for record in caplog.records] == [
        "w.h5: the file has no dual.position.attention.qkv.weight; they keep the values they were started with, so "
        "train before relying on them"
    ]
    assert torch.equal(before, other.dual.position.attention.qkv.weight)  # type: ignore[union-attr]
    caplog.clear()
    gates = varied(AGUNet(filters=SMALL))
    load_keras(AGUNet(filters=SMALL), write_keras(tmp_path / "a.h5", keras_layers(gates)))
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"filters": (4, 6, 10)},
            r"filters=\[4, 6, 10\] \(.*/kernel \(8, 6, 3, 3, 3\) instead of \(10, 6, 3, 3, 3\) for",
        ),
        ({"filters": (4, 6, 8, 8)}, "transposed convolutions where the network has 3"),
        ({"input_pyramid": False}, "convolutions where the network has"),
        ({"deep_supervision": False}, "convolutions where the network has"),
    ],
)
def test_a_network_of_other_parts_is_refused_with_what_differs(options: Any, said: str, tmp_path: Path) -> None:
    path = write_keras(tmp_path / "w.h5", keras_layers(AGUNet(filters=SMALL)))
    network = AGUNet(**{"filters": SMALL, **options})
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(InputError, match=said) as caught:
        load_keras(network, path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1200
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


def test_layers_of_another_kind_are_refused(tmp_path: Path) -> None:
    layers = [*keras_layers(AGUNet(filters=SMALL)), ("dense_1", {"kernel": np.zeros((3, 3)), "extra": np.zeros(3)})]
    with pytest.raises(InputError, match="layer dense_1 with extra, kernel"):
        load_keras(AGUNet(filters=SMALL), write_keras(tmp_path / "w.h5", layers))


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    network = AGUNet(filters=SMALL)
    with pytest.raises(InputError, match="does not exist"):
        load_keras(network, tmp_path / "absent.h5")
    (tmp_path / "text.h5").write_text("no HDF5 at all")
    with pytest.raises(InputError, match="cannot be read as Keras weights"):
        load_keras(network, tmp_path / "text.h5")
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file["features"] = np.zeros((3, 4))
    with pytest.raises(InputError, match="no attribute layer_names"):
        load_keras(network, tmp_path / "features.h5")
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file.attrs["layer_names"] = np.array([], dtype="S1")
    with pytest.raises(InputError, match="no layers with weights"):
        load_keras(network, tmp_path / "empty.h5")
    with h5py.File(tmp_path / "broken.h5", "w") as file:
        file.attrs["layer_names"] = [b"conv3d"]
    with pytest.raises(InputError, match="cannot be read as Keras weights"):
        load_keras(network, tmp_path / "broken.h5")
