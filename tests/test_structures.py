"""The small tools of `structures` that hosts share."""

import pytest
import torch

from decay_pruning.slices import Sums


@pytest.mark.parametrize("shape", [(), (3,)])
def test_sums_by_segment(shape):
    segment = torch.tensor([4, -1, 0, 4, 2, -1, 0, 4])
    values = torch.arange(8 * max(1, sum(shape)), dtype=torch.float64).view(8, *shape).square()
    expected = torch.zeros(6, *shape, dtype=torch.float64)
    for where, value in zip(segment.tolist(), values, strict=True):
        if where >= 0:
            expected[where] += value
    assert torch.equal(Sums(segment, 6, values.device)(values), expected)


def test_sums_of_nothing():
    none = torch.zeros(0, dtype=torch.int64)
    assert Sums(none, 0, none.device)(torch.zeros(0)).shape == (0,)
    assert Sums(none, 2, none.device)(torch.zeros(0)).tolist() == [0, 0]
    assert Sums(none - 1, 0, none.device)(torch.zeros(0)).shape == (0,)
    assert Sums(torch.full((3,), -1), 2, none.device)(torch.ones(3)).tolist() == [0, 0]
