"""CUDA lanes on the driver of tests: schedulers whose parameters lie in CPU memory."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cuda_testing import Driver, TestDevice
from hogstream.kernels import rows
from hogstream.kernels.backends.select import Backend
from hogstream.scheduler import SharedParameters, StreamScheduler
from hogstream.scheduler.lanes import cuda_device
from hogstream.scheduler.lanes.cuda_device import CudaDevice, Image
from hogstream.scheduler.lanes.cuda_driver import CudaDriver
from hogstream.scheduler.update_state import kinds_of

if TYPE_CHECKING:  # it needs Numba and Triton
    from hogstream.scheduler.lanes.cuda_graphs import UpdateGraph

#: Elements of a program, and of a block of race counters.
BLOCK = 64
#: Elements of a tile of rows.
TILE = 128


class TestGpu(CudaDevice):
    """The device of a driver of tests, as lanes see it.

    Attributes:
        tests: The driver.
        torch: What stands for torch's streams.
        streams: Those that lanes have had.
    """

    __test__ = False  # the name is not of a class of tests

    def __init__(self, tests: Driver) -> None:
        self.tests = tests
        self.torch = TestDevice(tests)
        self.streams: set[int] = set()
        # Functions that know nothing of their arguments' types, as those of a system's driver.
        untyped = ctypes.CDLL(None, handle=tests.library._handle)
        super().__init__(CudaDriver(untyped), 0)

    def take_stream(self) -> int:
        """A stream that nobody uses."""
        stream = super().take_stream()
        self.streams.add(stream)
        return stream

    def current_stream(self) -> int:
        """The stream that is current on the calling thread."""
        return self.torch.current_stream()

    def computing(self, stream: int) -> AbstractContextManager[object]:
        """Makes a stream the current one, on the thread that enters it."""
        return self.torch.computing(stream)

    def compile(self, kernel: str, constants: dict[str, Any]) -> Image:
        """What the driver of tests takes for a compiled kernel."""
        return Image(self.torch.compile(kernel, constants), 128, 0)


def _never(*operands: Any, **more: Any) -> None:
    raise AssertionError("CUDA lanes launch kernels by the driver")


@contextmanager
def gpu_of_tests(seed: int = 0, **options: Any) -> Iterator[TestGpu]:
    """A device of the driver of tests, on which lanes are opened for parameters in CPU memory.

    Args:
        seed: Of the driver.
        options: Of the driver.
    """
    from hogstream.kernels.backends import triton_rows  # which needs Triton

    with Driver(seed, **options) as driver, pytest.MonkeyPatch.context() as patch:
        gpu = TestGpu(driver)
        patch.setattr(cuda_device, "gpu_of", lambda device: gpu)
        patch.setattr(triton_rows, "INTERPRETED_BLOCK", TILE)
        yield gpu


@contextmanager
def rows_unseen() -> Iterator[None]:
    """The host does not look at rows, as of a device, whose kernels do that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_check_in_table", lambda *given: None)
        yield


def faults(gpu: TestGpu, *, leaks: bool = False) -> list[str]:
    """What was done wrong on a device.

    Events may be destroyed that a stream has yet to come to: CUDA keeps them until then.

    Args:
        gpu: The device.
        leaks: Whether something may be left.
    """
    pending = r"event \d+ is destroyed while a stream has yet to"
    allowed = re.compile(f"{pending}|leak:" if leaks else pending)
    return [each for each in gpu.tests.violations() if not allowed.match(each)]


def backend_on_gpu() -> Backend:
    """What lanes of the device launch, which call no kernels themselves."""
    return Backend("triton", _never, _never, lambda dtype, device: BLOCK)


def scheduler_on(shared: SharedParameters, **settings: Any) -> StreamScheduler:
    """A scheduler whose lanes are those of the device."""
    scheduler = StreamScheduler(shared, **settings)
    scheduler.backend = backend_on_gpu()
    return scheduler


class Gpu:
    """A device on which lanes are those of a GPU.

    Attributes:
        device: Where tensors are.
        cuda: The device as lanes see it.
        medium: Elements of which an update takes some microseconds.
        large: Elements of which updates that may overlap will.
    """

    def __init__(self, tests: TestGpu | None) -> None:
        """The driver of tests, or the first GPU if that is None."""
        self._tests = tests
        self.device = torch.device("cpu") if tests else torch.device("cuda", 0)
        self.cuda = tests or cuda_device.cuda_device(0)
        self.medium, self.large = (1000, 5000) if tests else (1 << 16, 1 << 22)

    def zeros(self, elements: int) -> SharedParameters:
        """Parameters there."""
        return SharedParameters({"p": torch.zeros(elements, device=self.device)})

    def scheduler(self, shared: SharedParameters, **settings: Any) -> StreamScheduler:
        """A scheduler there; only a policy without a lock of all may have races."""
        if self._tests is None:
            return StreamScheduler(shared, **settings)
        scheduler = scheduler_on(shared, **settings)
        policy = scheduler.settings.policy
        if policy in ("lock-free", "row-locked") or policy.startswith("bounded"):
            state = shared.make_state(kinds_of(scheduler.hyperparameters.switches))
            for tensor in (shared.flat, *state.named().values()):
                self._tests.tests.allow_races(tensor.data_ptr(), tensor.nbytes)
        return scheduler


@contextmanager
def open_gpu(kind: str) -> Iterator[Gpu]:
    """A device: the ``"driver of tests"``, which must find nothing wrong, or a GPU."""
    if kind == "cuda":
        yield Gpu(None)
        return
    with gpu_of_tests() as tests:
        yield Gpu(tests)
    violations = tests.tests.violations()
    assert violations == [], violations


@contextmanager
def graphs_made() -> Iterator[list[UpdateGraph]]:
    """The graphs that lanes make meanwhile."""
    from hogstream.scheduler.lanes.cuda import CudaLanes  # which needs Numba and Triton

    made: list[UpdateGraph] = []
    make = CudaLanes._make_graph

    def noted(*arguments: Any) -> UpdateGraph:
        made.append(make(*arguments))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CudaLanes, "_make_graph", noted)
        yield made
