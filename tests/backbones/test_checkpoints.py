"""Weights from files and from the hub's cache: loaded whole, or one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

import backbones
from backbones.architectures import _resample_positions
from backbones.checkpoints import digest, find_file, read_state
from backbones.encoder import Encoder
from backbones.pathology import ENCODERS
from kernels.errors import InputError
from tests.backbones.conftest import COMMIT, Publish

TINY_VIT: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
TINY = {
    "uni": TINY_VIT,
    "uni2_h": {**TINY_VIT, "img_size": 28},
    "virchow2": {**TINY_VIT, "img_size": 28},
    "gigapath": TINY_VIT,
    "h_optimus_0": {**TINY_VIT, "img_size": 28},
    "phikon_v2": TINY_VIT,
    "conch_v1_5": {"img_size": 32, "depth": 2, "context_dim": 32, "num_heads": 2, "embed_dim": 16},
    "lunit_dino_vits8": {"depth": 1},
    "ctranspath": {"depths": (1, 1, 1, 1), "embed_dim": 48},
    "resnet50_clam": {},
}


def tiles() -> Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)


def trained(name: str, seed: int = 1, params: dict[str, Any] | None = None) -> Encoder:
    """An encoder whose weights are taken for trained ones: its features are those of the network, not centred."""
    encoder = backbones.create_encoder(name, seed=seed, params=params)
    encoder.centre = None
    return encoder


def saved(state: dict[str, Tensor], path: Path) -> Path:
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize("name", TINY)
def test_every_encoder_reads_back_its_weights(name: str, tmp_path: Path) -> None:
    source = trained(name, seed=1, params=TINY[name])
    path = saved(source.model.state_dict(), tmp_path / "w.safetensors")
    loaded = backbones.create_encoder(name, seed=2, checkpoint=path, params=TINY[name])
    given = tiles()
    assert torch.equal(loaded(given), source(given))
    assert loaded.weights == f"w.safetensors (sha256 {digest(path)})"
    assert loaded.fingerprint != source.fingerprint


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_pytorch_files_are_read_out_of_their_wrapper(wrapper: str | None, tmp_path: Path) -> None:
    source = trained("resnet18")
    state = {f"module.{key}": value for key, value in source.model.state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "w.pth")
    loaded = backbones.create_encoder("resnet18", seed=2, checkpoint=tmp_path / "w.pth")
    given = tiles()
    assert torch.equal(loaded(given), source(given))


def test_the_classifier_of_a_whole_network_is_left_out(tmp_path: Path) -> None:
    for name, whole in (("resnet18", "resnet18"), ("resnet50_clam", "resnet50"), ("convnext_tiny", "convnext_tiny")):
        model = timm.create_model(whole, num_classes=11)
        path = saved(model.state_dict(), tmp_path / f"{name}.safetensors")
        encoder = backbones.create_encoder(name, checkpoint=path)
        own = encoder.model.state_dict()
        assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items() if key in own)


def test_the_truncated_resnet_gives_the_third_stage_of_the_whole_one(tmp_path: Path) -> None:
    whole = timm.create_model("resnet50", features_only=True, out_indices=[3])
    path = saved(timm.create_model("resnet50").state_dict(), tmp_path / "w.safetensors")
    whole.load_state_dict(safetensors.torch.load_file(path), strict=False)
    encoder = backbones.create_encoder("resnet50_clam", checkpoint=path)
    given = tiles()
    expected = whole.eval()(encoder.prepare(given))[0].mean((2, 3))
    torch.testing.assert_close(encoder(given), expected)


def test_phikon_weights_in_the_layout_of_transformers_are_renamed(tmp_path: Path) -> None:
    source = trained("phikon_v2", params=TINY_VIT)
    path = saved(_to_transformers_dinov2(source.model.state_dict()), tmp_path / "model.safetensors")
    loaded = backbones.create_encoder("phikon_v2", seed=2, checkpoint=tmp_path, params=TINY_VIT)
    given = tiles()
    assert torch.equal(loaded(given), source(given))
    assert path.name in loaded.weights


def test_ctranspath_weights_of_the_original_release_are_renamed(tmp_path: Path) -> None:
    source = trained("ctranspath", params=TINY["ctranspath"])
    released: dict[str, Tensor] = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    for key, value in source.model.state_dict().items():
        if "downsample" in key:  # the release has it at the end of the stage before
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        released[key] = value
    torch.save({"model": released}, tmp_path / "ctranspath.pth")
    path = tmp_path / "ctranspath.pth"
    loaded = backbones.create_encoder("ctranspath", seed=2, checkpoint=path, params=TINY["ctranspath"])
    given = tiles()
    assert torch.equal(loaded(given), source(given))


def test_position_embeddings_of_another_grid_are_resampled() -> None:
    positions = torch.randn(1, 1 + 14 * 14, 6)
    assert torch.equal(_resample_positions(positions, 14), positions)
    larger = _resample_positions(positions, 28)
    assert larger.shape == (1, 1 + 28 * 28, 6)
    assert torch.equal(larger[:, 0], positions[:, 0])
    flat = torch.cat([positions[:, :1], torch.ones(1, 196, 6)], dim=1)
    torch.testing.assert_close(_resample_positions(flat, 28)[:, 1:], torch.ones(1, 784, 6))


def test_weights_in_the_hub_cache_are_used_without_a_download(tmp_path: Path, hub_cache: Publish) -> None:
    params = TINY["lunit_dino_vits8"]
    source = trained("lunit_dino_vits8", params=params)
    path = saved(source.model.state_dict(), tmp_path / "w.safetensors")
    hub_cache("1aurent/vit_small_patch8_224.lunit_dino", path, "model.safetensors")
    loaded = backbones.create_encoder("lunit_dino_vits8", pretrained=True, params=params)
    given = tiles()
    assert torch.equal(loaded(given), source(given))
    assert loaded.weights == f"pretrained: 1aurent/vit_small_patch8_224.lunit_dino@{COMMIT[:12]}"
    assert loaded.fingerprint != source.fingerprint
    maps = backbones.create("lunit_dino_vits8", pretrained=True, features_only=True, out_indices=[0], **params)
    assert [tuple(x.shape) for x in maps(torch.zeros(1, 3, 224, 224))] == [(1, 384, 28, 28)]


def test_a_cached_timm_model_is_named_by_its_hub_id(tmp_path: Path, hub_cache: Publish) -> None:
    model = timm.create_model("resnet18")
    path = saved(model.state_dict(), tmp_path / "w.safetensors")
    hub_cache("timm/resnet18.a1_in1k", path, "model.safetensors")
    encoder = backbones.create_encoder("resnet18", pretrained=True)
    assert encoder.weights == "pretrained: resnet18.a1_in1k (timm/resnet18.a1_in1k)"
    torch.testing.assert_close(encoder.model.state_dict()["conv1.weight"], model.conv1.weight.detach())


def test_a_cached_hub_model_is_built_from_its_description_without_pretrained(
    tmp_path: Path, hub_cache: Publish
) -> None:
    config = tmp_path / "c.json"
    config.write_text('{"architecture": "resnet10t", "num_classes": 4, "pretrained_cfg": {"input_size": [3, 96, 96]}}')
    hub_cache("lab/model", config, "config.json")
    encoder = backbones.create_encoder("hf-hub:lab/model")
    assert (encoder.dim, encoder.input_size, encoder.weights) == (512, 96, "random, seed 1")
    config.write_text('{"model_type": "dinov2"}')
    hub_cache("lab/other", config, "config.json")
    with pytest.raises(InputError, match="names no architecture"):
        backbones.create_encoder("hf-hub:lab/other")


@pytest.mark.parametrize("name", ["resnet50_clam", "lunit_dino_vits8"])
def test_weights_that_are_nowhere_end_in_one_sentence(name: str, hub_cache: Publish) -> None:
    with pytest.raises(InputError) as caught:
        backbones.create_encoder(name, pretrained=True)
    assert f"https://huggingface.co/{ENCODERS[name].hub_id}" in str(caught.value)
    assert "backbone.checkpoint=FILE" in str(caught.value)


def test_a_gated_model_says_what_to_request_and_where_to_put_the_file(hub_cache: Publish) -> None:
    with pytest.raises(InputError) as caught:
        backbones.create_encoder("uni", pretrained=True, params=TINY_VIT)
    message = str(caught.value)
    assert "request access at https://huggingface.co/MahmoodLab/UNI" in message
    assert "hf auth login" in message
    assert "backbone.checkpoint=FILE" in message
    assert "\n" not in message


def test_weights_of_another_network_are_refused_with_what_is_wrong(tmp_path: Path) -> None:
    path = saved(timm.create_model("resnet34").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"w\.safetensors does not fit backbone 'resnet18' \(unexpected: .* more"):
        backbones.create_encoder("resnet18", checkpoint=path)
    path = saved(timm.create_model("resnet50").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(
        InputError, match=r"shape: layer1\.0\.conv1\.weight \(64, 64, 1, 1\) instead of \(64, 64, 3, 3\)"
    ):
        backbones.create_encoder("resnet18", checkpoint=path)
    path = saved({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="missing: "):
        backbones.create_encoder("resnet18", checkpoint=path)


def test_a_file_that_would_run_code_is_refused_unread(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Payload()}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="no plain weights file"):
        backbones.create_encoder("resnet18", checkpoint=tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_a_damaged_file_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"not weights at all")
    with pytest.raises(InputError, match=f"w{suffix}"):
        read_state(path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="no named tensors"):
        read_state(tmp_path / "w.pt")


def test_a_folder_is_searched_for_its_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_file(tmp_path / "absent.pth")
    with pytest.raises(InputError, match="is a folder that holds no"):
        find_file(tmp_path)
    (tmp_path / "a.pth").touch()
    assert find_file(tmp_path).name == "a.pth"
    (tmp_path / "b.pth").touch()
    with pytest.raises(InputError, match=r"holds a\.pth, b\.pth; name one"):
        find_file(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert find_file(tmp_path).name == "pytorch_model.bin"


def _to_transformers_dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that the transformers library gives the parameters of a Dinov2 model."""
    plain = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    in_block = {
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    }
    renamed = {"embeddings.mask_token": torch.zeros(1, state["cls_token"].shape[-1])}
    for key, value in state.items():
        if key in plain:
            renamed[plain[key]] = value
            continue
        _, block, rest = key.split(".", 2)
        prefix = f"encoder.layer.{block}."
        if rest.startswith("attn.qkv."):
            for part, name in zip(value.chunk(3), ("query", "key", "value"), strict=True):
                renamed[f"{prefix}attention.attention.{name}.{rest.rsplit('.', 1)[1]}"] = part
        else:
            for ours, theirs in in_block.items():
                rest = rest.replace(ours, theirs)
            renamed[prefix + rest] = value
    return renamed
