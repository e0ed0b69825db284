"""Our models: importing this file registers them with timm."""

import backbones.architectures
import backbones.dependency_vit
import backbones.duoformer
import backbones.dynamic_perceiver
import backbones.global_deit
import backbones.global_swin
import backbones.l2vit
import backbones.mavit
import backbones.metaformer
import backbones.ninformer  # noqa: F401
