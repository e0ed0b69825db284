"""QTSeg's encoder: a small convolutional detector's body and neck, three maps that have all seen each other.

Tran et al.: QTSeg: A Query Token-Based Dual-Mix Attention Framework with Multi-Level Feature Distribution for Medical
Image Segmentation, 2024, arXiv:2412.17241. The layout is that of the nano-sized YOLOv8 without its detection head:
cross-stage stages at strides 4 to 32, a way up that adds coarse maps to fine ones and a way down again (Liu et al.,
PANet, CVPR 2018, arXiv:1803.01534). Batch normalisation has eps 1e-5 and momentum 0.1, as in QTSeg; weights that were
trained with other values give other numbers. No code of either is here, and QTSeg's authors name no licence.

| name | width | strides | channels | parameters |
|---|---|---|---|---|
| qtseg_encoder | 16 | 8, 16, 32 | 64, 128, 256 | 2.26 M, without the classifier |

Images of any size are taken without padding: every map has ceil(side / stride) cells, and a coarser one that is
repeated is cut to the finer. For multiples of 32, as the released network needs them, numbers are the released ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.classifier import ClassifierHead
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from backbones.cross_stage import ConvUnit, CrossStage, PooledPyramid
from backbones.four_stages import Classifying, as_indices, describe, only_nchw
from backbones.weights import unwrapped
from kernels.errors import InputError

__all__ = ["QTSegEncoder", "checkpoint_filter_fn"]


class QTSegEncoder(Classifying):
    """Images (B, in_chans, H, W) to maps of strides 8, 16 and 32 with 4, 8 and 16 times ``width`` channels.

    Args:
        width: channels of the stem, an even number, of which all others are multiples.
        drop_rate: dropout before the classifier.

    Raises:
        InputError: the width is not possible.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        width: int = 16,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if width < 2 or width % 2:
            raise InputError(f"qtseg_encoder: width={width} must be an even number of at least 2.")
        super().__init__()
        n = width
        self.in_chans, self.num_classes, self.drop_rate, self.width = in_chans, num_classes, drop_rate, width
        self.grad_checkpointing = False
        self.stem = ConvUnit(in_chans, n, 3, 2)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(ConvUnit(n, 2 * n, 3, 2), CrossStage(2 * n, 2 * n, 1)),
                nn.Sequential(ConvUnit(2 * n, 4 * n, 3, 2), CrossStage(4 * n, 4 * n, 2)),
                nn.Sequential(ConvUnit(4 * n, 8 * n, 3, 2), CrossStage(8 * n, 8 * n, 2)),
                nn.Sequential(
                    ConvUnit(8 * n, 16 * n, 3, 2), CrossStage(16 * n, 16 * n, 1), PooledPyramid(16 * n, 16 * n)
                ),
            ]
        )
        self.up16 = CrossStage(24 * n, 8 * n, 1, shortcut=False)
        self.up8 = CrossStage(12 * n, 4 * n, 1, shortcut=False)
        self.down16 = nn.ModuleList([ConvUnit(4 * n, 4 * n, 3, 2), CrossStage(12 * n, 8 * n, 1, shortcut=False)])
        self.down32 = nn.ModuleList([ConvUnit(8 * n, 8 * n, 3, 2), CrossStage(24 * n, 16 * n, 1, shortcut=False)])
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": 4 * n, "reduction": 8, "module": "up8"},
            {"num_chs": 8 * n, "reduction": 16, "module": "down16.1"},
            {"num_chs": 16 * n, "reduction": 32, "module": "down32.1"},
        ]
        self.levels = 3
        self.num_features = self.head_hidden_size = 16 * n
        self.head = ClassifierHead(16 * n, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing beside the vectors that are left alone anyway."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that decay with depth."""
        fine: Any = [(r"^stages\.(\d+)", None), (r"^(?:up|down)(\d+)", (99998,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each stage again in the backward pass instead of keeping what is inside it."""
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps (B, C, ceil(H / stride), ceil(W / stride)) of the levels ``indices`` (the last n for a number).

        Args:
            norm: of no account, there is no norm behind the levels.
            stop_early: leave out the levels behind the last one asked for, where only the list is returned.
            intermediates_only: return the list alone, not (``forward_features`` of ``x``, list).

        Raises:
            InputError: another format than NCHW is asked for.
        """
        only_nchw(output_fmt)
        take, last = feature_take_indices(self.levels, as_indices(indices))
        maps = self._maps(x, last + 1 if stop_early and intermediates_only else self.levels)
        wanted = [maps[i] for i in take]
        return wanted if intermediates_only else (maps[-1], wanted)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the levels ``indices`` do not need, in place, and return the levels' numbers."""
        take, last = feature_take_indices(self.levels, as_indices(indices))
        shortened = last + 1 < self.levels
        self.levels = last + 1
        if self.levels < 3:
            self.down32 = nn.ModuleList()
        if self.levels < 2:
            self.down16 = nn.ModuleList()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """The coarsest map (B, 16 * width, ceil(H / 32), ceil(W / 32))."""
        return self._maps(x, self.levels)[-1]

    def _maps(self, x: Tensor, levels: int) -> list[Tensor]:
        """The first ``levels`` maps, finest first."""
        x = self.stem(x)
        found = []
        for stage in self.stages:
            x = self._run(stage, x)
            found.append(x)
        _, fine, middle, deep = found
        middle = self._run(self.up16, middle, deep)
        maps = [self._run(self.up8, fine, middle)]
        for (shrink, merge), other in zip((self.down16, self.down32)[: levels - 1], (middle, deep), strict=False):
            maps.append(self._run(merge, torch.cat([shrink(maps[-1]), other], dim=1)))
        return maps

    def _run(self, part: nn.Module, *inputs: Tensor) -> Tensor:
        return checkpoint(part, *inputs) if self.grad_checkpointing else part(*inputs)


# What each layer is called in the released checkpoints, and here.
_LAYERS = {
    "conv_0": "stem",
    "conv_1": "stages.0.0",
    "c2f_2": "stages.0.1",
    "conv_3": "stages.1.0",
    "c2f_4": "stages.1.1",
    "conv_5": "stages.2.0",
    "c2f_6": "stages.2.1",
    "conv_7": "stages.3.0",
    "c2f_8": "stages.3.1",
    "sppf_9": "stages.3.2",
    "c2f_12": "up16",
    "c2f_15": "up8",
    "conv_16": "down16.0",
    "c2f_18": "down16.1",
    "conv_19": "down32.0",
    "c2f_21": "down32.1",
}
# What the convolution, the norm and the parts of a block are called there, and here.
_PARTS = (
    (r"\.bn\.", ".norm."),
    (r"\.m\.(\d+)\.cv1\.", r".blocks.\1.0."),
    (r"\.m\.(\d+)\.cv2\.", r".blocks.\1.1."),
    (r"\.cv1\.", ".enter."),
    (r"\.cv2\.", ".leave."),
)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights of QTSeg's encoder, alone or out of the whole network, by our names; ours pass through unchanged."""
    plain = unwrapped(state)
    if any(key.startswith("image_encoder.") for key in plain):
        plain = {key.removeprefix("image_encoder."): v for key, v in plain.items() if key.startswith("image_encoder.")}
    if "conv_0.conv.weight" not in plain:
        return plain
    renamed = {}
    for key, value in plain.items():
        layer, _, rest = key.partition(".")
        rest = f".{rest}"
        for official, ours in _PARTS:
            rest = re.sub(official, ours, rest)
        renamed[_LAYERS.get(layer, layer) + rest] = value
    return renamed


default_cfgs = generate_default_cfgs(
    {
        "qtseg_encoder": describe(
            "stem.conv",
            "none",
            input_size=(3, 512, 512),
            pool_size=(16, 16),
            crop_pct=1.0,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            paper_ids="arXiv:2412.17241",
            origin_url="https://github.com/tpnam0901/QTSeg",
        )
    }
)


@register_model
def qtseg_encoder(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The encoder of the published network."""
    return build_model_with_cfg(
        QTSegEncoder,
        "qtseg_encoder",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
        **kwargs,
    )
