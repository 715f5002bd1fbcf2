"""A small share of the networks of `benchmarks/fuzz.py`: none is pruned wrongly, and no removal is refused late."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest

from tests.random_maps import MAPS
from tests.random_nets import judge, network
from tests.random_tokens import TOKENS


@pytest.mark.parametrize("number", range(40))
def test_random_networks(number: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about odd shapes
        verdict, about = judge(number)
    assert verdict in ("pruned", "refused"), about


def test_every_kind_of_stage_comes_up() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = Counter(kind for number in range(150) for kind in network(number).kinds)
    assert set(seen) == {make.__name__ for make in [*MAPS, *TOKENS]}
