"""Linear attention in two passes: keys and values are reduced to one small matrix per head, queries are applied to it.

No matrix of tokens by tokens exists, so that time and memory grow linearly with the tokens. Feature map, rotary
embedding, normaliser and per-token weights are fused into both passes; together they cover plain linear attention
(arXiv:2006.16236), InLine (arXiv:2412.06590), MALA (arXiv:2507.00698), the global attention of L2ViT
(arXiv:2501.16182) and the channel attention of DaViT (arXiv:2204.03645). Flow attention (arXiv:2202.06258) is composed
from the operator.
"""

from kernels.linear_attention.compositions import channel_attention, flow_attention
from kernels.linear_attention.two_pass import linear_attention_2pass, plan

__all__ = ["channel_attention", "flow_attention", "linear_attention_2pass", "plan"]
