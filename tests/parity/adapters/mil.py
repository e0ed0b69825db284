"""Slide poolers, their losses and the learning-rate schedule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import attention
from attention.acmil import branch_similarity, negative_entropy
from attention.pooling import PooledBags, Pooler
from kernels.segment import segment_softmax
from tasks.common.schedules import half_cosine
from tests.parity.harness import Case, adapter


class CrossEntropy:
    """One class per bag."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none")

    def active(self, target: Tensor) -> Tensor:
        return F.one_hot(target, self.classes).bool()

    def __init__(self, classes: int) -> None:
        self.classes = classes


class BinaryCrossEntropy:
    """Any number of classes per bag."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)

    def active(self, target: Tensor) -> Tensor:
        return target > 0.5


def _build(case: Case, name: str, dim: int, classes: int, **params: object) -> Pooler:
    pooler = attention.load_official(
        attention.create(name, kind="pooling", dim=dim, num_classes=classes, **params), case.state
    )
    assert isinstance(pooler, Pooler)
    return pooler.train(case.mode == "train")


def _bag(x: Tensor) -> tuple[Tensor, Tensor]:
    """One bag (1, N, D) or (N, D) as a packed batch."""
    x = x.flatten(0, -2)
    return x, torch.tensor([0, len(x)])


def _acmil_terms(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    zero = torch.zeros(())
    return {
        "output.loss_sub": losses.get("semantic", zero),
        "output.loss_slide": losses["bag"],
        "output.loss_div": losses.get("diversity", zero),
        "output.loss_total": losses["total"],
    }


@adapter("mil_acmil_ga_*")
def acmil(case: Case) -> dict[str, Tensor]:
    config = case.config
    pooler = _build(
        case,
        "acmil",
        config["D_feat"],
        config["n_class"],
        hidden_dim=config["D_inner"],
        attention_dim=config["D"],
        num_branches=config["n_token"],
        num_masked=config["n_masked_patch"],
        mask_drop=config["mask_drop"],
    )
    x, cu_seqlens = _bag(case.inputs["x"])
    noise = case.inputs.get("mask_noise")
    if noise is not None:
        noise = F.pad(noise, (0, config["n_masked_patch"] - noise.shape[1]))[:, None]
    bags = pooler(x, cu_seqlens, mask_noise=noise)
    losses = pooler.loss(bags, case.inputs["label"], cu_seqlens, CrossEntropy(config["n_class"]))
    losses["total"].backward()
    masked = (bags.attention == -1e9).nonzero()
    tanh_weight, sigmoid_weight = pooler.gate.weight.grad.chunk(2)
    tanh_bias, sigmoid_bias = pooler.gate.bias.grad.chunk(2)
    return {
        "output.sub_preds": bags.extras["branch_logits"][0],
        "output.slide_preds": bags.logits,
        "output.attn": bags.attention[None],
        "output.bag_attention": segment_softmax(bags.attention, cu_seqlens).mean(0, keepdim=True),
        "output.masked_indices": masked,
        "output.n_masked_per_branch": masked[:, 0].bincount(minlength=config["n_token"]),
        **_acmil_terms(losses),
        "grad.dimreduction.fc1.weight": pooler.embed.weight.grad,
        "grad.attention.attention_V.0.weight": tanh_weight,
        "grad.attention.attention_V.0.bias": tanh_bias,
        "grad.attention.attention_U.0.weight": sigmoid_weight,
        "grad.attention.attention_U.0.bias": sigmoid_bias,
        "grad.attention.attention_weights.weight": pooler.score.weight.grad,
        "grad.attention.attention_weights.bias": pooler.score.bias.grad,
        "grad.Slide_classifier.fc.weight": pooler.classifier.weight.grad,
    }


@adapter("mil_acmil_mha_*")
def acmil_mha(case: Case) -> dict[str, Tensor]:
    config = case.config
    pooler = _build(
        case,
        "acmil_mha",
        config["D_feat"],
        config["n_class"],
        hidden_dim=config["D_inner"],
        num_heads=config["num_heads"],
        num_branches=config["n_token"],
        num_masked=config["n_masked_patch"],
        mask_drop=config["mask_drop"],
        dropout=0,
    )
    x, cu_seqlens = _bag(case.inputs["x"])
    noise = None
    if case.mode == "train":
        noise = torch.cat([case.inputs[f"mask_noise.{branch}"] for branch in range(config["n_token"])])[:, None]
    bags = pooler(x, cu_seqlens, mask_noise=noise)
    losses = pooler.loss(bags, case.inputs["label"], cu_seqlens, CrossEntropy(config["n_class"]))
    losses["total"].backward()
    weights = bags.extras["weights"].unflatten(0, (config["n_token"], config["num_heads"]))
    torch.testing.assert_close(segment_softmax(bags.attention, cu_seqlens), weights.mean(1))
    return {
        "output.sub_preds": bags.extras["branch_logits"][0],
        "output.slide_preds": bags.logits,
        "output.attn": bags.extras["head_scores"],
        "output.bag_attention_per_head": weights.mean(0),
        **_acmil_terms(losses),
        "grad.q": pooler.queries.grad[None],
        "grad.dimreduction.fc1.weight": pooler.embed.weight.grad,
        "grad.sub_attention.0.k_proj.weight": pooler.k.weight.grad[0],
        "grad.bag_attention.v_proj.weight": pooler.bag_v.weight.grad[0],
    }


@adapter("mil_acmil_losses")
def acmil_losses(case: Case) -> dict[str, Tensor]:
    branches = case.config["n_token"]
    scores, cu_seqlens = case.inputs["attn"][0], torch.tensor([0, case.inputs["attn"].shape[-1]])
    weights = segment_softmax(scores, cu_seqlens)
    logits = case.inputs["slide_preds"]
    classes = logits.shape[1]
    pooler = attention.create("acmil", dim=8, num_classes=classes, num_branches=branches)
    assert isinstance(pooler, Pooler)
    bags = PooledBags(logits, logits, scores, {"branch_logits": case.inputs["sub_preds"][None], "weights": weights})
    pairs = [(i, j) for i in range(branches) for j in range(i + 1, branches)]
    return {
        "output.pair_cosines": torch.stack([branch_similarity(weights[list(p)], cu_seqlens, 2)[0] for p in pairs]),
        "output.eval_neg_entropy": negative_entropy(weights, cu_seqlens)[0],
        **_acmil_terms(pooler.loss(bags, case.inputs["label"], cu_seqlens, CrossEntropy(classes))),
    }


@adapter("mil_acmil_lr_schedule")
def acmil_lr_schedule(case: Case) -> dict[str, Tensor]:
    config = case.config
    rates = [
        half_cosine(epoch, config["train_epoch"], config["warmup_epoch"], config["lr"], config["min_lr"])
        for epoch in case.inputs["epoch"].tolist()
    ]
    return {"output.lr": torch.tensor(rates) * 1e4}


@adapter("mil_abmil_*")
def abmil(case: Case) -> dict[str, Tensor]:
    config = case.config
    if "D_feat" in config:
        pooler = _build(
            case,
            "gated_abmil",
            config["D_feat"],
            config["n_class"],
            hidden_dim=config["D_inner"],
            attention_dim=config["D"],
        )
    else:
        pooler = _build(
            case,
            "abmil",
            config["input_dim"],
            config["n_classes"],
            hidden_dim=config["inner_dim"],
            dropout=config["dropout"],
            act=config["act"],
            norm="batch" if "mil_norm" in config else None,
        )
    leaf = case.inputs["x"].requires_grad_()
    x, cu_seqlens = _bag(leaf)
    bags = pooler(x, cu_seqlens)
    return {
        "output.logits": bags.logits,
        "output.attention": segment_softmax(bags.attention, cu_seqlens),
        "grad.x": torch.autograd.grad(bags.logits.sum(), leaf)[0],
    }


@adapter("mil_meanmil", "mil_maxmil")
def mean_and_max(case: Case) -> dict[str, Tensor]:
    config = case.config
    name = "mean" if case.name == "mil_meanmil" else "max"
    pooler = _build(case, name, config["D_feat"], config["n_class"], hidden_dim=config["D_inner"])
    return {"output.logits": pooler(*_bag(case.inputs["x"])).logits}


@adapter("mil_clam_milfc*")
def clam_max(case: Case) -> dict[str, Tensor]:
    config = case.config
    pooler = _build(
        case,
        "max",
        config["embed_dim"],
        config["n_classes"],
        hidden_dim=config["hidden"],
        select="instance",
    )
    bags = pooler(*_bag(case.inputs["h"]))
    return {
        "output.top_instance_logits": bags.logits,
        "output.Y_prob": bags.logits.softmax(1),
        "output.Y_hat": bags.logits.argmax(1),
        "output.instance_probs": bags.attention.t().softmax(1),
    }


@adapter("mil_clam_*")
def clam(case: Case) -> dict[str, Tensor]:
    config = case.config
    multi = "_mb_" in case.name
    pooler = _build(
        case,
        "clam_mb" if multi else "clam_sb",
        config["embed_dim"],
        config["n_classes"],
        hidden_dim=config["hidden_sizes"][0],
        attention_dim=config["hidden_sizes"][1],
        gate=config["gate"],
        num_samples=config["k_sample"],
        subtyping=config["subtyping"],
        bag_weight=config["bag_weight"],
        instance_loss=config["inst_loss"],
    )
    x, cu_seqlens = _bag(case.inputs["h"])
    label = case.inputs["label"]
    bags = pooler(x, cu_seqlens)
    losses = pooler.loss(bags, label, cu_seqlens, CrossEntropy(config["n_classes"]))
    losses["total"].backward()
    # The released code lists what it evaluated class by class: top then bottom of the true class, top of the others.
    predicted = pooler.sampled_logits(bags, cu_seqlens)[0][:, 0].argmax(-1)  # (C, top or bottom, k)
    labels, predictions = [], []
    for number, of_class in enumerate(predicted):
        if number == label.item():
            labels += [torch.ones_like(of_class[0]), torch.zeros_like(of_class[1])]
            predictions += [of_class.flatten()]
        elif config["subtyping"]:
            labels += [torch.zeros_like(of_class[0])]
            predictions += [of_class[0]]
    grads = {
        "grad.attention_net.0.weight": pooler.embed.weight.grad,
        "grad.attention_net.3.attention_c.weight": pooler.score.weight.grad,
    }
    for number in range(config["n_classes"]):
        grads[f"grad.instance_classifiers.{number}.weight"] = pooler.instance_weight.grad[number]
        grads[f"grad.instance_classifiers.{number}.bias"] = pooler.instance_bias.grad[number]
    return {
        "output.logits": bags.logits,
        "output.Y_prob": bags.logits.softmax(1),
        "output.Y_hat": bags.logits.argmax(1, keepdim=True),
        "output.A_raw": bags.attention,
        "output.features": bags.embeddings.view(len(bags.attention), -1),
        "output.instance_loss": losses["instance"],
        "output.bag_loss": losses["bag"],
        "output.total_loss": losses["total"],
        "output.inst_labels": torch.cat(labels),
        "output.inst_preds": torch.cat(predictions),
        **grads,
    }


@adapter("mil_dsmil*")
def dsmil(case: Case) -> dict[str, Tensor]:
    config = case.config
    pooler = _build(
        case,
        "dsmil",
        config["in_size"],
        config["output_class"],
        query_dim=config["query_dim"],
        nonlinear=config["nonlinear"],
        passing_v=config["passing_v"],
    )
    x, cu_seqlens = _bag(case.inputs["x"])
    bags = pooler(x, cu_seqlens)
    loss = pooler.loss(bags, case.inputs["y"], cu_seqlens, BinaryCrossEntropy())["total"]
    loss.backward()
    return {
        "output.instance_logits": bags.extras["instance_logits"],
        "output.bag_logits": bags.logits,
        "output.attention": segment_softmax(bags.attention, cu_seqlens).t(),
        "output.bag_features": bags.embeddings.view(1, config["output_class"], -1),
        "output.critical_index": bags.extras["critical"][0],
        "output.loss": loss,
        "grad.i_classifier.fc.0.weight": pooler.instance_classifier.weight.grad,
        "grad.i_classifier.fc.0.bias": pooler.instance_classifier.bias.grad,
        "grad.b_classifier.fcc.weight": pooler.classifier.weight.grad.view(
            config["output_class"], -1, config["in_size"]
        ),
    }


@adapter("mil_transmil*")
def transmil(case: Case) -> dict[str, Tensor]:
    config = case.config
    pooler = _build(
        case,
        "transmil",
        config["D_feat"],
        config["n_class"],
        hidden_dim=config["D_inner"],
        num_heads=config["heads"],
        num_landmarks=config["num_landmarks"],
    )
    leaf = case.inputs["x"].requires_grad_()
    x, cu_seqlens = _bag(leaf)
    bags = pooler(x, cu_seqlens)
    return {
        "output.logits": bags.logits,
        "output.nystrom_layer1_tokens": pooler.attention1(pooler.norm1(pooler.embed(x).relu()))[None],
        "grad.x": torch.autograd.grad(bags.logits.sum(), leaf)[0],
    }
