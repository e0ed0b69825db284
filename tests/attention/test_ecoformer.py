"""EcoFormer attention: its two forms, codes, and what learning them does."""

from __future__ import annotations

import pytest
import torch

from attention.ecoformer import EcoFormerAttention, KernelHash, _Sign, _targets, _unit
from kernels.errors import InputError


def make(**changes: object) -> EcoFormerAttention:
    torch.manual_seed(0)
    return EcoFormerAttention(32, 2, **changes).eval()  # type: ignore[arg-type]


def test_corrected_weights_are_shifted_products_of_codes_and_sum_to_one() -> None:
    module, x = make(form="corrected"), torch.randn(1, 3, 4, 32)
    _, weights = module(x, return_attention=True)
    codes = module.hash(module.to_qk(x).view(1, 12, 2, 16)).transpose(1, 2)
    similar = codes @ codes.mT + 17
    torch.testing.assert_close(weights, similar / similar.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 12))
    assert similar.min() >= 1 and len(similar.unique()) > 4


def test_released_weights_have_the_constant_on_the_diagonal_alone() -> None:
    x = torch.randn(1, 3, 4, 32)
    _, wrong = make()(x, return_attention=True)
    _, right = make(form="corrected")(x, return_attention=True)
    codes = make().hash(make().to_qk(x).view(1, 12, 2, 16)).transpose(1, 2)
    constant = 17 / (codes @ codes.mT + 17).sum(-1, keepdim=True)
    torch.testing.assert_close(wrong + constant * (1 - torch.eye(12)), right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["released", "corrected"])
def test_masked_tokens_are_in_no_sum_and_not_in_sigma(form: str) -> None:
    module, x = make(form=form), torch.randn(1, 4, 5, 32)
    mask = torch.rand(1, 4, 5) < 0.5
    torch.testing.assert_close(module(x, mask)[mask], module(x[mask][None])[0], rtol=1e-4, atol=1e-5)
    assert (module(x, torch.zeros_like(mask)) == 0).all()


def test_codes_do_not_depend_on_the_length_of_a_vector() -> None:
    functions, x = KernelHash(2, 8, 16, 25, 0), torch.randn(3, 9, 2, 8)
    assert (functions(x) == functions(7 * x)).all()
    assert functions(x).unique().tolist() == [-1, 1]
    assert functions(torch.zeros(1, 1, 2, 8)).abs().min() == 1


def test_the_gradient_of_a_sign_is_passed_through_between_minus_one_and_one() -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 0.9, 1.1], requires_grad=True)
    out = _Sign.apply(x)
    assert out.tolist() == [-1, -1, 1, 1, 1]
    out.backward(torch.full((5,), 3.0))
    assert x.grad is not None and x.grad.tolist() == [0, 3, 3, 3, 0]


def test_seeds_repeat_functions_and_others_differ() -> None:
    assert torch.equal(make(seed=1).hash.A, make(seed=1).hash.A)
    assert not torch.equal(make(seed=1).hash.A, make(seed=2).hash.A)


def test_learned_codes_tell_similar_tokens_from_dissimilar_ones() -> None:
    module = make()
    torch.manual_seed(1)
    x = torch.randn(2, 6, 10, 32)
    targets = _targets(_unit(module.to_qk(x[0]).view(60, 2, 16)).transpose(0, 1))

    @torch.no_grad()
    def agreement() -> float:
        codes = module.hash(module.to_qk(x).view(2, 60, 2, 16))[0].transpose(0, 1)
        return float((codes @ codes.mT / 16 * targets).sum() / targets.abs().sum())

    before = agreement()
    module.learn(x)
    assert agreement() > before + 0.1
    anchors = _unit(module.to_qk(x[0]).view(60, 2, 16)).transpose(0, 1)
    assert (torch.cdist(module.hash.anchor[0], anchors).amin(-1) < 1e-3).all()


def test_learning_takes_the_first_item_alone_is_seeded_and_leaves_projections_alone() -> None:
    x = torch.randn(2, 5, 8, 32)
    module, twin, other = make(), make(), make()
    state = {k: v.clone() for k, v in module.state_dict().items() if not k.startswith("hash")}
    module.learn(x)
    twin.learn(x[:1])
    other.learn(x, seed=1)
    assert torch.equal(module.hash.A, twin.hash.A)
    assert not torch.equal(module.hash.anchor, other.hash.anchor)
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in state.items())
    out = module.train()(x).square().sum()
    out.backward()
    assert module.hash.A.grad is None


def test_learning_leaves_masked_tokens_out_and_works_with_few() -> None:
    x = torch.randn(1, 5, 8, 32)
    mask = torch.zeros(1, 5, 8, dtype=torch.bool)
    mask[:, :3, :2] = True
    module, twin = make(), make()
    module.learn(x.masked_fill(~mask[..., None], torch.nan), mask)
    twin.learn(x[:, :3, :2])
    assert torch.equal(module.hash.A, twin.hash.A) and module.hash.A.isfinite().all()
    module.learn(x[:, :1, :1])
    assert module(x).isfinite().all()
    with pytest.raises(InputError, match="no real token to learn"):
        module.learn(x, torch.zeros_like(mask))


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(InputError, match=r"Did you mean 'corrected'"):
        make(form="correct")
    with pytest.raises(InputError, match="bits=0 and anchors=25 must be at least 1"):
        make(bits=0)
