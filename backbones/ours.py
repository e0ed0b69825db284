"""Our models: importing this file registers them with timm."""

import backbones.architectures
import backbones.biformer
import backbones.dynamic_perceiver
import backbones.metaformer  # noqa: F401
