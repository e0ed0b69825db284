"""What is published of a backbone: ImageNet-1k top-1, cost, and the licence of its released weights.

Figures of timm's own models are those of timm's evaluation of its weights, but for DeiT; the others are the authors'.
"""

from __future__ import annotations

from dataclasses import dataclass

_TIMM = "Apache-2.0 or the weights' own, see the model card"


@dataclass(frozen=True)
class Published:
    """Figures of one backbone.

    Attributes:
        top1: ImageNet-1k, in percent; None where nothing is published.
        gflops: multiply-adds of one image at ``pixels``, in 10^9; None where nothing is published.
        pixels: side of the image.
        licence: of the released weights; ``none`` where the authors name none or have released none.
    """

    top1: float | None = None
    gflops: float | None = None
    pixels: int = 224
    licence: str = "none"


def _row(licence: str, **models: tuple[float | None, float | None]) -> dict[str, Published]:
    return {name: Published(top1, gflops, 224, licence) for name, (top1, gflops) in models.items()}


PUBLISHED: dict[str, Published] = {
    **_row(
        "MIT",
        biformer_tiny=(81.4, 2.2),
        biformer_small=(83.8, 4.5),
        biformer_base=(84.3, 9.8),
        biformer_stl=(82.7, 4.6),
        biformer_stl_nchw=(82.7, 4.6),
        nat_mini=(81.8, 2.7),
        nat_tiny=(83.2, 4.3),
        nat_small=(83.7, 7.8),
        nat_base=(84.3, 13.7),
        dinat_mini=(81.8, 2.7),
        dinat_tiny=(82.7, 4.3),
        dinat_small=(83.8, 7.8),
        dinat_base=(84.4, 13.7),
        dinat_large=(86.6, 30.6),
        dinat_s_tiny=(81.8, 4.5),
        dinat_s_small=(83.5, 8.7),
        dinat_s_base=(83.8, 15.4),
        dinat_s_large=(86.5, 34.5),
        nat_iso_small=(80.0, None),
        nat_iso_base=(81.6, None),
        dinat_iso_small=(80.8, None),
        dinat_iso_base=(82.1, None),
        vitrpb_small=(81.2, None),
        vitrpb_base=(82.5, None),
        l2vit_tiny=(83.1, None),
        l2vit_small=(84.1, None),
        l2vit_base=(84.4, None),
    ),
    **_row(
        "Apache-2.0",
        overlock_xtiny=(82.7, 2.6),
        overlock_tiny=(84.2, 5.5),
        overlock_small=(84.8, 9.7),
        overlock_base=(85.1, 16.7),
    ),
    **_row(
        "none",
        mavit_small=(84.7, 4.6),
        mavit_base=(85.7, 9.9),
        mavit_large=(86.0, 16.1),
        agent_swin_tiny=(82.6, None),
        agent_swin_small=(83.7, None),
        agent_swin_base=(84.0, None),
        inline_swin_tiny=(82.4, None),
        inline_swin_small=(83.6, None),
        inline_swin_base=(84.1, None),
        agent_deit_tiny=(74.9, None),
        agent_deit_small=(80.5, None),
        agent_deit_base=(82.0, None),
        inline_deit_tiny=(74.5, None),
        dynperceiver_reg800m_t128=(79.86, None),
        dynperceiver_resnet50_0375_t128=(77.70, None),
        dynperceiver_mobilenetv3_075_t128=(74.59, None),
    ),
    **_row(
        "CC-BY-NC-SA-4.0",
        gcvit_any_xxtiny=(79.76, 2.1),
        gcvit_any_xtiny=(81.96, 2.9),
        gcvit_any_tiny=(83.40, 4.8),
        gcvit_any_small=(83.90, 8.6),
        gcvit_any_base=(84.46, 14.9),
        gcvit_xxtiny=(79.76, 2.1),
        gcvit_xtiny=(81.96, 2.9),
        gcvit_tiny=(83.40, 4.8),
        gcvit_small=(83.90, 8.6),
        gcvit_base=(84.46, 14.9),
    ),
    **_row(
        _TIMM,
        davit_tiny=(82.69, 4.5),
        davit_small=(84.25, 8.7),
        davit_base=(84.65, 15.4),
        maxvit_tiny_tf_224=(83.43, 5.4),
        maxvit_small_tf_224=(84.45, 11.4),
        maxvit_base_tf_224=(84.88, 23.5),
        maxvit_large_tf_224=(84.94, 43.0),
        volo_d1_224=(84.15, 6.9),
        volo_d2_224=(85.20, 14.3),
        volo_d3_224=(85.44, 20.8),
        volo_d4_224=(85.87, 44.3),
        volo_d5_224=(86.08, 72.4),
        deit_tiny_patch16_224=(72.2, None),
        deit_small_patch16_224=(79.8, None),
        deit_base_patch16_224=(81.8, None),
        swin_tiny_patch4_window7_224=(81.39, 4.5),
        swin_small_patch4_window7_224=(83.23, 8.8),
        swin_base_patch4_window7_224=(83.60, 15.5),
    ),
    "crossvit_tiny_240": Published(73.35, 1.3, 240, _TIMM),
    "crossvit_small_240": Published(81.04, 5.1, 240, _TIMM),
    "crossvit_base_240": Published(82.21, 20.1, 240, _TIMM),
    "halonet26t": Published(79.13, 3.2, 256, _TIMM),
    "halonet50ts": Published(81.64, 5.3, 256, _TIMM),
    "sehalonet33ts": Published(80.98, 3.6, 256, _TIMM),
}


def published(name: str) -> Published:
    """What is published of a model; nothing where this table does not have it."""
    return PUBLISHED.get(name.partition(".")[0], Published(licence=""))
