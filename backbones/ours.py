"""Our models: importing this file registers them with timm."""

import backbones.architectures
import backbones.biformer
import backbones.dense
import backbones.dynamic_perceiver
import backbones.meta_spikformer
import backbones.metaformer
import backbones.nat
import backbones.nat_isotropic
import backbones.overlock  # noqa: F401
