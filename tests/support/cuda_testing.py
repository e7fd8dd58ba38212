"""A CUDA driver over CPU memory, for tests: its harness, and a device made of it.

The driver is C, in ``cuda_driver``: it has the functions of the driver that lanes call, with their
names, signatures and meanings, and it finds what real hardware would not forgive. Tensors "on" it
are ordinary CPU tensors. One driver is open at a time in a process; streams and modules are kept
for the life of the process, everything else is forgotten when it closes.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest
import torch

SOURCES = Path(__file__).parent / "cuda_driver"
FLAGS = ["-std=c11", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
LINKED = ["-pthread", "-shared", "-fPIC"]

SUCCESS, INVALID_VALUE, NOT_INITIALIZED, DEINITIALIZED = 0, 1, 3, 4
INVALID_IMAGE, INVALID_CONTEXT, INVALID_HANDLE = 200, 201, 400
NOT_FOUND, NOT_READY, ILLEGAL_ADDRESS = 500, 600, 700

_KERNELS = {
    **{"rmsprop_kernel": 0, "finite_kernel": 1, "fill_kernel": 2},
    **{"row_rmsprop_kernel": 3, "row_range_kernel": 4, "row_copy_kernel": 5},
}
_STORAGE = {"fp32": 0, "int32": 0, "fp64": 1, "int64": 1}  # as ``triton.language`` calls them
_IMAGE = struct.Struct("<8s13i4xq")  # struct image in driver.h
_ANY = 1 << 30  # of elements, what one program takes
_FILLED = {torch.float32: ("fp32", "<fxxxx", 1024), torch.float64: ("fp64", "<d", 256)}


@dataclass(frozen=True)
class Timing:
    """What takes how long in mode ``timed``, in nanoseconds; 0 is allowed for each.

    Defaults were measured on an H200, with updates of 2^20 elements and calls from compiled code;
    ``cuGraphLaunch`` with 16 branches, which takes 1.3 us with one.

    Attributes:
        update: A launch, or a kernel of a graph, once what it comes after is done.
        serial: The part of it that the device does for one launch at a time.
        dispatch: From a call to when the device may begin what it asks for.
        crossing: From the end of what another stream recorded to the end of a wait for it.
        launch: That a call of ``cuLaunchKernel`` keeps its thread busy; those below likewise.
        graph: ``cuGraphLaunch``.
        record: ``cuEventRecord``.
        wait: ``cuStreamWaitEvent``.
        write: ``cuStreamWriteValue64``.
    """

    update: int = 4700
    serial: int = 300
    dispatch: int = 3000
    crossing: int = 1500
    launch: int = 3400
    graph: int = 18_000
    record: int = 200
    wait: int = 100
    write: int = 900


_NO_TIME = Timing(*[0] * 9)


class _Settings(ctypes.Structure):
    _fields_ = (
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("timed", "aborts", "logs")),
        *((name, ctypes.c_int64) for name in Timing.__dataclass_fields__),
    )


class _Entry(ctypes.Structure):
    _fields_ = (
        ("stream", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("called", ctypes.c_int64),
        ("begun", ctypes.c_int64),
        ("ended", ctypes.c_int64),
    )


class Operation(NamedTuple):
    """An operation as the device did it; times in nanoseconds, from an arbitrary moment."""

    stream: int  #: number of the stream: 0 is the default stream, others count from 1
    number: int  #: of the operation in its stream, from 1
    name: str  #: of the kernel, or "memset", "copy", "write of a value", "wait", "record", "graph"
    called: int
    begun: int
    ended: int


@functools.cache
def library() -> ctypes.CDLL:
    """The driver, built once a process; a test that asks for it is skipped where it cannot be."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    header = _folder_of_header()
    if compiler is None or header is None:
        pytest.skip("needs a C compiler, and the header cuda.h that Triton brings")
    with tempfile.TemporaryDirectory(prefix="hogstream-driver-") as folder:
        path = Path(folder, "libcuda_of_tests.so")
        sources = sorted(SOURCES.glob("*.c"))
        command = [compiler, *FLAGS, *LINKED, f"-I{header}", "-o", str(path), *map(str, sources)]
        subprocess.run([*command, "-lm"], check=True)
        loaded = ctypes.CDLL(str(path))
    _declare_harness(loaded)
    return loaded


