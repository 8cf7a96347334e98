"""A fixture that the tests of several scripts share."""
import pytest
import torch


@pytest.fixture
def one_thread():
    """Within the test, torch has one CPU thread: how exactly a short training goes depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
