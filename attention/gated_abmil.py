"""ABMIL with the gated score: a sigmoid decides how much of each tanh counts.

Source: Ilse, Tomczak and Welling, ICML 2018, arXiv 1802.04712, eq. 9. The defaults are the ABMIL baseline of the ACMIL
repository (no input bias, no dropout), which is ACMIL with one branch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from attention.abmil import ABMIL
from attention.parameters import Positive, Probability
from attention.registry import register


@register("gated_abmil", kind="pooling")
class GatedABMIL(ABMIL):
    """Gated ABMIL: attention pooling with a tanh times sigmoid score (Ilse et al. 2018).

    Arguments as :class:`attention.abmil.ABMIL`.
    """

    gated: ClassVar[bool] = True

    def __init__(
        self,
        dim: Positive,
        num_classes: Positive,
        hidden_dim: Positive | None = None,
        attention_dim: Positive = 128,
        dropout: Probability = 0.0,
        act: Literal["relu", "gelu"] = "relu",
        input_bias: bool = False,
        norm: Literal["batch"] | None = None,
    ) -> None:
        super().__init__(dim, num_classes, hidden_dim, attention_dim, dropout, act, input_bias, norm)
