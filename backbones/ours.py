"""Our models: importing this file registers them with timm."""

import backbones.architectures
import backbones.dynamic_perceiver
import backbones.metaformer
import backbones.overlock  # noqa: F401
