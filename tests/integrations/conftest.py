"""All tests here are marked `integrations`, and run where the packages are installed."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.integrations)
            item.add_marker(pytest.mark.filterwarnings("default"))  # of other people's code


def pytest_collect_file(file_path, parent):
    """torchvision, which most of them import, may not load by itself beside this build of torch."""
    if file_path.suffix == ".py" and "integrations" in (parent.config.option.markexpr or "").split():
        from benchmarks import stock

        stock._torchvision()


@pytest.fixture(autouse=True)
def children(monkeypatch):
    """New processes find the same packages."""
    path = os.pathsep.join([str(HERE / "child"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("YOLO_CONFIG_DIR", os.devnull)
