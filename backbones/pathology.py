"""The named pathology encoders: where each comes from, what it wants to see, and what it gives.

One entry per encoder. Architectures are timm's; what timm has not is in :mod:`backbones.architectures`. ``tile`` and
``mpp`` are the field of view the authors extract features with: a square of ``tile`` pixels at ``mpp`` micrometres per
pixel, which the encoder itself resizes to its input. Figures follow the model cards and papers named in each entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_H_OPTIMUS_MEAN = (0.707223, 0.578729, 0.703617)
_H_OPTIMUS_STD = (0.211883, 0.230117, 0.177517)

# "model": what the timm model gives with its own pooling and no classifier.
# "class_and_mean": the class token followed by the mean of the patch tokens, register tokens left out.
Pooling = Literal["model", "class_and_mean"]


@dataclass(frozen=True)
class PathologyEncoder:
    """How one published encoder is built, fed, pooled and loaded.

    Attributes:
        sources: (hub id, file name) pairs that hold the weights, tried in order; the first names the page to ask.
        architecture: timm's name of the network.
        arguments: what this encoder changes in it; the values of ``mlp_layer`` and ``act_layer`` are names.
        input_size: side of the square the network sees, pixels.
        resize: side the tile is resized to before its centre of ``input_size`` is cut out; None when the same.
        tile, mpp: recommended tile side in pixels and its micrometres per pixel.
        patch: side of the network's patch (or stem stride) in pixels.
        dim: number of features.
        gated: the hub asks for an account and consent to the licence before it hands out the weights.
    """

    name: str
    title: str
    sources: tuple[tuple[str, str], ...]
    architecture: str
    dim: int
    patch: int
    tile: int
    licence: str
    gated: bool
    paper: str
    arguments: dict[str, Any] = field(default_factory=dict)
    input_size: int = 224
    resize: int | None = None
    mpp: float = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    pooling: Pooling = "model"

    @property
    def hub_id(self) -> str:
        return self.sources[0][0]


def _files(hub_id: str) -> tuple[tuple[str, str], ...]:
    return ((hub_id, "model.safetensors"), (hub_id, "pytorch_model.bin"))


_SWIGLU = {"mlp_layer": "swiglu_packed", "act_layer": "silu"}

ENCODERS: dict[str, PathologyEncoder] = {
    encoder.name: encoder
    for encoder in (
        PathologyEncoder(
            name="uni",
            title="UNI, ViT-L/16",
            sources=(("MahmoodLab/UNI", "pytorch_model.bin"),),
            architecture="vit_large_patch16_224",
            arguments={"init_values": 1e-5, "dynamic_img_size": True},
            dim=1024,
            patch=16,
            tile=256,
            licence="CC-BY-NC-ND-4.0",
            gated=True,
            paper="Chen et al., Nature Medicine 2024, doi:10.1038/s41591-024-02857-3",
        ),
        PathologyEncoder(
            name="uni2_h",
            title="UNI2-h, ViT-H/14 with 8 registers",
            sources=(("MahmoodLab/UNI2-h", "pytorch_model.bin"),),
            architecture="vit_giant_patch14_224",
            arguments={
                "img_size": 224,
                "patch_size": 14,
                "depth": 24,
                "num_heads": 24,
                "embed_dim": 1536,
                "init_values": 1e-5,
                "mlp_ratio": 2.66667 * 2,
                "reg_tokens": 8,
                "no_embed_class": True,
                "dynamic_img_size": True,
                **_SWIGLU,
            },
            dim=1536,
            patch=14,
            tile=256,
            licence="CC-BY-NC-ND-4.0",
            gated=True,
            paper="Chen et al., Nature Medicine 2024, doi:10.1038/s41591-024-02857-3 (second release, model card)",
        ),
        PathologyEncoder(
            name="virchow2",
            title="Virchow2, ViT-H/14 with 4 registers",
            sources=_files("paige-ai/Virchow2"),
            architecture="vit_huge_patch14_224",
            arguments={
                "img_size": 224,
                "init_values": 1e-5,
                "mlp_ratio": 5.3375,
                "reg_tokens": 4,
                "dynamic_img_size": True,
                **_SWIGLU,
            },
            pooling="class_and_mean",
            dim=2560,
            patch=14,
            tile=224,
            licence="CC-BY-NC-ND-4.0",
            gated=True,
            paper="Zimmermann et al., 2024, arXiv:2408.00738",
        ),
        PathologyEncoder(
            name="conch_v1_5",
            title="CONCH v1.5, ViT-L/16 at 448 px with an attentional pooler",
            sources=(
                ("MahmoodLab/conchv1_5", "pytorch_model_vision.bin"),
                ("MahmoodLab/TITAN", "conch_v1_5_pytorch_model.bin"),
            ),
            architecture="fovea_conch_v1_5",
            input_size=448,
            dim=768,
            patch=16,
            tile=512,
            licence="CC-BY-NC-ND-4.0",
            gated=True,
            paper="Ding et al. (TITAN), Nature Medicine 2025, arXiv:2411.19666",
        ),
        PathologyEncoder(
            name="gigapath",
            title="Prov-GigaPath tile encoder, ViT-g/16",
            sources=(("prov-gigapath/prov-gigapath", "pytorch_model.bin"),),
            architecture="vit_giant_patch14_dinov2",
            arguments={"img_size": 224, "patch_size": 16},
            resize=256,
            dim=1536,
            patch=16,
            tile=256,
            licence="Apache-2.0, research use by the model card",
            gated=True,
            paper="Xu et al., Nature 2024, doi:10.1038/s41586-024-07441-w",
        ),
        PathologyEncoder(
            name="h_optimus_0",
            title="H-optimus-0, ViT-g/14 with 4 registers",
            sources=_files("bioptimus/H-optimus-0"),
            architecture="vit_giant_patch14_reg4_dinov2",
            arguments={"img_size": 224, "init_values": 1e-5},
            mean=_H_OPTIMUS_MEAN,
            std=_H_OPTIMUS_STD,
            dim=1536,
            patch=14,
            tile=224,
            licence="Apache-2.0",
            gated=True,
            paper="Saillard et al., 2024, github.com/bioptimus/releases",
        ),
        PathologyEncoder(
            name="h_optimus_1",
            title="H-optimus-1, ViT-g/14 with 4 registers",
            sources=_files("bioptimus/H-optimus-1"),
            architecture="vit_giant_patch14_reg4_dinov2",
            arguments={"img_size": 224, "init_values": 1e-5},
            mean=_H_OPTIMUS_MEAN,
            std=_H_OPTIMUS_STD,
            dim=1536,
            patch=14,
            tile=224,
            licence="CC-BY-NC-ND-4.0",
            gated=True,
            paper="Bioptimus, 2025, huggingface.co/bioptimus/H-optimus-1",
        ),
        PathologyEncoder(
            name="phikon_v2",
            title="Phikon-v2, ViT-L/16",
            sources=(("owkin/phikon-v2", "model.safetensors"),),
            architecture="vit_large_patch16_224",
            arguments={"init_values": 1.0},
            dim=1024,
            patch=16,
            tile=224,
            licence="Owkin non-commercial licence",
            gated=False,
            paper="Filiot et al., 2024, arXiv:2409.09173",
        ),
        PathologyEncoder(
            name="ctranspath",
            title="CTransPath, Swin-T with a convolutional stem",
            sources=_files("1aurent/swin_tiny_patch4_window7_224.CTransPath"),
            architecture="fovea_ctranspath",
            dim=768,
            patch=4,
            tile=256,
            mpp=1.0,
            licence="GPL-3.0",
            gated=False,
            paper="Wang et al., Medical Image Analysis 2022, doi:10.1016/j.media.2022.102559",
        ),
        PathologyEncoder(
            name="lunit_dino_vits8",
            title="Lunit DINO, ViT-S/8",
            sources=_files("1aurent/vit_small_patch8_224.lunit_dino"),
            architecture="vit_small_patch8_224",
            mean=(0.70322989, 0.53606487, 0.66096631),
            std=(0.21716536, 0.26081574, 0.20723464),
            dim=384,
            patch=8,
            tile=224,
            licence="Lunit non-commercial licence",
            gated=False,
            paper="Kang et al., CVPR 2023, arXiv:2212.04690",
        ),
        PathologyEncoder(
            name="resnet50_clam",
            title="ResNet-50 (ImageNet) up to its third stage, as CLAM uses it",
            sources=_files("timm/resnet50.tv_in1k"),
            architecture="fovea_resnet50_clam",
            dim=1024,
            patch=16,
            tile=256,
            licence="BSD-3-Clause",
            gated=False,
            paper="Lu et al. (CLAM), Nature Biomedical Engineering 2021, arXiv:2004.09666",
        ),
    )
}
