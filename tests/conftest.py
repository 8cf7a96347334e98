"""Fixtures that the tests of several scripts share."""
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
