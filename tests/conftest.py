"""Fixtures that the tests of several scripts share."""
from pathlib import Path

import pytest
import torch

import common


@pytest.fixture(autouse=True)
def auto_is_the_cpu(monkeypatch):
    """Tests compare with numbers that were computed on the CPU: --device auto is the CPU in them, also beside a GPU."""
    pick = common.pick_device
    monkeypatch.setattr(common, "pick_device", lambda name: pick("cpu" if name == "auto" else name))
    yield
    torch.set_float32_matmul_precision("highest")                                # cuda sets another


@pytest.fixture
def one_thread():
    """Within the test, torch has one CPU thread: how exactly a short training goes depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by name; none is saved."""
    figure = pytest.importorskip("matplotlib.figure")
    found = {}

    def keep(figure, path, **settings):
        found[Path(path).stem] = figure
    monkeypatch.setattr(figure.Figure, "savefig", keep)
    return found
