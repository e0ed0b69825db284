"""What holds for every registered pooler: the contract, packing, order, precision, configuration."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attention
import conf
from attention.pooling import PooledBags, Pooler
from kernels.errors import InputError
from kernels.segment import segment_softmax
from tests.attention.common import CLASSES, DIM, SMALL, CrossEntropy, MultiLabel, bounds, make

POOLERS = attention.available(kind="pooling")
CONFIGURATIONS = Path(conf.__file__).parent / "attention"
every_pooler = pytest.mark.parametrize("name", POOLERS)


def test_the_baselines_of_the_field_are_registered() -> None:
    expected = {"mean", "max", "abmil", "gated_abmil", "acmil", "acmil_mha", "clam_sb", "clam_mb", "dsmil", "transmil"}
    expected |= {"efficient_probing", "low_rank"}
    assert expected <= set(POOLERS)


@every_pooler
@pytest.mark.parametrize("sizes", [[1], [0], [7, 0, 1, 20], [0, 0], [50]], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_outputs_have_the_promised_shapes_and_are_finite(
    name: str, sizes: list[int], training: bool, dtype: torch.dtype
) -> None:
    pooler = make(name).train(training)
    cu_seqlens = bounds(sizes).to(dtype)
    bags = pooler(torch.randn(sum(sizes), DIM), cu_seqlens)
    assert bags.logits.shape == (len(sizes), CLASSES)
    assert bags.embeddings.ndim == 2
    assert len(bags.embeddings) == len(sizes)
    assert bags.attention.shape[1] == sum(sizes)
    assert bags.logits.isfinite().all() and bags.embeddings.isfinite().all() and bags.attention.isfinite().all()
    losses = pooler.loss(bags, torch.arange(len(sizes)) % CLASSES, cu_seqlens, CrossEntropy())
    losses["total"].backward()
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in pooler.parameters() if p.grad is not None)


@every_pooler
def test_attention_has_one_row_per_branch_or_class(name: str) -> None:
    pooler = make(name).eval()
    rows = len(pooler(torch.randn(9, DIM), bounds([9])).attention)
    expected = {"class": CLASSES, "branch": getattr(pooler, "num_branches", 1)}
    assert rows == expected[pooler.attention_rows]


def run(pooler: Pooler, features: Tensor, cu_seqlens: Tensor, noise: Tensor | None) -> PooledBags:
    return pooler(features, cu_seqlens) if noise is None else pooler(features, cu_seqlens, mask_noise=noise)


@every_pooler
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=6), seed=st.integers(0, 2**20))
def test_packing_does_not_change_a_bags_result(name: str, training: bool, sizes: list[int], seed: int) -> None:
    pooler = make(name, seed).train(training)
    features = torch.randn(sum(sizes), DIM)
    target = torch.randint(CLASSES, (len(sizes),))
    heads = getattr(pooler, "num_heads", 1)
    noise = torch.rand(3 * heads, len(sizes), 4) if name.startswith("acmil") and training else None

    cu_seqlens = bounds(sizes)
    packed_features = features.clone().requires_grad_()
    packed = run(pooler, packed_features, cu_seqlens, noise)
    packed_losses = pooler.loss(packed, target, cu_seqlens, CrossEntropy())
    packed_losses["total"].backward()
    packed_grads = [p.grad.clone() for p in pooler.parameters() if p.grad is not None]
    pooler.zero_grad()

    single_features = features.clone().requires_grad_()
    total = torch.zeros(())
    for bag, part in enumerate(single_features.split(sizes)):
        alone = bounds([len(part)])
        bags = run(pooler, part, alone, None if noise is None else noise[:, bag : bag + 1])
        start, end = cu_seqlens[bag], cu_seqlens[bag + 1]
        torch.testing.assert_close(packed.logits[bag], bags.logits[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed.embeddings[bag], bags.embeddings[0], rtol=1e-5, atol=1e-5)
        ours, expected = packed.attention[:, start:end], bags.attention
        torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1), rtol=1e-5, atol=1e-5)
        total = total + pooler.loss(bags, target[bag : bag + 1], alone, CrossEntropy())["total"] / len(sizes)
    total.backward()
    torch.testing.assert_close(packed_losses["total"], total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_features.grad, single_features.grad, rtol=1e-4, atol=1e-5)
    single_grads = [p.grad for p in pooler.parameters() if p.grad is not None]
    for ours, expected in zip(packed_grads, single_grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@every_pooler
def test_packing_large_bags_does_not_change_their_results(name: str) -> None:
    sizes = [1500, 300, 700]  # enough for the CPU paths of the kernels
    pooler = make(name).eval()
    features = torch.randn(sum(sizes), DIM)
    packed = pooler(features, bounds(sizes))
    for bag, part in enumerate(features.split(sizes)):
        torch.testing.assert_close(
            packed.logits[bag], pooler(part, bounds([len(part)])).logits[0], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", [name for name in POOLERS if name != "transmil"])
def test_the_order_of_instances_does_not_matter(name: str) -> None:
    sizes = [11, 0, 30]
    pooler = make(name).eval()
    features = torch.randn(sum(sizes), DIM)
    order = torch.cat([torch.randperm(11), 11 + torch.randperm(30)])
    one, other = pooler(features, bounds(sizes)), pooler(features[order], bounds(sizes))
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.attention[:, order], other.attention, rtol=1e-5, atol=1e-5)


@every_pooler
def test_instances_of_one_bag_never_reach_another(name: str) -> None:
    pooler = make(name).eval()
    features = torch.randn(30, DIM, requires_grad=True)
    pooler(features, bounds([10, 5, 15])).logits[1].sum().backward()
    assert features.grad is not None
    assert features.grad[10:15].abs().sum() > 0
    assert not features.grad[:10].any() and not features.grad[15:].any()


@every_pooler
def test_the_same_seed_gives_the_same_training_step(name: str) -> None:
    outcomes = []
    for _ in range(2):
        pooler = make(name, seed=3).train()
        features = torch.randn(40, DIM)
        bags = pooler(features, bounds([25, 15]))
        pooler.loss(bags, torch.tensor([0, 2]), bounds([25, 15]), CrossEntropy())["total"].backward()
        outcomes.append([p.grad for p in pooler.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@every_pooler
def test_a_state_dict_makes_the_round_trip(name: str) -> None:
    one, other = make(name, 1).eval(), make(name, 2).eval()
    features = torch.randn(9, DIM)
    assert not torch.equal(one(features, bounds([9])).logits, other(features, bounds([9])).logits)
    attention.load_official(other, one.state_dict())
    assert torch.equal(one(features, bounds([9])).logits, other(features, bounds([9])).logits)


@every_pooler
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_trains_and_stays_close(name: str, half: torch.dtype) -> None:
    pooler = make(name)
    if hasattr(pooler, "mask_drop"):
        pooler.mask_drop = 0.5
    features, cu_seqlens = torch.randn(40, DIM), bounds([25, 15])
    expected = pooler.eval()(features, cu_seqlens)
    with torch.autocast("cpu", half):
        bags = pooler(features, cu_seqlens)
        torch.testing.assert_close(bags.logits.float(), expected.logits, rtol=0.1, atol=0.1)
        pooler.train()
        bags = pooler(features, cu_seqlens)
        loss = pooler.loss(bags, torch.tensor([0, 1]), cu_seqlens, CrossEntropy())["total"]
    loss.backward()
    assert all(p.grad.isfinite().all() for p in pooler.parameters() if p.grad is not None)


@every_pooler
def test_half_precision_features_are_accepted(name: str) -> None:
    pooler = make(name).eval()
    features = torch.randn(20, DIM).half()
    expected = pooler(features.float(), bounds([20]))
    torch.testing.assert_close(pooler(features, bounds([20])).logits, expected.logits)


@every_pooler
def test_multi_label_targets_train(name: str) -> None:
    pooler = make(name)
    target = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    cu_seqlens = bounds([12, 5])
    losses = pooler.loss(pooler(torch.randn(17, DIM), cu_seqlens), target, cu_seqlens, MultiLabel())
    assert losses["total"].isfinite()
    losses["total"].backward()


@every_pooler
def test_a_single_output_works(name: str) -> None:
    pooler = attention.create(name, kind="pooling", dim=DIM, num_classes=1, **SMALL.get(name, {}))
    assert pooler(torch.randn(6, DIM), bounds([4, 2])).logits.shape == (2, 1)


@every_pooler
def test_features_of_another_size_are_refused_with_both_sizes(name: str) -> None:
    with pytest.raises(InputError, match=rf"'{name}' was built for features of size 12 and got \(5, 7\)"):
        make(name)(torch.randn(5, 7), bounds([5]))


@every_pooler
def test_every_pooler_has_a_yaml_with_its_own_defaults(name: str) -> None:
    values: dict[str, Any] = yaml.safe_load((CONFIGURATIONS / f"{name}.yaml").read_text())
    assert values.pop("name") == name
    accepted = inspect.signature(type(make(name))).parameters
    defaults = {key: p.default for key, p in accepted.items() if key not in ("dim", "num_classes")}
    if len(attention.kinds_of(name)) > 1:  # one file serves all kinds, with what they share
        defaults = {key: default for key, default in defaults.items() if key in values}
    assert values == defaults
    attention.create(name, kind="pooling", dim=32, num_classes=2, **values)


def test_every_yaml_names_a_registered_module() -> None:
    names = [yaml.safe_load(path.read_text())["name"] for path in sorted(CONFIGURATIONS.glob("*.yaml"))]
    assert names and set(names) <= set(attention.available())


def test_a_misspelt_name_or_parameter_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'gated_abmil'"):
        attention.create("gated_abmill", dim=8, num_classes=2)
    with pytest.raises(InputError, match=r"'acmil' has no parameter 'num_branch'\. Did you mean 'num_branches'"):
        attention.create("acmil", dim=8, num_classes=2, num_branch=3)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("acmil", {"num_branches": 0}, "num_branches=0"),
        ("acmil", {"mask_drop": 1.5}, r"mask_drop=1\.5"),
        ("acmil_mha", {"hidden_dim": 9}, "hidden_dim=9 must be a multiple of num_heads=2"),
        ("transmil", {"hidden_dim": 30}, "hidden_dim=30 must be a multiple of num_heads=4"),
        ("abmil", {"act": "rellu"}, "Did you mean 'relu'"),
        ("abmil", {"norm": "bacth"}, "Did you mean 'batch'"),
        ("mean", {"act": "geluu"}, "Did you mean 'gelu'"),
        ("max", {"select": "instances"}, "Did you mean 'instance'"),
        ("clam_sb", {"size": "bigg"}, "Did you mean 'big'"),
        ("clam_mb", {"instance_loss": "svmm"}, "Did you mean 'svm'"),
        ("clam_sb", {"num_samples": 0}, "num_samples=0"),
        ("dsmil", {"init": "orthogona"}, "Did you mean 'orthogonal'"),
    ],
)
def test_bad_values_are_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(name, **changes)


@every_pooler
def test_the_attention_softmaxed_is_what_was_pooled_with(name: str) -> None:
    pooler = make(name).eval()
    cu_seqlens = bounds([6, 9])
    bags = pooler(torch.randn(15, DIM), cu_seqlens)
    weights = segment_softmax(bags.attention, cu_seqlens)
    torch.testing.assert_close(weights[:, :6].sum(1), torch.ones(len(weights)))
    if "weights" in bags.extras and name != "acmil_mha":
        torch.testing.assert_close(weights, bags.extras["weights"])


@every_pooler
def test_costs_grow_with_the_instances_and_hold_one_read_of_the_features(name: str) -> None:
    pooler = make(name)
    for cost in (pooler.flops, pooler.min_bytes):
        steps = [cost((1, count)) for count in (40_000, 80_000, 120_000)]
        assert steps[2] - steps[1] == pytest.approx(steps[1] - steps[0], rel=0.02)
        assert steps[0] >= cost((0, 40_000)) > 0
    assert pooler.min_bytes((3, 1000), torch.bfloat16) == pooler.min_bytes((3, 1000)) / 2 > 1000 * DIM * 2


@every_pooler
def test_costs_are_the_operations_that_are_carried_out(name: str) -> None:
    changes = {"bag_weight": 1.0} if name.startswith("clam") else {}  # one operation to the counter otherwise
    pooler = make(name, **changes).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pooler(torch.randn(4000, DIM), bounds([2000, 2000]))
    assert pooler.flops((2, 4000)) == pytest.approx(counter.get_total_flops(), rel=0.1)
