"""Fixtures that the tests of several scripts share."""
import pytest
import torch
from torch.overrides import TorchFunctionMode


class Moved(torch.Tensor):
    """A tensor that was moved to the CPU; all that is computed from it is of this class, too."""


def tensors(items):
    """The tensors among some arguments, those in lists and tuples included."""
    for item in items:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from tensors(item)


class Float64OnlyOnCPU(TorchFunctionMode):
    """Stands for a device without float64, as Apple's mps is: every tensor counts as being there until .cpu() is called."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        if func is torch.Tensor.cpu or (func is torch.Tensor.to and "cpu" in [str(a) for a in args[1:]]):
            return result.as_subclass(Moved)
        inputs = list(tensors(args))
        made_here = not inputs and str(kwargs.get("device") or "cpu") == "cpu"      # a factory call without a device
        if result.dtype == torch.float64 and not made_here and not any(isinstance(t, Moved) for t in inputs):
            raise TypeError(f"{func.__name__} gives float64 on a device that has none: move the tensor to the CPU first")
        return result


@pytest.fixture
def no_float64_on_device():
    """Within the test, float64 exists only for tensors that have been moved with .cpu()."""
    with Float64OnlyOnCPU():
        yield


@pytest.fixture
def one_thread():
    """Within the test, torch has one CPU thread: the exact course of a short training depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
