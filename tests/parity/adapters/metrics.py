"""Metrics against scikit-learn, torchmetrics and a direct enumeration of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.common.concordance import concordance_index
from tasks.common.metrics import classification_metrics
from tests.parity.harness import Case, adapter


@adapter("mil_metrics_binary", "mil_metrics_multi")
def classification(case: Case) -> dict[str, Tensor]:
    kind = "binary" if case.config["n_classes"] == 2 else "multiclass"
    found = classification_metrics(case.inputs["prob"].numpy(), case.inputs["label"].numpy(), kind)
    names = {
        "auc_macro": "auc",
        "torchmetrics_auroc_macro": "auc",
        "f1_macro": "f1_macro",
        "f1_micro": "accuracy",  # the same number when every sample has one class
        "torchmetrics_f1_default": "accuracy",
        "acc": "accuracy",
        "balanced_acc": "balanced_accuracy",
        "kappa": "kappa",
        "kappa_quadratic": "kappa" if kind == "binary" else "kappa_quadratic",  # two classes have one distance
    }
    return {f"output.{theirs}": torch.tensor(found[ours]) for theirs, ours in names.items()}


@adapter("mil_metrics_cindex")
def concordance(case: Case) -> dict[str, Tensor]:
    event, time, risk = (case.inputs[name].numpy() for name in ("event", "time", "risk"))
    return {"output.cindex": torch.tensor(concordance_index(event, time, risk, case.config["tied_tol"]))}