def _folder_of_header() -> Path | None:
    spec = find_spec("triton.backends.nvidia") if find_spec("triton") else None
    for place in (spec and spec.submodule_search_locations) or ():
        if Path(place, "include", "cuda.h").exists():
            return Path(place, "include")
    return None


def _declare_harness(loaded: ctypes.CDLL) -> None:
    for name, arguments, result in [
        ("open", [ctypes.POINTER(_Settings)], None),
        ("close", [], None),
        ("violations", [], ctypes.c_uint64),
        ("violation", [ctypes.c_uint64], ctypes.c_char_p),
        ("allow_races", [ctypes.c_uint64, ctypes.c_uint64], None),
        ("host_write", [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int], None),
        ("functions", [], ctypes.c_int),
        ("function", [ctypes.c_int], ctypes.c_char_p),
        ("calls", [ctypes.c_int], ctypes.c_uint64),
        ("fail", [ctypes.c_int, ctypes.c_uint64, ctypes.c_int], None),
        ("lose", [], None),
        ("hold", [ctypes.c_uint64, ctypes.c_int], ctypes.c_int),
        ("capture", [ctypes.c_uint64, ctypes.c_int], ctypes.c_int),
        ("wait_idle", [ctypes.c_uint64], ctypes.c_int),
        ("count", [ctypes.c_int], ctypes.c_uint64),
        ("entries", [], ctypes.c_uint64),
        ("entry", [ctypes.c_uint64], _Entry),
    ]:
        function = getattr(loaded, f"test_{name}")
        function.argtypes, function.restype = arguments, result


_open: Driver | None = None


