"""The notebooks run from the first cell to the last, and are kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"


@pytest.mark.parametrize("name", ["own_cnn", "compare"])
def test_a_notebook_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NOTEBOOKS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    scope = {"__name__": "__main__"}
    try:
        for cell in code:
            exec(compile("".join(cell["source"]), f"{name}: {cell['id']}", "exec"), scope)
    finally:
        torch.set_num_threads(threads)
