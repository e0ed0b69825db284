"""Every backbone in detectors of mmdet 3.x: ``custom_imports = dict(imports=["backbones.mmdet_adapter"])``, then

    backbone = dict(type="FoveaBackbone", name="convnext_tiny", out_indices=(0, 1, 2, 3), frozen_stages=1,
                    init_cfg=dict(type="Pretrained", checkpoint="weights.safetensors"))

The neck's ``in_channels`` are the backbone's, which ``python -m backbones show NAME`` prints. Norms behind the levels
are had by ``level_norms=True``. :data:`PARAMWISE` is for the optimiser: no weight decay for norms and positions.
Importing this module registers the class where mmdet is installed and does nothing elsewhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

import backbones
from kernels.errors import InputError

if TYPE_CHECKING:
    from backbones.pyramid import Pyramid

__all__ = ["PARAMWISE", "register"]

PARAMWISE: dict[str, Any] = {
    "custom_keys": {
        key: {"decay_mult": 0.0} for key in ("norm", "bn", "rpb", "relative_position_bias_table", "pos_embed")
    }
}
"""``paramwise_cfg`` of mmengine's optimiser wrapper, by parts of parameters' names."""


def register() -> type[nn.Module]:
    """The class ``FoveaBackbone``, registered among mmdet's models.

    Raises:
        InputError: mmdet is not installed.
    """
    try:
        from mmdet.registry import MODELS
        from mmengine.model import BaseModule
    except ImportError as error:
        raise InputError(
            "FoveaBackbone needs mmdet; install it with: pip install -U openmim && mim install mmengine mmcv mmdet"
        ) from error
    known = MODELS.module_dict.get("FoveaBackbone")  # get() would import every detector first
    if known is not None:
        return known
    cls = type("FoveaBackbone", (_Backbone, BaseModule), {"__doc__": _Backbone.__doc__, "__module__": __name__})
    MODELS.register_module(module=cls)
    return cls


class _Backbone:
    """A backbone of this project for mmdet: images (B, 3, H, W) to a tuple of maps, finest first.

    Args:
        name: of :func:`backbones.available`.
        out_indices, frozen_stages, norm_eval: see :class:`backbones.pyramid.Pyramid`.
        with_cp: compute blocks again in the backward pass.
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE, prefix=...)`` loads a local file when the detector
            initialises its weights; others are mmengine's.
        params: further ones of :func:`backbones.create`.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
        **params: Any,
    ) -> None:
        super().__init__(init_cfg=init_cfg)  # type: ignore[call-arg]
        self.name = name
        made = backbones.create(
            name,
            features_only=True,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            **params,
        )
        self.pyramid = cast("Pyramid", made)
        if with_cp:
            self.pyramid.set_grad_checkpointing(True)

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names."""
        init_cfg = getattr(self, "init_cfg", None)
        if not init_cfg or init_cfg.get("type") != "Pretrained":
            parent: Any = super()
            parent.init_weights()
            return
        from backbones.checkpoints import find_file, load, read_state

        checkpoint = str(init_cfg["checkpoint"])
        if "://" in checkpoint:
            raise InputError(f"init_cfg.checkpoint={checkpoint} must be a file here; download it and give its path.")
        file = find_file(checkpoint)
        state = read_state(file)
        prefix = init_cfg.get("prefix")
        if prefix:
            start = f"{prefix.rstrip('.')}."
            state = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            if not state:
                raise InputError(f"init_cfg.prefix={prefix} begins no name in {file}; leave it out.")
        load(self.pyramid, state, self.name, f"init_cfg.checkpoint={file}")
        self._is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.pyramid(x))


if importlib.util.find_spec("mmdet") is not None and importlib.util.find_spec("mmengine") is not None:
    register()