class Driver:
    """The driver, from when it is made until it is closed: a context manager closes it."""

    def __init__(
        self,
        seed: int = 0,
        mode: str = "threads",
        timing: Timing | None = None,
        *,
        abort: bool = True,
        log: bool = False,
    ) -> None:
        """Opens the driver.

        Args:
            seed: What delays are drawn from, and which of a graph's nodes goes on.
            mode: "threads": each stream has a thread, that is delayed, does the arithmetic of
                kernels, and what operations touch is checked. "timed": one thread lets operations
                end in the time that they would take; kernels compute nothing, and nothing is
                checked but handles.
            timing: Of mode "timed"; the defaults if None.
            abort: Whether what hardware would crash on ends the process; else it is a violation
                like others.
            log: Whether to keep a log of operations.

        Raises:
            ValueError: If there is no such mode, or timing in mode "threads".
            RuntimeError: If a driver is open in this process.
        """
        global _open
        if mode not in ("threads", "timed"):
            raise ValueError(f"mode must be 'threads' or 'timed', got {mode!r}")
        if mode == "threads" and timing is not None:
            raise ValueError("timing is of mode 'timed'")
        if _open is not None:
            raise RuntimeError("a driver is open in this process: close it first")
        self.library = library()
        self._pid = os.getpid()
        self._kept: tuple[list[str], dict[str, int], list[Operation]] | None = None
        names = range(self.library.test_functions())
        self._functions = {self.library.test_function(i).decode(): i for i in names}
        times = (timing or Timing()) if mode == "timed" else _NO_TIME
        settings = _Settings(seed & (1 << 64) - 1, mode == "timed", abort, log, *astuple(times))
        self.library.test_open(settings)
        _open = self

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all threads. What is pending, or was not destroyed, is a violation.

        A device that was lost forgives that. In a child of the process, nothing is done.
        """
        global _open
        if self._kept is not None or self._pid != os.getpid():
            return
        self.library.test_close()
        self._kept = self.violations(), self.calls, self.log()
        _open = None

    def call(self, function: str, *arguments: Any) -> int:
        """Calls a function of the driver's, and returns its ``CUresult``.

        Args:
            function: Its exported name.
            arguments: Integers, also for handles and addresses; or as ``ctypes`` takes them.
        """
        words = (ctypes.c_uint64(each) if isinstance(each, int) else each for each in arguments)
        return int(getattr(self.library, function)(*words))

    @property
    def calls(self) -> dict[str, int]:
        """How often each function was called, by its exported name."""
        if self._kept:
            return self._kept[1]
        return {name: self.library.test_calls(i) for name, i in self._functions.items()}

    def violations(self) -> list[str]:
        """What was done wrong so far, in order; after ``close``, what it found too."""
        if self._kept:
            return self._kept[0]
        found = range(self.library.test_violations())
        return [self.library.test_violation(i).decode() for i in found]

    def log(self) -> list[Operation]:
        """The operations that were done, in the order in which they ended."""
        if self._kept:
            return self._kept[2]
        entries = map(self.library.test_entry, range(self.library.test_entries()))
        return [
            Operation(e.stream, e.number, e.name.decode(), e.called, e.begun, e.ended)
            for e in entries
        ]

    @property
    def streams_created(self) -> int:
        """How many streams there have been in the life of the process."""
        return int(self.library.test_count(0))

    @property
    def streams_destroyed(self) -> int:
        """How many of them were destroyed."""
        return int(self.library.test_count(1))

    @property
    def modules_loaded(self) -> int:
        """How many modules there have been in the life of the process."""
        return int(self.library.test_count(2))

    def allow_races(self, address: int, nbytes: int) -> None:
        """Races in this memory are by design, until the driver is closed."""
        self.library.test_allow_races(address, nbytes)

    def host_write(self, address: int, nbytes: int, *, poison: bool = False) -> None:
        """Says that host code may write this memory from now on: no operation may still use it.

        Args:
            address: Where it begins.
            nbytes: How much there is.
            poison: Whether to fill it with NaN.
        """
        self.library.test_host_write(address, nbytes, poison)

    def fail(self, function: str, nth: int, error: int) -> None:
        """Lets one call to come fail, without any effect.

        Args:
            function: Its exported name.
            nth: Which of its calls, counted from 1 since the driver was opened, by all threads.
            error: The ``CUresult`` that it returns.

        Raises:
            KeyError: If there is no such function.
        """
        self.library.test_fail(self._functions[function], nth, error)

    def lose(self) -> None:
        """The device is lost: calls fail with ILLEGAL_ADDRESS, and nothing pending is ever done."""
        self.library.test_lose()

    def hold(self, stream: int) -> None:
        """Lets a stream begin no operation until it is released.

        Raises:
            ValueError: If the stream is unknown.
        """
        self._known(self.library.test_hold(stream, True), stream)

    def release(self, stream: int) -> None:
        """Lets a stream go on that was held.

        Raises:
            ValueError: If the stream is unknown.
        """
        self._known(self.library.test_hold(stream, False), stream)

    def capture(self, stream: int, captured: bool) -> None:
        """Says whether a stream is captured: no event may be recorded on it then.

        Raises:
            ValueError: If the stream is unknown.
        """
        self._known(self.library.test_capture(stream, captured), stream)

    def wait_idle(self, stream: int) -> None:
        """Waits until a stream, which is not held, has done all, or the device is lost.

        To the checks, the host learns nothing by it: a program under test has to find out itself.

        Raises:
            ValueError: If the stream is unknown.
        """
        self._known(self.library.test_wait_idle(stream), stream)

    def _known(self, found: int, stream: int) -> None:
        if not found:
            raise ValueError(f"stream must be one of this driver, got {stream:#x}")


def image_of(kernel_name: str, constants: Mapping[str, Any]) -> bytes:
    """What ``cuModuleLoadData`` takes in place of a compiled kernel.

    Args:
        kernel_name: That of one of our kernels, but those of many tensors; or "fill_kernel", whose
            arguments are an address, how many elements there are, and the bits of one.
        constants: The kernel's, by name; for "fill_kernel" STORAGE and BLOCK.

    Raises:
        ValueError: If there is no such kernel, or elements are neither float32 nor float64, or the
            kernel does what this driver does not.
    """
    if kernel_name not in _KERNELS:
        raise ValueError(f"kernel_name must be one of {sorted(_KERNELS)}, got {kernel_name!r}")
    elements = str(constants.get("STORAGE", constants.get("BITS", "int64")))
    for name in ("STOCHASTIC", "COMPENSATED", "SCALED", "ROWWISE", "LAZY"):
        if constants.get(name):
            raise ValueError(f"{name} must be False on this driver, got True")
    if elements not in _STORAGE:
        raise ValueError(f"elements must be float32 or float64 on this driver, got {elements}")
    switches = (
        *("EPS_INSIDE_SQRT", "COUPLED", "CENTERED", "MOMENTUM", "LR_IN_MOMENTUM"),
        *("LR_ON_DEVICE", "CHECKED", "COUNTED", "LOCKED"),
    )
    return _IMAGE.pack(
        b"hogtests",
        _KERNELS[kernel_name],
        _STORAGE[elements],
        *(bool(constants.get(name, False)) for name in switches),
        constants.get("UNIT", 1),
        constants.get("ROWS", constants.get("BLOCK", _ANY)),
        constants.get("EXPONENT", 0),
    )


class TestDevice:
    """A device of the driver's: what lanes need of a GPU and of torch.

    Attributes:
        driver: The driver.
        library: Its functions.
        context: The primary context of the device.
        index: Of the device.
    """

    __test__ = False  # the name is not of a class of tests

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.library = driver.library
        self.index = 0
        self._current = threading.local()
        self._fills: dict[torch.dtype, int] = {}
        self.call("cuInit", 0)
        self.context = self.make("cuDevicePrimaryCtxRetain", 0)

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function of the driver's.

        Raises:
            RuntimeError: If it fails.
        """
        result = self.driver.call(function, *arguments)
        if result != SUCCESS:
            raise RuntimeError(f"{function} failed with CUDA error {result}")

    def make(self, function: str, *arguments: Any) -> int:
        """What a function of the driver's makes, which it gives by its first argument.

        Raises:
            RuntimeError: If it fails.
        """
        made = ctypes.c_uint64()
        self.call(function, ctypes.byref(made), *arguments)
        return made.value

    def current_stream(self) -> int:
        """The stream that is current on the calling thread: unless computing, the default one."""
        return getattr(self._current, "stream", 0)

    @contextmanager
    def computing(self, stream: int) -> Iterator[None]:
        """Makes a stream, and the device's context, current on the calling thread."""
        before = self.current_stream()
        with self.entered():
            self._current.stream = stream
            try:
                yield
            finally:
                self._current.stream = before

    def compile(self, kernel_name: str, constants: Mapping[str, Any]) -> bytes:
        """The image of a kernel."""
        return image_of(kernel_name, constants)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Makes the device's context current on the calling thread."""
        self.call("cuCtxPushCurrent_v2", self.context)
        try:
            yield
        finally:
            self.driver.call("cuCtxPopCurrent_v2", None)  # fails if the device was lost meanwhile

    def make_stream(self, flags: int = 1) -> int:
        """A stream, non-blocking unless flags say otherwise, as a program of torch has some."""
        with self.entered():
            return self.make("cuStreamCreateWithPriority", flags, 0)

    def launch_fill(self, stream: int, tensor: torch.Tensor, value: float) -> None:
        """Enqueues a kernel on a stream that fills a tensor.

        Args:
            stream: Where.
            tensor: float32 or float64, contiguous; has elements.
            value: What each becomes.
        """
        _, bits, block = _FILLED[tensor.dtype]
        arguments = (
            tensor.data_ptr(),
            tensor.numel(),
            *struct.unpack("<q", struct.pack(bits, value)),
        )
        with self.entered():
            self.call(
                "cuLaunchKernel",
                *(self._fill(tensor.dtype), -(-tensor.numel() // block), 1, 1, 128, 1, 1, 0),
                *(stream, parameters(arguments), None),
            )

    def make_on(self, stream: int, elements: int, value: float, dtype: torch.dtype) -> torch.Tensor:
        """A tensor that has its values once a stream has filled it, and is NaN until then."""
        made = torch.full((elements,), torch.nan, dtype=dtype)
        self.launch_fill(stream, made, value)
        return made

    def function(self, kernel_name: str, constants: Mapping[str, Any]) -> int:
        """The handle of a kernel, from an image of its own."""
        with self.entered():
            module = self.make("cuModuleLoadData", self.compile(kernel_name, constants))
        return self.make("cuModuleGetFunction", module, kernel_name.encode())

    def _fill(self, dtype: torch.dtype) -> int:
        if dtype not in self._fills:
            storage, _, block = _FILLED[dtype]
            constants = {"STORAGE": storage, "BLOCK": block}
            self._fills[dtype] = self.function("fill_kernel", constants)
        return self._fills[dtype]


def parameters(arguments: Sequence[int]) -> Any:
    """A kernel's arguments as ``kernelParams`` has them: addresses of each and of no scratch."""
    values = (ctypes.c_int64 * (len(arguments) + 2))(*arguments)
    addresses = [ctypes.addressof(values) + 8 * i for i in range(len(values))]
    made = (ctypes.c_void_p * len(values))(*addresses)
    made.values = values  # type: ignore[attr-defined]  # which live as long
    return made
