"""Our models: importing this file registers them with timm."""

import backbones.architectures
import backbones.dynamic_perceiver
import backbones.metaformer
import backbones.nat
import backbones.nat_isotropic  # noqa: F401
