"""Our models: importing this file registers them with timm."""

import backbones.architectures
import backbones.biformer
import backbones.dense
import backbones.dependency_vit
import backbones.duoformer
import backbones.dynamic_perceiver
import backbones.global_deit
import backbones.global_swin
import backbones.l2vit
import backbones.mavit
import backbones.meta_spikformer
import backbones.metaformer
import backbones.nat
import backbones.nat_isotropic
import backbones.ninformer
import backbones.overlock
import backbones.qtseg_encoder  # noqa: F401
