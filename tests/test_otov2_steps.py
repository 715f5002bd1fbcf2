"""OTOv2: the steps of DHSPG are those of only-train-once 2.0.16, number by number.

`tests/fixtures/make_otov2.py` made the fixtures, and says how the first step after the partition was aligned.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decay_pruning import OTOv2, Pruner, SmoothPruning, Target
from decay_pruning.structures import Role

from .fixtures.make_otov2 import TRACE, TRACES, batches, settled

FIXTURES = Path(__file__).parent / "fixtures" / "otov2"


def without_readers(values: dict[str, Tensor], pruner: Pruner) -> dict[str, Tensor]:
    """With the columns that read what is gone set to zero, as ours are; 2.0.16 leaves them as they are."""
    for name, ids in pruner.engine.held.items():
        layer_group = pruner.structures.groups[name]
        rows = torch.isin(layer_group.ids, torch.tensor(list(ids))).nonzero().flatten()
        for c in layer_group.couplings:
            if c.role is Role.COLUMN:
                values[c.tensor].index_fill_(c.dim, c.position[torch.isin(c.owner, rows)], 0.0)
    return values


@pytest.mark.parametrize("name", list(TRACES))
def test_step_by_step_as_the_published_optimizer(name: str) -> None:
    settings, recorded = TRACES[name], json.loads((FIXTURES / f"dhspg-{name}.json").read_text())
    assert recorded["made with"]["only_train_once"] == "2.0.16"
    model = settled(settings["make"]())
    optimizer = torch.optim.SGD(model.parameters(), **settings["sgd"])
    shared: dict[str, Any] = {key: TRACE[key] for key in ("amplify", "coeff", "tolerance")}
    host = OTOv2(lam=settings["lam"], epsilon=settings["epsilon"], deadline=None, **shared)
    pruner = Pruner(
        model, next(batches(settings["channels"]))[0], optimizer, Target(structures=TRACE["keep"]), host=host,
        smooth=SmoothPruning.one_step(), start=int(TRACE["partition"]),
    )  # fmt: skip
    wanted = math.ceil((1 - TRACE["keep"]) * len(pruner.original))
    compared = zeros = 0
    for (x, y), step in zip(batches(settings["channels"]), recorded["steps"], strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if pruner.done:  # removed by now; 2.0.16 zeroes all that pass, we no more than the target asks for
            assert pruner.finish().removed == wanted <= sum(len(ids) for ids in step["zero"].values())
            break
        assert pruner.engine.held == {layer: ids for layer, ids in step["zero"].items() if ids}
        expected = {
            name: torch.tensor(step["parameters"][name], dtype=torch.float64).view_as(p)
            for name, p in model.named_parameters()
        }
        for name, value in without_readers(expected, pruner).items():
            # it divides by ‖x‖ + 1e-8, and the file has nine digits
            torch.testing.assert_close(
                model.get_parameter(name).detach(),
                value,
                rtol=1e-8,
                atol=1e-7,
                msg=f"{name} after {compared} steps",
            )
        compared += 1
        zeros = max(zeros, sum(map(len, step["zero"].values())))
    assert compared > TRACE["partition"] + 10 and zeros > 0, "too little was compared"
