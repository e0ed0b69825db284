"""What a caller gets wrong is said in one sentence with the values, by every operator that could not notice later."""

from collections.abc import Callable

import pytest
import torch

from kernels.bi_level_routing_attention import bi_level_routing_attention
from kernels.dynamic_conv import neighborhood_av
from kernels.errors import InputError
from kernels.gated_attention_pool import PoolWeights, gated_attention_pool
from kernels.group_attention import group_attention
from kernels.linear_attention import linear_attention_2pass
from kernels.neighborhood_attention import neighborhood_attention
from kernels.varlen_attention import varlen_attention
from kernels.window_attention import window_attention

ROWS = torch.randn(10, 2, 8)
MAP = torch.randn(1, 16, 8, 8)
WEIGHTS = PoolWeights(*(torch.randn(*s) for s in ((6, 8), (6,), (6, 8), (6,), (3, 6), (3,))))

PACKED: dict[str, Callable[[torch.Tensor], object]] = {
    "varlen_attention": lambda cuts: varlen_attention(ROWS, ROWS, ROWS, cuts, cuts),
    "gated_attention_pool": lambda cuts: gated_attention_pool(ROWS[:, 0], WEIGHTS, cuts),
    "linear_attention_2pass": lambda cuts: linear_attention_2pass(ROWS, ROWS, ROWS, cu_seqlens=cuts),
}


@pytest.mark.parametrize("operator", PACKED)
@pytest.mark.parametrize(
    ("cuts", "sentence"),
    [
        ([0, 4], "must go from 0 to the 10 packed rows; it goes from 0 to 4"),
        ([0, 4, 14], "it goes from 0 to 14"),
        ([2, 10], "it goes from 2 to 10"),
        ([0, 8, 4, 10], "must not fall; entry 2 is 4 after 8"),
        ([0.0, 10.0], "must be int32 or int64; got float32"),
    ],
)
def test_boundaries_of_packed_rows(operator: str, cuts: list[float], sentence: str) -> None:
    with pytest.raises(InputError, match=f"{operator}: .*{sentence}"):
        PACKED[operator](torch.tensor(cuts))


def test_indices_beyond_what_there_is() -> None:
    graph = torch.full((1, 1, 4, 1), 99)
    with pytest.raises(InputError, match="region_graph must be from 0 to 3; it goes from 99 to 99"):
        bi_level_routing_attention(MAP, MAP, MAP, 4, region_graph=graph, num_heads=2)
    with pytest.raises(InputError, match="order must be from 0 to 9; it goes from -1 to 8"):
        group_attention(ROWS[None], ROWS[None], ROWS[None], torch.arange(-1, 9)[None], 4)


def test_dtypes_that_differ_or_are_not_numbers() -> None:
    maps = MAP.view(1, 8, 8, 2, 8)
    with pytest.raises(InputError, match="one dtype; got q float32, k float16, v float32"):
        neighborhood_attention(maps, maps.half(), maps, 3)
    with pytest.raises(InputError, match="floating-point tensors of one dtype; got q int64"):
        cuts = torch.tensor([0, 10])
        varlen_attention(ROWS.long(), ROWS.long(), ROWS.long(), cuts, cuts)
    with torch.autocast("cpu", torch.bfloat16):  # which makes them one
        assert neighborhood_attention(maps, maps.half(), maps, 3).dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"kernel_size=3\.5 must be a whole number, or one for each of the 2 axes"):
        neighborhood_attention(maps, maps, maps, 3.5)  # type: ignore[call-overload]


def test_operators_run_on_tensors_that_are_shapes_alone() -> None:
    q = torch.empty(1, 8, 8, 2, 4, device="meta")
    assert neighborhood_attention(q, q, q, 3).shape == q.shape
    out = window_attention(q, q, q, 4)
    assert isinstance(out, torch.Tensor) and out.shape == q.shape and out.device.type == "meta"


def test_tables_made_while_exporting_are_not_kept() -> None:
    class Shifted(torch.nn.Module):
        def forward(self, weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return neighborhood_av(weights, value, 3)

    weights, value = torch.rand(1, 2, 11, 13, 9), torch.randn(1, 2, 11, 13, 4)  # a size that no other test has
    with torch.no_grad():
        program = torch.export.export(Shifted(), (weights, value)).module()
        torch.testing.assert_close(neighborhood_av(weights, value, 3), program(weights, value))
        expected = neighborhood_av(weights, value, 3, backend="reference")
        torch.testing.assert_close(program(weights, value), expected)
