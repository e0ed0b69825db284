"""Window arithmetic against its definition, over every small axis."""

import itertools

import pytest
import torch

from kernels.errors import InputError
from kernels.windows import Axis, axis_bias_index, axis_mask, axis_neighbours, window, window_mask

AXES = [
    Axis(length, kernel, stride, dilation, causal)
    for length in range(2, 15)
    for kernel in range(2, length + 1)
    for dilation in range(1, length // kernel + 1)
    for stride in range(1, kernel + 1)
    for causal in (False, True)
]


def test_a_query_sees_itself_only_its_group_and_at_most_a_kernel() -> None:
    for axis in AXES:
        for i in range(axis.length):
            keys = axis.keys(i)
            assert i in keys and keys[0] >= 0 and keys[-1] < axis.length
            assert all((j - i) % axis.dilation == 0 and abs(j - i) // axis.dilation < axis.kernel for j in keys)
            assert (keys[-1] == i and len(keys) <= axis.kernel) if axis.causal else len(keys) == axis.kernel


def test_queries_of_a_key_are_the_inverse_of_keys_of_a_query() -> None:
    for axis in AXES:
        for j in range(axis.length):
            assert list(axis.seen_by(j)) == [i for i in range(axis.length) if j in axis.keys(i)], (axis, j)


def test_windows_are_centred_inside_and_shifted_at_the_border() -> None:
    axis = Axis(9, 5)
    assert [axis.keys(i)[0] for i in range(9)] == [0, 0, 0, 1, 2, 3, 4, 4, 4]
    assert list(Axis(9, 4).keys(4)) == [2, 3, 4, 5]  # one more to the left when even
    assert [Axis(8, 4, stride=4).keys(i)[0] for i in range(8)] == [0, 0, 0, 0, 4, 4, 4, 4]  # plain windows
    assert list(Axis(9, 3, dilation=3).keys(4)) == [1, 4, 7]
    assert [len(Axis(5, 3, causal=True).keys(i)) for i in range(5)] == [1, 2, 3, 3, 3]


def test_masks_neighbours_and_bias_entries_agree() -> None:
    for axis in AXES[::7]:
        mask = axis_mask(axis)
        assert [mask[i].nonzero().flatten().tolist() for i in range(axis.length)] == [
            list(axis.keys(i)) for i in range(axis.length)
        ]
        if not axis.causal:
            assert torch.equal(axis_neighbours(axis), torch.stack([row.nonzero().flatten() for row in mask]))
        entries = axis_bias_index(axis)
        for i, j in itertools.product(range(axis.length), repeat=2):
            if mask[i, j]:
                assert entries[i, j] == (j - i) // axis.dilation + axis.kernel - 1


def test_the_window_of_a_grid_is_the_product_of_its_axes() -> None:
    found = window((4, 5), (2, 3), dilation=(2, 1), is_causal=(False, True))
    mask = window_mask(found).view(4, 5, 4, 5)
    for y, x in itertools.product(range(4), range(5)):
        expected = torch.zeros(4, 5, dtype=torch.bool)
        for a, b in itertools.product(found.axes[0].keys(y), found.axes[1].keys(x)):
            expected[a, b] = True
        assert torch.equal(mask[y, x], expected)
    assert found.neighbours == 6 and found.grid == (4, 5) and found.kernel == (2, 3)


@pytest.mark.parametrize(
    ("grid", "options", "sentence"),
    [
        ((5, 9), {"kernel_size": 7}, r"kernel_size=7 times dilation=1 is 7, more than the 5 tokens on axis 0"),
        ((9, 9), {"kernel_size": 3, "dilation": (1, 4)}, r"is 12, more than the 9 tokens on axis 1"),
        ((9,), {"kernel_size": 1}, "kernel_size=1 on axis 0 .* is below 2"),
        ((9,), {"kernel_size": 3, "stride": 4}, "stride=4 .* not within 1 to kernel_size=3"),
        ((9,), {"kernel_size": 3, "dilation": 0}, "dilation=0"),
        ((9, 9), {"kernel_size": (3, 3, 3)}, "has 3 values for a grid of 2 axes"),
    ],
)
def test_what_cannot_be_is_said_with_its_numbers(grid: tuple[int, ...], options: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        window(grid, **options)
